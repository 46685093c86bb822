"""Plots: grids of images, and the curves of a run from its ``metrics.json``."""

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

logger = logging.getLogger(__name__)

CELL_INCHES = 2.6  # longer side of an image in a grid
CAPTION_INCHES = 0.3
DOTS_PER_INCH = 100

SMOOTHING = 0.02  # reach of the running mean on either side, as a fraction of the points
MAX_NAMES_IN_LEGEND = 4
VALIDATION = "val/total_loss"  # drawn beside the total loss of training

# Name -> iteration -> value, in order of the iterations.
Series = dict[str, dict[int, float]]


def image_grid(
    columns: Mapping[str, Tensor], captions: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Write a PNG of images in columns, one row per image, atomically.

    Args:
        columns: title -> (N, 3, height, width) uint8 in RGB, on any device.
        captions: N lines, one for each row.
        path: the file to write.

    Raises:
        OSError: the file cannot be written.
    """
    height, width = next(iter(columns.values())).shape[-2:]
    scale = CELL_INCHES / max(height, width)
    row_inches = height * scale + CAPTION_INCHES
    size = len(columns) * width * scale, len(captions) * row_inches + CAPTION_INCHES
    figure = _figure(size, pad=0.03)
    cells = figure.subplots(len(captions), len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        cells[0, column].set_title(title, fontsize=11)
        for row, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
            axes = cells[row, column]
            axes.imshow(image, interpolation="nearest")  # small images keep their pixels
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for row, caption in enumerate(captions):
        # In a file name, "$" does not start a formula.
        cells[row, 0].set_xlabel(caption, fontsize=9, loc="left", parse_math=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def read_metrics(metrics_json: str | os.PathLike[str]) -> Series:
    """Read the JSON lines of a run's ``metrics.json``.

    A resumed run repeats iterations: the last value counts, and later values of the abandoned run
    are dropped. A line cut short by a kill is skipped.

    Returns:
        Name -> iteration -> value, in order of the iterations; NaN for non-finite values.

    Raises:
        ValueError: the file does not exist, or has no metrics.
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
        except (ValueError, AttributeError, KeyError, TypeError, OverflowError):
            skipped += bool(line.strip())
            continue
        for name, value in record.items():
            if value is None:  # JSON has no NaN or infinity
                value = math.nan
            if not isinstance(value, int | float):
                continue
            values = series.setdefault(name, {})
            if values and iteration <= next(reversed(values)):
                for stale in [known for known in values if known >= iteration]:
                    del values[stale]
            values[iteration] = float(value)
    if not series:
        raise ValueError(f"{path}: no metrics: has the run written its first line yet?")
    if skipped:
        logger.warning("%s: skipped %d unreadable lines", path, skipped)
    return series


def plot_metrics(metrics_json: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Plot the losses, the learning rate and, if evaluated, the AP of a run over its iterations.

    Losses are drawn as logged values with a running mean, except for a validation loss, which is
    drawn without one. Their axis is logarithmic if they span more than a factor of ten. Non-finite
    values leave a gap and a cross on the axis below it.

    Args:
        metrics_json: detectron2's ``metrics.json``.
        png_path: the file to write, atomically; 1400 pixels wide.

    Raises:
        ValueError: the metrics file does not exist, is empty, or has nothing to plot.
        OSError: the plot cannot be written.
    """
    series = read_metrics(metrics_json)

    def select(names: Callable[[str], bool]) -> Series:
        return {name: series[name] for name in sorted(series) if names(name)}

    total = select(lambda name: name in ("total_loss", VALIDATION))
    parts = select(lambda name: name.startswith("loss_"))
    if len(parts) == 1 and "total_loss" in total:
        parts = {}  # the same curve
    panels: list[tuple[str, Series, Callable[[Axes, Series], None]]] = [
        ("Total loss", total, _draw_losses),
        ("Losses", parts, _draw_losses),
        ("COCO AP", select(lambda n: n.rpartition("/")[2] in ("AP", "AP50")), _draw_precisions),
        ("Learning rate", select(lambda name: name == "lr"), _draw_rates),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        raise ValueError(f"{metrics_json}: no total_loss, loss_*, lr or */AP to plot")
    rows = math.ceil(len(panels) / 2)
    figure = _figure((14.001, 4.6 * rows + 0.001), pad=0.15)  # matplotlib rounds pixels down
    last = max(max(values) for _, group, _ in panels for values in group.values())
    grid = figure.add_gridspec(rows, 2)
    for index, (title, group, draw) in enumerate(panels):
        row, column = divmod(index, 2)
        # An odd last panel spans the row.
        alone = index == len(panels) - 1 and column == 0
        axes = figure.add_subplot(grid[row, :] if alone else grid[row, column])
        draw(axes, group)
        _decorate(axes, title, last, len(group))
    with atomic_path(png_path) as temporary:
        figure.savefig(temporary, format="png")


def _figure(inches: tuple[float, float], pad: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=pad, h_pad=pad)
    figure = Figure(figsize=inches, dpi=DOTS_PER_INCH, layout=layout)
    FigureCanvasAgg(figure)
    return figure


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
        color, style = f"C{number % 10}", "-" if number < 10 else "--"
        label = f"{name}, last {values[finite][-1]:.3g}"
        if finite.sum() == 1 or name == VALIDATION:
            # A validation loss has few values, without the noise of batches.
            axes.plot(iterations, values, "o-", color=color, markersize=5, label=label)
            continue
        axes.plot(iterations, values, ".", color=color, alpha=0.22, markersize=4, linewidth=0)
        axes.plot(iterations, smooth(values), style, color=color, linewidth=1.8, label=label)
    if broken:
        label = f"not finite ({len(broken)} logged)"
        (marks,) = axes.plot(
            sorted(broken), [0] * len(broken), "x", color="crimson", zorder=5, label=label
        )
        marks.set(transform=axes.get_xaxis_transform(), clip_on=False)
    axes.set_ylabel("loss")
    if finite_values and 0 < 10 * min(finite_values) < max(finite_values):
        axes.set_yscale("log")


def _draw_precisions(axes: Axes, group: Series) -> None:
    # One color per task, so that AP and AP50 of a task belong together.
    tasks = sorted({name.rpartition("/")[0] for name in group})
    for name, points in group.items():
        task, _, metric = name.rpartition("/")
        iterations, values = _arrays(points)
        finite = values[np.isfinite(values)]
        last = finite[-1] if len(finite) else math.nan
        axes.plot(
            iterations,
            values,
            "o-" if metric == "AP" else "s--",
            markersize=5,
            color=f"C{tasks.index(task) % 10}",
            label=f"{task} {metric}".strip() + f", last {last:.2f}",
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
    # All panels share their scale, with space for a mark at the last iteration.
    axes.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if names <= MAX_NAMES_IN_LEGEND:
        axes.legend(frameon=True, framealpha=0.85, fontsize=9)
    else:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), ncols=1)


def _arrays(points: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Iterations, and values with NaN for non-finite ones."""
    values = np.array(list(points.values()), dtype=float)
    return np.array(list(points), dtype=int), np.where(np.isfinite(values), values, np.nan)


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over the finite values of a window; NaN where the value itself is NaN.

    The window stays centered and shrinks towards the ends, so that the curve does not lag.
    """
    reach = max(1, round(SMOOTHING * len(values)))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    reaches = np.minimum(reach, np.minimum(index, len(values) - 1 - index))
    low, high = index - reaches, index + reaches + 1
    mean = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(finite, mean, np.nan)
