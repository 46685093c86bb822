"""The shipped configs, found wherever the package is installed."""

from crossmae_det.model_zoo.zoo import get_config, get_config_file

__all__ = ["get_config", "get_config_file"]
