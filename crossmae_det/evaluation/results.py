"""Evaluation results as a table for people and as JSON for programs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tabulate import tabulate

from crossmae_det.visualization.files import write_json

PER_CLASS_PREFIX = "AP-"


def write_results(
    path: str | os.PathLike[str], results: Mapping[str, Any], *, context: Mapping[str, Any]
) -> None:
    """Writes ``{"results": ..., "context": ...}`` as JSON, atomically and with full precision.

    Args:
        path: the file to write.
        results: metrics, nested to any depth, e.g. ``{"bbox": {"AP": 51.2}}``. NaN and infinite
            values become null.
        context: what the numbers were measured on: config file, checkpoint, iteration, data set,
            number of images, date, versions. Values that JSON does not know (paths, dates) are
            written as their text.

    Raises:
        OSError: ``path`` cannot be written.
    """
    write_json(
        path, {"results": _plain(results), "context": _plain(context)}, indent=2, default=str
    )


def format_table(results: Mapping[str, Any]) -> str:
    """The summary metrics as one table: a row for every task, a column for every metric.

    Args:
        results: metrics, nested to any depth; a row is every mapping that holds numbers, named by
            its keys from the outside in (``bbox``, or ``ema bbox``). Per-class metrics
            (``AP-<name>``) are left out.

    Returns:
        A table in Markdown, two decimals, ``-`` for what could not be computed; "no results" when
        there is no number.
    """
    rows = [(name, metrics) for name, metrics in _rows(results, ()) if metrics]
    if not rows:
        return "no results"
    columns = list(dict.fromkeys(key for _, metrics in rows for key in metrics))
    cells = [
        [name, *(_cell(metrics.get(key, math.nan)) for key in columns)] for name, metrics in rows
    ]
    return _markdown(cells, ["", *columns])


def format_per_class(results: Mapping[str, Mapping[str, float]], *, blocks: int = 3) -> str:
    """AP of every class, the tasks side by side.

    Args:
        results: ``{task: {"AP-<name>": value, ...}}``; the order is that of the first task.
        blocks: how many classes share a line at most.

    Returns:
        A table in Markdown, ``-`` for a class without ground truth; empty when there is no
        per-class metric.
    """
    tasks = list(results)
    all_keys = (key for metrics in results.values() for key in metrics)
    keys = list(dict.fromkeys(key for key in all_keys if key.startswith(PER_CLASS_PREFIX)))
    if not keys:
        return ""
    blocks = max(1, min(blocks, math.ceil(len(keys) / 8)))
    height = math.ceil(len(keys) / blocks)
    lines: list[list[str]] = [[] for _ in range(height)]
    for index, key in enumerate(keys):
        name = key.removeprefix(PER_CLASS_PREFIX)
        lines[index % height] += [
            name,
            *(_cell(results[task].get(key, math.nan)) for task in tasks),
        ]
    used = math.ceil(len(keys) / height)
    width = used * (1 + len(tasks))
    cells = [line + [""] * (width - len(line)) for line in lines]
    headers = ["category", *(f"{task} AP" for task in tasks)] * used
    return _markdown(cells, headers, period=1 + len(tasks))


def _rows(
    node: Mapping[str, Any], names: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, float]]]:
    metrics = {
        key: float(value)
        for key, value in node.items()
        if isinstance(value, int | float | np.number) and not key.startswith(PER_CLASS_PREFIX)
    }
    yield " ".join(names), metrics
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _rows(value, (*names, str(key)))


def _markdown(cells: list[list[str]], headers: list[str], period: int | None = None) -> str:
    period = period or len(headers)
    alignment = ["left" if column % period == 0 else "right" for column in range(len(headers))]
    # The numbers are text by now: tabulate must neither parse nor reformat them.
    return tabulate(
        cells, headers=headers, tablefmt="pipe", colalign=alignment, disable_numparse=True
    )


def _cell(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def _plain(value: Any) -> Any:
    """``value`` with numpy numbers as Python's, mappings as dicts, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
