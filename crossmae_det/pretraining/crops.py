"""Crops of unlabeled images, as bytes: the loaders of pretraining.

Random crops for training are those of the published recipe (torchvision's ``RandomResizedCrop``),
made faster: a JPEG that is far larger than needed is decoded at a half, a quarter or an eighth of
its size, only the crop is resized, by a faster bicubic filter, and the loader returns uint8, which
the model normalizes on its own device. On 80 photographs of COCO, the PSNR to crops that Pillow
decodes and resizes is 71 dB on average and 54 dB at least. Validation and visualizations use the
largest central part of an image. Boxes refer to the upright image.

Legend: N images of a batch, H x W pixels of a crop, all colors in the order RGB.
"""

import logging
import math
import random
from collections.abc import Callable, Sequence
from functools import partial

import cv2
import numpy as np
import torch
from timm.layers import to_2tuple
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from crossmae_det.data import ResumableLoader, process_rank
from crossmae_det.pretraining.image_datasets import StoredImage, find_images
from crossmae_det.utils.image_files import sampled_sizes
from crossmae_det.utils.image_reading import REDUCTIONS, UndecodableImageError
from crossmae_det.utils.resizing import resize, to_tensor

logger = logging.getLogger(__name__)

# Width over height of a random crop, before it is resized.
ASPECT_RATIOS = (3 / 4, 4 / 3)
# Draws that may not fit the image, before a central crop is taken.
CROP_ATTEMPTS = 10

# How many times smaller than it is decoded a part must become. Without a margin, the filter of the
# decoder replaces the bicubic one: PSNR to Pillow is then 27 dB at worst, 54 dB with it.
MARGIN = 1.25

Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def random_crop(height: int, width: int, scale: Sequence[float], rng: random.Random) -> Box:
    """Draw the box of a crop as torchvision's ``RandomResizedCrop`` does, inside an image and not
    empty; ``scale`` is the least and greatest area of the crop over that of the image."""
    low, high = map(math.log, ASPECT_RATIOS)
    for _ in range(CROP_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        crop_w, crop_h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_w <= width and 0 < crop_h <= height:
            top, left = rng.randint(0, height - crop_h), rng.randint(0, width - crop_w)
            return top, left, crop_h, crop_w
    # Long and thin: the largest central crop of a permitted aspect.
    crop_w = min(width, max(1, round(height * ASPECT_RATIOS[1])))
    crop_h = min(height, max(1, round(width / ASPECT_RATIOS[0])))
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def read_part(
    image: StoredImage, choose: Callable[[int, int], Box], size: tuple[int, int]
) -> np.ndarray:
    """Decode a part of an image, at the lowest resolution that suffices, and resize it.

    Args:
        image: where the image is.
        choose: makes the box of the part from height and width of the image.
        size: (H, W) of the result.

    Returns:
        (H, W, 3) uint8 in the order BGR, not always contiguous.

    Raises:
        UndecodableImageError: the image cannot be read or decoded.
    """
    encoded = image.open()
    height, width = encoded.height, encoded.width
    top, left, part_h, part_w = choose(height, width)
    smaller = max(1, min(part_h / size[0], part_w / size[1]) / MARGIN)
    pixels = encoded.decode("BGR", max(r for r in REDUCTIONS if r <= smaller))
    scale_y, scale_x = pixels.shape[0] / height, pixels.shape[1] / width
    top, part_h = round(top * scale_y), max(1, round(part_h * scale_y))
    left, part_w = round(left * scale_x), max(1, round(part_w * scale_x))
    return resize(pixels[top : top + part_h, left : left + part_w], *size, mode="bicubic")


def load_image(image: StoredImage, image_size: int | tuple[int, int]) -> Tensor:
    """The largest central part of an image, resized: (3, H, W) uint8 in RGB.

    Args:
        image: where the image is.
        image_size: side in pixels, int or (H, W); a smaller image is enlarged.

    Raises:
        UndecodableImageError: the image cannot be read or decoded.
    """
    size = to_2tuple(image_size)

    def central(height: int, width: int) -> Box:
        scale = min(height / size[0], width / size[1])
        part_h, part_w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        return (height - part_h) // 2, (width - part_w) // 2, part_h, part_w

    return to_tensor(read_part(image, central, size), reverse=True)


def load_images(dataset: str, image_size: int | tuple[int, int], count: int) -> Tensor:
    """The images of :func:`named_images`, with its arguments and errors: (N, 3, H, W) uint8."""
    return torch.stack([image for _, image in named_images(dataset, image_size, count)])


def named_images(
    dataset: str, image_size: int | tuple[int, int], count: int
) -> list[tuple[str, Tensor]]:
    """A few images of a dataset, evenly spread over it, the same in every call.

    Args:
        dataset: names the images, see :mod:`crossmae_det.pretraining.image_datasets`.
        image_size: side in pixels, int or (H, W), see :func:`load_image`.
        count: how many; all of them where there are fewer.

    Returns:
        The name of each image, and the image: (3, H, W) uint8 in RGB. Undecodable images are
        skipped and logged.

    Raises:
        ValueError: ``count`` is not positive, there is no image, or none can be decoded.
        FileNotFoundError: a file or a folder does not exist.
    """
    if count < 1:
        raise ValueError(f"the number of images must be at least 1, got {count}")
    images = find_images(dataset)
    loaded = []
    for index in np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int):
        try:
            loaded.append((str(images[index]), load_image(images[index], image_size)))
        except UndecodableImageError as error:
            logger.warning("Skipped: %s", error)
    if not loaded:
        raise ValueError(f"{dataset}: none of the images looked at can be decoded")
    return loaded


class RandomCrops:
    """Makes a crop of an image: a random part, resized and randomly flipped.

    Args:
        image_size: side of the crop in pixels, int or (H, W); smaller parts are enlarged.
        scale: least and greatest area of the part over that of the image, in (0, 1].
        flip: mirror half of the crops, at random.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        scale: Sequence[float] = (0.2, 1.0),
        flip: bool = True,
    ):
        self.height, self.width = to_2tuple(image_size)
        if min(self.height, self.width) < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"crop_scale must be two ascending numbers in (0, 1], got {scale}")
        self.scale = tuple(scale)
        self.flip = flip

    def __call__(self, image: StoredImage, seed_sequence: Sequence[int]) -> Tensor:
        """The crop (3, H, W) uint8 that ``seed_sequence`` decides; raises UndecodableImageError."""
        # The seed is a string because the hash of one is the same everywhere. NumPy's generator
        # takes ten times as long for a few numbers.
        rng = random.Random(" ".join(map(str, seed_sequence)))
        part = read_part(
            image,
            lambda height, width: random_crop(height, width, self.scale, rng),
            (self.height, self.width),
        )
        if self.flip and rng.random() < 0.5:
            part = cv2.flip(part, 1)
        return to_tensor(part, reverse=True)


def build_pretraining_loader(
    dataset: str,
    *,
    image_size: int | tuple[int, int],
    total_batch_size: int,
    crop_scale: Sequence[float] = (0.2, 1.0),
    flip: bool = True,
    num_workers: int = 2,
    seed: int = 0,
    skip_undecodable: bool = True,
    device: str = "auto",
) -> ResumableLoader:
    """Build the training loader, for ``dataloader.train`` of a lazy config.

    Number, suffixes and sizes of the images found are logged.

    Batch i depends on (seed, i) and the names of the images only: not on workers, on the number of
    processes, of which each gets its slice, or on whether the run was resumed. An epoch shows every
    image once; tar shards are read ``image_datasets.SHARDS_AT_A_TIME`` at a time.

    Args:
        dataset: names the images, see :mod:`crossmae_det.pretraining.image_datasets`.
        image_size: side of the crops in pixels, int or (H, W); smaller images are enlarged.
        total_batch_size: images per iteration over all processes.
        crop_scale: least and greatest area of a crop over that of its image, in (0, 1].
        flip: mirror half of the crops, at random.
        num_workers: worker processes of each process; 0 loads in the process itself.
        seed: an int >= 0, the same in every process.
        skip_undecodable: replace an undecodable image by another one, log it once and count it in
            ``skipped``; False raises an error that names it.
        device: the device that the batches are for, as in ``train.device``: batches for CUDA are
            in page-locked memory.

    Returns:
        An endless iterable of (N, 3, H, W) uint8 tensors in RGB with ``start_at(iteration)``.

    Raises:
        ValueError: there is no image, or an argument is out of range; while loading: an
            image cannot be decoded, or with ``skip_undecodable`` none of those drawn can.
        FileNotFoundError: a file or a folder does not exist.
    """
    images = find_images(dataset)
    if process_rank()[0] == 0:
        sizes = sampled_sizes(lambda index: images[index].image_size(), len(images))
        logger.info("%s: %s; %s", dataset, images.summary, sizes)
    return ResumableLoader(
        images,
        RandomCrops(image_size, crop_scale, flip),
        total_batch_size,
        num_workers=num_workers,
        seed=seed,
        skip_undecodable=skip_undecodable,
        collate=default_collate,
        pin_memory=torch.cuda.is_available() and str(device).startswith(("auto", "cuda")),
        worker_init=_use_one_thread,
    )


def _use_one_thread(worker: int) -> None:
    """Workers share the cores: further threads of OpenCV would only compete for them."""
    cv2.setNumThreads(0)


def build_validation_loader(
    dataset: str,
    *,
    image_size: int | tuple[int, int],
    batch_size: int = 32,
    max_images: int = 512,
    num_workers: int = 2,
) -> DataLoader:
    """Build ``dataloader.validation`` of a lazy config for pretraining: held-out images.

    Each process gets a part of the batches that a single process would get, the first process the
    first ones.

    Args:
        dataset: names the images, see :mod:`crossmae_det.pretraining.image_datasets`.
        image_size: side in pixels, int or (H, W), see :func:`load_image`.
        batch_size: images of a batch of one process.
        max_images: use at most this many images, evenly spread over the dataset.
        num_workers: worker processes of each process; 0 loads in the process itself.

    Returns:
        A finite loader of (N, 3, H, W) uint8 tensors in RGB, the same in every epoch.

    Raises:
        ValueError: there is no image, or an argument is out of range; while loading: an image
            cannot be decoded.
        FileNotFoundError: a file or a folder does not exist.
    """
    if not dataset:
        raise ValueError(
            "train.validation_loss needs held-out images: set dataloader.validation.dataset.name"
        )
    if batch_size < 1 or max_images < 1:
        raise ValueError(
            "dataloader.validation: batch_size and max_images must be at least 1, got"
            f" {batch_size} and {max_images}"
        )
    images = find_images(dataset)
    count = min(max_images, len(images))
    chosen = [index * len(images) // count for index in range(count)]
    batches = [chosen[start : start + batch_size] for start in range(0, count, batch_size)]
    rank, world_size = process_rank()
    first, end = (len(batches) * part // world_size for part in (rank, rank + 1))
    return DataLoader(
        images,
        batch_sampler=batches[first:end],
        num_workers=num_workers,
        collate_fn=partial(_stack_central_parts, image_size=image_size),
    )


def _stack_central_parts(
    images: Sequence[StoredImage], image_size: int | tuple[int, int]
) -> Tensor:
    return torch.stack([load_image(image, image_size) for image in images])
