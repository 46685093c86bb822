"""The zoo's records: results and checkpoints as data, each row with where it comes from.

Three JSON files lie in ``data/``: ``published.json`` has what others measured, ``measured.json``
what was measured with this project, ``checkpoints.json`` the files of weights. In each, ``origins``
names the sources, and every row lists those that it is from.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from crossmae_det.utils import atomic_path

FOLDER = Path(__file__).parent / "data"


# What an origin has to say: where something stands, or how and on what it was measured.
ORIGIN_KEYS = {
    "published": ("text", "url"),
    "checkpoints": ("text", "url"),
    "measured": ("command", "machine"),
}

# What it may say: how the command was run.
MAY_SAY = ("how",)

# The groups of checkpoints.json, and what every checkpoint has.
CHECKPOINT_GROUPS = ("pretraining", "fine_tuned", "detection")

# What a file has beside its origins.
PARTS: dict[str, tuple[str, ...]] = {
    "published": ("tables",),
    "checkpoints": CHECKPOINT_GROUPS,
    "measured": ("machines", "tables", "costs"),
}

CHECKPOINT_KEYS = ("name", "config", "holds", "license", "url", "origin")


def read_records(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Read and check one file of records.

    Args:
        name: "published", "measured" or "checkpoints".
        folder: where the files are.

    Returns:
        What the file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON, a row without an origin, or one without a value that it needs.
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
    """Write one file of records, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps(records, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(folder / f"{name}.json") as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def checkpoints(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Every checkpoint of the records, those of pretraining first."""
    records = read_records("checkpoints", folder)
    return [row for group in CHECKPOINT_GROUPS for row in records[group]]


def _rows(records: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], Sequence[str]]]:
    """(What it is called, the row, what it must have) of everything that needs an origin."""
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
        if not set(keys) <= set(origin) <= {*keys, *MAY_SAY} or not all(origin.values()):
            raise ValueError(f"the origin '{name}' must have {' and '.join(keys)}")
        if "machine" in keys and origin["machine"] not in machines:
            raise ValueError(f"the origin '{name}' is on no machine of the file's")


def _check_row(
    where: str, row: Mapping[str, Any], columns: Sequence[str], origins: Mapping[str, Any]
) -> None:
    if not row.get("origin"):
        raise ValueError(f"{where} has no origin")
    for name in row["origin"]:
        if name not in origins:
            raise ValueError(f"{where} has an origin that the file does not explain: '{name}'")
    for column in columns:
        if column not in row:
            raise ValueError(f"{where} has no '{column}'")
    if "license" in columns and not row["license"]:
        raise ValueError(f"{where} does not say its license")
