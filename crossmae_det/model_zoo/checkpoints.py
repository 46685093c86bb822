"""Models of the shipped configs, with published weights where there are any."""

from collections.abc import Sequence

from detectron2.config import instantiate
from torch import nn

from crossmae_det.checkpoint import load
from crossmae_det.engine import resolve_device
from crossmae_det.model_zoo import records
from crossmae_det.model_zoo.zoo import get_config, get_config_file

WHOLE = "whole model"


def get_checkpoint_url(config_path: str) -> str:
    """The published checkpoint of a shipped config: what its recipe produced, and nothing else.

    Args:
        config_path: as in :func:`get_config_file`: "pretraining/crossmae_vit_b_800ep_pred75.py".

    Returns:
        The URL of a file that holds the whole model of the config.

    Raises:
        ValueError: there is no such config, or no checkpoint of it is published.
    """
    get_config_file(config_path)
    urls = _urls()
    if config_path not in urls:
        raise ValueError(
            f"no checkpoint of the whole model of '{config_path}' is published; there is one of"
            f" {', '.join(urls)}"
        )
    return urls[config_path]


def get(
    config_path: str,
    trained: bool = False,
    device: str | None = None,
    overrides: Sequence[str] = (),
) -> nn.Module:
    """The model of a shipped config.

    Args:
        config_path: as in :func:`get_config_file`.
        trained: load the published checkpoint of the config; else the weights are random.
        device: where the model goes; None for ``train.device`` of the config.
        overrides: as in :func:`get_config`.

    Returns:
        The model, in training mode as detectron2's.

    Raises:
        ValueError: there is no such config, device or key, or, with ``trained``, no checkpoint of
            it is published, or the overrides make another model than the checkpoint's.
        OSError: the checkpoint cannot be read.
    """
    url = get_checkpoint_url(config_path) if trained else None
    cfg = get_config(get_config_file(config_path), overrides)
    place = resolve_device(cfg.train.device if device is None else device)
    model = instantiate(cfg.model)
    if url is not None:
        load(model, url, whole=True)
    return model.to(place)


def _urls() -> dict[str, str]:
    """Config -> URL of the checkpoint of its whole model."""
    rows = records.checkpoints()
    return {row["config"]: row["url"] for row in rows if row["config"] and row["holds"] == WHOLE}
