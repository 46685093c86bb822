"""Drawings of pretraining models: reconstructions in training, and the analysis of decoders."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from torch import Tensor
from torchvision.utils import make_grid

from crossmae_det.pretraining.masked_image_model import MaskedImageModel, Panels
from crossmae_det.utils import atomic_path
from crossmae_det.utils.plots import image_grid

logger = logging.getLogger(__name__)

# Label, color and marker of what mask tokens attend to, in the order of the columns.
KEY_STYLES = (
    ("visible patches", "tab:blue", "o"),
    ("masked patches", "tab:orange", "s"),
    ("class token", "tab:gray", "^"),
)


class ReconstructionVisualizer:
    """Reconstruct fixed images under a fixed masking, periodically in training.

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


def draw_decoder_attention(
    mass: np.ndarray, relative: np.ndarray, png_path: str | os.PathLike[str]
) -> None:
    """Draw where the mask tokens of an MAE attend, by decoder block.

    On the left the mean attention that a token of each group gets, relative to uniform attention,
    which is a dashed line at 1 on a logarithmic axis; on the right the probability that goes to
    each group.

    Args:
        mass: (depth, 3) probabilities, to visible patches, masked patches and the class token.
        relative: (depth, 3), the same over those of uniform attention; positive.
        png_path: the PNG, written atomically, 1400 pixels wide.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(14, 5.4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(1, color="black", linestyle="--", linewidth=1.2, label="uniform attention")
    bottom = np.zeros(len(mass))
    for (name, color, marker), share, ratio in zip(KEY_STYLES, mass.T, relative.T, strict=True):
        label = f"{name}, mean {ratio.mean():.2f}"
        left.plot(ratio, marker=marker, color=color, linewidth=1.8, label=label)
        label = f"{name}, mean {share.mean():.2f}"
        bars = right.bar(range(len(mass)), share, bottom=bottom, color=color, label=label)
        # Thinner bars are too small for a number.
        numbers = [f"{value:.2f}" if value >= 0.05 else "" for value in share]
        right.bar_label(bars, numbers, label_type="center", fontsize=8, color="white")
        bottom = bottom + share
    left.set_title(
        "Attention of mask tokens per key, relative to uniform", loc="left", fontweight="bold"
    )
    left.set_yscale("log", base=2)
    # At least a factor of two on either side, so that small differences look small.
    low, high = left.get_ylim()
    left.set_ylim(min(low, 0.5), max(high, 2))
    left.yaxis.set_major_locator(LogLocator(base=2, numticks=12))
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    left.grid(alpha=0.3)
    right.set_title("Where their attention goes", loc="left", fontweight="bold")
    right.set(ylabel="probability", ylim=(0, 1))
    for axes in (left, right):
        axes.set(xlabel="decoder block", xlim=(-0.6, len(mass) - 0.4))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.spines[["top", "right"]].set_visible(False)
        # Below the axes, where there are neither curves nor bars.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    with atomic_path(png_path) as temporary:
        figure.savefig(temporary)


def draw_feature_usage(
    weights: np.ndarray,
    contribution: np.ndarray,
    names: Sequence[str],
    png_path: str | os.PathLike[str],
) -> None:
    """Draw which features of the encoder each decoder block of a CrossMAE reads.

    Above the learned weights with their signs, below the contributions in percent; a row by decoder
    block, a column by feature.

    Args:
        weights: (depth, K), as learned.
        contribution: (depth, K) in [0, 1]; a row sums to 1.
        names: of the K features.
        png_path: the PNG, written atomically; it grows with depth and K.

    Raises:
        OSError: the file cannot be written.
    """
    depth, count = weights.shape
    # A cell holds a signed number with two decimals.
    size = max(7.0, 1.8 + 0.52 * count), 2 * (1.4 + 0.36 * depth)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1)
    largest = float(np.abs(weights).max())
    # Zero is added because a small negative number is rounded to -0.
    _draw_map(above, weights.round(2) + 0.0, "{:.2f}", "RdBu_r", (-largest, largest))
    above.set_title("Learned weight", loc="left", fontweight="bold")
    percent = 100 * contribution
    _draw_map(below, percent, "{:.0f}", "Blues", (0.0, float(percent.max())))
    below.set_title("Contribution to the decoder block, %", loc="left", fontweight="bold")
    for axes in (above, below):
        axes.set(xlabel="feature of the encoder", ylabel="decoder block")
        axes.set_xticks(range(count), [name.replace(" ", "\n") for name in names], fontsize=8)
        axes.set_yticks(range(depth), [str(index) for index in range(depth)], fontsize=8)
    with atomic_path(png_path) as temporary:
        figure.savefig(temporary)


def _draw_map(
    axes: Axes, values: np.ndarray, number: str, cmap: str, limits: tuple[float, float]
) -> None:
    """Draw a cell for each value, colored between the limits, with the number in it."""
    image = axes.imshow(values, cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(values):
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5  # luma
        color = "white" if dark else "black"
        text = number.format(value)
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
