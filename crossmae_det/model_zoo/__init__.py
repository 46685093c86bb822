"""The shipped configs and the published weights, as in ``detectron2.model_zoo``."""

from crossmae_det.model_zoo.zoo import (
    get,
    get_checkpoint_url,
    get_config,
    get_config_file,
    usage_examples,
)
from crossmae_det.model_zoo.zoo import list_configs as list

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file", "list", "usage_examples"]
