"""The trained model of a config, for tools that look at what it does."""

import logging

from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import nn

from crossmae_det.checkpoint import load
from crossmae_det.engine.setup import resolve_device

logger = logging.getLogger(__name__)


def load_pretrained(cfg: DictConfig, weights: str = "model") -> nn.Module:
    """Build the model of a config with all of its weights.

    Args:
        cfg: a config; ``train.init_checkpoint`` names a file with the whole model, ``train.device``
            where it goes.
        weights: "model", or "ema" for the averaged weights of the run.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError, OSError: no checkpoint is named, or it is not one of the whole of this model.
    """
    if not cfg.train.init_checkpoint:
        raise ValueError("this needs weights: add train.init_checkpoint=PATH")
    device = resolve_device(cfg.train.device)
    model = instantiate(cfg.model).eval()
    logger.info(load(model, cfg.train.init_checkpoint, whole=True, weights=weights))
    return model.to(device)
