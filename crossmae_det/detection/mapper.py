"""From dataset records to batches: the mapper, its augmentations, and the training loader."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetFromList, DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, PolygonMasks
from detectron2.utils.file_io import PathManager
from detectron2.utils.serialize import PicklableWrapper
from timm.layers import to_2tuple
from torch.utils.data import Dataset

from crossmae_det.data import ResumableLoader
from crossmae_det.utils.image_reading import (
    ImageError,
    UndecodableImageError,
    check_image_format,
    naming_errors,
    read_image,
)

# detectron2's threshold: boxes with a shorter side, in pixels, are not targets.
_MIN_SIDE = 1e-5


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


class AugInput(T.AugInput):
    """detectron2's input of augmentations, but each side of the image keeps at least one pixel.

    Otherwise, the short side of a long, thin image could round to 0 when it is scaled down.
    """

    def transform(self, tfm: T.Transform) -> None:
        for step in tfm.transforms if isinstance(tfm, T.TransformList) else [tfm]:
            if isinstance(step, T.ResizeTransform):
                step.new_h, step.new_w = max(1, step.new_h), max(1, step.new_w)
        super().transform(tfm)


class DetectionMapper(DatasetMapper):
    """detectron2's ``DatasetMapper`` for boxes and masks, with these differences:

    - Images are read by :func:`crossmae_det.utils.image_reading.read_image`, and each side keeps at
      least one pixel in resizing.
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
        dataset_dict = copy.deepcopy(dataset_dict)
        augmented = AugInput(self._read(dataset_dict))
        transforms = self.augmentations(augmented)
        image = augmented.image
        dataset_dict["image"] = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image.shape[:2])
        return dataset_dict

    def _read(self, dataset_dict: dict[str, Any]) -> np.ndarray:
        file_name = dataset_dict["file_name"]
        # In training, the loader adds the advice: it may skip the image.
        advice = "" if self.is_train else ": replace the file or remove it from the dataset"
        try:
            with naming_errors(file_name), PathManager.open(file_name, "rb") as file:
                data = file.read()
            image = read_image(data, self.image_format, name=file_name)
        except UndecodableImageError as error:
            raise UndecodableImageError(f"{error}{advice}", file_name) from error
        height, width = image.shape[:2]
        try:
            utils.check_image_size(dataset_dict, image)
        except utils.SizeMismatchError as error:
            raise UndecodableImageError(
                f"{file_name}: the image is {width}x{height} pixels, but its annotations are for "
                f"{dataset_dict['width']}x{dataset_dict['height']}{advice}",
                file_name,
            ) from error
        if min(height, width) < self.min_size:
            raise ImageError(
                f"{file_name}: the image is {width}x{height} pixels, but both sides must be at "
                f"least {self.min_size} (a patch): remove it from the dataset"
            )
        return image

    def _transform_annotations(self, dataset_dict, transforms, image_shape) -> None:
        annotations = []
        for annotation in dataset_dict.pop("annotations"):
            if annotation.get("iscrowd", 0):
                continue
            if not self.use_instance_mask:
                annotation.pop("segmentation", None)
            annotation.pop("keypoints", None)
            utils.transform_instance_annotations(annotation, transforms, image_shape)
            if isinstance(annotation.get("segmentation"), np.ndarray):
                annotation["segmentation"] = annotation["segmentation"] == 1  # 255 is padding
            annotations.append(annotation)

        has_mask = torch.tensor(["segmentation" in a for a in annotations], dtype=torch.bool)
        run_lengths = any(isinstance(a.get("segmentation"), np.ndarray) for a in annotations)
        if has_mask.any():
            for annotation in annotations:
                if "segmentation" not in annotation:
                    x0, y0, x1, y1 = map(float, annotation["bbox"])
                    annotation["segmentation"] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        mask_format = "bitmask" if run_lengths else "polygon"
        instances = utils.annotations_to_instances(annotations, image_shape, mask_format)
        if self.use_instance_mask and not annotations:
            instances.gt_masks = PolygonMasks([])
        keep = instances.gt_boxes.nonempty(threshold=_MIN_SIDE)
        if instances.has("gt_masks"):
            if self.recompute_boxes:
                boxes = instances.gt_masks.get_bounding_boxes().tensor
                boxes = torch.where(has_mask[:, None], boxes, instances.gt_boxes.tensor)
                instances.gt_boxes = Boxes(boxes)
                keep = instances.gt_boxes.nonempty(threshold=_MIN_SIDE)
            keep &= instances.gt_masks.nonempty() | ~has_mask
            if not has_mask.all():
                instances.gt_has_mask = has_mask
        dataset_dict["instances"] = instances[keep]


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
        )


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
