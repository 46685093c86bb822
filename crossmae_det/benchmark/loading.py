"""How many images one core decodes and crops in a second, beside the usual pipeline.

How fast the loader of a detection config makes its images.
"""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Protocol

import cv2
import numpy as np
import PIL
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.benchmark import timer
from torchvision import transforms

from crossmae_det.benchmark.cases import DETECTOR
from crossmae_det.benchmark.measuring import Spread, interleaved, ratios
from crossmae_det.benchmark.report import Section
from crossmae_det.model_zoo.zoo import get_config

# Images of a repeat, spread evenly over the dataset: seconds for either pipeline.
IMAGES = 256


class EncodedImage(Protocol):
    """An image as it is stored."""

    def read(self) -> bytes: ...


class ImageSet(Protocol):
    """Images by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> EncodedImage: ...


Crop = Callable[[Any, Sequence[int]], Tensor]


class UsualCrops:
    """Random crops as MAE and most others make them: Pillow and torchvision, float32 at the end.

    Args:
        image_size: side of the crop in pixels.
    """

    def __init__(self, image_size: int):
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    image_size,
                    scale=(0.2, 1.0),
                    interpolation=transforms.InterpolationMode.BICUBIC,
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]
        )

    def __call__(self, image: EncodedImage, seed_sequence: Sequence[int]) -> Tensor:
        """A crop: (3, H, W) float32, normalized. It is drawn from torch, not from
        ``seed_sequence``."""
        with Image.open(io.BytesIO(image.read())) as opened:
            return self.transform(opened.convert("RGB"))


@dataclass(frozen=True)
class LoadingRates:
    """Images a second of one core, of each repeat, by two pipelines over the same images.

    Attributes:
        images: number of them in a repeat.
        ours: rates of the pipeline under test.
        usual: rates of the usual one.
    """

    images: int
    ours: list[float]
    usual: list[float]


def time_loading(dataset: ImageSet, ours: Crop, usual: Crop, repeats: int) -> LoadingRates:
    """Time two ways of making a crop of an encoded image, in turns, on one thread.

    Args:
        dataset: the images, at least one; 256 of them are taken, or all where there are fewer.
        ours: makes a crop from an image and numbers that decide the crop.
        usual: the same, to compare it with.
        repeats: how often each goes through the images.

    Raises:
        ValueError, OSError: ``repeats`` is not positive, or an image cannot be decoded.
    """
    indices = np.linspace(0, len(dataset) - 1, min(IMAGES, len(dataset))).round().astype(int)
    images = [dataset[index] for index in indices.tolist()]
    with single_threaded():
        measures = [
            partial(_images_per_second, crop, images, itertools.count()) for crop in (ours, usual)
        ]
        rates = interleaved(measures, repeats, "images")
    return LoadingRates(len(images), *rates)


def _images_per_second(crop: Crop, images: Sequence[EncodedImage], numbers: Iterator[int]) -> float:
    start = timer()
    for image in images:
        crop(image, (next(numbers),))
    return len(images) / (timer() - start)


def mapped_images_per_second(
    mapper: Callable[[dict[str, Any]], Any], records: Sequence[dict[str, Any]]
) -> float:
    """The rate of a mapper of detectron2 over records of a dataset."""
    start = timer()
    for record in records:
        mapper(record)
    return len(records) / (timer() - start)


@contextmanager
def single_threaded() -> Iterator[None]:
    """As in a worker of a loader, which has one core to itself."""
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


def loading_section(rates: LoadingRates, dataset: str, image_size: int) -> Section:
    """The rates as a table."""
    ours, usual = Spread.of(rates.ours), Spread.of(rates.usual)
    ratio = ratios(rates.ours, rates.usual)
    repeats = len(rates.ours)
    return Section(
        key="data",
        title=f"Decoding and cropping to {image_size} x {image_size}: images/s of one core",
        headers=["pipeline", "images/s (range)", "x usual (range)"],
        rows=[
            ["usual", rate_text(usual), "1"],
            ["crossmae_det", rate_text(ours), str(ratio)],
        ],
        notes=[
            f"{rates.images} images of {dataset}, read before; {repeats} repeats in turns;"
            " range: lowest to highest of them.",
            f"Usual: Pillow {PIL.__version__} and torchvision {version('torchvision')}'s"
            " RandomResizedCrop (0.2 to 1, bicubic), RandomHorizontalFlip, ToTensor, Normalize.",
            f"crossmae_det: OpenCV {cv2.__version__}, uint8; the model normalizes.",
        ],
        values={
            "dataset": dataset,
            "images": rates.images,
            "image_size": image_size,
            "usual_images_per_second": asdict(usual) | {"repeats": rates.usual},
            "crossmae_det_images_per_second": asdict(ours) | {"repeats": rates.ours},
            "ratio": asdict(ratio),
        },
    )


def rate_text(rate: Spread) -> str:
    """A rate for a table."""
    return f"{rate.median:.1f} ({rate.low:.1f} to {rate.high:.1f})"


# Images of a repeat: some seconds of large-scale jitter.
IMAGES = 64


def detection_loading(dataset: str, image_size: int, repeats: int) -> Iterator[Section]:
    """The rate of large-scale jitter over a detection dataset, as a table; nothing of others.

    Args:
        dataset: a name that is registered in detectron2, or ``annotations.json:image_folder``;
            a folder of images has no annotations, and gives no table.
        image_size: side of the crops in pixels.
        repeats: how often the images are gone through.

    Raises:
        ValueError, OSError: as the dataset's own loading, or an image cannot be decoded.
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
