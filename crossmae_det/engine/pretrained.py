"""The trained model of a config, for tools that look at what it does."""

import logging

from omegaconf import DictConfig
from torch import nn

from crossmae_det.checkpoint import load, read_checkpoint
from crossmae_det.engine.configuration import build_model, check_ranges, use_trained_classes
from crossmae_det.engine.setup import resolve_device

logger = logging.getLogger(__name__)


def load_pretrained(cfg: DictConfig, weights: str = "model") -> nn.Module:
    """Build the model of a config with all of its weights.

    Args:
        cfg: a config; ``train.init_checkpoint`` points to a file with the whole model,
            ``train.device`` says where it goes. ``dataloader.categories`` becomes the classes that
            the weights were trained for.
        weights: "model", or "ema" for the averaged weights of the run.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError, OSError: no checkpoint is named, or it is not one of the whole of this model.
    """
    if not cfg.train.init_checkpoint:
        raise ValueError("this needs weights: add train.init_checkpoint=PATH")
    check_ranges(cfg, training=False)
    device = resolve_device(cfg.train.device)
    checkpoint = cfg.train.init_checkpoint
    content = read_checkpoint(checkpoint)
    use_trained_classes(cfg, content)
    model = build_model(cfg).eval()
    logger.info("Weights: %s", checkpoint)
    logger.info(load(model, checkpoint, content=content, whole=True, weights=weights))
    return model.to(device)
