"""The report of ``crossmae-det benchmark-gpu``: targets, tables and plots."""

import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from crossmae_det.benchmark.groups import GroupResult, target_section
from crossmae_det.benchmark.report import (
    Report,
    decorate,
    environment,
    new_figure,
    save_figures,
)

# Names of the files, without the suffix.
NAME = "benchmark_gpu"

BAR_COLOR = "#4477aa"
# Inches of a bar, and of what surrounds them.
BAR_HEIGHT, MARGIN = 0.32, 1.2


def gpu_report(results: Sequence[GroupResult], command: str, device: torch.device) -> Report:
    """The tables of a run, the targets first.

    Args:
        results: from :func:`.groups.run_groups`.
        command: the command line.
        device: what was measured.
    """
    targets = target_section(results)
    sections = [targets] if targets else []
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    facts = environment(device) | {"date": date}
    return Report(command, facts, [*sections, *(result.section() for result in results)])


def write_report(
    report: Report, results: Sequence[GroupResult], folder: str | os.PathLike[str]
) -> list[Path]:
    """Write the JSON, the Markdown with the plots, and the plots; returns the files.

    Raises:
        OSError: a file cannot be written.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    json, markdown = (Path(folder, f"{NAME}.{suffix}") for suffix in ("json", "md"))
    report.write_json(json)
    figures = plots(results)
    report.write_markdown(markdown, {key: f"{key}.png" for key in figures})
    return [json, markdown, *save_figures(figures, folder)]


def plots(results: Sequence[GroupResult]) -> dict[str, Figure]:
    """Time and memory of the cases of each group, by the key of the group. Groups that were not
    timed, and cases that failed, are left out."""
    figures = {}
    for result in results:
        records = [r for _, r in sorted(result.records.items()) if r.get("milliseconds")]
        if records:
            figures[result.group.key] = _bars(result.group.title, records)
    return figures


def _bars(title: str, records: Sequence[Mapping[str, Any]]) -> Figure:
    names = [" ".join(str(record[key]) for key in LABELS if key in record) for record in records]
    memory = [record["peak_bytes"] for record in records]
    figure, panels = new_figure(2 if all(memory) else 1)
    figure.set_figheight(BAR_HEIGHT * len(records) + MARGIN)
    times = [record["milliseconds"] for record in records]
    errors = [[t.median - t.low for t in times], [t.high - t.median for t in times]]
    medians = [t.median for t in times]
    panels[0].barh(names, medians, xerr=errors, color=BAR_COLOR, error_kw={"capsize": 2})
    decorate(panels[0], title, "ms: median and range", "")
    if all(memory):
        panels[1].barh(names, [each / 2**20 for each in memory], color=BAR_COLOR)
        decorate(panels[1], "Peak memory", "MiB", "")
        panels[1].set_yticklabels([])
    for axes in panels:
        axes.invert_yaxis()
    return figure


# Of an entry, for its bar.
LABELS = ("case", "mode")
