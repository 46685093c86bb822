"""Results and checkpoints as data, each row with its origin.

``data/`` holds three JSON files: ``published.json`` (results of others), ``measured.json`` (results
of this project) and ``checkpoints.json`` (weights). In each, ``origins`` describes the sources, and
every row lists its own.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from crossmae_det.utils import atomic_path

FOLDER = Path(__file__).parent / "data"

# Keys of an origin, and one that it may have: how the command was run.
ORIGIN_KEYS = {
    "published": ("text", "url"),
    "checkpoints": ("text", "url"),
    "measured": ("command", "machine"),
}
OPTIONAL_ORIGIN_KEYS = ("how",)

CHECKPOINT_GROUPS = ("pretraining", "fine_tuned", "detection")
CHECKPOINT_KEYS = ("name", "config", "holds", "license", "url", "origin")

# Keys of a file besides ``origins``.
PARTS: dict[str, tuple[str, ...]] = {
    "published": ("tables",),
    "checkpoints": CHECKPOINT_GROUPS,
    "measured": ("machines", "tables", "costs"),
}


def read_records(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Read and check one file of records.

    Args:
        name: "published", "measured" or "checkpoints".
        folder: where the files are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON, a row without an origin, or a row that lacks a value.
    """
    path = folder / f"{name}.json"
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        _check_origins(records["origins"], ORIGIN_KEYS[name], records.get("machines", {}))
        for where, row, columns in _rows({part: records[part] for part in PARTS[name]}):
            _check_row(where, row, columns, records["origins"])
    except KeyError as error:
        raise ValueError(f"{path}: there is no {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return records


def write_records(name: str, records: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """Write one file of records atomically.

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps(records, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(folder / f"{name}.json") as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def checkpoints(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All checkpoints, those of pretraining first."""
    records = read_records("checkpoints", folder)
    return [row for group in CHECKPOINT_GROUPS for row in records[group]]


def _rows(records: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Sequence[str]]]:
    """(Description, row, required keys) of everything that needs an origin."""
    for table in records.get("tables", []):
        for index, row in enumerate(table["rows"], 1):
            yield f"row {index} of '{table['title']}'", row, table["columns"]
    if "costs" in records:
        yield "'costs'", records["costs"], ("pretraining", "detection")
    for group in CHECKPOINT_GROUPS:
        for index, row in enumerate(records.get(group, []), 1):
            yield f"row {index} of '{group}'", row, CHECKPOINT_KEYS


def _check_origins(
    origins: Mapping[str, Mapping[str, str]], keys: Sequence[str], machines: Mapping[str, str]
) -> None:
    for name, origin in origins.items():
        if not set(keys) <= set(origin) <= {*keys, *OPTIONAL_ORIGIN_KEYS} or not all(
            origin.values()
        ):
            raise ValueError(f"the origin '{name}' must have {' and '.join(keys)}")
        if "machine" in keys and origin["machine"] not in machines:
            raise ValueError(f"the origin '{name}' names a machine that the file lacks")


def _check_row(
    where: str, row: Mapping[str, Any], columns: Sequence[str], origins: Mapping[str, Any]
) -> None:
    if not row.get("origin"):
        raise ValueError(f"{where} has no origin")
    for name in row["origin"]:
        if name not in origins:
            raise ValueError(f"{where} has an origin that the file does not describe: '{name}'")
    for column in columns:
        if column not in row:
            raise ValueError(f"{where} has no '{column}'")
    if "license" in columns and not row["license"]:
        raise ValueError(f"{where} has no license")
