"""Drawing the images of the built-in data set: textured shapes, and which pixel belongs to which.

Classes differ in outline only: size, rotation, colour and texture are drawn alike for all of them.
Later shapes hide earlier ones. A shape that would make itself or another one hard to recognise is
not drawn.

Legend: H x W pixels of an image or of a window in it. Pixel i reaches from i to i + 1. Windows are
(x0, y0, x1, y1), the ends excluded.
"""

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Outline = list[Array]
Window = tuple[int, int, int, int]

CLASSES = ("ellipse", "rectangle", "triangle", "star", "ring", "cross")
SPLITS = ("train", "val")

_MAX_OBJECTS = 6
# Side of the square as large as the shape, as a fraction of the image's side.
_SIDE = (0.15, 0.45)
# A shape, and the hole of a ring, keep at least this part of their area in sight, and a shape at
# least this many pixels. With less, a ring and an ellipse, or a cross and a star, look the same.
_MIN_VISIBLE = 0.6
_MIN_PIXELS = 20
_ATTEMPTS = 20
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Scene:
    """One image and what is in it.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        owners: (H, W) uint8: 0 where the ground is seen, k where object k is, counted from 1.
        categories: for object k, at k - 1, its index into ``CLASSES``.
    """

    image: Array
    owners: Array
    categories: tuple[int, ...]


def render(split: str, number: int, *, image_size: int = 128, seed: int = 0) -> Scene:
    """Draw one image of the data set.

    Args:
        split: ``"train"`` or ``"val"``.
        number: the image's number, from 1.
        image_size: H = W in pixels.
        seed: that of the data set.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), number]))
    whole = (0, 0, image_size, image_size)
    ground_colors = _color_pair(rng, saturation=(0.05, 0.5), value=(0.25, 0.9))
    canvas = _paint(_texture(rng, whole, image_size), *ground_colors)
    ground = canvas.mean(axis=(0, 1))
    shadow_angle = rng.uniform(0, 2 * math.pi)

    owners = np.zeros((image_size, image_size), np.uint8)
    categories: list[int] = []
    # What must stay in sight: the pixels of every body and hole, and the least number of them.
    parts: list[tuple[Array, float]] = []
    count = rng.integers(1, _MAX_OBJECTS + 1)
    attempts = 0
    while len(categories) < count and (attempts < _ATTEMPTS or not categories):
        attempts += 1
        category = int(rng.integers(len(CLASSES)))
        side = image_size * math.exp(rng.uniform(*np.log(_SIDE)))
        outline = _place(rng, _OUTLINES[CLASSES[category]](rng), side, image_size)
        window = _window(outline, side, image_size)
        x0, y0, x1, y1 = window
        alpha = _coverage(outline, window)
        body = np.zeros(owners.shape, bool)
        body[y0:y1, x0:x1] = alpha >= 0.5
        left = [(part & ~body, least) for part, least in parts]
        left.append((body, max(_MIN_PIXELS, _MIN_VISIBLE * side * side)))
        for inner in outline[1:]:
            hole = np.zeros(owners.shape, bool)
            hole[y0:y1, x0:x1] = _coverage([inner], window) >= 0.5
            left.append((hole, _MIN_VISIBLE * _area(inner)))
        if any(np.count_nonzero(part) < least for part, least in left):
            continue
        parts = left
        categories.append(category)
        owners[body] = len(categories)

        view = canvas[y0:y1, x0:x1]
        view *= 1 - 0.45 * _shadow(alpha, shadow_angle, side)[..., None]
        colors = _color_pair(rng, saturation=(0.2, 0.95), value=(0.35, 1.0), away_from=ground)
        paint = _paint(_texture(rng, window, image_size), *colors)
        view += alpha[..., None] * (paint - view)

    return Scene(_expose(rng, canvas), owners, tuple(categories))


# Outlines: closed polygons of x, y; a second one is a hole.


def _ellipse(rng: np.random.Generator) -> Outline:
    return [_polygon(48) * (1.0, rng.uniform(0.65, 1.0))]


def _rectangle(rng: np.random.Generator) -> Outline:
    half_width, half_height = 1.0, rng.uniform(0.6, 1.0)
    return [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (half_width, half_height)]


def _triangle(rng: np.random.Generator) -> Outline:
    return [_polygon(3) * (1.0, rng.uniform(0.75, 1.25))]


def _star(rng: np.random.Generator) -> Outline:
    points = _polygon(10) * (1.0, rng.uniform(0.85, 1.0))
    points[1::2] *= rng.uniform(0.36, 0.48)
    return [points]


def _ring(rng: np.random.Generator) -> Outline:
    outer = _polygon(48) * (1.0, rng.uniform(0.75, 1.0))
    return [outer, outer * rng.uniform(0.45, 0.65)]


def _cross(rng: np.random.Generator) -> Outline:
    a = rng.uniform(0.22, 0.36)
    arm = np.array([(a, -a), (1.0, -a), (1.0, a)])
    quarter_turn = np.array([(0, 1), (-1, 0)])
    arms = [arm @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)]
    return [np.concatenate(arms) * (1.0, rng.uniform(0.8, 1.0))]


_OUTLINES: dict[str, Callable[[np.random.Generator], Outline]] = {
    "ellipse": _ellipse,
    "rectangle": _rectangle,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}


def _polygon(corners: int) -> Array:
    angles = np.arange(corners) * (2 * math.pi / corners)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _area(polygon: Array) -> float:
    return float(cv2.contourArea(polygon.astype(np.float32)))


def _place(rng: np.random.Generator, outline: Outline, side: float, image_size: int) -> Outline:
    """Turn, scale to an area of side x side (holes aside) and move to pixel coordinates."""
    angle = rng.uniform(0, 2 * math.pi)
    turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    scale = side / math.sqrt(_area(outline[0]) - sum(map(_area, outline[1:])))
    margin = 0.2 * side
    center = rng.uniform(margin, image_size - margin, size=2)
    return [part @ turn * scale + center for part in outline]


def _window(outline: Outline, side: float, image_size: int) -> Window:
    """The part of the image that a shape and its shadow can touch."""
    margin = 0.25 * side + 2
    low = np.floor(outline[0].min(axis=0) - margin).clip(0, image_size - 1).astype(int)
    high = np.ceil(outline[0].max(axis=0) + margin).clip(1, image_size).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _coverage(outline: Outline, window: Window) -> Array:
    """How much of each pixel in the window lies inside the outline: (H, W) float32 in [0, 1]."""
    x0, y0, x1, y1 = window
    fine = np.zeros(((y1 - y0) * _SUPERSAMPLING, (x1 - x0) * _SUPERSAMPLING), np.uint8)
    fraction_bits = 4
    # OpenCV puts the centre of pixel i at i.
    points = [
        np.round(((part - (x0, y0)) * _SUPERSAMPLING - 0.5) * 2**fraction_bits).astype(np.int32)
        for part in outline
    ]
    cv2.fillPoly(fine, points, 255, shift=fraction_bits)
    coarse = cv2.resize(fine, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
    return coarse.astype(np.float32) / 255


def _shadow(alpha: Array, angle: float, side: float) -> Array:
    """The blurred, shifted coverage: (H, W) float32 in [0, 1]."""
    distance = 0.07 * side
    shift = np.array([(1, 0, distance * math.cos(angle)), (0, 1, distance * math.sin(angle))])
    moved = cv2.warpAffine(alpha, shift, alpha.shape[::-1])
    return cv2.GaussianBlur(moved, (0, 0), 0.05 * side + 0.5)


def _texture(rng: np.random.Generator, window: Window, image_size: int) -> Array:
    """A pattern for the window: (H, W) float32 in [0, 1], the share of the second colour."""
    x0, y0, x1, y1 = window
    angle = rng.uniform(0, 2 * math.pi)
    x = np.arange(x0, x1, dtype=np.float32)[None, :] / image_size - 0.5
    y = np.arange(y0, y1, dtype=np.float32)[:, None] / image_size - 0.5
    across = x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle))
    along = y * np.float32(math.cos(angle)) - x * np.float32(math.sin(angle))
    # Cycles in an image. Finer ones would be lost in small images, as would a hard edge.
    turns = np.float32(2 * math.pi * rng.uniform(5, 14))
    phase = np.float32(rng.uniform(0, 2 * math.pi))
    kind = rng.choice(("gradient", "stripes", "checks", "dots", "noise"))
    if kind == "gradient":
        low, high = across.min(), across.max()
        return (across - low) / max(high - low, np.float32(1e-6))
    if kind == "noise":
        cells = int(rng.integers(3, 14))
        coarse = rng.random((cells, cells), dtype=np.float32)
        smooth = cv2.resize(coarse, (x1 - x0, y1 - y0), interpolation=cv2.INTER_CUBIC)
        return smooth.clip(0, 1)
    wave = np.sin(across * turns + phase)
    if kind == "checks":
        wave = wave * np.sin(along * turns)
    elif kind == "dots":
        wave = wave + np.sin(along * turns) - np.float32(0.8)
    return (0.5 + np.float32(rng.uniform(0.5, 3)) * wave).clip(0, 1)


def _color_pair(
    rng: np.random.Generator,
    *,
    saturation: tuple[float, float],
    value: tuple[float, float],
    away_from: Array | None = None,
) -> tuple[Array, Array]:
    """Two related RGB colours in [0, 1], the mean of which stands out from ``away_from``."""
    # A bounded search: a colour that stands out is found in a few draws, whatever the ground.
    for _ in range(20):
        hue = rng.random()
        first = _rgb(hue, rng.uniform(*saturation), rng.uniform(*value))
        near = hue + rng.uniform(-0.12, 0.12)
        second = _rgb(near, rng.uniform(*saturation), rng.uniform(*value))
        if away_from is None or np.linalg.norm((first + second) / 2 - away_from) > 0.3:
            break
    return first, second


def _rgb(hue: float, saturation: float, value: float) -> Array:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def _paint(texture: Array, first: Array, second: Array) -> Array:
    return first + texture[..., None] * (second - first)


def _expose(rng: np.random.Generator, canvas: Array) -> Array:
    """Uneven light and sensor noise over a picture in [0, 1]: (H, W, 3) uint8."""
    size = canvas.shape[0]
    corners = rng.uniform(0.7, 1.15, size=(2, 2)).astype(np.float32)
    light = cv2.resize(corners, (size, size), interpolation=cv2.INTER_LINEAR)
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    picture = canvas * light[..., None] + np.float32(rng.uniform(0.005, 0.03)) * noise
    return (picture * 255 + 0.5).clip(0, 255).astype(np.uint8)
