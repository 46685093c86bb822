"""Pictures of what the decoder of a pretraining model looks at."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from torch import Tensor
from torchvision.utils import make_grid

from crossmae_det.pretraining.masked_image_model import MaskedImageModel
from crossmae_det.pretraining.reconstruction import Panels
from crossmae_det.utils import atomic_path
from crossmae_det.utils.plots import image_grid

logger = logging.getLogger(__name__)


class ReconstructionVisualizer:
    """Reconstruct fixed images under a fixed masking, every so often in training.

    Writes ``reconstructions/ITERATION.png`` into the run's folder, and "reconstructions" to
    TensorBoard, a row for each image: original, masked, prediction, prediction with the visible
    patches pasted in. :class:`crossmae_det.engine.hooks.Visualization` calls it.

    Args:
        output_dir: the run's folder.
        images: (N, 3, height, width) uint8 in RGB.
        period: in iterations; 0 draws after the last iteration only.
        seed: decides the masking.
    """

    NAME = "reconstructions"

    def __init__(self, output_dir: str, images: Tensor, period: int, seed: int = 0):
        self.folder = os.path.join(output_dir, self.NAME)
        self.images = images
        self.period = period
        self.seed = seed

    def compute(self, model: MaskedImageModel) -> Panels:
        """The reconstructions of ``model``; every process takes part in a sharded one."""
        return model.reconstruct(self.images, model.fixed_noise(self.images, self.seed))

    def write(self, panels: Panels, iteration: int, storage: Any) -> None:
        """Write them, and their mean PSNR; ``storage`` is a detectron2 ``EventStorage``."""
        captions = [f"PSNR {value:.1f} dB" for value in panels.psnr.tolist()]
        path = os.path.join(self.folder, f"{iteration:07d}.png")
        image_grid(panels.columns, captions, path)
        rows = torch.stack([*panels.columns.values()], dim=1).flatten(0, 1).cpu()
        storage.put_image(self.NAME, make_grid(rows, nrow=len(panels.columns), pad_value=255))
        storage.put_scalar("reconstruction_psnr", panels.psnr.mean().item())
        logger.info("Reconstructions after %d iterations are in %s", iteration, path)


# Label, color and marker of what mask tokens attend to, in the order of the columns.
KEY_GROUPS = (
    ("visible patches", "tab:blue", "o"),
    ("masked patches", "tab:orange", "s"),
    ("class token", "tab:gray", "^"),
)


# Inches of a cell of a map: room for a signed number with two decimals.
CELL_WIDTH, CELL_HEIGHT = 0.52, 0.36


def draw_decoder_attention(
    mass: np.ndarray, relative: np.ndarray, png_path: str | os.PathLike[str]
) -> None:
    """Draws where the mask tokens of an MAE attend, by decoder block.

    On the left the mean attention that a token of each group gets, relative to uniform attention,
    which is a dashed line at 1 on a logarithmic axis; on the right the probability that goes to
    each group.

    Args:
        mass: (depth, 3) probabilities, to visible patches, masked patches and the class token.
        relative: (depth, 3), the same over those of uniform attention; positive.
        png_path: the picture, written atomically: 100 pixels an inch, 1400 pixels wide.

    Raises:
        OSError: the picture cannot be written.
    """
    # A little more than the pixels wanted: matplotlib rounds down.
    figure = _figure(14.001, 5.401)
    left, right = figure.subplots(1, 2)
    _draw_relative(left, relative)
    _draw_mass(right, mass)
    for axes in (left, right):
        axes.set_xlabel("decoder block")
        axes.set_xlim(-0.6, len(mass) - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.spines[["top", "right"]].set_visible(False)
        # Below the axes, where there is neither a curve nor a bar.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    _save(figure, png_path)


def draw_feature_usage(
    weights: np.ndarray,
    contribution: np.ndarray,
    names: Sequence[str],
    png_path: str | os.PathLike[str],
) -> None:
    """Draws which features of the encoder each decoder block of a CrossMAE reads.

    Above the learnt weights with their signs, below the contributions in percent; a row by decoder
    block, a column by feature.

    Args:
        weights: (depth, K), as learnt.
        contribution: (depth, K) in [0, 1]; a row sums to 1.
        names: of the K features.
        png_path: the picture, written atomically, at 100 pixels an inch; it grows with the map.

    Raises:
        OSError: the picture cannot be written.
    """
    depth, count = weights.shape
    figure = _figure(max(7.0, 1.8 + CELL_WIDTH * count), 2 * (1.4 + CELL_HEIGHT * depth))
    above, below = figure.subplots(2, 1)
    largest = float(np.abs(weights).max())
    # Zero is added because a small negative number is rounded to -0.
    _draw_map(above, weights.round(2) + 0.0, "{:.2f}", "RdBu_r", (-largest, largest))
    above.set_title("Learnt weight", loc="left", fontweight="bold")
    percent = 100 * contribution
    _draw_map(below, percent, "{:.0f}", "Blues", (0.0, float(percent.max())))
    below.set_title("Contribution to the decoder block, %", loc="left", fontweight="bold")
    for axes in (above, below):
        axes.set_xlabel("feature of the encoder")
        axes.set_ylabel("decoder block")
        axes.set_xticks(range(count), [name.replace(" ", "\n") for name in names], fontsize=8)
        axes.set_yticks(range(depth), [str(index) for index in range(depth)], fontsize=8)
    _save(figure, png_path)


def _draw_relative(axes: Axes, relative: np.ndarray) -> None:
    axes.axhline(1, color="black", linestyle="--", linewidth=1.2, label="uniform attention")
    for (label, color, marker), values in zip(KEY_GROUPS, relative.T, strict=True):
        text = f"{label}, mean {values.mean():.2f}"
        axes.plot(values, marker=marker, color=color, linewidth=1.8, label=text)
    axes.set_title(
        "Attention of mask tokens per key, relative to uniform", loc="left", fontweight="bold"
    )
    axes.set_yscale("log", base=2)
    # At least a factor of two on either side: small differences are to look small.
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5), max(high, 2))
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    axes.grid(alpha=0.3)


def _draw_mass(axes: Axes, mass: np.ndarray) -> None:
    bottom = np.zeros(len(mass))
    for (label, color, _), values in zip(KEY_GROUPS, mass.T, strict=True):
        text = f"{label}, mean {values.mean():.2f}"
        bars = axes.bar(range(len(mass)), values, bottom=bottom, color=color, label=text)
        # Thinner parts have no room for a number.
        numbers = [f"{value:.2f}" if value >= 0.05 else "" for value in values]
        axes.bar_label(bars, numbers, label_type="center", fontsize=8, color="white")
        bottom = bottom + values
    axes.set_title("Where their attention goes", loc="left", fontweight="bold")
    axes.set_ylabel("probability")
    axes.set_ylim(0, 1)


def _draw_map(
    axes: Axes, values: np.ndarray, number: str, cmap: str, limits: tuple[float, float]
) -> None:
    """Draws a cell for each value, colored between the limits, with the number in it."""
    image = axes.imshow(values, cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(values):
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5  # luma
        axes.text(
            column,
            row,
            number.format(value),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else "black",
        )


def _figure(width: float, height: float) -> Figure:
    """A figure of so many inches, at 100 pixels each."""
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15)
    figure = Figure(figsize=(width, height), dpi=100, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, png_path: str | os.PathLike[str]) -> None:
    with atomic_path(png_path) as temporary:
        figure.savefig(temporary, format="png")
