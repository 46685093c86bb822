"""Pictures in rows and columns, with titles and captions."""

import os
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from crossmae_det.checkpoint import atomic_path

CELL_INCHES = 2.6
DOTS_PER_INCH = 100


def picture_grid(
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
