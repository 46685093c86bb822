"""Overrides of a lazy config, ``path.key=value``, checked before anything runs.

Values follow hydra's grammar, except that text which hydra cannot parse needs no quotes. Unknown
keys are rejected with a suggestion, and values must have the type of the parameter that they set,
or of the value that they replace.
"""

import ast
import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from types import UnionType
from typing import Any, get_args

from detectron2.config.instantiate import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.nn.parallel import DistributedDataParallel

from crossmae_det.detection.formats import for_evaluation
from crossmae_det.detection.yaml_config import KEYS as YAML_KEYS

# Last parts of the names that other tools have for our keys.
SYNONYMS = {
    "optimizer.lr": "learning_rate base_lr max_lr lr0 blr",
    "optimizer.weight_decay": "wd decay l2",
    "optimizer.params.lr_decay": "layer_decay layer_wise_decay llrd layer_decay_rate",
    "dataloader.train.total_batch_size": "batch_size batch bs ims_per_batch batchsize",
    "dataloader.train.num_workers": "workers num_workers n_workers",
    "dataloader.image_size": "img_size imgsz image_size input_size resolution crop_size",
    "dataloader.train.dataset.names": "train_set train_data train_dataset trainset data dataset",
    "dataloader.test.dataset.names": "val_set val_data val_dataset test_set test_data valset",
    "dataloader.train.dataset.name": "train_set train_data train_dataset data_path data dataset",
    "model.backbone.net.size": "backbone arch architecture model_size model_name vit",
    "model.backbone.net.drop_path_rate": "drop_path droppath stochastic_depth",
    "model.encoder.size": "backbone arch architecture model_size model_name vit",
    "model.roi_heads.num_classes": "classes nc num_class",
    "train.epochs": "epoch num_epochs max_epochs n_epochs",
    "train.max_iter": "iterations iters max_iters num_iters steps max_steps num_steps",
    "train.output_dir": "output out_dir work_dir save_dir out log_dir",
    "train.init_checkpoint": "weights checkpoint pretrained ckpt load_from init finetune",
    "train.device": "gpu cuda",
    "train.seed": "random_seed",
    "train.amp.enabled": "fp16 bf16 mixed_precision precision half use_amp",
    "train.gradient_accumulation_steps": "accum_iter accum grad_accum accumulation accumulate",
    "optimizer.betas": "momentum beta1 beta2 adam_beta1 adam_beta2",
    "train.clip_grad.max_norm": "clip max_grad_norm clip_norm grad_clip gradient_clip_val",
    "train.ema.enabled": "model_ema use_ema",
    "train.early_stopping.patience": "patience early_stop",
    "train.eval_period": "eval_interval val_interval eval_freq eval_every",
    "train.checkpointer.period": "save_interval save_freq save_every save_period",
    "train.log_period": "log_interval print_freq log_every",
    "lr_multiplier.warmup_iters": "warmup warmup_steps warmup_epochs",
}

TYPES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    type(None): "null",
}

# Its keys go to DistributedDataParallel.
DDP_OPTIONS = "train.ddp"

# Numbers that may also be two: height and width.
PAIRS = re.compile(r"(size|pad)$")

# Text that may also be a list of several.
NAMES = re.compile(r"\.names$")

TEST_NAMES = "dataloader.test.dataset.names"

# Keys that null turns off or resets, although their value is not null.
NULLABLE = {
    TEST_NAMES,
    "train.output_dir",
    "train.init_checkpoint",
    "train.visualizer",
    "train.report",
    "train.epochs",
}


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Apply ``path.key=value`` overrides in place.

    A key must be one of the config, or a parameter of the function that it configures. A plus in
    front (``+path.key=value``) adds a key that the function takes as ``**kwargs`` or that another
    key refers to.

    Returns:
        ``cfg``.

    Raises:
        ValueError: an override that cannot be parsed or has no effect, an unknown key, or a value
            of the wrong type.
    """
    added, given = [], set()
    for index, override in enumerate(overrides):
        following = overrides[index + 1] if index + 1 < len(overrides) else "="
        name, raw, plus = _split(cfg, override, following)
        key = _Key(cfg, name)
        adds = plus and not key.exists  # +key of a key that exists sets it
        addable = adds and isinstance(key.parent, DictConfig)
        if not key.exists and not addable and key.last not in key.parameters:
            hint = _did_you_mean(cfg, name)
            if key.passes_on:
                hint += f"; +{name}={raw} passes on an argument that is not listed"
            raise ValueError(f"unknown config key '{name}'{hint}")
        value = _parse(name, raw)
        if value is None and not adds and not key.nullable:
            evaluates = name in ("dataloader.test", "dataloader.evaluator")
            hint = f"; to train without evaluation: {TEST_NAMES}=null"
            raise ValueError(f"{name}={raw}: must not be null{hint if evaluates else ''}")
        value = _convert(key, value, raw)
        if name == TEST_NAMES:
            value = _test_names(value)
        OmegaConf.update(cfg, name, value, merge=True, force_add=adds)
        given.add(name)
        if adds:
            added.append(name)
    for name in added:
        if not _is_read(cfg, name):
            raise ValueError(f"+{name}: nothing reads this key{_did_you_mean(cfg, name)}")
    if "train.epochs" in given and "train.max_iter" not in given:
        fixed = _Key(cfg, "train.max_iter").raw
        if isinstance(fixed, int):
            raise ValueError(
                f"train.epochs has no effect, because this config sets train.max_iter={fixed}:"
                " override train.max_iter instead"
            )
    return cfg


class _Key:
    """A key of a config: its value and the parameter that it sets.

    Attributes:
        parent: the dict or list that holds it; None where there is none.
        last: its name or index there.
        parameters: those of the function that ``parent`` configures.
        passes_on: whether that function takes ``**kwargs``.
    """

    def __init__(self, cfg: DictConfig, name: str):
        self.name = name
        path, _, self.last = name.rpartition(".")
        self.parent = _select(cfg, path) if path else cfg
        self.parameters, self.passes_on = _signature(self.parent)

    @cached_property
    def exists(self) -> bool:
        if isinstance(self.parent, ListConfig):
            return self.last.isdigit() and int(self.last) < len(self.parent)
        # `in` would resolve the value.
        return isinstance(self.parent, DictConfig) and self.last in list(self.parent)

    @cached_property
    def raw(self) -> Any:
        """The value with its references unresolved; None without one."""
        if not self.exists:
            return None
        index = int(self.last) if isinstance(self.parent, ListConfig) else self.last
        return OmegaConf.to_container(self.parent, resolve=False)[index]  # type: ignore[index]

    @cached_property
    def value(self) -> Any:
        """The resolved value; None without one, or if it depends on the data."""
        if self.raw is None or (isinstance(self.raw, str) and "${dataset." in self.raw):
            return None
        return _select(self.parent, self.last)

    @cached_property
    def nullable(self) -> bool:
        """Whether the value may be null: it is already, or the parameter allows it."""
        if self.name in NULLABLE or (self.exists and self.raw is None):
            return True
        if isinstance(self.value, DictConfig) and "_target_" not in self.value:
            return False  # a group of keys, such as train.ema
        if not isinstance(self.parent, DictConfig) or "_target_" not in self.parent:
            return False  # read by the engine
        parameter = self.parameters.get(self.last)
        if parameter is None:
            return True
        return parameter.default is None or type(None) in get_args(parameter.annotation)

    @cached_property
    def types(self) -> set[type]:
        """The types that the value may have; empty for any type, and for groups of keys."""
        if (parameter := self.parameters.get(self.last)) is not None:
            union = isinstance(parameter.annotation, UnionType)
            types = set(get_args(parameter.annotation)) if union else {parameter.annotation}
            if types <= TYPES.keys():
                return types
        if isinstance(self.value, bool):
            return {bool}
        if isinstance(self.value, int | float):
            return {float, list} if PAIRS.search(self.name) else {float}
        if isinstance(self.value, str | ListConfig):
            own = str if isinstance(self.value, str) else list
            return {str, list} if NAMES.search(self.name) else {own}
        return set()


def _select(cfg: Any, name: str) -> Any:
    """The value of a key; None if there is none, or it follows from data that are absent."""
    try:
        return OmegaConf.select(cfg, name, throw_on_resolution_failure=False)
    except (OmegaConfBaseException, ValueError, OSError):
        return None


def _signature(node: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters of the function that a LazyCall calls, and whether it takes ``**kwargs``.

    A class with ``**kwargs`` also takes the parameters of the classes that it is derived from.
    """
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if target is None:
        return {}, False
    function: Any = locate(target) if isinstance(target, str) else target
    classes = function.__mro__ if inspect.isclass(function) else ()
    found: dict[str, inspect.Parameter] = {}
    for callee in [vars(c)["__init__"] for c in classes if "__init__" in vars(c)] or [function]:
        parameters = inspect.signature(callee).parameters.values()
        kinds = [parameter.kind for parameter in parameters]
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        found = {p.name: p for p in named if p.name != "self"} | found
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return found, False
    return found, True


def _split(cfg: DictConfig, override: str, following: str) -> tuple[str, str, bool]:
    """The key and the text of the value of an override, and whether it starts with a plus.

    Args:
        following: the next override, which may be the value of this one.

    Raises:
        ValueError: not an override of a lazy config.
    """
    name, equals, raw = override.partition("=")
    bare = re.sub(r"\[(\d+)\]", r".\1", name.lstrip("+~").strip())
    if bare in YAML_KEYS:
        raise ValueError(f"{bare} is a key of yaml configs: write {YAML_KEYS[bare]}=VALUE")
    if name.startswith("~"):
        raise ValueError(f"override '{override}': a key cannot be deleted: set it to null")
    if not equals and _Key(cfg, bare).exists:
        value = "VALUE" if "=" in following else following
        raise ValueError(f"override '{override}' has no value: write {bare}={value}")
    if not equals:
        raise ValueError(
            f"'{override}' is neither an option nor an override: write key=value, in quotes if it"
            " has spaces"
        )
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", bare):
        raise ValueError(f"override '{override}': '{bare}' is not a key: write path.key=value")
    return bare, raw.strip(), name.startswith("+")


def _parse(name: str, raw: str) -> Any:
    """Parse a value by hydra's grammar, except that ``a,b`` is text.

    Raises:
        ValueError: a list or dict that cannot be parsed.
    """
    try:
        override = OverridesParser.create().parse_override(f"key={raw}")
        return raw if override.is_sweep_override() else override.value()
    except HydraException as error:
        if not raw.startswith(("[", "{", "(", "'", '"')):
            return raw
        try:
            value = ast.literal_eval(raw)
        except (ValueError, SyntaxError):
            raise ValueError(
                f"{name}={raw}: cannot parse the value ({str(error).splitlines()[0]}): put the text"
                " of every element in quotes"
            ) from error
        return list(value) if isinstance(value, tuple) else value


def _convert(key: _Key, value: Any, raw: str) -> Any:
    """The value as one of the types of the key.

    Raises:
        ValueError: it has another type, or ``_target_`` names nothing.
    """
    if value is None or (isinstance(value, str) and "${" in value):
        return value
    if key.last == "_target_":
        try:
            locate(value)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{key.name}={raw}: there is no such class or function") from error
        return value
    if isinstance(key.value, DictConfig) and not isinstance(value, dict):
        names = [str(name) for name in key.value if name != "_target_"]
        if not names:
            return value
        raise ValueError(
            f"{key.name}={raw}: set its keys instead, such as {key.name}.{names[0]}"
            f" ({', '.join(names)})"
        )
    types = key.types
    whole = isinstance(value, float) and value.is_integer()
    fits = {type(value)} | ({float} if type(value) is int else {int} if whole else set())
    if not types or types & fits:
        return value
    if bool in types and type(value) is int and value in (0, 1):
        return bool(value)
    if str in types and not isinstance(value, list | dict):
        return raw
    wanted = " or ".join(text for kind, text in TYPES.items() if kind in types)
    shown = str(key.value).replace(" ", "")
    example = "" if key.value is None else f", as in {key.name}={shown}"
    raise ValueError(f"{key.name}={raw}: must be {wanted}{example}")


def _test_names(value: Any) -> Any:
    """The test set; of a dataset with splits that names none, its validation split."""
    if isinstance(value, list):
        return [for_evaluation(name) for name in value]
    return for_evaluation(value) if isinstance(value, str) else value


def _is_read(cfg: DictConfig, name: str) -> bool:
    """Whether an added key is passed to a function, or another key refers to it."""
    key = _Key(cfg, name)
    if name.rpartition(".")[0] == DDP_OPTIONS:
        return key.last in inspect.signature(DistributedDataParallel).parameters
    if key.passes_on or key.last in key.parameters:
        return True
    references = re.findall(r"\$\{([^}]*)", OmegaConf.to_yaml(cfg))
    return any(re.search(rf"(^|[.:,]){re.escape(key.last)}($|[.,\[])", text) for text in references)


def _did_you_mean(cfg: DictConfig, name: str) -> str:
    """The keys that were probably meant, as the end of a sentence; "" without one."""
    close = _similar_keys(cfg, name)
    return f"; did you mean {' or '.join(repr(key) for key in close)}?" if close else ""


def _similar_keys(cfg: DictConfig, name: str) -> list[str]:
    """At most two keys: by meaning, among the keys beside it, of that name, of a similar name."""
    keys = sorted(set(_keys(cfg)) - {name}, key=lambda key: (key.count("."), key))
    parent, _, last = name.rpartition(".")
    word = _letters(last)
    for key, synonyms in SYNONYMS.items():
        if key in keys and word in _letters(synonyms).split():
            return [key]
    beside = {_letters(key): key for key in keys if key.rpartition(".")[0] == parent}
    if close := difflib.get_close_matches(word, beside, n=1, cutoff=0.65):
        return [beside[close[0]]]
    if same := [key for key in keys if key.rpartition(".")[2] == last]:
        return difflib.get_close_matches(name, same, n=2, cutoff=0)
    anywhere = {_letters(key): key for key in reversed(keys)}
    close = difflib.get_close_matches(word, anywhere, n=1, cutoff=0.75)
    return [anywhere[word] for word in close]


def _letters(name: str) -> str:
    """The last part of a key, without case, hyphens and underscores."""
    return re.sub(r"[-_]", "", name.rpartition(".")[2].lower())


def _keys(node: DictConfig | ListConfig, prefix: str = "") -> Iterator[str]:
    """Every key that an override can name, without those below references."""
    names: Sequence[Any] = list(node) if isinstance(node, DictConfig) else range(len(node))
    for name in names:
        if str(name).startswith("_"):
            continue
        yield f"{prefix}{name}"
        if not OmegaConf.is_interpolation(node, name) and OmegaConf.is_config(node[name]):
            yield from _keys(node[name], f"{prefix}{name}.")
    yield from (f"{prefix}{name}" for name in _signature(node)[0] if name not in names)
