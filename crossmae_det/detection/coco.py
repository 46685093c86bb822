"""Datasets named by one string: a name registered in detectron2, ``JSON:IMAGE_FOLDER``, or a layout
and a path, such as ``yolo:data.yaml`` (see `formats.spec`).

`describe` tells configs the number of images, the classes and whether there are masks, without
reading an image. `get_dataset_dicts` returns the checked records for loaders.
"""

import contextlib
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager
from torch.utils.data import Dataset, IterableDataset

from crossmae_det.detection import formats, shapes
from crossmae_det.detection.coco_annotations import id_order
from crossmae_det.detection.coco_json import CocoInfo, inspect, load
from crossmae_det.detection.coco_records import (
    CROWDS_ONLY,
    KEEP_CROWDS,
    Summary,
    adapt_records,
    category_indices,
    check_crowd,
    check_headers,
    dataset_categories,
    find_faults,
    make_records,
)
from crossmae_det.utils.image_files import locate

# COCO train2017 has 118,287 images, but published schedules count 118,000: 100 epochs are 184,375
# iterations of 64 images, and 184,375 x 64 = 100 x 118,000. `describe` does the same for this
# dataset only, so that schedules computed from it are the published ones.
_TRAIN2017_IMAGES = 118_287
_TRAIN2017_SCHEDULED_IMAGES = 118_000

# Sizes of COCO's splits, for configs that are inspected without the data.
_NUM_IMAGES = {
    "coco_2014_train": 82_783,
    "coco_2014_val": 40_504,
    "coco_2014_minival": 5_000,
    "coco_2014_valminusminival": 35_504,
    "coco_2017_train": _TRAIN2017_SCHEDULED_IMAGES,
    "coco_2017_val": 5_000,
    "coco_2017_val_100": 100,
}

_registered: dict[str, CocoInfo] = {}  # the strings that resolve_name registered

_STRINGS = "give a registered name, JSON:IMAGE_FOLDER, or a layout, as in yolo:data.yaml"


@dataclass(frozen=True)
class DatasetInfo:
    """What a config needs to know about a dataset.

    Attributes:
        num_images: number of images in an epoch.
        categories: dataset category id -> name, in the order of the contiguous class ids.
        has_masks: False when no annotation has a mask, so that only boxes can be trained.
    """

    num_images: int
    categories: dict[int, str]
    has_masks: bool


def resolve_name(spec: str) -> str:
    """Return the name under which detectron2 knows a dataset, registering the strings of files.

    Args:
        spec: a name registered in ``DatasetCatalog``, ``"instances.json:image_folder"``, or a
            string of another layout, such as ``"yolo:data.yaml:val"``. A string of files is
            registered under itself, with the metadata that detectron2's evaluators and visualizers
            need. ``DatasetCatalog.get`` loads its records.

    Raises:
        ValueError: ``spec`` is none of them, or the files cannot be read in their layout.
        FileNotFoundError: a file or the image folder does not exist.
    """
    if spec in DatasetCatalog and spec not in _registered:
        return spec
    source, image_root = _source(spec)
    info = inspect(source)
    if image_root and not os.path.isdir(image_root):
        raise FileNotFoundError(f"{image_root}: no such image folder: check the dataset {spec!r}")
    if _registered.get(spec) == info:
        return spec
    if spec in _registered:  # the file changed; metadata cannot be modified, only replaced
        DatasetCatalog.remove(spec)
        MetadataCatalog.remove(spec)
    _registered[spec] = info
    root = info.image_root or image_root
    indices = {id_: index for index, id_ in enumerate(info.categories)}
    DatasetCatalog.register(spec, lambda: _load_registered(source, root, indices))
    MetadataCatalog.get(spec).set(
        image_root=root,
        evaluator_type="coco",
        thing_classes=list(info.categories.values()),
        thing_dataset_id_to_contiguous_id=indices,
    )
    if info.image_root is None:  # in other layouts there is no json for detectron2's evaluators
        MetadataCatalog.get(spec).json_file = source
    return spec


def describe(
    spec: str,
    *,
    filter_empty: bool = False,
    max_images: int | None = None,
    crowd: str = "ignore",
) -> DatasetInfo:
    """Describe a dataset without loading its images.

    If the json of a registered name is missing, the dataset is described by its metadata, provided
    its size is known: for COCO's own names, or from ``num_images`` in the metadata.

    Args:
        spec: what `resolve_name` accepts.
        filter_empty, max_images, crowd: as in `get_dataset_dicts`; only the images that remain are
            counted. For COCO train2017, 118,000 are counted, as in its published schedules.

    Raises:
        ValueError, FileNotFoundError: as `resolve_name`; or the json is missing, its size unknown.
    """
    name = resolve_name(spec)
    metadata = MetadataCatalog.get(name)
    known = metadata.get("num_images", _NUM_IMAGES.get(name))
    info = None
    if not is_coco(name):
        records = _call_loader(name)
        if filter_empty and "annotations" in records[0]:
            records = Summary().filter_empty(records)
        annotations = (a for record in records for a in record.get("annotations", []))
        has_masks = any(a.get("segmentation") for a in annotations if not a.get("iscrowd", 0))
        num_images = len(records)
    elif known is not None and name not in _registered and not os.path.isfile(_json_file(name)):
        num_images, has_masks = known, True
    else:
        info = inspect_registered(name)
        num_images = info.num_images
        if num_images == _TRAIN2017_IMAGES and info.categories == dataset_categories(
            "coco_2017_train", None
        ):
            num_images = _TRAIN2017_SCHEDULED_IMAGES
        elif filter_empty:
            num_images = info.num_with_crowds if crowd == "keep" else info.num_with_objects
        has_masks = info.has_masks or (crowd == "keep" and info.crowds_have_masks)
    if max_images is not None:
        num_images = min(num_images, max_images)
    return DatasetInfo(num_images, dataset_categories(name, info), has_masks)


def get_dataset_dicts(
    names: str | Sequence[str],
    *,
    categories: Mapping[int, str] | None = None,
    filter_empty: bool = True,
    max_images: int | None = None,
    invalid_annotations: str | None = None,
    crowd: str = "ignore",
    skip_undecodable: bool | None = None,
) -> list[dict]:
    """Load the records of one or more datasets in detectron2's format, after checking them.

    A COCO json is checked completely and read in its clean form, see `coco_json.load`. A summary
    of what is used, left out and repaired is logged.

    Args:
        names: what `resolve_name` accepts, or a sequence of it.
        categories: id -> name in the order of the model's classes; the categories of each dataset
            are matched to them by name, whatever their ids. None takes those of the first dataset.
        filter_empty: leave out images without an annotation that is not a crowd region.
        max_images: keep only this many images, the first by image id within each dataset, the
            datasets in the order given, counted after `filter_empty`.
        invalid_annotations: for annotations whose box or mask has no area or is outside of the
            image: "error", or "skip" to leave them out with a warning. None is "error" for
            strings of files and "skip" for registered names: COCO's own files have a few.
        crowd: "ignore" trains nothing on crowd regions (``iscrowd: 1``), as COCO intends;
            "keep" makes them ordinary objects, for exports that set it on every mask.
        skip_undecodable: whether training skips images that cannot be used: they are then logged
            rather than raised. None: skipping is not an option, as in a test set.

    Returns:
        One dict per image: ``file_name``, ``height``, ``width``, ``image_id``, ``annotations``. An
        annotation without a mask has no ``segmentation``.

    Raises:
        ValueError: a dataset is invalid, or no image is left.
        FileNotFoundError: a json, an image folder or images in it are missing.
    """
    specs = [names] if isinstance(names, str) else list(names or ())
    if not specs:
        raise ValueError(f"no dataset is given: {_STRINGS}")
    if invalid_annotations not in (None, "error", "skip"):
        raise ValueError(
            f"invalid_annotations={invalid_annotations!r}: choose error, skip or null (None)"
        )
    check_crowd(crowd)
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images={max_images}: give a positive number, or null (None) for all")

    classes = dict(categories) if categories else None
    reference = "the model"
    summary = Summary()
    records: list[dict] = []
    versions: list[Any] = []
    for spec in specs:
        name = resolve_name(spec)
        loaded, own, version = _load(name, classes, reference, invalid_annotations, crowd, summary)
        if classes is None:
            classes, reference = own, spec
        if max_images is not None and all("image_id" in record for record in loaded):
            loaded = sorted(loaded, key=lambda record: id_order(record["image_id"]))
        records += loaded
        versions.append(version)
    summary.found = len(records)
    if filter_empty and "annotations" in records[0]:
        records = summary.filter_empty(records)
    source = ", ".join(specs)
    if not records:
        advice = "annotate some images"
        if summary.skipped[CROWDS_ONLY]:
            advice = f"the existing ones have iscrowd: 1; {KEEP_CROWDS}"
        raise ValueError(f"{source}: no image has an annotation to train on: {advice}")
    if max_images is not None and max_images < len(records):
        reason = f"beyond the first {max_images} by image id (max_images)"
        summary.skipped[reason] = len(records) - max_images
        records = records[:max_images]
    if all(versions):
        key = (*versions, filter_empty, max_images, crowd)
        check_headers(records, source, skip_undecodable=skip_undecodable, key=key)
    summary.log(source, records, None if classes is None else list(classes.values()))
    return records


def inspect_registered(name: str) -> CocoInfo:
    """Describe the COCO json of a registered dataset, letting its loader write the file first.

    Raises:
        ValueError, FileNotFoundError: as `coco_json.inspect`.
    """
    if name in _registered:
        return inspect(_registered[name].path)
    path = _json_file(name)
    if not os.path.isfile(path):
        with contextlib.suppress(FileNotFoundError):  # a loader may write its files when called
            DatasetCatalog.get(name)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path}: the annotations of {name} are missing: set DETECTRON2_DATASETS to the "
                "folder that has them, or give the dataset as JSON:IMAGE_FOLDER"
            )
    return inspect(path, needs_annotations=False)


def _json_file(name: str) -> str:
    path = os.fspath(MetadataCatalog.get(name).json_file)
    return PathManager.get_local_path(path) if "://" in path else path


def _source(text: str) -> tuple[str, str]:
    """What `coco_json.inspect` reads, and the image folder; "" if the layout states it."""
    if not isinstance(text, str):
        raise ValueError(f"dataset {text!r}: {_STRINGS}")
    if (pair := formats.coco_string(text)) is not None:
        return _split(pair)
    spec = formats.parse(text)
    if spec is None:
        return _split(text)
    return formats.find_json(spec) if spec.layout == "coco" else (text, "")


def _split(spec: str) -> tuple[str, str]:
    """Split JSON:IMAGE_FOLDER; either path may contain further colons."""
    pairs = [(spec[:i], spec[i + 1 :]) for i, character in enumerate(spec) if character == ":"]
    pairs = [
        (os.path.expanduser(json_file), os.path.expanduser(image_root))
        for json_file, image_root in reversed(pairs)
        if json_file.lower().endswith(".json") and image_root
    ]
    if pairs:
        # If no such json exists, the last colon gives the path that the error names.
        return next((pair for pair in pairs if os.path.isfile(pair[0])), pairs[0])
    if spec.lower().rstrip(":").endswith(".json"):
        raise ValueError(f"dataset {spec!r}: add the image folder, as in {spec.rstrip(':')}:FOLDER")
    if suggestion := formats.suggestion(spec):
        raise ValueError(f"dataset {spec!r}: name its layout, as in {suggestion}")
    similar = difflib.get_close_matches(spec, list(DatasetCatalog), n=1)
    hint = f" (did you mean {similar[0]}?)" if similar else ""
    raise ValueError(f"dataset {spec!r} is not registered in detectron2{hint}: {_STRINGS}")


def is_coco(name: str) -> bool:
    """Whether a dataset has a COCO json or is in another layout, which `coco_json` reads."""
    if name in _registered:
        return True
    metadata = MetadataCatalog.get(name)
    has_files = metadata.get("json_file") and metadata.get("image_root")
    return bool(has_files) and metadata.get("evaluator_type", "coco") == "coco"


def _is_plain(name: str) -> bool:
    """Whether the loader of a COCO json returns its content as it is, unlike a custom loader."""
    loader = DatasetCatalog[name]
    module = getattr(loader, "func", loader).__module__
    return name in _registered or module in (load_coco_json.__module__, shapes.__name__)


def _load_registered(json_file: str, image_root: str, indices: Mapping[int, int]) -> list[dict]:
    file = load(json_file)
    faults = find_faults(file, invalid_annotations="skip", crowd="ignore")
    return make_records(file, image_root, indices, faults)


def _call_loader(name: str) -> list[dict]:
    records = DatasetCatalog.get(name)
    if isinstance(records, IterableDataset):
        raise ValueError(f"dataset {name!r} is an IterableDataset: resuming needs a list")
    if isinstance(records, Dataset):
        records = [records[i] for i in range(len(records))]  # type: ignore[arg-type]
    if not len(records):
        raise ValueError(f"dataset {name!r} has no images: check its loader")
    return records


def _load(
    name: str,
    classes: Mapping[int, str] | None,
    reference: str,
    invalid_annotations: str | None,
    crowd: str,
    summary: Summary,
) -> tuple[list[dict], dict[int, str] | None, Any]:
    """Load the records of one dataset, checked if it is a COCO json.

    Returns:
        The records, with the indices of ``classes``; its own categories; and a value that changes
        when its files do, None if the images cannot be checked.
    """
    metadata = MetadataCatalog.get(name)
    image_root = os.fspath(metadata.get("image_root", ""))
    is_remote = "://" in image_root
    file, own, faults = None, None, {}
    if is_coco(name):
        info = inspect_registered(name)
        own = dataset_categories(name, info)
        file = load(info.path, needs_annotations=False)
        policy = invalid_annotations or ("error" if name in _registered else "skip")
        faults = find_faults(file, invalid_annotations=policy, crowd=crowd)
    elif metadata.get("thing_classes") is not None or classes is not None:
        own = dataset_categories(name, None)

    if file is None or own is None or not _is_plain(name):
        if file is not None and not is_remote:
            locate([image["file_name"] for image in file.images], image_root, file.info.path)
        remap = None
        if own is not None and classes is not None:
            indices = category_indices(own, classes, name, reference)
            remap = {index: indices[id_] for index, id_ in enumerate(own)}
        records = _call_loader(name)
        return adapt_records(records, remap, bool(faults), crowd, summary), own, None

    if own.keys() != info.categories.keys():
        raise ValueError(
            f"{info.path}: its categories are not those that {name} is registered with: "
            "give the dataset as JSON:IMAGE_FOLDER instead"
        )
    indices = category_indices(own, classes or own, name, reference)
    records = make_records(file, image_root, indices, faults, crowd)
    summary.faulty += len(faults)
    if metadata.get("thing_classes") is None:  # as detectron2's loader does
        metadata.thing_classes = list(own.values())
    if metadata.get("thing_dataset_id_to_contiguous_id") is None:
        metadata.thing_dataset_id_to_contiguous_id = {id_: i for i, id_ in enumerate(own)}
    return records, own, None if is_remote else (info.path, info.version, image_root)
