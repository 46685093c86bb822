"""CrossMAE pretraining and plain-ViT backbones for detectron2.

Where detectron2 is installed, importing the package registers its backbones and built-in dataset
in detectron2 and the resolvers of its configs in OmegaConf. Without detectron2, ``utils``,
``layers``, ``modeling``, ``data``, ``checkpoint``, ``pretraining`` and ``classification`` still
import. Subpackages are attributes: ``crossmae_det.checkpoint.load(...)`` imports them on first use.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def register() -> None:
    """Register everything; importing the package does so, except in the command line."""
    from crossmae_det.utils.messages import ignore_library_warnings

    ignore_library_warnings()
    if find_spec("detectron2") is not None:
        from crossmae_det import detection, model_zoo  # noqa: F401
        from crossmae_det.model_zoo import resolvers  # noqa: F401


def __getattr__(name: str) -> Any:
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return import_module(f"{__name__}.{name}")


def _is_command_line() -> bool:
    """Whether this process is ``crossmae-det`` or ``python -m crossmae_det``.

    It calls :func:`register` when a command needs it: ``--help`` then takes no seconds, and
    ``doctor`` runs where a library is missing or broken.
    """
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # until Python has found the module
        return "crossmae_det" in sys.orig_argv
    return Path(program).stem == "crossmae-det"


if not _is_command_line():
    register()
