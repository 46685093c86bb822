"""Data sets by one string: a name registered in detectron2, or a user's own ``JSON:IMAGE_FOLDER``.

A config needs to know a data set before any image is read (`describe`: how many images, which
classes, boxes or masks), and the loaders need its records (`get_dataset_dicts`), checked.
"""

import contextlib
import difflib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog, print_instances_class_histogram
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager
from torch.utils.data import Dataset, IterableDataset

from crossmae_det.data.coco_json import (
    CocoFile,
    area_fault,
    check_images,
    collector_paused,
    inspect,
)

logger = logging.getLogger(__name__)

# COCO train2017 holds 118,287 images, but every published schedule counts it as 118,000: 100 epochs
# are 184,375 iterations of 64 images, and 184,375 x 64 = 100 x 118,000. `describe` counts alike, so
# that the schedules computed from it are the published ones. No other data set is rounded.
_TRAIN2017_IMAGES = 118_287
_TRAIN2017_SCHEDULED_IMAGES = 118_000

# Sizes of COCO's splits, for a config that is looked at where the data is not.
_NUM_IMAGES = {
    "coco_2014_train": 82_783,
    "coco_2014_val": 40_504,
    "coco_2014_minival": 5_000,
    "coco_2014_valminusminival": 35_504,
    "coco_2017_train": _TRAIN2017_SCHEDULED_IMAGES,
    "coco_2017_val": 5_000,
    "coco_2017_val_100": 100,
}

_registered: dict[str, CocoFile] = {}  # the JSON:IMAGE_FOLDER strings that resolve_name registered


@dataclass(frozen=True)
class DatasetInfo:
    """What a config needs to know of a data set.

    Attributes:
        num_images: number of images an epoch counts.
        categories: dataset category id -> name, in the order of the contiguous class ids.
        has_masks: False when no annotation has a mask, so that only boxes can be trained.
    """

    num_images: int
    categories: dict[int, str]
    has_masks: bool


def resolve_name(spec: str) -> str:
    """Return the name under which detectron2 knows a data set, registering a user's own first.

    Args:
        spec: a name registered in ``DatasetCatalog``, or ``"instances.json:image_folder"``, which
            is registered under that very string, with the metadata that detectron2's evaluators
            and visualizers want. The records are loaded when ``DatasetCatalog.get`` asks for them.

    Raises:
        ValueError: neither of the two, or the json is not COCO.
        FileNotFoundError: the json or the image folder does not exist.
    """
    if spec in DatasetCatalog and spec not in _registered:
        return spec
    json_file, image_root = _split(spec)
    coco_file = inspect(json_file)
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"{image_root}: no such image folder; check the data set {spec!r}")
    if _registered.get(spec) == coco_file:
        return spec
    if spec in _registered:  # the file was rewritten; metadata cannot be changed, only replaced
        DatasetCatalog.remove(spec)
        MetadataCatalog.remove(spec)
    _registered[spec] = coco_file
    DatasetCatalog.register(spec, lambda: load_coco_json(json_file, image_root, spec))
    MetadataCatalog.get(spec).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=list(coco_file.categories.values()),
        thing_dataset_id_to_contiguous_id={id_: i for i, id_ in enumerate(coco_file.categories)},
    )
    return spec


def describe(spec: str) -> DatasetInfo:
    """Describe a data set without loading its images.

    A COCO json is read once and again only when it changes. Where the json of a registered name is
    absent, the metadata describe it if its size is known (COCO's own names, or ``num_images`` in
    the metadata): a config can be looked at where the data is not, or not yet.

    Raises:
        ValueError, FileNotFoundError: as `resolve_name`; or an absent json of unknown size.
    """
    name = resolve_name(spec)
    metadata = MetadataCatalog.get(name)
    if not _is_coco(name):
        records = _records(name)
        annotations = (a for record in records for a in record.get("annotations", []))
        has_masks = any(a.get("segmentation") for a in annotations if not a.get("iscrowd", 0))
        return DatasetInfo(len(records), _categories(name, None), has_masks)
    known = metadata.get("num_images", _NUM_IMAGES.get(name))
    if known is not None and not os.path.isfile(_local(metadata.json_file)):
        return DatasetInfo(known, _categories(name, None), has_masks=True)
    coco_file = _inspect(name)
    num_images = coco_file.num_images
    if num_images == _TRAIN2017_IMAGES and coco_file.categories == _categories(
        "coco_2017_train", None
    ):
        num_images = _TRAIN2017_SCHEDULED_IMAGES
    return DatasetInfo(num_images, _categories(name, coco_file), coco_file.has_masks)


def get_dataset_dicts(
    names: str | Sequence[str],
    *,
    filter_empty: bool = True,
    max_images: int | None = None,
    invalid_annotations: str | None = None,
) -> list[dict]:
    """Load the records of one or more data sets in detectron2's format, after checking them.

    Every COCO json is checked whole: see `crossmae_det.data.coco_json.inspect`.

    Args:
        names: what `resolve_name` accepts, or a sequence of it.
        filter_empty: leave out images without an annotation that is not a crowd region.
        max_images: keep only the first so many images, by ascending image id within each data set,
            the data sets in the order given, counted after `filter_empty`.
        invalid_annotations: what to do with annotations whose box or mask has no area, and with
            those that have no mask where others of the same json do: "error", or "skip" to leave
            them out with a warning. None is "error" for ``JSON:IMAGE_FOLDER`` and "skip" for
            registered names, because COCO's own files have a few of them.

    Returns:
        One dict per image: ``file_name``, ``height``, ``width``, ``image_id``, ``annotations``.

    Raises:
        ValueError: a data set is not as it must be, or nothing of it is left; one line.
        FileNotFoundError: a json, an image folder or images in it are absent; one line.
    """
    specs = [names] if isinstance(names, str) else list(names)
    if not specs:
        raise ValueError("no data set is named; give a registered name or JSON:IMAGE_FOLDER")
    if invalid_annotations not in (None, "error", "skip"):
        raise ValueError(
            f"invalid_annotations={invalid_annotations!r}: choose error, skip or null (None)"
        )
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images={max_images}: give a positive number, or null (None) for all")

    resolved = [resolve_name(spec) for spec in specs]
    records = []
    for name in resolved:
        loaded = _load(name, invalid_annotations)
        if max_images is not None and all("image_id" in record for record in loaded):
            loaded = sorted(loaded, key=lambda record: record["image_id"])
        records += loaded
    has_instances = "annotations" in records[0]
    if filter_empty and has_instances:
        records = filter_images_with_only_crowd_annotations(records)
    if not records:
        raise ValueError(
            f"{', '.join(specs)}: no image has an annotation to train on; annotate some"
        )
    if max_images is not None and max_images < len(records):
        logger.info("Using the first %d of %d images, by image id", max_images, len(records))
        records = records[:max_images]

    classes = [MetadataCatalog.get(name).get("thing_classes") for name in resolved]
    for spec, others in zip(specs, classes, strict=True):
        if others != classes[0]:
            raise ValueError(
                f"{specs[0]} and {spec} have different classes; use sets with the same"
            )
    if has_instances and classes[0] is not None:
        print_instances_class_histogram(records, classes[0])
    return records


def _split(spec: str) -> tuple[str, str]:
    """Split JSON:IMAGE_FOLDER; a colon may also occur inside either path."""
    if not isinstance(spec, str):
        raise ValueError(f"data set {spec!r}: give a registered name or JSON:IMAGE_FOLDER")
    pairs = [(spec[:i], spec[i + 1 :]) for i, character in enumerate(spec) if character == ":"]
    pairs = [
        (os.path.expanduser(json_file), os.path.expanduser(image_root))
        for json_file, image_root in reversed(pairs)
        if json_file.lower().endswith(".json") and image_root
    ]
    if pairs:
        # Where no such json exists, the last colon gives the path that the error will name.
        return next((pair for pair in pairs if os.path.isfile(pair[0])), pairs[0])
    if spec.lower().rstrip(":").endswith(".json"):
        raise ValueError(
            f"data set {spec!r}: add the image folder, as in {spec.rstrip(':')}:FOLDER"
        )
    similar = difflib.get_close_matches(spec, list(DatasetCatalog), n=1)
    hint = f" (did you mean {similar[0]}?)" if similar else ""
    raise ValueError(
        f"data set {spec!r} is not registered in detectron2{hint}; "
        "a data set of your own is named by JSON:IMAGE_FOLDER"
    )


def _is_coco(name: str) -> bool:
    """Whether a data set is a COCO json, which `inspect` can read, rather than anything else."""
    metadata = MetadataCatalog.get(name)
    return (
        bool(metadata.get("json_file") and metadata.get("image_root"))
        and metadata.get("evaluator_type", "coco") == "coco"
    )


def _local(path: Any) -> str:
    path = os.fspath(path)
    return PathManager.get_local_path(path) if "://" in path else path


def _inspect(name: str) -> CocoFile:
    path = _local(MetadataCatalog.get(name).json_file)
    if name in _registered:
        return inspect(path)
    if not os.path.isfile(path):
        with contextlib.suppress(FileNotFoundError):  # a loader may make its files when called
            DatasetCatalog.get(name)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: the annotations of {name} are absent; set DETECTRON2_DATASETS to the folder "
            "that has them, or give the data set as JSON:IMAGE_FOLDER"
        )
    return inspect(path, needs_annotations=False)


def _categories(name: str, coco_file: CocoFile | None) -> dict[int, str]:
    """Dataset id -> name in class order; the metadata decide, as they do in detectron2."""
    metadata = MetadataCatalog.get(name)
    classes = metadata.get("thing_classes")
    if classes is None and coco_file is None:
        raise ValueError(
            f"data set {name!r} has no class names; set MetadataCatalog.get(name).thing_classes"
        )
    if coco_file is not None and (
        classes is None or list(classes) == list(coco_file.categories.values())
    ):
        return dict(coco_file.categories)
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    if ids is None:
        return dict(enumerate(classes))
    # Several dataset ids may share a class: the first of them stands for it.
    first = {contiguous: id_ for id_, contiguous in sorted(ids.items(), reverse=True)}
    return {first[contiguous]: classes[contiguous] for contiguous in sorted(first)}


def _records(name: str) -> list[dict]:
    records = DatasetCatalog.get(name)
    if isinstance(records, IterableDataset):
        raise ValueError(f"data set {name!r} is an IterableDataset; a resumable run needs a list")
    if isinstance(records, Dataset):
        records = [records[i] for i in range(len(records))]  # type: ignore[arg-type]
    if not len(records):
        raise ValueError(f"data set {name!r} has no images")
    return records


def _load(name: str, invalid_annotations: str | None) -> list[dict]:
    """Load the records of one registered data set, checked where it is a COCO json."""
    coco_file = None
    if _is_coco(name):
        coco_file = _inspect(name)
        image_root = os.fspath(MetadataCatalog.get(name).image_root)
        if "://" not in image_root:
            check_images(coco_file, image_root)
        policy = invalid_annotations or ("error" if name in _registered else "skip")
        if coco_file.num_faulty and policy == "error":
            more = f" (and {coco_file.num_faulty - 1} more)" if coco_file.num_faulty > 1 else ""
            raise ValueError(
                f"{coco_file.path}: {coco_file.first_fault}{more}; correct it, or "
                "set dataloader.train.dataset.invalid_annotations=skip to leave such annotations "
                "out (dataloader.test for a test set)"
            )
    try:
        with collector_paused():
            records = _records(name)
    except AssertionError as error:  # load_coco_json's only words for metadata that do not fit
        classes = MetadataCatalog.get(name).get("thing_classes")
        if coco_file is None or classes == list(coco_file.categories.values()):
            raise
        raise ValueError(
            f"{coco_file.path}: its categories are not those that {name} is registered with; "
            "give the data set as JSON:IMAGE_FOLDER instead"
        ) from error
    if coco_file is not None and coco_file.num_faulty:
        records = [
            _without_faults(record, coco_file)
            if record.get("image_id") in coco_file.faulty_images
            else record
            for record in records
        ]
        logger.warning(
            "%s: left out %d annotations; the first: %s",
            coco_file.path,
            coco_file.num_faulty,
            coco_file.first_fault,
        )
    return records


def _without_faults(record: dict, coco_file: CocoFile) -> dict:
    annotations = [
        annotation
        for annotation in record.get("annotations", [])
        if area_fault(annotation, needs_mask=coco_file.has_masks) is None
    ]
    return {**record, "annotations": annotations}
