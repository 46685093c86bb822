"""k-nearest-neighbor classification on frozen features: a backbone's quality without training.

Legend: N images, C channels of a feature.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from timm.layers import to_2tuple
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from tqdm import tqdm

from crossmae_det.utils.image_files import file_sizes, is_image_file, suffix_counts
from crossmae_det.utils.image_reading import UndecodableImageError, read_image

logger = logging.getLogger(__name__)


def labeled_features(
    folder: str,
    encode: Callable[[Tensor], Tensor],
    image_size: int | tuple[int, int],
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    skip_undecodable: bool = False,
) -> tuple[Tensor, Tensor, list[str]]:
    """The features of a folder of images, with one subfolder per class, as ImageNet is laid out.

    Number, suffixes and sizes of the images found are logged.

    Args:
        folder: the folder.
        encode: (N, 3, height, width) uint8 in RGB -> (N, C); run without gradients.
        image_size: side in pixels, int or (H, W): the shorter side is resized to it, and the center
            is cropped.
        batch_size: images at a time.
        num_workers: worker processes that load the images; 0 loads in this one.
        skip_undecodable: skip undecodable images and log their names.

    Returns:
        Features (images, C) float32 and labels (images,) int64 on the CPU, and the classes' names.

    Raises:
        FileNotFoundError: there is no such folder, it has no class folders, or one has no images.
        UndecodableImageError: an image cannot be decoded.
        ValueError: no image can be decoded.
    """
    size = to_2tuple(image_size)
    transform = Compose(
        [Resize(max(size), InterpolationMode.BICUBIC), CenterCrop(size), PILToTensor()]
    )
    dataset = _LabeledImages(folder, transform, loader=_read_image, is_valid_file=is_image_file)
    paths = [path for path, _ in dataset.samples]
    logger.info(
        "%s: %d images (%s) of %d classes; %s",
        *(folder, len(paths), suffix_counts(paths), len(dataset.classes), file_sizes(paths)),
    )
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size, num_workers=num_workers, collate_fn=list
    )
    features, labels = [], []
    skipped = 0
    for samples in tqdm(loader, desc=folder):
        decoded = [sample for sample in samples if not isinstance(sample, UndecodableImageError)]
        for error in samples:
            if isinstance(error, UndecodableImageError):
                if not skip_undecodable:
                    advice = "replace the file or remove it, or pass --skip-undecodable"
                    raise UndecodableImageError(f"{error}: {advice}", error.file_name)
                logger.warning("Skipped: %s", error)
                skipped += 1
        if decoded:
            images, classes = default_collate(decoded)
            with torch.no_grad():
                features.append(encode(images).float().cpu())
            labels.append(classes)
    if skipped:
        logger.warning("%s: %d of %d images were skipped", folder, skipped, len(paths))
    if not features:
        raise ValueError(f"{folder}: none of the {len(paths)} images can be decoded")
    return torch.cat(features), torch.cat(labels), dataset.classes


class _LabeledImages(ImageFolder):
    """(image, class) by index; the error instead for an image that cannot be decoded.

    torch re-raises the errors of a worker with the worker's traceback inside the message.
    """

    def __getitem__(self, index: int) -> Any:
        try:
            return super().__getitem__(index)
        except UndecodableImageError as error:
            return error


def _read_image(path: str) -> Image.Image:
    return Image.fromarray(read_image(path))


def knn_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], neighbors: int = 20
) -> float:
    """Accuracy of a majority vote of the nearest training images, in percent.

    Nearest in cosine similarity, after each channel is standardized with the mean and the standard
    deviation of the training set: without that, the few channels in which a masked autoencoder is
    large decide alone.

    Args:
        train: features (images, C) and labels (images,).
        test: the same of the test set.
        neighbors: how many vote.

    Raises:
        ValueError: ``neighbors`` is not between 1 and the number of training images.
    """
    (train_x, train_y), (test_x, test_y) = train, test
    if not 1 <= neighbors <= len(train_x):
        raise ValueError(
            f"the number of neighbors must lie between 1 and the {len(train_x)} training images,"
            f" got {neighbors}"
        )
    deviation, mean = torch.std_mean(train_x, dim=0)
    scale = deviation.clamp(min=1e-6)
    classifier = KNeighborsClassifier(neighbors, metric="cosine", algorithm="brute")
    classifier.fit(((train_x - mean) / scale).numpy(), train_y.numpy())
    return 100 * float(classifier.score(((test_x - mean) / scale).numpy(), test_y.numpy()))
