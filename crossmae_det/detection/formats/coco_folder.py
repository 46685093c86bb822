"""A COCO json in the folder of its images, as Roboflow exports it: ``_annotations.coco.json``."""

import os

from crossmae_det.detection.formats.content import existing_folder
from crossmae_det.detection.formats.spec import COCO_JSON, Spec, choose_split, split_folders


def splits(spec: Spec) -> list[str]:
    """The folders that are named like splits; [] if the json is in the folder itself."""
    return list(_folders(spec.path))


def find_json(spec: Spec) -> tuple[str, str]:
    """The json of a split and the folder of its images.

    Raises:
        FileNotFoundError: there is no json.
        ValueError: there is no such split.
    """
    existing_folder(spec.path, spec.text)
    folders = _folders(spec.path)
    split = choose_split(spec, folders)
    folder = folders[split] if split else spec.path
    path = os.path.join(folder, COCO_JSON)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: no such annotation file: check the dataset {spec.text!r}, or write "
            "JSON:IMAGE_FOLDER"
        )
    return path, folder


def _folders(folder: str) -> dict[str, str]:
    return {} if os.path.isfile(os.path.join(folder, COCO_JSON)) else split_folders(folder)
