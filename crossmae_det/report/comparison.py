"""The page that compares runs: headline numbers, curves, configs and classes, side by side."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crossmae_det.report.analysis import per_class
from crossmae_det.report.blocks import (
    DASH,
    Block,
    Cell,
    Charts,
    Note,
    Table,
    count,
    decimal,
    duration,
    finite,
)
from crossmae_det.report.charts import Chart, Line, line_chart, number
from crossmae_det.report.config_diff import differences
from crossmae_det.report.run_files import Run, last_finite, read_run
from crossmae_det.report.sections import SUMMARY, images_per_second, results_by_task, task_title

MOST_CLASSES = 400  # with the greatest differences


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read the folders of several runs, with names that tell them apart.

    Raises:
        ValueError: see :func:`read_run`; or a folder is given twice.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if twice := {path for path in paths if paths.count(path) > 1}:
        raise ValueError(f"{sorted(twice)[0]} is given twice: name different runs")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):  # a/run, b/run
        base = os.path.commonpath(paths)
        names = [os.path.relpath(path, base) for path in paths]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def numbers(runs: Sequence[Run]) -> list[Block]:
    """The headline numbers, each with its difference to the first run."""
    rows: list[list[Cell | str]] = [["status", *(run.status.text for run in runs)]]
    results = [results_by_task(run) for run in runs]
    for task in dict.fromkeys(task for found in results for task in found):
        for metric in SUMMARY:
            values = [finite(found.get(task, {}).get(metric)) for found in results]
            if any(value is not None for value in values):
                rows.append([f"{task_title(task)} {metric}", *_with_differences(values, decimal)])
    losses = {
        "total_loss": "loss",
        "val/total_loss": "validation loss",
        "reconstruction_psnr": "reconstruction PSNR (dB)",
    }
    for name, title in losses.items():
        values = [run.last(name) for run in runs]
        if any(value is not None for value in values):
            rows.append(
                [title, *_with_differences(values, number, lower=name != "reconstruction_psnr")]
            )
    rates = [last_finite(images_per_second(run)) for run in runs]
    rows.append(["images per second", *(number(rate) for rate in rates)])
    rows.append(["iterations", *(count(run.iterations or None) for run in runs)])
    rows.append(["time", *(duration(run.seconds) for run in runs)])
    memory = [run.last("max_memory_gib") for run in runs]
    rows.append(["peak memory (GiB)", *(decimal(value, 1) for value in memory)])
    rows = [row for row in rows if any(_text(cell) != DASH for cell in row[1:])]
    note = f"Differences are to {runs[0].name}. AP and AR in percent."
    return [Table(["", *(run.name for run in runs)], rows, note=note)]


def _text(cell: Cell | str) -> str:
    return cell if isinstance(cell, str) else cell.text


def _with_differences(
    values: Sequence[float | None], show: Callable[[float | None], str], lower: bool = False
) -> list[Cell]:
    """A cell for each value; from the second on with the difference to the first.

    Args:
        values: None where there is none.
        show: a value as text.
        lower: lower values are better.
    """
    cells = []
    first = values[0] if values else None
    for index, value in enumerate(values):
        text, tone = show(value), ""
        if index and value is not None and first is not None:
            difference = value - first
            shown = show(abs(difference))
            if float(shown.replace(",", "")) == 0:
                text += " (±0)"
            else:
                text += f" ({'+' if difference > 0 else '−'}{shown})"
                tone = "good" if (difference > 0) != lower else "bad"
        cells.append(Cell(text, value, tone=tone))
    return cells


def curves(runs: Sequence[Run]) -> list[Block]:
    """AP, losses, learning rate and throughput of all runs in the same charts."""
    end = max(run.iterations for run in runs)
    names = {name for run in runs for name in run.metrics if name.endswith("/AP")}
    charts: list[Chart | None] = []

    def chart(title: str, name: str, **options: Any) -> None:
        noisy = options.pop("noisy", False)
        charts.append(
            line_chart(
                title,
                [
                    Line(run.name, run.metrics[name], noisy=noisy, color=index)
                    for index, run in enumerate(runs)
                    if name in run.metrics
                ],
                x_max=end,
                **options,
            )
        )

    for name in sorted(names, key=lambda name: (name.startswith("ema/"), "segm" not in name, name)):
        task = name.removesuffix("/AP").replace("/", " ")
        chart(f"{task_title(task)} AP", name, zero=True)
    chart("Total loss", "total_loss", noisy=True, log=True)
    chart("Validation loss", "val/total_loss", log=True)
    chart("Reconstruction PSNR (dB)", "reconstruction_psnr")
    chart("Learning rate", "lr", zero=True)
    lines = [Line(run.name, images_per_second(run), color=index) for index, run in enumerate(runs)]
    charts.append(line_chart("Throughput (images per second)", lines, zero=True, x_max=end))
    found = [one for one in charts if one is not None]
    return [Charts(found)] if found else []


def configs(runs: Sequence[Run]) -> list[Block]:
    """The keys of the configs that differ between runs."""
    known = [run for run in runs if run.config]
    blocks: list[Block] = []
    if len(known) > 1:
        rows = [[key, *values] for key, values in differences([run.config for run in known])]
        if rows:
            columns = ["key", *(run.name for run in known)]
            blocks.append(Table(columns, rows, text_columns=len(columns)))
        else:
            blocks.append(Note("The configs are the same."))
    if missing := [run.name for run in runs if not run.config]:
        blocks.append(Note(f"Without a config.yaml: {', '.join(missing)}."))
    return blocks


def classes(runs: Sequence[Run]) -> list[Block]:
    """AP of every class in all runs, the greatest differences first."""
    found = [per_class(run) for run in runs]
    blocks: list[Block] = []
    for task in dict.fromkeys(task for tasks in found for task in tasks):
        names = dict.fromkeys(name for tasks in found for name in tasks.get(task, {}))
        rows: list[tuple[float, list[Cell | str]]] = []
        for name in names:
            values = [finite(tasks.get(task, {}).get(name, {}).get("AP")) for tasks in found]
            if all(value is None for value in values):
                continue
            measured = [value for value in values if value is not None]
            spread = max(measured) - min(measured) if len(measured) > 1 else -1.0
            cells = _with_differences(values, lambda value: decimal(value, 1))
            rows.append((spread, [name, *cells]))
        rows.sort(key=lambda row: -row[0])
        if rows:
            more = f" The {MOST_CLASSES} of {len(rows)} classes with the greatest differences."
            blocks.append(
                Table(
                    ["class", *(run.name for run in runs)],
                    [row for _, row in rows[:MOST_CLASSES]],
                    f"{task_title(task)} AP of each class",
                    f"Sorted by difference.{more if len(rows) > MOST_CLASSES else ''}",
                    sortable=True,
                )
            )
    return blocks


BUILDERS: Sequence[tuple[str, Callable[[Sequence[Run]], Sequence[Block]]]] = (
    ("Numbers", numbers),
    ("Curves", curves),
    ("Configuration", configs),
    ("Classes", classes),
)
