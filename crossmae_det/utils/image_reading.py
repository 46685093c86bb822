"""Reading images: one decoder for training, evaluation, inference and drawing of every task.

Legend: H x W pixels of the upright image, C channels.

- An EXIF orientation is applied exactly once, in every container that can hold one.
- 16-bit channels become 8-bit by their upper byte. 32-bit integers are taken for 16-bit values, as
  Pillow takes them; float pixels have no fixed range and are rejected.
- Alpha is dropped, as detectron2 drops it: the color below a transparent pixel is what is read.
- Palettes, 1-bit, gray, CMYK and YCCK become RGB or gray. Color profiles are not applied.
- The first frame of an animation or of a file with several pages is read.

Pillow decides what a file contains. OpenCV decodes whole JPEGs and plain 8-bit PNGs, where it gives
the same pixels in half the time.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from crossmae_det.utils.errors import UndecodableImageError
from crossmae_det.utils.image_headers import JPEG_ENDS, read_header, without_warnings

# Path of an image file, or the encoded image.
Source = str | os.PathLike[str] | bytes

IMAGE_FORMATS = ("RGB", "BGR", "L")

# A JPEG can be decoded at a fraction of its size for a fraction of the time: OpenCV's names.
REDUCTIONS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


class EncodedImage:
    """An encoded image whose header was read: its upright size is known before it is decoded.

    Args:
        data: the content of an image file.
        name: names the image in messages.

    Attributes:
        height, width: of the upright image, in pixels.

    Raises:
        UndecodableImageError: the data are empty or not an image, or it has too many pixels.
    """

    def __init__(self, data: bytes, name: str):
        self._data = data
        self._name = name
        with naming_errors(name):
            if not data:
                raise _ReasonError("the file is empty")
            self._header = read_header(data)
        self.height, self.width = self._header.height, self._header.width

    def decode(self, format: str = "RGB", reduction: int = 1) -> np.ndarray:
        """Decode the image, upright.

        Args:
            format: "RGB", "BGR" or "L" (gray).
            reduction: 1, 2, 4 or 8. A JPEG is decoded at this fraction of its size, each side
                rounded up; any other image at its full size.

        Returns:
            (H, W, C) uint8, C = 1 for "L" and 3 otherwise; not contiguous in memory as a rule.

        Raises:
            UndecodableImageError: the data are truncated or damaged, or of a kind that has no 8-bit
                form.
            ValueError: ``format`` is not one of the three.
        """
        check_image_format(format)
        with naming_errors(self._name):
            pixels = self._decode_fast(reduction) if self._header.fast else None
            if pixels is None:
                pixels = _decode(self._data, reduction)
            return _convert(_turn(pixels, self._header.orientation), format)

    def _decode_fast(self, reduction: int) -> np.ndarray | None:
        """(height, width, 3) uint8 in RGB as stored, or None where OpenCV cannot decode it."""
        reduction = reduction if self._data.startswith(JPEG_ENDS[0]) else 1
        flags = REDUCTIONS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            pixels = cv2.imdecode(np.frombuffer(self._data, np.uint8), flags)
        except cv2.error:  # Pillow has the clearer message
            return None
        return None if pixels is None else pixels[:, :, ::-1]


def read_image(source: Source, format: str = "RGB", *, name: str = "") -> np.ndarray:
    """Read an image, upright, as the tasks do.

    Args:
        source: path of an image file, or the encoded image.
        format: order and number of the channels: "RGB", "BGR" or "L" (gray).
        name: names the image in messages; the path by default.

    Returns:
        (H, W, C) uint8, contiguous and writable; C = 1 for "L" and 3 otherwise.

    Raises:
        UndecodableImageError: there is no such file, or it is empty, truncated, damaged, not an
            image, of float pixels, or has too many pixels; one line that names it.
        ValueError: ``format`` is not one of the three.
    """
    check_image_format(format)
    if isinstance(source, bytes):
        data, name = source, name or "an image in memory"
    else:
        name = name or os.fspath(source)
        with naming_errors(name), open(source, "rb") as file:
            data = file.read()
    return np.ascontiguousarray(EncodedImage(data, name).decode(format))


def image_size(source: Source, *, name: str = "") -> tuple[int, int]:
    """Read the size of an image from its header; its pixels are not decoded.

    Args:
        source: path of an image file, or the encoded image.
        name: names the image in messages; the path by default.

    Returns:
        (height, width) of the upright image, as :func:`read_image` gives it, in pixels.

    Raises:
        UndecodableImageError: there is no such file, or it is empty, not an image, or has too many
            pixels. A file that is damaged after its header is not noticed.
    """
    if isinstance(source, bytes):
        image = EncodedImage(source, name or "an image in memory")
        return image.height, image.width
    with naming_errors(name or os.fspath(source)), open(source, "rb") as file:
        if not file.read(1):
            raise _ReasonError("the file is empty")
        header = read_header(file)
    return header.height, header.width


def check_image_format(format: str) -> None:
    """Raise a ValueError of one line unless ``format`` is one that :func:`read_image` knows."""
    if format not in IMAGE_FORMATS:
        raise ValueError(
            f"image_format={format!r}: unknown image format; use {', '.join(IMAGE_FORMATS)}"
        )


def convert_color(image_bgr: np.ndarray, format: str) -> np.ndarray:
    """Convert an image in memory, such as a frame of a video.

    Args:
        image_bgr: (H, W, 3) uint8 in BGR.
        format: "RGB", "BGR" or "L" (gray).

    Returns:
        (H, W, C) uint8, what :func:`read_image` gives of the same image; it may be a view.

    Raises:
        ValueError: ``format`` is not one of the three.
    """
    check_image_format(format)
    return _convert(image_bgr[:, :, ::-1], format)


class _ReasonError(Exception):
    """Why an image cannot be decoded, in words for the user."""


@contextmanager
def naming_errors(name: str) -> Iterator[None]:
    """Turn whatever reading and decoding raise into an UndecodableImageError that names the image.

    MemoryError is left alone.
    """
    try:
        yield
    except (MemoryError, UndecodableImageError):
        raise
    except Exception as error:  # decoders meet damaged files with almost any exception
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image of a known format"
        elif isinstance(error, Image.DecompressionBombError):
            reason = "too many pixels: cut it into parts, or raise PIL.Image.MAX_IMAGE_PIXELS"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
        raise UndecodableImageError(f"{name}: the image cannot be decoded ({reason})", name) from (
            None if isinstance(error, _ReasonError) else error
        )


def _decode(data: bytes, reduction: int) -> np.ndarray:
    """Decode with Pillow.

    Returns:
        (height, width, 3) uint8 in RGB or (height, width) uint8 gray; as stored, a TIFF upright.
    """
    with without_warnings(), Image.open(io.BytesIO(data)) as image:
        bits = 16
        inverted = False
        if image.format == "TIFF":
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            bits = min(tags.get(258, (16,))[0], 16)
            inverted = tags.get(262) == 0
        if reduction > 1 and image.format in ("JPEG", "MPO"):
            size = (max(1, image.width // reduction), max(1, image.height // reduction))
            image.draft(image.mode, size)
        image.load()
        if image.mode == "F":
            raise _ReasonError("float pixels have no fixed range: convert it to 8 or 16 bits")
        if image.mode == "I" or image.mode.startswith("I;16"):
            pixels = _upper_byte(np.asarray(image), bits)
            if inverted and bits == 16:  # Pillow inverts white-is-zero up to 8 bits only
                pixels = 255 - pixels
        else:
            # Premultiplied alpha is taken out before it is dropped.
            straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
            if straight:
                image = image.convert(straight)  # type: ignore[assignment]
            pixels = np.array(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    return pixels


def _upper_byte(values: np.ndarray, bits: int) -> np.ndarray:
    """Gray of ``bits`` bits in a wider integer type -> uint8."""
    if values.size and (int(values.min()) < 0 or int(values.max()) >= 1 << bits):
        raise _ReasonError(
            f"gray values from {values.min()} to {values.max()} do not fit {bits} bits: convert it"
            " to 8 or 16 bits"
        )
    return (values >> (bits - 8)).astype(np.uint8)


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels upright; a view."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _convert(pixels: np.ndarray, format: str) -> np.ndarray:
    """(H, W) gray or (H, W, 3) RGB -> (H, W, C) of the format."""
    if format == "L":
        if pixels.ndim == 3:
            # Pillow's weights, wherever the pixels are from.
            pixels = np.array(Image.fromarray(pixels).convert("L"))
        return pixels[:, :, None]
    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    return pixels[:, :, ::-1] if format == "BGR" else pixels
