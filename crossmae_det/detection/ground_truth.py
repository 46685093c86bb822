"""The ground truth of an evaluation: the clean form of a COCO json, in the classes of the model."""

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json

from crossmae_det.detection.coco import inspect_registered, is_coco, resolve_name
from crossmae_det.detection.coco_annotations import mask_area
from crossmae_det.detection.coco_json import CocoFile, CocoInfo, load
from crossmae_det.detection.coco_records import category_indices, dataset_categories
from crossmae_det.detection.detections import as_text, encoder

logger = logging.getLogger(__name__)


class GroundTruth:
    """The annotations of one dataset, as COCO's evaluation needs them.

    Args:
        dataset_name: a registered name or ``JSON:IMAGE_FOLDER``.
        categories: id -> name in the order of the model's classes, matched by name. None takes
            those of the dataset.
        crowd: "keep" makes crowd regions ordinary objects, as in the loader.
        converted: path for the json of a dataset that has none; None rejects such a dataset.

    Attributes:
        file: the json in its clean form.
        names: a distinct name for each class.
        category_ids: the category id in the dataset for each class.
        has_annotations: False for a test set without annotations.
        has_masks: whether any annotation has a mask.

    Raises:
        ValueError: the dataset is not registered, its json is not in COCO format, or its categories
            are not ``categories``.
        FileNotFoundError: the json does not exist.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        categories: Mapping[int, str] | None = None,
        crowd: str = "ignore",
        converted: str | None = None,
    ):
        self.file = _load(dataset_name, converted)
        self._crowd = crowd
        info = self.file.info
        own = dataset_categories(dataset_name, info)
        self.category_ids = list(own)
        self._indices = _class_indices(dataset_name, info, own)
        names = list(own.values())
        if categories:
            mapping = category_indices(own, categories, dataset_name)
            self._indices = {
                id_: mapping[self.category_ids[index]] for id_, index in self._indices.items()
            }
            names = list(categories.values())
            self.category_ids = sorted(own, key=mapping.__getitem__)
        self.names = [
            name if names.index(name) == index else f"{name} ({self.category_ids[index]})"
            for index, name in enumerate(names)
        ]
        self._by_image = self._annotations_by_image()
        self._encoded = False
        self.has_annotations = info.num_annotations is not None
        self.has_masks = info.has_masks or info.crowds_have_masks
        if ignored := len(info.categories) - len(self._indices):
            logger.info(
                "%s: %d categories belong to no class: not evaluated", dataset_name, ignored
            )

    @property
    def image_ids(self) -> list[int | str]:
        return [image["id"] for image in self.file.images]

    def dataset(self, numbers: Mapping[Any, int | str], task: str = "bbox") -> dict[str, Any]:
        """The annotations of some images in COCO's format; the caller may modify them.

        Args:
            numbers: image id -> id to use in the result, for the images to include.
            task: "bbox", without masks, or "segm", without annotations that have no mask.

        Returns:
            "images", "annotations" and "categories", the last two numbered from 1.
        """
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        without_mask = 0
        for image, own in zip(self.file.images, self._by_image, strict=True):
            number = numbers.get(image["id"])
            if number is None:
                continue
            images.append({**image, "id": number})
            for annotation in own:
                made = {**annotation, "id": len(annotations) + 1, "image_id": number}
                if task == "bbox":
                    made.pop("segmentation", None)
                elif "segmentation" not in made:
                    without_mask += 1
                    continue
                annotations.append(made)
        if without_mask:
            logger.warning("Mask AP leaves out %d annotations without a mask", without_mask)
        return {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.names, start=1)],
        }

    def encode_masks(self) -> None:
        """Turn polygons into run lengths, which is half of the work of an evaluation of masks.

        The first call does it, for all evaluations to come.
        """
        if self._encoded:
            return
        self._encoded = True
        for image, annotations in zip(self.file.images, self._by_image, strict=True):
            for annotation in annotations:
                if isinstance(mask := annotation.get("segmentation"), list):
                    size = image["height"], image["width"]
                    merged = encoder.merge(encoder.frPyObjects(mask, *size))
                    annotation["segmentation"] = as_text(merged)

    def _annotations_by_image(self) -> list[list[dict[str, Any]]]:
        """The annotations of each image, without ids, for every evaluation to copy."""
        sizes = {image["id"]: (image["height"], image["width"]) for image in self.file.images}
        found: dict[Any, list[dict[str, Any]]] = {id_: [] for id_ in sizes}
        for annotation in self.file.annotations:
            index = self._indices.get(annotation["category_id"])
            if index is None:
                continue
            mask, area = annotation.get("segmentation"), annotation["area"]
            if area is None and mask:
                area = mask_area(mask, *sizes[annotation["image_id"]])
            elif area is None:
                area = float(annotation["bbox"][2] * annotation["bbox"][3])
            made = {
                "category_id": index + 1,
                "bbox": annotation["bbox"],
                "iscrowd": 0 if self._crowd == "keep" else annotation["iscrowd"],
                "area": area,
            }
            if mask:
                made["segmentation"] = mask
            found[annotation["image_id"]].append(made)
        return list(found.values())


def _class_indices(name: str, info: CocoInfo, own: Mapping[int, str]) -> dict[int, int]:
    """Category id of a json -> index in ``own``, the categories of the dataset registered with it.

    By the metadata, several ids may share a class, and categories may be left out.
    """
    if own.keys() == info.categories.keys() and set(own.values()) == set(info.categories.values()):
        return {id_: index for index, id_ in enumerate(own)}
    ids = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id") or {}
    indices = {id_: ids[id_] for id_ in info.categories if id_ in ids}
    if not indices:
        raise ValueError(
            f"{info.path}: its categories are not those that {name} is registered with: "
            "give the dataset as JSON:IMAGE_FOLDER instead"
        )
    return indices


def _load(dataset_name: str, converted: str | None) -> CocoFile:
    """Read the json of a dataset, writing it first if the dataset has none."""
    resolve_name(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    if not is_coco(dataset_name) and metadata.get("json_file") is None:
        _convert(dataset_name, converted)
    return load(inspect_registered(dataset_name).path, needs_annotations=False)


def _convert(dataset_name: str, path: str | None) -> None:
    """Write the records of a dataset without a json as a json."""
    if path is None:
        raise ValueError(
            f"dataset '{dataset_name}' is not in COCO format: set the output_dir of the evaluator, "
            "where the converted file is written"
        )
    try:
        # A file left by an earlier run may describe other data under the same name.
        convert_to_coco_json(dataset_name, path, allow_cached=False)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"dataset '{dataset_name}' cannot be converted to COCO format "
            f"({type(error).__name__}: {error}): give its records detectron2's standard format"
        ) from error
    MetadataCatalog.get(dataset_name).json_file = path
