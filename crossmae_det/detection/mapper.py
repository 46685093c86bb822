"""From dataset records to batches: the mapper, its augmentations, and the training loader."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetFromList, DatasetMapper
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from detectron2.utils.serialize import PicklableWrapper
from omegaconf import ListConfig
from timm.layers import to_2tuple
from torch.utils.data import Dataset

from crossmae_det.data import ResumableLoader
from crossmae_det.detection.jitter import AugInput, are_by_size, decode, draw_by_size
from crossmae_det.detection.targets import make_instances
from crossmae_det.utils.image_reading import (
    EncodedImage,
    ImageError,
    UndecodableImageError,
    check_image_format,
    naming_errors,
)
from crossmae_det.utils.resizing import to_tensor


class ResizeToFit(T.Augmentation):
    """Resize an image, keeping its aspect ratio, to the largest size that fits into a box.

    For a square box, this is detectron2's ``ResizeShortestEdge`` with both of its sizes equal.

    Args:
        max_size: size of the box in pixels, int or (H, W).
    """

    def __init__(self, max_size: int | tuple[int, int]):
        super().__init__()
        self.max_size = to_2tuple(max_size)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The transform of an image (H, W, C) of any dtype."""
        height, width = image.shape[:2]
        box_height, box_width = self.max_size
        # The shorter edge may fill its side of the box if the longer one fits then.
        short, long = (box_height, box_width) if height <= width else (box_width, box_height)
        size = T.ResizeShortestEdge.get_output_shape(height, width, short, long)
        new_height, new_width = (max(1, side) for side in size)
        return T.ResizeTransform(height, width, new_height, new_width)


class DetectionMapper(DatasetMapper):
    """detectron2's ``DatasetMapper`` for boxes and masks, with these differences:

    - Images are read by :mod:`crossmae_det.utils.image_reading`, and each side keeps at least one
      pixel in resizing.
    - In training, large-scale jitter (flips, ``ResizeScale``, ``FixedSizeCrop``, nothing else)
      takes a fraction of the time, with the same targets and nearly the same pixels: see
      :mod:`crossmae_det.detection.jitter`. Other augmentations, and every test image, pass
      through detectron2's own code.
    - An image that cannot be decoded, is not of the annotated size, or is smaller than `min_size`
      raises an `ImageError` that names the file.
    - Polygons and run-length masks may be mixed: an image with a run-length mask gets ``BitMasks``
      and any other ``PolygonMasks``. Pixels that an augmentation pads are outside of every mask
      (detectron2 fills them with 255, which its ``BitMasks`` treat as inside).
    - An image without a target gets empty ``gt_boxes`` and ``gt_masks`` like any other.
    - Some objects of an image may have only a box. The image then has a field ``gt_has_mask``,
      (number of objects) bool, and the box stands in for the mask. An image where no object has a
      mask has no ``gt_masks``.

    Args:
        is_train: False leaves out the annotations.
        augmentations: detectron2 augmentations or transforms, applied in order.
        image_format: "RGB", "BGR" or "L" (gray), the input format of the model.
        use_instance_mask: whether to return masks.
        recompute_boxes: make the boxes tight around the masks after augmentation.
        min_size: smallest usable height and width of an image file, in pixels; configs set the
            patch size.

    Raises:
        ValueError: the image format is unknown, an augmentation is not detectron2's, or
            ``recompute_boxes`` is set without ``use_instance_mask``.
    """

    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        use_instance_mask: bool = False,
        recompute_boxes: bool = False,
        min_size: int = 1,
    ):
        check_image_format(image_format)
        if recompute_boxes and not use_instance_mask:
            raise ValueError("recompute_boxes=True needs use_instance_mask=True")
        for item in augmentations:
            if not isinstance(item, T.Augmentation | T.Transform):
                raise ValueError(
                    f"mapper.augmentations: {item!r} is not an augmentation of detectron2: to "
                    "change one, override its keys, such as mapper.augmentations.0.prob=0.5"
                )
            for name, value in vars(item).items():
                if isinstance(value, ListConfig):  # NumPy reads one a hundred times as slowly
                    setattr(item, name, tuple(value))
        super().__init__(
            is_train,
            augmentations=list(augmentations),
            image_format=image_format,
            use_instance_mask=use_instance_mask,
            recompute_boxes=recompute_boxes,
        )
        self.min_size = min_size

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one record.

        Args:
            dataset_dict: a record in detectron2's format; it is not modified.

        Returns:
            The record with ``image``, a uint8 tensor (C, H, W), and in training ``instances``
            in place of ``annotations``.

        Raises:
            UndecodableImageError: the file cannot be read, or has another size than annotated.
            ImageError: a side of the image is smaller than `min_size`.
        """
        try:
            return self._map(dataset_dict)
        except UndecodableImageError as error:
            if self.is_train:  # the loader adds the advice: it may skip the image
                raise
            advice = "replace the file or remove it from the dataset"
            raise UndecodableImageError(f"{error}: {advice}", error.file_name) from error

    def _map(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        record = {key: value for key, value in dataset_dict.items() if key != "annotations"}
        record = copy.deepcopy(record)
        encoded = self._open(record)
        size = encoded.height, encoded.width
        if self.is_train and are_by_size(self.augmentations.augs):
            transforms = draw_by_size(self.augmentations, *size)
            # OpenCV decodes to BGR; the copy to the tensor reverses the order.
            decoded_format = "L" if self.image_format == "L" else "BGR"
            pixels = decode(encoded, decoded_format, transforms)
            image = to_tensor(pixels, reverse=self.image_format == "RGB")
        else:
            augmented = AugInput(np.ascontiguousarray(encoded.decode(self.image_format)))
            transforms = self.augmentations(augmented)
            image = torch.from_numpy(np.array(augmented.image.transpose(2, 0, 1), order="C"))
        record["image"] = image
        if self.is_train and "annotations" in dataset_dict:
            try:
                record["instances"] = make_instances(
                    dataset_dict["annotations"],
                    transforms,
                    size,
                    (image.shape[1], image.shape[2]),
                    masks=self.use_instance_mask,
                    recompute_boxes=self.recompute_boxes,
                )
            except ValueError as error:
                raise ValueError(f"{record['file_name']}: {error}") from error
        return record

    def _open(self, record: dict[str, Any]) -> EncodedImage:
        file_name = record["file_name"]
        with naming_errors(file_name), PathManager.open(file_name, "rb") as file:
            data = file.read()
        image = EncodedImage(data, file_name)
        height, width = image.height, image.width
        expected = record.setdefault("height", height), record.setdefault("width", width)
        if expected != (height, width):
            raise UndecodableImageError(
                f"{file_name}: the image is {width}x{height} pixels, but its annotations are for "
                f"{expected[1]}x{expected[0]}",
                file_name,
            )
        if min(height, width) < self.min_size:
            raise ImageError(
                f"{file_name}: the image is {width}x{height} pixels, but both sides must be at "
                f"least {self.min_size} (a patch): remove it from the dataset"
            )
        return image


class TrainLoader(ResumableLoader):
    """An endless iterable over training batches, each a list of what `mapper` returns.

    Args:
        dataset: records in detectron2's format, or a map-style dataset of them.
        mapper: makes a model input from a record. It may return None to have another image drawn.
            It may draw from ``random``, ``numpy.random`` and ``torch`` (CPU), which are seeded.
        total_batch_size: images per iteration over all processes.
        num_workers: worker processes of each process; 0 loads in the process itself.
        seed: at least 0, the same in every process.
        skip_undecodable: replace an image that raises `UndecodableImageError` by another one.

    Raises:
        ValueError: the dataset is empty, or the batch size or the seed is invalid.
    """

    def __init__(
        self,
        dataset: Sequence[dict] | Dataset,
        mapper: Callable[[dict], dict | None],
        total_batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        skip_undecodable: bool = False,
    ):
        if isinstance(dataset, list) and dataset:  # one buffer that worker processes share
            dataset = DatasetFromList(dataset, copy=False, serialize=True)
        super().__init__(
            dataset,
            _SeededMapper(mapper),
            total_batch_size,
            num_workers=num_workers,
            seed=seed,
            skip_undecodable=skip_undecodable,
            worker_init=_prepare_worker,
        )


def _prepare_worker(worker: int) -> None:
    """Workers share the cores: further threads of OpenCV would only compete for them. An image is
    megabytes, for which the kernel would make new pages each time."""
    from crossmae_det.engine import keep_freed_memory  # imports tensorboard, not needed before

    cv2.setNumThreads(0)
    keep_freed_memory(torch.device("cpu"))


class _SeededMapper:
    """Calls a mapper with the global random generators seeded for each record."""

    def __init__(self, mapper: Callable[[dict], dict | None]):
        self.mapper = PicklableWrapper(mapper)  # a lambda can then be sent to a worker

    def __call__(self, record: dict, seed_sequence: list[int]) -> dict | None:
        with _seeded(seed_sequence):
            return self.mapper(record)


@contextmanager
def _seeded(seed_sequence: list[int]) -> Iterator[None]:
    """Seed ``random``, ``numpy.random`` and torch's CPU generator, and restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(seed_sequence).generate_state(8, np.uint32)
    random.seed(words[:4].tobytes())
    np.random.seed(words[4:6])
    # torch.manual_seed would also seed the GPUs, whose state is not restored here.
    torch.default_generator.manual_seed(int(words[6:].view(np.uint64)[0] >> np.uint64(1)))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
