"""Pictures in rows and columns, with titles and captions.

Curves of a training run from its ``metrics.json``.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from torch import Tensor

from crossmae_det.utils.files import atomic_path

CELL_INCHES = 2.6

DOTS_PER_INCH = 100


def image_grid(
    columns: Mapping[str, Tensor], captions: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Write pictures that belong together side by side, one row for each image.

    Args:
        columns: title -> (N, 3, height, width) uint8 in RGB, on any device.
        captions: N lines, one below the first picture of each row.
        path: the PNG, written atomically.

    Raises:
        OSError: the file cannot be written.
    """
    height, width = next(iter(columns.values())).shape[-2:]
    scale = CELL_INCHES / max(height, width)
    caption_inches = 0.3
    figure = Figure(
        figsize=(
            len(columns) * width * scale,
            len(captions) * (height * scale + caption_inches) + caption_inches,
        ),
        dpi=DOTS_PER_INCH,
        layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03),
    )
    FigureCanvasAgg(figure)
    cells = figure.subplots(len(captions), len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns.items()):
        cells[0, column].set_title(title, fontsize=11)
        for row, picture in enumerate(pictures.permute(0, 2, 3, 1).cpu().numpy()):
            axes = cells[row, column]
            # The blocks of a small image are to be seen as they are.
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for row, caption in enumerate(captions):
        # File names are text: "$" must not start a formula.
        cells[row, 0].set_xlabel(caption, fontsize=9, loc="left", parse_math=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


logger = logging.getLogger(__name__)


# iteration -> value, per name; in order of the iterations.
Series = dict[str, dict[int, float]]


SMOOTHING = 0.02  # of the number of points, on either side

MAX_NAMES_IN_LEGEND = 4

VALIDATION = "val/total_loss"  # drawn beside the training's total loss


def read_metrics(metrics_json: str | os.PathLike[str]) -> Series:
    """Reads the JSON lines of a run's ``metrics.json``, with null or NaN for what is not finite.

    A resumed run writes iterations again that were written before it was stopped: the last value
    counts, and what a name had beyond it belongs to the abandoned run and is dropped. A line cut
    short by a killed process is skipped.

    Args:
        metrics_json: the file.

    Returns:
        For every name, ``{iteration: value}`` in order of the iterations. Values may be NaN.

    Raises:
        ValueError: the file is missing, or holds no metrics.
    """
    path = Path(metrics_json)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot read the metrics of a run: {error.strerror}") from error
    series: Series = {}
    skipped = 0
    for line in lines:
        try:
            record = json.loads(line)
            iteration = int(record.pop("iteration"))
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError):
            skipped += bool(line.strip())
            continue
        for name, value in record.items():
            if value is None:  # what is not finite in JSON
                value = math.nan
            if isinstance(value, int | float):
                _append(series.setdefault(name, {}), iteration, float(value))
    if not series:
        raise ValueError(f"{path}: no metrics in it; has the run written its first line yet?")
    if skipped:
        logger.warning("%s: skipped %d unreadable lines", path, skipped)
    return series


def plot_metrics(metrics_json: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draws the losses, the learning rate and, where evaluated, the AP of a run over iterations.

    Losses are a smoothed line (running mean over 4 % of the points) over the logged values, that of
    a validation set is drawn as it is; their
    axis is logarithmic where they span more than a factor of ten. Values that are not finite leave
    a gap and a cross on the axis below it.

    Args:
        metrics_json: detectron2's ``metrics.json``.
        png_path: the picture, written atomically: 100 pixels an inch, 1400 pixels wide.

    Raises:
        ValueError: the metrics file is missing, empty, or has neither losses nor AP.
        OSError: the picture cannot be written.
    """
    series = read_metrics(metrics_json)
    total = {name: series[name] for name in ("total_loss", VALIDATION) if name in series}
    parts = {name: series[name] for name in sorted(series) if name.startswith("loss_")}
    rates = {name: series[name] for name in sorted(series) if name == "lr"}
    precisions = {name: series[name] for name in sorted(series) if _is_precision(name)}
    if len(parts) == 1 and "total_loss" in total:
        # The total of one loss is that loss.
        parts = {}
    panels: list[tuple[str, Series, Callable[[Axes, Series], None]]] = [
        ("Total loss", total, _draw_losses),
        ("Losses", parts, _draw_losses),
        ("COCO AP", precisions, _draw_precisions),
        ("Learning rate", rates, _draw_rates),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        raise ValueError(f"{metrics_json}: no total_loss, loss_*, lr or */AP in it to draw")

    figure = Figure(
        # A little more than the pixels wanted: matplotlib rounds down.
        figsize=(14.001, 4.6 * math.ceil(len(panels) / 2) + 0.001),
        dpi=100,
        layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15),
    )
    FigureCanvasAgg(figure)
    last = max(max(values) for _, group, _ in panels for values in group.values())
    grid = figure.add_gridspec(math.ceil(len(panels) / 2), 2)
    for index, (title, group, draw) in enumerate(panels):
        row, column = divmod(index, 2)
        # An odd last panel has the row to itself.
        alone = index == len(panels) - 1 and column == 0
        axes = figure.add_subplot(grid[row, :] if alone else grid[row, column])
        draw(axes, group)
        _decorate(axes, title, last, names=len(group))
    with atomic_path(png_path) as temporary:
        figure.savefig(temporary, format="png")


def _append(values: dict[int, float], iteration: int, value: float) -> None:
    if values and iteration <= next(reversed(values)):
        for stale in [known for known in values if known >= iteration]:
            del values[stale]
    values[iteration] = value


def _is_precision(name: str) -> bool:
    return name.rpartition("/")[2] in ("AP", "AP50")


def _draw_losses(axes: Axes, group: Series) -> None:
    finite_values: list[float] = []
    broken: set[int] = set()
    for number, (name, points) in enumerate(group.items()):
        iterations, values = _arrays(points)
        finite = np.isfinite(values)
        broken.update(iterations[~finite].tolist())
        if not finite.any():
            continue
        finite_values += values[finite].tolist()
        color = f"C{number % 10}"
        style = "-" if number < 10 else "--"
        label = f"{name}, last {_last(values):.3g}"
        if finite.sum() == 1 or name == VALIDATION:
            # There are few values of a validation set, and they have no noise of batches.
            axes.plot(iterations, values, "o-", color=color, markersize=5, label=label)
            continue
        axes.plot(iterations, values, ".", color=color, alpha=0.22, markersize=4, linewidth=0)
        axes.plot(iterations, _smooth(values), style, color=color, linewidth=1.8, label=label)
    if broken:
        where = sorted(broken)
        axes.plot(
            where,
            [0] * len(where),
            "x",
            color="crimson",
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            zorder=5,
            label=f"not finite ({len(where)} logged)",
        )
    axes.set_ylabel("loss")
    positive = [value for value in finite_values if value > 0]
    if len(positive) == len(finite_values) > 0 and max(positive) > 10 * min(positive):
        axes.set_yscale("log")


def _draw_precisions(axes: Axes, group: Series) -> None:
    # One color per task, so that AP and AP50 of a task belong together.
    tasks = sorted({name.rpartition("/")[0] for name in group})
    for name, points in group.items():
        task, _, metric = name.rpartition("/")
        iterations, values = _arrays(points)
        axes.plot(
            iterations,
            values,
            "-" if metric == "AP" else "--",
            marker="o" if metric == "AP" else "s",
            markersize=5,
            color=f"C{tasks.index(task) % 10}",
            label=f"{task} {metric}".strip() + f", last {_last(values):.2f}",
        )
    axes.set_ylabel("percent")
    axes.set_ylim(bottom=0)


def _draw_rates(axes: Axes, group: Series) -> None:
    for name, points in group.items():
        iterations, values = _arrays(points)
        axes.plot(iterations, values, marker="." if len(values) == 1 else "", label=name)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))


def _decorate(axes: Axes, title: str, last: int, names: int) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("iteration")
    # All panels share their scale, with room for a mark at the last iteration.
    axes.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if names <= MAX_NAMES_IN_LEGEND:
        axes.legend(frameon=True, framealpha=0.85, fontsize=9)
    else:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), ncols=1)


def _arrays(points: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    values = np.array(list(points.values()), dtype=float)
    return np.array(list(points), dtype=int), np.where(np.isfinite(values), values, np.nan)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over the finite values of a window, NaN where the value itself is."""
    reach = max(1, round(SMOOTHING * len(values)))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    # The window shrinks towards the ends and stays centered: no lag at the start, none at the end.
    index = np.arange(len(values))
    reaches = np.minimum(reach, np.minimum(index, len(values) - 1 - index))
    low, high = index - reaches, index + reaches + 1
    mean = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(finite, mean, np.nan)


def _last(values: Sequence[float] | np.ndarray) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return finite[-1] if finite else math.nan
