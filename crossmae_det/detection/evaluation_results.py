"""The results of an evaluation: the results file, and tables for the log."""

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tabulate import tabulate

from crossmae_det.detection.coco_backends import PER_CLASS_PREFIX
from crossmae_det.detection.error_analysis import ERROR_TYPES
from crossmae_det.utils.files import atomic_path

_CONTAINERS = (dict, list, tuple, Mapping)


def write_results(
    path: str | os.PathLike[str],
    results: Mapping[str, Any],
    *,
    context: Mapping[str, Any],
    **more: Mapping[str, Any],
) -> None:
    """Write ``{"results": ..., "context": ..., ...}`` as JSON, atomically and in full precision.

    Args:
        path: the file to write.
        results: metrics, nested to any depth, e.g. ``{"bbox": {"AP": 51.2}}``. NaN and infinite
            values become null.
        context: what the numbers were measured on: config file, checkpoint, iteration, dataset,
            number of images, date, versions. Values without a JSON type (paths, dates) are written
            as text.
        more: further entries, such as "analysis".

    Raises:
        OSError: ``path`` cannot be written.
    """
    content = {"results": results, "context": context, **more}
    with atomic_path(path) as temporary:
        temporary.write_text("".join(_json_lines(content, "")) + "\n", encoding="utf-8")


def _json_lines(value: Any, indent: str) -> Iterator[str]:
    """``value`` as JSON, an entry a line. Lists of numbers, and small dicts deep inside of the
    analysis, take one line."""
    is_mapping = isinstance(value, Mapping)
    if not _is_container(value) or not value:
        yield json.dumps(_json_value(value), allow_nan=False, default=str)
        return
    inner = value.values() if is_mapping else value
    if (not is_mapping or len(indent) >= 8) and not any(map(_is_container, inner)):
        items = map(_json_value, inner)
        yield json.dumps(
            dict(zip(value, items, strict=True)) if is_mapping else list(items),
            allow_nan=False,
            default=str,
        )
        return
    keys = [f"{json.dumps(str(key))}: " for key in value] if is_mapping else [""] * len(value)
    yield "{" if is_mapping else "["
    separator = "\n"
    for key, item in zip(keys, inner, strict=True):
        yield f"{separator}{indent}  {key}"
        yield from _json_lines(item, indent + "  ")
        separator = ",\n"
    yield f"\n{indent}" + ("}" if is_mapping else "]")


def _is_container(value: Any) -> bool:
    return isinstance(value, _CONTAINERS)


def _json_value(value: Any) -> Any:
    """numpy numbers as Python's, non-finite numbers as None."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_table(results: Mapping[str, Any]) -> str:
    """The summary metrics as a Markdown table: a row for each task, a column for each metric.

    Args:
        results: ``{task: {metric: value}}``, nested to any depth: ``{"ema": {"bbox": ...}}`` is the
            row ``ema bbox``. Per-class metrics are left out.

    Returns:
        Numbers with two decimals, ``-`` for NaN and missing ones; "no results" without any metric.
    """
    found = list(_summary_rows(results))
    if not found:
        return "no results"
    columns = dict.fromkeys(itertools.chain(*(values for _, values in found)))
    rows = [[title, *(_cell(values.get(key)) for key in columns)] for title, values in found]
    return _markdown(rows, ["", *columns])


def _summary_rows(
    results: Mapping[str, Any], title: str = ""
) -> Iterator[tuple[str, dict[str, float | None]]]:
    inner = {key: value for key, value in results.items() if isinstance(value, Mapping)}
    values = {k: v for k, v in results.items() if k not in inner and not _is_class(k)}
    if values:
        yield title, values
    for key, value in inner.items():
        yield from _summary_rows(value, f"{title} {key}".lstrip())


def format_per_class(results: Mapping[str, Mapping[str, float]], *, blocks: int = 3) -> str:
    """AP of every class as a Markdown table, the tasks side by side.

    Args:
        results: ``{task: {"AP-<name>": value, ...}}``; the order is that of the first task.
        blocks: number of classes per line.

    Returns:
        Numbers with two decimals, ``-`` for a class without ground truth; empty without classes.
    """
    rows: list[list[str]] = []
    for index, key in enumerate(
        dict.fromkeys(filter(_is_class, itertools.chain(*results.values())))
    ):
        if index % blocks == 0:
            rows.append([])
        rows[-1] += [key.removeprefix(PER_CLASS_PREFIX)]
        rows[-1] += [_cell(values.get(key)) for values in results.values()]
    titles = ["category", *(f"{task} AP" for task in results)]
    return _markdown(rows, titles, repeat=len(rows[0]) // len(titles)) if rows else ""


def _is_class(metric: str) -> bool:
    return metric.startswith(PER_CLASS_PREFIX)


def _cell(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _markdown(rows: list[list[str]], titles: list[str], repeat: int = 1) -> str:
    alignment = ["left"] + ["right"] * (len(titles) - 1)
    # The numbers are formatted already: tabulate must not parse them again.
    return tabulate(
        rows,
        headers=titles * repeat,
        tablefmt="pipe",
        colalign=alignment * repeat,
        disable_numparse=True,
    )


def format_errors(analysis: Mapping[str, Mapping[str, Any]]) -> str:
    """The AP50 that each type of error costs, as a Markdown table with a row for each task.

    Args:
        analysis: task -> what `error_analysis.analyze` returns.
    """
    columns = list(ERROR_TYPES.values())
    rows = []
    for task, values in analysis.items():
        tide = values["tide"]
        costs = [tide["delta_ap"][column] for column in columns]
        rows.append([task, *map(_cell, [tide["base_ap50"], *costs])])
    return _markdown(rows, ["", "AP50", *(column.replace("_", " ") for column in columns)])
