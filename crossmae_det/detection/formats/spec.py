"""The strings that name datasets in other layouts than a COCO json: ``LAYOUT:PATH[:SPLIT]``.

===============================  ==================================================================
``yolo:data.yaml``               Ultralytics' description of a dataset, or a folder that has one
``voc:FOLDER``                   Pascal VOC, or a folder of images and XML files
``cvat:annotations.xml:IMAGES``  CVAT for images 1.1 and the folder of the images
``labelme:FOLDER``               JSON files beside their images
``masks:FOLDER``                 ``images/`` and ``masks/``, PNG files with a mask or instance ids
``coco:FOLDER``                  a COCO json in the folder of its images, as Roboflow exports it
===============================  ==================================================================

Each may end with the name of a split, such as ``:train`` or ``:val``. ``coco:JSON:IMAGE_FOLDER`` is
``JSON:IMAGE_FOLDER``.
"""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass

LAYOUTS = ("yolo", "voc", "cvat", "labelme", "masks", "coco")

# Those whose classes are inferred from their objects, unless labels.txt lists them.
INFERRED_CLASSES = ("voc", "labelme", "masks")

# Names that tools give to the splits, in lower case.
ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}

COCO_JSON = "_annotations.coco.json"  # Roboflow's name

_EXAMPLES = {
    "yolo": "yolo:data.yaml",
    "cvat": "cvat:annotations.xml:IMAGE_FOLDER",
    "coco": "coco:JSON:IMAGE_FOLDER",
}


@dataclass(frozen=True)
class Spec:
    """A dataset string in its parts.

    Attributes:
        text: as the user wrote it.
        layout: one of `LAYOUTS`.
        path: the file or folder, with ``~`` expanded.
        images: of CVAT the folder of the images, "" where it is not given.
        split: "" where none is given.
    """

    text: str
    layout: str
    path: str
    images: str
    split: str


def parse(text: object) -> Spec | None:
    """The parts of a dataset string; None if it begins with no layout.

    Paths may contain colons: what exists decides where the path ends.

    Raises:
        ValueError: there is no path behind the layout.
    """
    if not isinstance(text, str):
        return None
    layout, colon, rest = text.partition(":")
    layout = layout.strip().lower()
    if not colon or layout not in LAYOUTS:
        return None
    rest = rest.strip()
    if not rest.strip(":"):
        raise ValueError(f"dataset {text!r}: add the path, as in {_example(layout)}")
    if layout == "cvat":
        xml, others = _xml_part(rest)
        images, split = ("", others) if _is_split(others) else _split_off(others)
        return Spec(text, layout, xml, images, split)
    path, split = _split_off(rest)
    return Spec(text, layout, path, "", split)


def coco_string(text: str) -> str | None:
    """``JSON:IMAGE_FOLDER`` if a string is ``coco:JSON:IMAGE_FOLDER``, else None."""
    layout, colon, rest = text.partition(":")
    pair = colon and layout.strip().lower() == "coco" and re.search(r"\.json:.", rest, re.I)
    return rest.strip() if pair else None


def suggestion(text: str) -> str:
    """How a path without a layout may be meant, as the end of a message; "" if it is none."""
    if text.lower().endswith((".yaml", ".yml")):
        return f"yolo:{text}"
    if text.lower().endswith(".xml") or ".xml:" in text.lower():
        return f"cvat:{text}"
    if os.path.isdir(os.path.expanduser(text)):
        return " or ".join(f"{layout}:{text}" for layout in LAYOUTS if layout != "cvat")
    return ""


def find_split(available: Collection[str], wanted: str) -> str | None:
    """The split with a name or one of its aliases, whatever the case; None if there is none."""
    wanted = wanted.lower()
    names = next((names for names in ALIASES.values() if wanted in names), (wanted,))
    by_name = {name.lower(): name for name in reversed(list(available))}
    return next((by_name[name] for name in (wanted, *names) if name in by_name), None)


def choose_split(spec: Spec, available: Collection[str]) -> str:
    """The split that a dataset string stands for; without a name, the one for training.

    Args:
        spec: the string.
        available: the splits of the dataset; empty if it has none.

    Returns:
        One of ``available``, "" if there is none.

    Raises:
        ValueError: there is no such split, or several and none is for training.
    """
    if not available:
        if spec.split:
            raise ValueError(
                f"dataset {spec.text!r}: {spec.path} has no splits: leave out ':{spec.split}'"
            )
        return ""
    found = find_split(available, spec.split or "train")
    if found is None and not spec.split:
        found = find_split(available, "trainval")
        if found is None and len(available) == 1:
            found = next(iter(available))
    if found is None:
        names = ", ".join(sorted(available))
        raise ValueError(
            f"dataset {spec.text!r}: {spec.path} has the splits {names}"
            + (f", but no {spec.split}" if spec.split else "")
            + ": name one of them at the end"
        )
    return found


def split_folders(folder: str) -> dict[str, str]:
    """Name -> path of the folders below one that are named like splits; {} without any."""
    known = {name for names in ALIASES.values() for name in names}
    if not os.path.isdir(folder):
        return {}
    names = sorted(name for name in os.listdir(folder) if name.lower() in known)
    folders = {name: os.path.join(folder, name) for name in names}
    return {name: path for name, path in folders.items() if os.path.isdir(path)}


def _example(layout: str) -> str:
    return _EXAMPLES.get(layout, f"{layout}:FOLDER")


def _is_split(text: str) -> bool:
    """Whether a part that may be a path or a split is a split."""
    known = {name for names in ALIASES.values() for name in names}
    return text.lower() in known and not os.path.exists(os.path.expanduser(text))


def _split_off(text: str) -> tuple[str, str]:
    """(path, split): the split is behind the last colon if the whole is not a path."""
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return path, ""
    head, colon, tail = text.rpartition(":")
    expanded = os.path.expanduser(head)
    # One letter before the colon is the drive of a Windows path.
    if colon and (os.path.exists(expanded) or (len(head) > 1 and re.fullmatch(r"[\w.-]*", tail))):
        return expanded, tail
    return path, ""


def _xml_part(text: str) -> tuple[str, str]:
    """(xml file, what follows it); of several readings, the longest file that exists."""
    ends = [i for i, character in enumerate(text) if character == ":"] + [len(text)]
    pairs = [(os.path.expanduser(text[:end]), text[end + 1 :]) for end in reversed(ends)]
    pairs = [pair for pair in pairs if pair[0].lower().endswith(".xml")]
    if not pairs:
        raise ValueError(f"dataset {'cvat:' + text!r}: name an XML file, as in {_example('cvat')}")
    return next((pair for pair in pairs if os.path.isfile(pair[0])), pairs[0])
