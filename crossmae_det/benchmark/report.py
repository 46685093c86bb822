"""Reports of the benchmark: tables for the terminal, Markdown and CSV, JSON, and plots."""

import csv
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from tabulate import tabulate

from crossmae_det.engine.run_record import cpu_name
from crossmae_det.model_zoo.records import read_records
from crossmae_det.utils import atomic_path
from crossmae_det.utils.files import write_json

# Increase it when an older reader would misread the JSON.
JSON_VERSION = 2

PLOT_FORMATS = ("png", "svg")

# Image size of the detectors whose box AP is published.
DETECTION_SIZE = 1024


@dataclass(frozen=True)
class Column:
    """A column of a table of records.

    Attributes:
        header: its title.
        key: of the value in a record; dots lead into nested ones.
        format: a format specification, as in ``format(value, ".1f")``.
        scale: factor of the value, for another unit.
    """

    header: str
    key: str
    format: str = ""
    scale: float = 1

    def cell(self, record: Mapping[str, Any]) -> str:
        """The value as text; a dash where the record has none."""
        value: Any = record
        for key in self.key.split("."):
            value = value.get(key)
            if value is None:
                return "-"
        return format(value if self.scale == 1 else self.scale * value, self.format)


@dataclass(frozen=True)
class Section:
    """One table of a report.

    Attributes:
        key: its name in the JSON.
        title: the subject of the measurement.
        columns: of the table; the first one names the rows.
        records: one per row, in full precision. The ``failure`` of a record, where it is not empty,
            is shown in the first column that the record has no value for.
        notes: sentences below the table: units, and how it was measured.
        values: what the JSON holds; the records by default.
    """

    key: str
    title: str
    columns: Sequence[Column]
    records: Sequence[Mapping[str, Any]]
    notes: Sequence[str]
    values: Any = None

    def __post_init__(self) -> None:
        if self.values is None:
            object.__setattr__(self, "values", self.records)

    @property
    def headers(self) -> list[str]:
        return [column.header for column in self.columns]

    @property
    def rows(self) -> list[list[str]]:
        rows = [[column.cell(record) for column in self.columns] for record in self.records]
        for row, record in zip(rows, self.records, strict=True):
            if record.get("failure"):
                row[row.index("-")] = record["failure"]
        return rows

    def table(self, style: str) -> str:
        """The table in one of tabulate's styles."""
        alignment = ["left", *["right"] * (len(self.columns) - 1)]
        # The cells are formatted already: tabulate must not parse numbers again.
        return tabulate(self.rows, self.headers, style, colalign=alignment, disable_numparse=True)


@dataclass(frozen=True)
class Report:
    """Tables, and the environment they were measured in. Files are written atomically.

    Attributes:
        command: the command line that produces it.
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
        return "\n\n".join([*parts, f"{self.command}\n{machine(self.environment)}"])

    def write_markdown(
        self, path: str | os.PathLike[str], images: Mapping[str, str] | None = None
    ) -> None:
        """Write the tables as Markdown, for a README.

        Args:
            path: the file to write.
            images: key of a section -> address of the image that follows its table.
        """
        parts = []
        for section in self.sections:
            parts += [f"**{section.title}**", section.table("pipe"), " ".join(section.notes)]
            if images and section.key in images:
                parts.append(f"![{section.title}]({images[section.key]})")
        text = "\n\n".join([*parts, f"`{self.command}` on {machine(self.environment)}.\n"])
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write the results in full precision."""
        head = {"version": JSON_VERSION, "command": self.command, "environment": self.environment}
        values = {section.key: section.values for section in self.sections}
        write_json(path, head | values, indent=2, default=asdict)

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the tables, one below the other, each under the key of its section."""
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            for section in self.sections:
                writer.writerow(["section", *section.headers])
                writer.writerows([section.key, *row] for row in section.rows)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :meth:`Report.write_json` wrote.

    Raises:
        ValueError: the file is something else, or of another version.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        found = content["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} was not written by the benchmark") from error
    if found != JSON_VERSION:
        raise ValueError(
            f"{path} has results of version {found}, not {JSON_VERSION}: run the benchmark again"
        )
    return content


def environment(device: torch.device) -> dict[str, str | int]:
    """The environment that results depend on: CPU, threads, versions, device."""
    result: dict[str, str | int] = {
        "CPU": f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("torchvision", "detectron2", "timm")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        result["GPU memory"] = f"{memory / 2**30:.0f} GiB"
        result |= {"CUDA": torch.version.cuda or "none", "driver": driver_version()}
    return result


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Version of NVIDIA's driver, such as "580.65.06"; "unknown" where Linux does not tell it."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    match = re.search(r"Module\b.*?\s(\d+\.[\d.]+)\s", text)
    return match[1] if match else "unknown"


def machine(environment: Mapping[str, Any]) -> str:
    """An environment in one line."""
    return ", ".join(f"{name}: {value}" for name, value in environment.items())


@dataclass(frozen=True)
class PublishedAP:
    """Published COCO box AP of a detector.

    Attributes:
        backbone: name of its backbone in the benchmark.
        weights: method of its pretraining.
        box_ap: in percent; MODEL_ZOO.md has the sources.
    """

    backbone: str
    weights: str
    box_ap: float


def published_ap() -> dict[str, PublishedAP]:
    """The published AP of the benchmark's backbones, by their names."""
    rows = [row for table in read_records("published")["tables"] for row in table["rows"]]
    return {
        row["benchmark"]: PublishedAP(row["benchmark"], row["weights"], row["box AP"])
        for row in rows
        if "benchmark" in row
    }


def plot_sections(sections: Iterable[Section], folder: str | os.PathLike[str]) -> list[Path]:
    """Plot latency, memory and published AP of backbones, and the growth of blocks.

    Args:
        sections: of a report; other sections, and cases that failed, are not plotted.
        folder: for the plots.

    Returns:
        The files written, PNG and SVG.

    Raises:
        OSError: a file cannot be written.
    """
    values = {section.key: section.values for section in sections}
    records = [record for record in values.get("backbones", []) if not record["failure"]]
    known = published_ap()
    precision = [
        (known[record["backbone"]], record["flops"] / 1e9)
        for record in values.get("backbones", [])
        if record["backbone"] in known and record["image_size"] == DETECTION_SIZE
    ]
    figures = {}
    if "growth" in values:
        figures["growth"] = _plot_growth(values["growth"])
    if records:
        figures["latency"] = _plot_latency(records)
    if precision:
        figures["precision"] = _plot_precision(precision)
    return save_figures(figures, folder)


def save_figures(figures: Mapping[str, Figure], folder: str | os.PathLike[str]) -> list[Path]:
    """Write figures by name, as PNG and SVG; returns the files.

    Raises:
        OSError: a file cannot be written.
    """
    files = []
    for name, figure in figures.items():
        for suffix in PLOT_FORMATS:
            files.append(Path(folder, f"{name}.{suffix}"))
            with atomic_path(files[-1]) as temporary:
                figure.savefig(temporary)
    return files


def _plot_latency(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Latency of an image and peak memory, against the image size."""
    figure, (time, memory) = new_figure(2)
    curves: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["image_size"]):
        curves.setdefault((record["backbone"], record["batch_size"]), []).append(record)
    several = len({batch for _, batch in curves}) > 1
    for (name, batch), points in curves.items():
        sizes = [point["image_size"] for point in points]
        label = f"{name}, batch {batch}" if several else name
        latency = [1e3 * point["median_seconds"] / batch for point in points]
        time.plot(sizes, latency, "o-", markersize=4, label=label)
        memory.plot(sizes, [point["peak_bytes"] / 2**20 for point in points], "o-", markersize=4)
    first = records[0]
    step = "training step" if first["train"] else "forward pass"
    where = f"{step}, {first['precision']}, {first['device']}"
    for axes, title, unit in (time, "Latency of an image", "ms"), (memory, "Peak memory", "MiB"):
        decorate(axes, f"{title}: {where}", "image size (pixels)", unit)
        axes.set_ylim(bottom=0)
        _mark_sizes(axes, {record["image_size"] for record in records})
    _add_legend(time)
    return figure


def _plot_precision(points: Sequence[tuple[PublishedAP, float]]) -> Figure:
    """Published AP of backbones, against the GFLOPs of a forward pass."""
    figure, (axes,) = new_figure(1)
    for known, gflops in dict(points).items():
        axes.plot(gflops, known.box_ap, "o")
        axes.annotate(
            f"{known.backbone}, {known.weights}",
            (gflops, known.box_ap),
            xytext=(0, 8),
            textcoords="offset points",
            fontsize=9,
            ha="center",
        )
    axes.margins(0.35)
    title = "Published box AP on COCO against cost"
    decorate(axes, title, "GFLOPs of a forward pass", "box AP (%)")
    return figure


def _plot_growth(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Time and memory of blocks, against the image size; both axes are logarithmic."""
    figure, panels = new_figure(2)
    for axes, title, unit, key, exponent, scale in (
        (panels[0], "Time of one block", "ms", "median_seconds", "time_exponent", 1e3),
        (panels[1], "Peak memory of one block", "MiB", "peak_bytes", "memory_exponent", 2**-20),
    ):
        decorate(axes, title, "image size (pixels)", unit)
        axes.set(xscale="log", yscale="log")
        sizes: set[int] = set()
        for kind, curve in curves.items():
            points = {p["image_size"]: scale * p[key] for p in curve["points"] if p.get(key)}
            if points:
                power = curve[exponent]
                label = f"{kind} block" + ("" if power is None else f", size ** {power:.2f}")
                axes.plot([*points], [*points.values()], "o-", label=label)
                sizes |= points.keys()
        if sizes:
            _mark_sizes(axes, sizes)
            _add_legend(axes)
    return figure


def new_figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    """A figure with panels side by side."""
    figure = Figure(figsize=(6.6 * panels, 4.8), dpi=110, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _mark_sizes(axes: Axes, sizes: Iterable[int]) -> None:
    """Tick the image sizes that were measured, and no others."""
    axes.set_xticks(sorted(sizes))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)


def decorate(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, labels of the axes, and a grid."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _add_legend(axes: Axes) -> None:
    axes.legend(frameon=True, framealpha=0.85, fontsize=9)
