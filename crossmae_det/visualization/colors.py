"""Colors of classes, and of the objects of one class."""

import colorsys
import math
from collections import Counter
from typing import Any

# Lightness of the objects of one class, one after another, beside that of the class's color.
SHADES = (0.0, -0.18, 0.14, -0.09, 0.07, -0.27)


def class_color(index: int, metadata: Any) -> tuple[float, float, float]:
    """The color of a class, RGB in [0, 1].

    Args:
        index: contiguous class index.
        metadata: its ``thing_colors`` are used where there is one for the class; otherwise hues are
            spread by the golden ratio, which keeps neighbouring indices apart for any number of
            classes.
    """
    colors = metadata.get("thing_colors") or ()
    if index < len(colors):
        red, green, blue = (channel / 255 for channel in colors[index])
        return red, green, blue
    hue = (0.56 + index * (math.sqrt(5) - 1) / 2) % 1
    return colorsys.hsv_to_rgb(hue, 0.75 if index % 2 == 0 else 0.55, 0.95)


class Colors:
    """The colors of the objects of an image, by their classes and their order."""

    def __init__(self, metadata: Any):
        self._metadata = metadata
        self._counts: Counter[int] = Counter()

    def next(self, index: int) -> tuple[float, float, float]:
        """The color of the next object of a class: the class's own first, then shades of it."""
        hue, lightness, saturation = colorsys.rgb_to_hls(*class_color(index, self._metadata))
        shade = SHADES[self._counts[index] % len(SHADES)]
        self._counts[index] += 1
        if not shade:
            return class_color(index, self._metadata)
        return colorsys.hls_to_rgb(hue, min(max(lightness + shade, 0.15), 0.9), saturation)
