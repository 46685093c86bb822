"""The keys that an override of a config can name, and which of them was meant.

Overrides of a config from the command line: ``path.key=value``, checked before anything runs.

The grammar is hydra's, with what people type besides: a value that hydra cannot parse is text, so
paths need no quotes. A key that nothing reads, or a value of another kind than the config's own, is
an error that names the nearest right one.
"""

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from types import UnionType
from typing import Any, get_args

from detectron2.config.instantiate import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.nn.parallel import DistributedDataParallel

from crossmae_det.detection.yaml_config import KEYS as YAML_KEYS

# What other tools call the keys of ours, by the last part of the name.
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


def did_you_mean(cfg: DictConfig, key: str) -> str:
    """A hint at the key that was probably meant, as the end of a sentence; "" without one."""
    close = _similar_keys(cfg, key)
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""


def parameters(node: DictConfig) -> tuple[list[str], bool]:
    """Names of the arguments that a LazyCall's function takes, and whether it takes any others."""
    target = node.get("_target_")
    if target is None:
        return [], False
    function: Callable = locate(target) if isinstance(target, str) else target
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return names, any(p.kind == p.VAR_KEYWORD for p in parameters)


def _keys(node: DictConfig | ListConfig, prefix: str = "") -> Iterator[str]:
    """Every key that an override can name, without those of LazyCalls that references share."""
    names: Sequence[Any] = list(node) if isinstance(node, DictConfig) else range(len(node))
    for name in names:
        if str(name).startswith("_"):
            continue
        key = f"{prefix}{name}"
        yield key
        if not OmegaConf.is_interpolation(node, name) and OmegaConf.is_config(node[name]):
            yield from _keys(node[name], f"{key}.")
    if isinstance(node, DictConfig):
        yield from (f"{prefix}{name}" for name in parameters(node)[0] if name not in node)


def _letters(name: str) -> str:
    return re.sub(r"[-_]", "", name.lower())


def _similar_keys(cfg: DictConfig, key: str) -> list[str]:
    """At most two keys that may have been meant: by meaning, by name, by spelling."""
    keys = sorted(set(_keys(cfg)) - {key}, key=lambda k: (k.count("."), k))
    parent, _, last = key.rpartition(".")
    word = _letters(last)
    by_meaning = [k for k, names in SYNONYMS.items() if word in _letters(names).split()]
    if by_meaning := [k for k in by_meaning if k in keys]:
        return by_meaning[:1]
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == parent}
    if same := [k for name, k in siblings.items() if _letters(name) == word]:
        return same[:1]
    if close := difflib.get_close_matches(last, siblings, n=1, cutoff=0.6):
        return [siblings[close[0]]]
    same_name = [k for k in keys if k.rpartition(".")[2] == last]
    if same_name:
        return difflib.get_close_matches(key, same_name, n=2, cutoff=0.0)
    if parent not in keys and (close := difflib.get_close_matches(key, keys, n=1, cutoff=0.75)):
        return close
    words = {k.rpartition(".")[2]: k for k in reversed(keys)}
    if close := difflib.get_close_matches(last, words, n=1, cutoff=0.75):
        return [words[close[0]]]
    return []


KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
}

# Options of this dict go to DistributedDataParallel as they are.
DDP_OPTIONS = "train.ddp"

# A number may be given as two, height and width, and one name as several.
PAIRS = re.compile(r"(size|pad)$")

NAMES = "names"

# Null stands for something here: no evaluation, the default folder, random weights, no drawing, and
# iterations that do not follow from epochs.
NULLABLE = frozenset(
    (
        "dataloader.test.dataset.names",
        "train.output_dir",
        "train.init_checkpoint",
        "train.visualizer",
        "train.epochs",
    )
)


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Apply ``path.key=value`` overrides, in place.

    A key must be one that the config or the called function has; a plus in front
    (``+path.key=value``) adds one that is passed on (``**kwargs``) or that another key refers to.

    Returns:
        ``cfg``.

    Raises:
        ValueError: an override that cannot be parsed, an unknown key, a value of another kind than
            the key's, or an override without effect; one line with the remedy.
    """
    added = []
    given = set()
    for override in overrides:
        key, raw, adds = _split(cfg, override, overrides)
        adds = adds and _select(cfg, key) is _MISSING  # +key of a key that is there sets it
        if adds:
            added.append(key)
        _check_key(cfg, key, adds)
        value = _parse(key, raw, _current(cfg, key))
        if value is None and not adds and not _takes_none(cfg, key):
            raise ValueError(f"{key}={raw}: must not be null; it is needed{_way_out(key)}")
        _check_type(cfg, key, raw, value)
        OmegaConf.update(cfg, key, value, merge=True, force_add=adds)
        given.add(key)
    for key in added:
        if not _is_read(cfg, key):
            raise ValueError(f"+{key}: nothing reads this key{did_you_mean(cfg, key)}")
    _check_effects(cfg, given)
    return cfg


def _split(cfg: DictConfig, override: str, overrides: Sequence[str]) -> tuple[str, str, bool]:
    """The key, the text of the value, and whether the key is to be added."""
    key, equals, raw = override.partition("=")
    adds = key.startswith("+")
    bare = key.lstrip("+~").strip()
    if bare in YAML_KEYS:
        raise ValueError(
            f"{bare} is a key of yaml configs; in a lazy config write {YAML_KEYS[bare]}=VALUE"
        )
    if key.startswith("~"):
        raise ValueError(f"override '{override}': a key cannot be deleted; set it to null")
    if not equals:
        if _select(cfg, bare) is not _MISSING:
            position = list(overrides).index(override)
            following = overrides[position + 1 : position + 2]
            value = following[0] if following and "=" not in following[0] else "VALUE"
            raise ValueError(
                f"override '{override}' has no value; write {bare}={value} without spaces"
            )
        raise ValueError(
            f"'{override}' is neither an option nor an override; overrides are key=value, and a "
            "value with spaces needs quotes around the whole override"
        )
    bare = re.sub(r"\[(\d+)\]", r".\1", bare)
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", bare):
        raise ValueError(f"override '{override}': '{bare}' is no key; overrides are path.key=value")
    return bare, raw.strip(), adds


_MISSING = object()


def _select(cfg: DictConfig, key: str) -> Any:
    """The unresolved content of a key, `_MISSING` where there is none."""
    node: Any = cfg
    for part in key.split("."):
        if isinstance(node, str) and node.startswith("${"):
            return _MISSING
        if isinstance(node, ListConfig):
            if not part.isdigit() or int(part) >= len(node):
                return _MISSING
            index: Any = int(part)
        elif isinstance(node, DictConfig):
            index = next((name for name in node if str(name) == part), _MISSING)
            if index is _MISSING:
                return _MISSING
        else:
            return _MISSING
        child = node._get_node(index)
        raw = child._value()
        if OmegaConf.is_interpolation(node, index) and not _reads_data(raw):
            # Keys below a reference are those of what it refers to.
            target = OmegaConf.select(node, str(part), throw_on_resolution_failure=False)
            node = target if OmegaConf.is_config(target) else raw
        else:
            node = child if OmegaConf.is_config(child) and raw is not None else raw
    return node


def _reads_data(raw: Any) -> bool:
    return isinstance(raw, str) and "${dataset." in raw


def _current(cfg: DictConfig, key: str) -> Any:
    """The value of a key; None where it is unknown, as of those that follow from the data."""
    raw = _select(cfg, key)
    if raw is _MISSING:
        return None
    if isinstance(raw, str) and "${" in raw:
        if _reads_data(raw):
            return None
        try:
            return OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        except (ValueError, OSError):  # it depends on data that are not there
            return None
    return raw


def _parse(key: str, raw: str, current: Any) -> Any:
    """The value that a text stands for, given the value that it replaces.

    Raises:
        ValueError: it cannot be parsed, or is of another kind.
    """
    value: Any = raw
    try:
        override = OverridesParser.create().parse_override(f"key={raw}")
        if not override.is_sweep_override():  # a,b is text or a list without its brackets
            value = override.value()
    except HydraException as error:
        if raw[:1] in "[{'\"(":
            try:
                value = ast.literal_eval(raw)
            except (ValueError, SyntaxError):
                raise ValueError(
                    f"{key}={raw}: cannot parse the value ({_first_line(error)}); put the text of "
                    f"every element in quotes"
                ) from error
            value = list(value) if isinstance(value, tuple) else value
    wanted = _mismatch(key, value, raw, current)
    if isinstance(wanted, str):
        raise ValueError(f"{key}={raw}: must be {wanted}")
    return value if wanted is None else wanted[0]


def _mismatch(key: str, value: Any, raw: str, current: Any) -> str | tuple[Any] | None:
    """None where a value is of the kind of the current one; the value meant, in a tuple; or what
    is wanted, in words."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    reference = isinstance(value, str) and value.startswith("${")
    if value is None or current is None or reference:
        return None
    if isinstance(current, bool):
        if isinstance(value, int) and value in (0, 1):
            return (bool(value),)
        return f"True or False, not {raw}"
    if isinstance(current, int | float):
        pair = isinstance(value, list) and PAIRS.search(key)
        return None if is_number or pair else f"a number, as in {key}={current}"
    if isinstance(current, str):
        if isinstance(value, list | dict):
            if key.endswith(f".{NAMES}") and isinstance(value, list):
                return None
            return f"one text, not a {'list' if isinstance(value, list) else 'dict'}"
        return None if isinstance(value, str) else (raw,)
    if OmegaConf.is_list(current) and not isinstance(value, list):
        if key.endswith(f".{NAMES}") and isinstance(value, str):
            return None
        return f"a list, as in {key}={_text(current)}"
    if OmegaConf.is_dict(current) and not isinstance(value, dict):
        names = [str(name) for name in current if name != "_target_"]
        if not names:
            return None
        null = "; or null" if "_target_" in current else ""
        return f"set by its keys, such as {key}.{names[0]} ({', '.join(names)}){null}"
    return None


def _text(value: Any) -> str:
    return str(list(value)).replace(" ", "")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _check_key(cfg: DictConfig, key: str, adds: bool) -> None:
    """Reject a key that is not there.

    Raises:
        ValueError: with the nearest keys.
    """
    *parents, last = key.split(".")
    parent = _select(cfg, ".".join(parents)) if parents else cfg
    if not OmegaConf.is_config(parent):
        found = next(
            (
                n
                for n in range(len(parents))
                if _select(cfg, ".".join(parents[: n + 1])) is _MISSING
            ),
            len(parents) - 1,
        )
        raise ValueError(
            f"unknown config key '{key}': there is no '{'.'.join(parents[: found + 1])}'"
            f"{did_you_mean(cfg, key)}"
        )
    if isinstance(parent, ListConfig):
        if not last.isdigit() or int(last) >= len(parent):
            raise ValueError(f"unknown config key '{key}': the list has {len(parent)} elements")
    elif not adds and last not in [str(name) for name in parent] + parameters(parent)[0]:
        hint = did_you_mean(cfg, key)
        if parameters(parent)[1]:
            hint += f"; +{key}=... passes on an argument that is not listed"
        raise ValueError(f"unknown config key '{key}'{hint}")


def _is_read(cfg: DictConfig, key: str) -> bool:
    """Whether an added key goes to a function, or another key refers to it."""
    parent, _, last = key.rpartition(".")
    node = _select(cfg, parent) if parent else cfg
    if parent == DDP_OPTIONS:
        return last in inspect.signature(DistributedDataParallel).parameters
    if isinstance(node, DictConfig):
        names, passes_on = parameters(node)
        if passes_on or last in names:
            return True
    references = re.findall(r"\$\{([^}]*)", OmegaConf.to_yaml(cfg))
    return any(re.search(rf"(^|[.:,]){re.escape(last)}($|[.,\[])", text) for text in references)


def _check_effects(cfg: DictConfig, given: set[str]) -> None:
    """Reject an override that another literal value makes void.

    Raises:
        ValueError: ``train.epochs`` of a run whose iterations are fixed.
    """
    if "train.epochs" in given and "train.max_iter" not in given:
        fixed = _select(cfg, "train.max_iter")
        if isinstance(fixed, int):
            raise ValueError(
                f"train.epochs has no effect: this config fixes train.max_iter={fixed}; override "
                "train.max_iter instead"
            )


def _way_out(key: str) -> str:
    if key in ("dataloader.test", "dataloader.evaluator"):
        return "; dataloader.test.dataset.names=null trains without evaluation"
    return ""


def _takes_none(cfg: DictConfig, key: str) -> bool:
    """Whether null can replace the value of a key.

    An argument of a function may be null where its signature tells so; a group of keys, such as
    ``train.ema``, is needed as it is, and so is what the engine itself reads, but :data:`NULLABLE`.
    """
    if key in NULLABLE or _select(cfg, key) is None:
        return True
    current = _current(cfg, key)
    if isinstance(current, DictConfig) and "_target_" not in current:
        return False
    parent, _, last = key.rpartition(".")
    node = _select(cfg, parent) if parent else cfg
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return False
    parameter = _parameter(cfg, key)
    if parameter is None:
        return True
    return parameter.default is None or type(None) in get_args(parameter.annotation)


def _parameter(cfg: DictConfig, key: str) -> inspect.Parameter | None:
    """The parameter that a key is handed to, as far as signatures tell."""
    parent, _, last = key.rpartition(".")
    node = _select(cfg, parent) if parent else cfg
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if target is None:
        return None
    function: Any = locate(target) if isinstance(target, str) else target
    # A class may hand on what it does not name to the classes that it is derived from.
    functions = (
        [vars(c).get("__init__") for c in function.__mro__]
        if inspect.isclass(function)
        else [function]
    )
    for candidate in filter(inspect.isfunction, functions):
        parameter = inspect.signature(candidate).parameters.get(last)
        if parameter is not None:
            return parameter
    return None


def _check_type(cfg: DictConfig, key: str, raw: str, value: Any) -> None:
    """Reject a value for a parameter that is annotated as a plain number or text.

    It is needed where the config's own value is null, and so tells nothing.

    Raises:
        ValueError: with the kind that is wanted; or ``_target_`` names nothing.
    """
    if key.rpartition(".")[2] == "_target_":
        try:
            locate(value)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{key}={raw}: there is no such class or function") from error
        return
    parameter = _parameter(cfg, key)
    if parameter is None or (isinstance(value, str) and "${" in value):
        return
    annotation = parameter.annotation
    kinds = set(get_args(annotation)) if isinstance(annotation, UnionType) else {annotation}
    if not kinds <= KINDS.keys():
        return
    whole = isinstance(value, float) and value.is_integer()
    if type(value) in kinds or (float in kinds and type(value) is int) or (int in kinds and whole):
        return
    names = " or ".join(KINDS[kind] for kind in KINDS if kind in kinds)
    raise ValueError(f"{key}={raw}: must be {names}")
