"""The shipped configs, found wherever the package is installed."""

from crossmae_det.model_zoo.zoo import find_config, get_config, get_config_file

__all__ = ["find_config", "get_config", "get_config_file"]
