"""Pictures of what backbones cost: latency by resolution, AP by FLOPs, growth of blocks.

Results with what they were measured on: for the terminal, for a README and for programs.
"""

import csv
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from tabulate import tabulate

from crossmae_det.utils import atomic_path
from crossmae_det.utils.files import write_json

FORMATS = ("png", "svg")


def plot_latency(cases: Sequence[Mapping[str, Any]], stem: str | os.PathLike[str]) -> list[Path]:
    """Draw the latency of one image and the peak memory against the side of the image.

    Args:
        cases: from :func:`crossmae_det.benchmark.case_values`; those that failed leave a gap.
        stem: of the files, which get ``.png`` and ``.svg``.

    Returns:
        The files; none where no case was measured.

    Raises:
        OSError: a file cannot be written.
    """
    measured = [case for case in cases if not case["failure"]]
    if not measured:
        return []
    figure, (time, memory) = _figure(2)
    names = list(dict.fromkeys((case["backbone"], case["batch_size"]) for case in measured))
    several = len({batch for _, batch in names}) > 1
    for number, (name, batch) in enumerate(names):
        own = sorted(
            (c for c in measured if (c["backbone"], c["batch_size"]) == (name, batch)),
            key=lambda case: case["image_size"],
        )
        sides = [case["image_size"] for case in own]
        label = f"{name}, batch {batch}" if several else name
        style: dict[str, Any] = dict(color=f"C{number % 10}", marker="o", markersize=4, label=label)
        latency = [1e3 * case["median_seconds"] / case["batch_size"] for case in own]
        time.plot(sides, latency, **style)
        memory.plot(sides, [case["peak_bytes"] / 2**20 for case in own], **style)
    first = measured[0]
    step = "training step" if first["train"] else "forward pass"
    where = f"{step}, {first['precision']}, {first['device']}"
    _decorate(time, f"Latency of an image: {where}", "side of the image (pixels)", "ms")
    _decorate(memory, f"Peak memory: {where}", "side of the image (pixels)", "MiB")
    for axes in (time, memory):
        _sides(axes, sorted({case["image_size"] for case in measured}))
    time.legend(frameon=True, framealpha=0.85, fontsize=9)
    return _save(figure, stem)


def plot_precision(
    points: Iterable[tuple[str, float, float]], stem: str | os.PathLike[str]
) -> list[Path]:
    """Draw the AP of backbones against their FLOPs.

    Args:
        points: (name, GFLOPs, box AP in percent).
        stem: of the files.

    Returns:
        The files; none where no AP is known.

    Raises:
        OSError: a file cannot be written.
    """
    known = list(points)
    if not known:
        return []
    figure, (axes,) = _figure(1)
    for number, (name, gflops, precision) in enumerate(known):
        axes.plot([gflops], [precision], "o", color=f"C{number % 10}")
        axes.annotate(
            name,
            (gflops, precision),
            xytext=(0, 8),
            textcoords="offset points",
            fontsize=9,
            horizontalalignment="center",
        )
    axes.margins(0.35)
    _decorate(
        axes, "Published box AP on COCO against cost", "GFLOPs of a forward pass", "box AP (%)"
    )
    return _save(figure, stem)


def plot_growth(
    curves: Mapping[str, Mapping[str, Any]], stem: str | os.PathLike[str]
) -> list[Path]:
    """Draw time and memory of blocks against the side of the image, both axes logarithmic.

    Args:
        curves: the values of :func:`crossmae_det.benchmark.growth_section`.
        stem: of the files.

    Returns:
        The files.

    Raises:
        OSError: a file cannot be written.
    """
    figure, panels = _figure(2)
    for axes, field, exponent, scale in (
        (panels[0], "seconds", "time_exponent", 1e3),
        (panels[1], "bytes", "memory_exponent", 2**-20),
    ):
        sides: set[int] = set()
        for kind, curve in curves.items():
            points = [(p["image_size"], p[field]) for p in curve["points"] if p[field]]
            if not points:
                continue
            power = curve[exponent]
            label = f"{kind} block" + ("" if power is None else f", side ** {power:.2f}")
            axes.plot(*zip(*[(s, scale * v) for s, v in points], strict=True), "o-", label=label)
            sides |= {side for side, _ in points}
        axes.set_xscale("log")
        axes.set_yscale("log")
        if not sides:
            continue
        _sides(axes, sorted(sides))
        axes.legend(frameon=True, framealpha=0.85, fontsize=9)
    _decorate(panels[0], "Time of one block", "side of the image (pixels)", "ms")
    _decorate(panels[1], "Peak memory of one block", "side of the image (pixels)", "MiB")
    return _save(figure, stem)


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6.6 * panels, 4.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, index + 1) for index in range(panels)]


def _sides(axes: Axes, sides: Sequence[int]) -> None:
    """Mark the sizes that were measured, and no others."""
    axes.set_xticks(list(sides))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)


def _decorate(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_yscale() == "linear" and y != "box AP (%)":
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, stem: str | os.PathLike[str]) -> list[Path]:
    files = []
    for suffix in FORMATS:
        path = Path(f"{os.fspath(stem)}.{suffix}")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=suffix)
        files.append(path)
    return files


# Of the JSON: another number where an older reader would misunderstand it.
JSON_VERSION = 2


@dataclass(frozen=True)
class Section:
    """One table of a report.

    Attributes:
        key: its name in the JSON.
        title: what was measured.
        headers: of the columns; the first column names the rows.
        rows: of as many texts as there are headers.
        notes: sentences below the table: units, and how it was measured.
        values: the same results with all their digits, for the JSON.
    """

    key: str
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    values: Any

    def table(self, style: str) -> str:
        """The table in one of tabulate's styles."""
        alignment = ["left", *["right"] * (len(self.headers) - 1)]
        # The numbers are text by now: tabulate must not format them anew.
        return tabulate(
            self.rows,
            headers=self.headers,
            tablefmt=style,
            colalign=alignment,
            disable_numparse=True,
        )


@dataclass(frozen=True)
class Report:
    """Tables, and what they were measured on.

    Attributes:
        command: the command line that makes it.
        environment: from :func:`environment`.
        sections: the tables.
    """

    command: str
    environment: Mapping[str, Any]
    sections: Sequence[Section]

    def __str__(self) -> str:
        """For the terminal."""
        parts = [
            "\n".join([section.title, "", section.table("simple"), "", *section.notes])
            for section in self.sections
        ]
        return "\n\n".join([*parts, f"{self.command}\n{self._machine()}"])

    def write_markdown(self, path: str | os.PathLike[str]) -> None:
        """Write the tables for a README.

        Raises:
            OSError: the file cannot be written.
        """
        parts = [
            f"**{section.title}**\n\n{section.table('pipe')}\n\n{' '.join(section.notes)}"
            for section in self.sections
        ]
        text = "\n\n".join([*parts, f"`{self.command}` on {self._machine()}.\n"])
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write the results with all their digits.

        Raises:
            OSError: the file cannot be written.
        """
        results = {section.key: section.values for section in self.sections}
        head = {"version": JSON_VERSION, "command": self.command}
        write_json(path, head | {"environment": dict(self.environment)} | results, indent=2)

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the tables, one below the other, each under the key of its section.

        Raises:
            OSError: the file cannot be written.
        """
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            for section in self.sections:
                writer.writerow(["section", *section.headers])
                writer.writerows([section.key, *row] for row in section.rows)

    def _machine(self) -> str:
        return ", ".join(f"{name}: {value}" for name, value in self.environment.items())


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :meth:`Report.write_json` wrote.

    Raises:
        ValueError: it is not that, or of another version.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        number = content.get("version")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} was not written by the benchmark: {error}") from error
    if number is None:
        raise ValueError(f"{path} was not written by the benchmark: it has no version")
    if number != JSON_VERSION:
        raise ValueError(
            f"{path} has results of version {number}, and this benchmark compares with version"
            f" {JSON_VERSION}: measure anew"
        )
    return content


def environment(device: torch.device) -> dict[str, str | int]:
    """What results depend on beside the code: CPU, cores, torch's threads, versions, device."""
    return {
        "CPU": f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("torchvision", "detectron2", "timm")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()
