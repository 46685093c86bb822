"""Loading speed of one core: random crops for pretraining, large-scale jitter for detection."""

import io
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import cv2
import numpy as np
import PIL
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, DatasetMapper
from PIL import Image, ImageOps
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.benchmark import timer
from torchvision import transforms

from crossmae_det.benchmark.cases import DETECTOR
from crossmae_det.benchmark.measuring import Spread, interleaved, ratios
from crossmae_det.benchmark.report import Column, Section
from crossmae_det.detection import DetectionMapper
from crossmae_det.engine import keep_freed_memory
from crossmae_det.model_zoo.zoo import get_config
from crossmae_det.pretraining.crops import RandomCrops, random_crop
from crossmae_det.pretraining.image_datasets import ImageFiles, ShardedImages, StoredImage

# Images per repeat, spread evenly over the dataset; they take some seconds.
CROP_IMAGES = 256
JITTER_IMAGES = 96

Images = ImageFiles | ShardedImages

# Makes a crop of an image; the numbers decide which.
Crop = Callable[[StoredImage, Sequence[int]], Tensor]


class TorchvisionCrops:
    """Random crops as in MAE: Pillow and torchvision, float32 at the end.

    Args:
        image_size: side of the crop in pixels.
    """

    def __init__(self, image_size: int):
        bicubic = transforms.InterpolationMode.BICUBIC
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(image_size, scale=(0.2, 1), interpolation=bicubic),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]
        )

    def __call__(self, image: StoredImage, seed_sequence: Sequence[int]) -> Tensor:
        """A crop: (3, H, W) float32, normalized. torch's generator draws it, not
        ``seed_sequence``."""
        with Image.open(io.BytesIO(image.read())) as opened:
            return self.transform(opened.convert("RGB"))


def exact_crop(crops: RandomCrops, image: StoredImage, seed_sequence: Sequence[int]) -> np.ndarray:
    """The crop that ``seed_sequence`` decides, by Pillow: (3, H, W) uint8 in RGB."""
    rng = random.Random(" ".join(map(str, seed_sequence)))
    with Image.open(io.BytesIO(image.read())) as opened:
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    top, left, height, width = random_crop(upright.height, upright.width, crops.scale, rng)
    part = upright.crop((left, top, left + width, top + height))
    part = part.resize((crops.width, crops.height), Image.Resampling.BICUBIC)
    if crops.flip and rng.random() < 0.5:
        part = ImageOps.mirror(part)
    return np.asarray(part).transpose(2, 0, 1)


def crop_loading(dataset: str, images: Images, image_size: int, repeats: int) -> Section:
    """A table of the rates of this project's crops and of torchvision's.

    Args:
        dataset: its name, for the table.
        images: at least one; at most 256 are used.
        image_size: side of the crops in pixels.
        repeats: number of passes of each pipeline over the images.

    Raises:
        ValueError, OSError: ``repeats`` is not positive, or an image cannot be decoded.
    """
    random_crops = RandomCrops(image_size)
    crops: list[Crop] = [random_crops, TorchvisionCrops(image_size)]
    ours, usual = time_crops(images, crops, repeats)
    similar = Spread.of(
        [
            psnr(random_crops(image, (0,)).numpy(), exact_crop(random_crops, image, (0,)))
            for image in _chosen(images)
        ]
    )
    return Section(
        key="data",
        title=f"Decoding and cropping to {image_size} x {image_size}: images/s of one core",
        columns=[
            Column("pipeline", "pipeline"),
            Column("images/s (range)", "images_per_second", ".1f"),
            Column("x torchvision (range)", "ratio"),
            Column("PSNR, dB (range)", "psnr", ".1f"),
        ],
        records=[
            {"pipeline": "torchvision", "images_per_second": Spread.of(usual)},
            {
                "pipeline": "crossmae_det",
                "images_per_second": Spread.of(ours),
                "ratio": ratios(ours, usual),
                "psnr": similar,
            },
        ],
        notes=[
            f"{min(CROP_IMAGES, len(images))} images of {dataset}, read before; {repeats}"
            " interleaved repeats; range: lowest to highest.",
            f"torchvision: Pillow {PIL.__version__} and torchvision {version('torchvision')}'s"
            " RandomResizedCrop (0.2 to 1, bicubic), RandomHorizontalFlip, ToTensor, Normalize.",
            f"crossmae_det: OpenCV {cv2.__version__}, uint8; the model normalizes.",
            "PSNR: compared to the same crops by Pillow.",
        ],
        values={
            "dataset": dataset,
            "images": min(CROP_IMAGES, len(images)),
            "image_size": image_size,
            "crossmae_det_images_per_second": ours,
            "torchvision_images_per_second": usual,
            "ratio": ratios(ours, usual),
            "psnr": similar,
        },
    )


def _chosen(images: Images) -> list[StoredImage]:
    """At most 256 of the images, evenly spread."""
    indices = np.linspace(0, len(images) - 1, min(CROP_IMAGES, len(images))).round().astype(int)
    return [images[index] for index in indices.tolist()]


def time_crops(images: Images, crops: Sequence[Crop], repeats: int) -> list[list[float]]:
    """Time functions that decode and crop an image, alternately, on one thread.

    Args:
        images: at least one; at most 256 are used.
        crops: the functions. Each makes different crops in each repeat.
        repeats: number of passes of each function over the images.

    Returns:
        For each of ``crops``, the images per second of each repeat.
    """
    chosen = _chosen(images)

    def images_per_second(crop: Crop, numbers: Iterator[int]) -> float:
        start = timer()
        for image in chosen:
            crop(image, (next(numbers),))
        return len(chosen) / (timer() - start)

    measures = [partial(images_per_second, crop, itertools.count()) for crop in crops]
    with single_threaded():
        return interleaved(measures, repeats, "images")


def detection_loading(dataset: str, image_size: int, repeats: int) -> Iterator[Section]:
    """A table of the rates of this project's mapper with large-scale jitter and of detectron2's.

    Args:
        dataset: a name that is registered in detectron2, or ``annotations.json:image_folder``. A
            folder of images has no annotations and yields no table.
        image_size: side of the crops in pixels.
        repeats: number of passes of each mapper over the images.

    Raises:
        ValueError, OSError: the dataset cannot be loaded, or an image cannot be decoded.
    """
    if dataset not in DatasetCatalog.list() and ".json:" not in dataset:
        return
    cfg = get_config(DETECTOR)
    cfg.dataloader.image_size = image_size
    cfg.dataloader.train.dataset.names = cfg.dataloader.test.dataset.names = dataset
    records: list[dict[str, Any]] = instantiate(cfg.dataloader.train.dataset)
    mapper = instantiate(cfg.dataloader.train.mapper)
    chosen = records[:: max(1, len(records) // JITTER_IMAGES)][:JITTER_IMAGES]
    mappers = [mapper, usual_mapper(mapper, chosen)]
    ours, usual = time_mappers(chosen, mappers, repeats)
    similar = Spread.of(similarities(chosen, *mappers))
    yield Section(
        key="large_scale_jitter",
        title=f"Large-scale jitter to {image_size} x {image_size}: images/s of one core",
        columns=[
            Column("mapper", "mapper"),
            Column("images/s (range)", "images_per_second", ".1f"),
            Column("x detectron2 (range)", "ratio"),
            Column("PSNR, dB (range)", "psnr", ".1f"),
        ],
        records=[
            {"mapper": "detectron2", "images_per_second": Spread.of(usual)},
            {
                "mapper": "crossmae_det",
                "images_per_second": Spread.of(ours),
                "ratio": ratios(ours, usual),
                "psnr": similar,
            },
        ],
        notes=[
            f"{len(chosen)} images of {dataset} with their {_targets(mapper)}: decode, flip, resize"
            f" by 0.1 to 2, crop; {repeats} interleaved repeats of the same draws; range: lowest to"
            " highest.",
            "detectron2: DatasetMapper with the same augmentations; PSNR: of the images compared to"
            " its own. Both keep freed memory, as the workers of training do.",
        ],
        values={
            "dataset": dataset,
            "images": len(chosen),
            "image_size": image_size,
            "crossmae_det_images_per_second": ours,
            "detectron2_images_per_second": usual,
            "ratio": ratios(ours, usual),
            "psnr": similar,
        },
    )


def _targets(mapper: DetectionMapper) -> str:
    return "masks" if mapper.use_instance_mask else "boxes"


def usual_mapper(mapper: DetectionMapper, records: Sequence[dict[str, Any]]) -> DatasetMapper:
    """detectron2's mapper with the options of this project's for these records."""
    masks = [a.get("segmentation") for r in records for a in r["annotations"] if not a["iscrowd"]]
    return DatasetMapper(
        mapper.is_train,
        augmentations=mapper.augmentations.augs,
        image_format=mapper.image_format,
        use_instance_mask=mapper.use_instance_mask,
        instance_mask_format="bitmask" if any(isinstance(m, dict) for m in masks) else "polygon",
        recompute_boxes=mapper.recompute_boxes,
    )


def time_mappers(
    records: Sequence[dict[str, Any]], mappers: Sequence[DatasetMapper], repeats: int
) -> list[list[float]]:
    """Time detectron2 mappers alternately, on one thread.

    Args:
        records: in detectron2's format.
        mappers: called with the records. In each repeat, all of them draw the same crops.
        repeats: number of passes of each mapper over the records.

    Returns:
        For each mapper, the images per second of each repeat.
    """

    def images_per_second(mapper: DatasetMapper, numbers: Iterator[int]) -> float:
        np.random.seed(next(numbers))
        start = timer()
        for record in records:
            mapper(record)
        return len(records) / (timer() - start)

    measures = [partial(images_per_second, mapper, itertools.count()) for mapper in mappers]
    keep_freed_memory(torch.device("cpu"))  # as in the workers of TrainLoader, for all mappers
    with single_threaded():
        return interleaved(measures, repeats, "large-scale jitter")


def similarities(
    records: Sequence[dict[str, Any]], mapper: DatasetMapper, usual: DatasetMapper
) -> list[float]:
    """The PSNR in dB between the images that two mappers make of each record with the same
    random numbers; at most 99."""
    values = []
    for index, record in enumerate(records):
        images = []
        for each in (mapper, usual):
            np.random.seed(index)
            images.append(each(record)["image"].numpy())
        values.append(psnr(*images))
    return values


def psnr(pixels: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 pixels of the same shape in dB; at most 99."""
    error = float(np.mean((pixels.astype(np.float32) - expected) ** 2))
    return min(99.0, 10 * math.log10(255**2 / error)) if error else 99.0


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run on one thread, as a worker of a loader does."""
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
