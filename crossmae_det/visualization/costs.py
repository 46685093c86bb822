"""Pictures of what backbones cost: latency by resolution, AP by FLOPs, growth of blocks."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from crossmae_det.checkpoint import atomic_path

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
