"""The ground truth of an evaluation: the clean form of a COCO json, in the classes of the model."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from crossmae_det.detection.coco import resolve_name
from crossmae_det.detection.coco_annotations import mask_area
from crossmae_det.detection.coco_json import CocoFile, load
from crossmae_det.detection.coco_records import category_indices, dataset_categories, json_indices

logger = logging.getLogger(__name__)


class GroundTruth:
    """The annotations of one dataset, as COCO's evaluation wants them.

    Args:
        dataset_name: a registered name or ``JSON:IMAGE_FOLDER``.
        categories: id -> name in the order of the model's classes, matched by name. None: the
            dataset 's own.
        crowd: "keep" makes crowd regions objects like any other, as in the loader.
        converted: where the json is written of a dataset that has none; None rejects it.

    Attributes:
        file: the json in its clean form.
        names: a distinct name for each class.
        category_ids: the id in the dataset for each class.
        has_annotations: False for a test set.

    Raises:
        ValueError: the dataset is not registered, its annotation file is not in COCO format, or
            its categories are not those asked for.
        FileNotFoundError: the annotation file does not exist.
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
        indices = json_indices(dataset_name, info, own)
        names = list(own.values())
        self.category_ids = list(own)
        if categories:
            mapping = category_indices(own, categories, dataset_name)
            indices = {id_: mapping[self.category_ids[index]] for id_, index in indices.items()}
            names = list(categories.values())
            self.category_ids = sorted(own, key=mapping.__getitem__)
        self._indices = indices
        self.names = [
            name if names.index(name) == index else f"{name} ({self.category_ids[index]})"
            for index, name in enumerate(names)
        ]
        self.has_annotations = info.num_annotations is not None
        self.has_masks = any("segmentation" in annotation for annotation in self.file.annotations)
        if ignored := len(info.categories) - len(indices):
            logger.info(
                "%s: evaluates %d classes; %d categories of the file are in none of them",
                dataset_name,
                len(names),
                ignored,
            )

    @property
    def image_ids(self) -> set[int | str]:
        return {image["id"] for image in self.file.images}

    def coco_api(self) -> COCO:
        """All of it as pycocotools has it, with the ids of the dataset."""
        image_ids = [image["id"] for image in self.file.images]
        dataset, _ = self.dataset(image_ids, "bbox")
        for images, key in ((dataset["images"], "id"), (dataset["annotations"], "image_id")):
            for entry in images:
                entry[key] = image_ids[entry[key] - 1]
        api = COCO()
        api.dataset = dataset
        with contextlib.redirect_stdout(io.StringIO()):
            api.createIndex()
        return api

    def dataset(
        self, image_ids: Sequence[int | str], task: str
    ) -> tuple[dict[str, Any], dict[int | str, int]]:
        """The annotations of some images in COCO's format, for one evaluation to write into.

        Both backends take a match with annotation id 0 for none, and one of them needs integer
        image ids: images, annotations and categories are numbered from 1, categories by class.

        Args:
            image_ids: the images that count, in the order of their numbers.
            task: "bbox", or "segm", which leaves out annotations without a mask.

        Returns:
            "images", "annotations" and "categories"; and the number of each image id.
        """
        numbers = {image_id: number for number, image_id in enumerate(image_ids, start=1)}
        sizes = {image["id"]: (image["height"], image["width"]) for image in self.file.images}
        annotations: list[dict[str, Any]] = []
        without_mask = 0
        for annotation in self.file.annotations:
            image_id = annotation["image_id"]
            index = self._indices.get(annotation["category_id"])
            if image_id not in numbers or index is None:
                continue
            mask = annotation.get("segmentation")
            if task == "segm" and not mask:
                without_mask += 1
                continue
            made = {
                "id": len(annotations) + 1,
                "image_id": numbers[image_id],
                "category_id": index + 1,
                "bbox": annotation["bbox"],
                "iscrowd": 0 if self._crowd == "keep" else annotation["iscrowd"],
                "area": annotation["area"],
            }
            if mask:
                made["segmentation"] = mask
            if made["area"] is None:
                made["area"] = (
                    mask_area(mask, *sizes[image_id])
                    if mask
                    else float(annotation["bbox"][2] * annotation["bbox"][3])
                )
            annotations.append(made)
        if without_mask:
            logger.warning("Mask AP leaves out %d annotations that have no mask", without_mask)
        dataset = {
            "images": [
                {**image, "id": numbers[image["id"]]}
                for image in self.file.images
                if image["id"] in numbers
            ],
            "annotations": annotations,
            "categories": [
                {"id": index + 1, "name": name} for index, name in enumerate(self.names)
            ],
        }
        return dataset, numbers


def _load(dataset_name: str, converted: str | None) -> CocoFile:
    """Read the json of a dataset, which may have to be made first."""
    json_file = _json_file(dataset_name)
    if dataset_name in DatasetCatalog or json_file is None:
        resolve_name(dataset_name)  # registers JSON:IMAGE_FOLDER, and anew where it was rewritten
        json_file = _json_file(dataset_name)
    if json_file is None or not os.path.isfile(json_file):
        try:
            DatasetCatalog.get(dataset_name)  # a loader may make its files when called
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"dataset '{dataset_name}': {error.filename or error} does not exist; correct the "
                f"path, or set DETECTRON2_DATASETS to the folder that holds the datasets"
            ) from error
        json_file = _json_file(dataset_name)
    if json_file is None:
        json_file = _convert(dataset_name, converted)
    elif not os.path.isfile(json_file):
        raise FileNotFoundError(f"dataset '{dataset_name}': {json_file} does not exist")
    try:
        return load(json_file, needs_annotations=False)
    except ValueError as error:
        raise ValueError(
            f"dataset '{dataset_name}': {json_file} cannot be used for COCO evaluation: "
            f"{str(error).removeprefix(f'{json_file}: ')}"
        ) from error


def _convert(dataset_name: str, path: str | None) -> str:
    """Write the records of a dataset without a json as one."""
    if path is None:
        raise ValueError(
            f"dataset '{dataset_name}' is not in COCO format; give the evaluator an output_dir, "
            "where it is converted"
        )
    try:
        # A file left by an earlier run may describe other data under the same name.
        convert_to_coco_json(dataset_name, path, allow_cached=False)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"dataset '{dataset_name}' cannot be converted for COCO evaluation: "
            f"{type(error).__name__}: {error}; give its records detectron2's standard format"
        ) from error
    MetadataCatalog.get(dataset_name).json_file = path
    return path


def _json_file(dataset_name: str) -> str | None:
    path = MetadataCatalog.get(dataset_name).get("json_file")
    return PathManager.get_local_path(path) if path and "://" in path else path
