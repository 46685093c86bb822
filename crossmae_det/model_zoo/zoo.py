"""Finding, reading and overriding configs, lazy or yaml."""

import difflib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import LazyConfig
from detectron2.config.instantiate import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from crossmae_det.model_zoo import resolvers  # noqa: F401  (registers the rules of the configs)
from crossmae_det.model_zoo.yaml import read_yaml, to_lazy

PACKAGE_CONFIGS = Path(__file__).parent / "configs"
CHECKOUT_CONFIGS = Path(__file__).parents[2] / "configs"
# Parts that configs share; they cannot be run.
SHARED = "common"


def _folder() -> Path:
    return PACKAGE_CONFIGS if PACKAGE_CONFIGS.is_dir() else CHECKOUT_CONFIGS


def _names() -> list[str]:
    """Every file of the configs' folder that is a config or a part of one."""
    folder = _folder()
    files = (path for path in folder.rglob("*") if path.suffix in (".py", ".yaml"))
    return sorted(path.relative_to(folder).as_posix() for path in files)


def list_configs() -> list[str]:
    """The names of the shipped configs that can be run, sorted.

    Returns:
        Names that :func:`get_config` and ``--config-file`` take: "coco/...", "demo/...",
        "pretraining/...".
    """
    return [name for name in _names() if not name.startswith(f"{SHARED}/")]


def get_config_file(config_path: str) -> str:
    """The path of a shipped config.

    Args:
        config_path: relative to the configs' folder: "coco/mask_rcnn_crossmae_vit_b_100ep.py".

    Raises:
        ValueError: there is no such config.
    """
    path = _folder() / config_path
    if not path.is_file():
        hint = _did_you_mean(config_path, _names())
        raise ValueError(f"there is no config '{config_path}'{hint}")
    return str(path)


def _find_config(config_file: str) -> str:
    """The path of a config file: the file itself, or the shipped config of that name.

    Raises:
        FileNotFoundError: there is neither.
    """
    if Path(config_file).is_file():
        return config_file
    try:
        return get_config_file(config_file)
    except ValueError as error:
        raise FileNotFoundError(f"no config file '{config_file}', and {error}") from None


def get_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Read a config with its five keys and apply overrides.

    Args:
        config_file: a path, or the name of a shipped config. A yaml file with detectron2's keys is
            turned into the lazy config that it stands for.
        overrides: ``path.key=value`` for lazy configs, ``PATH.KEY VALUE`` pairs for yaml ones.

    Returns:
        The unresolved config: values that follow from others still do.

    Raises:
        FileNotFoundError, ValueError: no such file, not a config, or an override of an unknown key.
    """
    path = _find_config(config_file)
    if path.endswith(".py"):
        return apply_overrides(LazyConfig.load(path), overrides)
    cfg = read_yaml(path, overrides)
    # A run's own config.yaml is a lazy config in yaml's clothes.
    return (
        apply_overrides(LazyConfig.load(path), overrides)
        if cfg is None
        else to_lazy(cfg, get_config)
    )


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Apply ``path.key=value`` overrides in hydra's grammar, in place.

    Unlike detectron2's, it takes no key that the config and the called function do not know; a plus
    in front (``+path.key=value``) adds one nevertheless.

    Returns:
        ``cfg``.

    Raises:
        ValueError: an override that cannot be parsed, or an unknown key.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ValueError(f"cannot parse the overrides {list(overrides)}: {error}") from error
    for override in parsed:
        _apply(cfg, override)
    return cfg


def _apply(cfg: DictConfig, override: Override) -> None:
    key = override.key_or_group
    *parents, last = key.split(".")
    if override.is_delete():
        raise ValueError(
            f"override '{override.input_line}': a key cannot be deleted; set it to null"
        )
    node: object = cfg
    for depth, part in enumerate(parents):
        known = list(node) if isinstance(node, DictConfig) else []
        node = OmegaConf.select(
            cfg, ".".join(parents[: depth + 1]), throw_on_resolution_failure=False
        )
        if not OmegaConf.is_config(node):
            raise ValueError(
                f"unknown config key '{key}': there is no '{part}'{_did_you_mean(part, known)}"
            )
    if isinstance(node, DictConfig) and not override.is_add():
        known = [str(name) for name in node] + _parameters(node)
        if last not in known:
            hint = _did_you_mean(last, known) or f"; +{key}=... adds a key that is not listed"
            raise ValueError(f"unknown config key '{key}'{hint}")
    OmegaConf.update(cfg, key, override.value(), merge=True)


def _parameters(node: DictConfig) -> list[str]:
    """Names of the arguments that a LazyCall's function takes."""
    target = node.get("_target_")
    if target is None:
        return []
    function: Callable = locate(target) if isinstance(target, str) else target
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
