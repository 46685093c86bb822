"""How fast the loader of a detection config makes its images."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog

from crossmae_det.benchmark import Section
from crossmae_det.benchmark.loading import mapped_images_per_second, rate_text, single_threaded
from crossmae_det.benchmark.timing import Spread, interleaved
from crossmae_det.model_zoo.backbones import DETECTOR
from crossmae_det.model_zoo.zoo import get_config

# Images of a repeat: some seconds of large-scale jitter.
IMAGES = 64


def detection_loading(dataset: str, image_size: int, repeats: int) -> Iterator[Section]:
    """The rate of large-scale jitter over a detection data set, as a table; nothing of others.

    Args:
        dataset: a name that is registered in detectron2, or ``annotations.json:image_folder``;
            a folder of images has no annotations, and gives no table.
        image_size: side of the crops in pixels.
        repeats: how often the images are gone through.

    Raises:
        ValueError, OSError: as the data set's own loading, or an image cannot be decoded.
    """
    if dataset not in DatasetCatalog.list() and ".json:" not in dataset:
        return
    cfg = get_config(DETECTOR)
    cfg.dataloader.image_size = image_size
    cfg.dataloader.train.dataset.names = cfg.dataloader.test.dataset.names = dataset
    records: list[dict[str, Any]] = instantiate(cfg.dataloader.train.dataset)
    mapper = instantiate(cfg.dataloader.train.mapper)
    chosen = records[:: max(1, len(records) // IMAGES)][:IMAGES]
    with single_threaded():
        measure = partial(mapped_images_per_second, mapper, chosen)
        (rates,) = interleaved([measure], repeats, "large-scale jitter")
    spread = Spread.of(rates)
    yield Section(
        key="large_scale_jitter",
        title=f"Large-scale jitter to {image_size} x {image_size}: images/s of one worker",
        headers=["pipeline", "images/s (range)"],
        rows=[["crossmae_det", rate_text(spread)]],
        notes=[
            f"{len(chosen)} images of {dataset} with their masks: decode, flip, resize by 0.1 to 2,"
            f" crop; {repeats} repeats, one core; range: lowest to highest of them."
        ],
        values={
            "dataset": dataset,
            "images": len(chosen),
            "image_size": image_size,
            "images_per_second": asdict(spread) | {"repeats": rates},
        },
    )
