"""k-nearest-neighbour classification: what frozen features know, with nothing trained on them.

Legend: N images, C channels of a feature.
"""

from collections.abc import Callable

import torch
from sklearn.neighbors import KNeighborsClassifier
from timm.layers import to_2tuple
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from tqdm import tqdm


def labelled_features(
    folder: str,
    encode: Callable[[Tensor], Tensor],
    image_size: int | tuple[int, int],
    *,
    batch_size: int = 256,
    num_workers: int = 0,
) -> tuple[Tensor, Tensor, list[str]]:
    """The features of a folder of images, one folder a class, as ImageNet is laid out.

    Args:
        folder: the folder.
        encode: (N, 3, height, width) uint8 in RGB -> (N, C); run without gradients.
        image_size: side in pixels, int or (H, W): the shorter side is resized to it, and the centre
            is cropped.
        batch_size: images at a time.
        num_workers: worker processes that load the images; 0 loads in this one.

    Returns:
        Features (images, C) float32 and labels (images,) int64 on the CPU, and the classes' names.

    Raises:
        FileNotFoundError: there is no such folder, it has no class folders, or one has no images.
        OSError: an image cannot be decoded.
    """
    size = to_2tuple(image_size)
    transform = Compose(
        [Resize(max(size), InterpolationMode.BICUBIC), CenterCrop(size), PILToTensor()]
    )
    dataset = ImageFolder(folder, transform)
    loader = DataLoader(dataset, batch_size, num_workers=num_workers)
    features, labels = [], []
    with torch.no_grad():
        for images, classes in tqdm(loader, desc=folder):
            features.append(encode(images).float().cpu())
            labels.append(classes)
    return torch.cat(features), torch.cat(labels), dataset.classes


def knn_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], neighbours: int = 20
) -> float:
    """The share of test images whose neighbours in the training set vote for their class.

    Neighbours are those of the greatest cosine similarity. A channel counts by its deviation from
    the mean of the training set, in units of its standard deviation there: without that, the few
    channels in which a masked autoencoder is large decide alone.

    Args:
        train: features (images, C) and labels (images,).
        test: the same of the test set.
        neighbours: how many vote.

    Returns:
        Accuracy in percent.

    Raises:
        ValueError: ``neighbours`` is not between 1 and the number of training images.
    """
    (train_x, train_y), (test_x, test_y) = train, test
    if not 1 <= neighbours <= len(train_x):
        raise ValueError(
            f"the number of neighbours must lie between 1 and the {len(train_x)} training images,"
            f" got {neighbours}"
        )
    deviation, mean = torch.std_mean(train_x, dim=0)
    scale = deviation.clamp(min=1e-6)
    classifier = KNeighborsClassifier(neighbours, metric="cosine", algorithm="brute")
    classifier.fit(((train_x - mean) / scale).numpy(), train_y.numpy())
    return 100 * float(classifier.score(((test_x - mean) / scale).numpy(), test_y.numpy()))
