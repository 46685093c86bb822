"""The shipped configs and the published weights, as in ``detectron2.model_zoo``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossmae_det.model_zoo.zoo import get, get_checkpoint_url, get_config, get_config_file
    from crossmae_det.model_zoo.zoo import list_configs as list

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file", "list"]


def __getattr__(name: str) -> Any:
    # On first use: the functions import the engine, which `import crossmae_det` does not need.
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from crossmae_det.model_zoo import zoo

    return getattr(zoo, "list_configs" if name == "list" else name)
