"""Unlabelled images that are held out, for the reconstruction loss on them.

Legend: N images of a batch, H x W pixels.
"""

from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset

from crossmae_det.pretraining.data import load_image
from crossmae_det.pretraining.images import ImageFiles, ShardedImages, find_images


def build_validation_loader(
    dataset: str,
    *,
    image_size: int | tuple[int, int],
    batch_size: int = 32,
    max_images: int = 512,
    num_workers: int = 2,
) -> DataLoader:
    """Build ``dataloader.validation`` of a lazy config for pretraining.

    Each process gets a part of the batches that one process would see, the first process the first
    ones.

    Args:
        dataset: names the images, see :mod:`crossmae_det.pretraining.images`.
        image_size: side in pixels, int or (H, W): the largest central part of each image at that
            shape.
        batch_size: images of a batch of one process.
        max_images: use so many images, evenly spread over the set.
        num_workers: worker processes of each process; 0 loads in the process itself.

    Returns:
        A finite loader of (N, 3, H, W) uint8 tensors in RGB, the same ones in every epoch.

    Raises:
        ValueError: there is no image, or an argument is out of range; while loading: an image
            cannot be decoded.
        FileNotFoundError: a file or a folder does not exist.
    """
    if not dataset:
        raise ValueError(
            "train.validation_loss needs images that are held out: name them in"
            " dataloader.validation.dataset.name"
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
    rank, world_size = 0, 1
    if distributed.is_available() and distributed.is_initialized():
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
    first, end = (len(batches) * part // world_size for part in (rank, rank + 1))
    return DataLoader(
        _CentralParts(images, image_size), batch_sampler=batches[first:end], num_workers=num_workers
    )


class _CentralParts(Dataset):
    """Index -> (3, H, W) uint8."""

    def __init__(self, images: ImageFiles | ShardedImages, image_size: int | tuple[int, int]):
        self.images = images
        self.image_size = image_size

    def __getitem__(self, index: int) -> Tensor:
        return load_image(self.images[index], self.image_size)
