"""The analysis of the detections of a run, from ``results.json``: classes, confusions, errors.

Legend: G classes and the background.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crossmae_det.report.blocks import (
    Bar,
    Bars,
    Block,
    Cell,
    Charts,
    Columns,
    Table,
    count,
    decimal,
    finite,
)
from crossmae_det.report.charts import CLASS, Chart, calibration_chart, precision_recall_chart
from crossmae_det.report.run_files import Run
from crossmae_det.report.sections import analyses, results_by_task, task_title

CLASS_METRICS = ("AP", "AP50", "AP75", "AR")
SHARED_COUNTS = ("images", "annotations")

# More classes than this are a list of confusions instead of a matrix.
LARGEST_MATRIX = 20
MOST_CONFUSIONS = 30

BACKGROUND = "background"

# Key of an error in `tide` -> its name and what it means.
ERRORS = {
    "classification": ("Classification", "found, but as another class"),
    "localization": ("Localization", "right class, imprecise position"),
    "both": ("Both", "another class and imprecise position"),
    "duplicate": ("Duplicate", "second detection of an object"),
    "background": ("Background", "detection where there is no object"),
    "missed": ("Missed", "object without a detection"),
}
TOTALS = {
    "false_positives": ("All false positives", "wrong detections of any kind"),
    "false_negatives": ("All false negatives", "objects not found for any reason"),
}


def classes(run: Run) -> list[Block]:
    """AP of every class, and what it is confused with."""
    blocks: list[Block] = []
    found = per_class(run)
    if found:
        blocks.append(_class_table(found))
    for task, analysis in analyses(run).items():
        matrix = analysis.get("confusion_matrix")
        if matrix and matrix.get("matrix"):
            blocks += _confusion(task, matrix)
            break  # of the first task: masks, where there are any
    return blocks


def per_class(run: Run) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Task -> class -> metric -> value; of older results, AP alone."""
    found = {
        task: analysis["per_class"]
        for task, analysis in analyses(run).items()
        if analysis.get("per_class")
    }
    if found:
        return found
    for task, values in results_by_task(run).items():
        named = {k.removeprefix("AP-"): {"AP": v} for k, v in values.items() if k.startswith("AP-")}
        if named and not task.startswith("ema "):
            found[task] = named
    return found


def _class_table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    first = next(iter(found.values()))
    shared = [key for key in SHARED_COUNTS if any(key in values for values in first.values())]
    columns = ["class", *(key.replace("annotations", "objects") for key in shared)]
    measured: list[tuple[str, str]] = []
    for task, values in found.items():
        for metric in CLASS_METRICS:
            if any(metric in row for row in values.values()):
                measured.append((task, metric))
                columns.append(f"{task_title(task)} {metric}")
    rows = []
    for name in names:
        row: list[Cell | str] = [name]
        for key in shared:
            value = finite(first.get(name, {}).get(key))
            row.append(Cell(count(value), -1 if value is None else value))
        for task, metric in measured:
            value = finite(found[task].get(name, {}).get(metric))
            bar = None if value is None or metric != "AP" else min(max(value / 100, 0), 1)
            row.append(Cell(decimal(value, 1), -1 if value is None else value, bar=bar))
        rows.append(row)
    note = "In percent; a class without objects in the test set has none."
    return Table(columns, rows, "AP of each class", note, sortable=True)


def _confusion(task: str, content: Mapping[str, Any]) -> list[Block]:
    names = [str(name) for name in content["classes"]]
    matrix = np.nan_to_num(np.array(content["matrix"], dtype=float)).tolist()
    labels = [*names, BACKGROUND][: len(matrix)]
    settings = (
        f"{task_title(task)} predictions with a score of at least"
        f" {content.get('score_threshold', 0):g} and an IoU of at least"
        f" {content.get('iou_threshold', 0.5):g}."
    )
    if len(names) <= LARGEST_MATRIX:
        rows: list[list[Cell | str]] = []
        for label, values in zip(labels, matrix, strict=False):
            total = sum(values) or 1
            cells = [
                Cell(count(value) if value else "·", value, shade=value / total) for value in values
            ]
            rows.append([label, *cells])
        columns = ["object", *labels]
        note = f"Rows: the object; columns: what it is predicted as. {settings}"
        return [Table(columns, rows, "Confusion matrix", note, matrix=True)]
    background = len(names)
    confusions = [
        (value, row, column)
        for row, values in enumerate(matrix)
        for column, value in enumerate(values)
        if row != column and value and background not in (row, column)
    ]
    confusions.sort(key=lambda item: -item[0])
    rows_of_pairs: list[list[Cell | str]] = []
    for value, row, column in confusions[:MOST_CONFUSIONS]:
        share = value / (sum(matrix[row]) or 1)
        cells = [Cell(count(value), value), Cell(f"{share:.0%}", share, bar=share)]
        rows_of_pairs.append([labels[row], labels[column], *cells])
    found = len(confusions)
    note = f"The {min(found, MOST_CONFUSIONS)} most frequent of {found:,} pairs. {settings}"
    columns = ["object", "predicted as", "number", "of the objects"]
    table = Table(
        columns, rows_of_pairs, "Most frequent confusions", note, sortable=True, text_columns=2
    )
    return [table] if confusions else []


def errors(run: Run) -> list[Block]:
    """What costs AP, precision by recall, and how far scores can be trusted."""
    found = analyses(run)
    blocks: list[Block] = []
    bars = [
        _error_bars(task, analysis["tide"])
        for task, analysis in found.items()
        if (analysis.get("tide") or {}).get("delta_ap")
    ]
    if bars:
        blocks.append(Columns(bars))
    charts = []
    for task, analysis in found.items():
        curves = analysis.get("precision_recall")
        if curves and any((curves.get("precision") or {}).values()):
            charts.append(_precision_recall(task, curves))
    if charts:
        blocks.append(Charts(charts))
    calibrations = []
    for task, analysis in found.items():
        calibration = analysis.get("calibration")
        if calibration and calibration.get("bins"):
            title = f"{task_title(task)} scores and accuracy"
            expected = decimal(calibration.get("expected_calibration_error"), 3)
            largest = decimal(calibration.get("maximum_calibration_error"), 3)
            note = f"Expected calibration error {expected}, largest {largest}."
            calibrations.append(calibration_chart(title, calibration["bins"], note))
    if calibrations:
        blocks.append(Charts(calibrations))
    return blocks


def _error_bars(task: str, tide: Mapping[str, Any]) -> Bars:
    losses = {key: finite(value) for key, value in tide["delta_ap"].items()}
    counts = tide.get("counts") or {}
    largest = max([value for value in losses.values() if value is not None] + [1e-9])
    bars = []
    for key, (name, meaning) in (ERRORS | TOTALS).items():
        value = losses.get(key)
        if value is None:
            continue
        number = (
            f" ·\N{NO-BREAK SPACE}{count(counts[key])}"
            if finite(counts.get(key)) is not None
            else ""
        )
        bars.append(Bar(name, f"{meaning}{number}", decimal(value, 1), max(value / largest, 0)))
    threshold = tide.get("iou_threshold", 0.5)
    base = decimal(tide.get("base_ap50"), 1)
    note = f"AP at IoU {threshold:g} is {base}; each bar is what it would gain without that error."
    return Bars(f"{task_title(task)} errors (TIDE)", bars, note)


def _precision_recall(task: str, content: Mapping[str, Any]) -> Chart:
    precision: Mapping[str, Sequence[float | None] | None] = content["precision"]
    threshold = finite(content.get("iou_threshold")) or 0.5
    curves = {}
    for name, values in precision.items():
        if values is None:  # no ground truth
            continue
        if name == "all":
            curves[f"all classes, IoU {threshold:g}"] = values
        elif len(precision) > 2:  # the curve of a single class is that of all
            curves[CLASS + name] = values
    title = f"{task_title(task)} precision and recall"
    return precision_recall_chart(title, content["recall"], curves)
