"""Reading images: one decoder for training, evaluation, inference and drawing of every task.

- An EXIF orientation is applied exactly once, in every container that can hold one.
- 16-bit channels become 8-bit by their upper byte. 32-bit integers are read as 16-bit values, as in
  Pillow; float pixels have no fixed range and are rejected.
- Alpha is dropped, as in detectron2: transparent pixels have the color that is stored for them.
- Palettes, 1-bit, gray, CMYK and YCCK become RGB or gray. Color profiles are not applied.
- The first frame of an animation or of a file with several pages is read.

Pillow decides what a file contains. OpenCV decodes complete JPEGs and plain 8-bit PNGs, where it
gives the same pixels in half the time.

Legend: H x W pixels of the upright image, C channels.
"""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base as Tag

# Path of an image file, or an encoded image.
Source = str | os.PathLike[str] | bytes

IMAGE_FORMATS = ("RGB", "BGR", "L")

# A JPEG can be decoded at a fraction of its size in a fraction of the time.
REDUCTIONS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

# First and last bytes of files that OpenCV decodes. OpenCV 4 silently fills the missing part of a
# truncated file with gray, so those are left to Pillow, which rejects them.
JPEG_ENDS = (b"\xff\xd8", b"\xff\xd9")
PNG_ENDS = (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")

# Chunks of a PNG that may hold an orientation: EXIF, and EXIF or XMP as text.
PNG_METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")


class ImageError(ValueError):
    """An image that cannot be used; the message is one line that names the file."""


class UndecodableImageError(ImageError):
    """An image that cannot be read or decoded, or whose size differs from the annotations.

    Attributes:
        file_name: the image file.
    """

    def __init__(self, message: str, file_name: str = ""):
        super().__init__(message, file_name)
        self.file_name = file_name

    def __str__(self) -> str:
        return self.args[0]


class _ReasonError(Exception):
    """The reason why an image cannot be decoded, for the user."""


@contextmanager
def naming_errors(name: str) -> Iterator[None]:
    """Turn any error of reading or decoding into an UndecodableImageError that names the image.

    MemoryError passes unchanged.
    """
    try:
        yield
    except (MemoryError, UndecodableImageError):
        raise
    except Exception as error:  # decoders raise almost anything on damaged files
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


def read_image(source: Source, format: str = "RGB", *, name: str = "") -> np.ndarray:
    """Read an image, upright.

    Args:
        source: path of an image file, or an encoded image.
        format: order and number of the channels: "RGB", "BGR" or "L" (gray).
        name: name of the image in messages; the path by default.

    Returns:
        (H, W, C) uint8, contiguous and writable; C = 1 for "L" and 3 otherwise.

    Raises:
        UndecodableImageError: the file does not exist, or is empty, truncated, damaged, not an
            image, of float pixels, or has too many pixels.
        ValueError: the format is unknown.
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
    """Read the size of an image from its header, without decoding it.

    Args:
        source: path of an image file, or an encoded image.
        name: name of the image in messages; the path by default.

    Returns:
        (height, width) in pixels of the upright image.

    Raises:
        UndecodableImageError: the file does not exist, or is empty, not an image, or has too many
            pixels. Damage after the header goes unnoticed.
    """
    if isinstance(source, bytes):
        image = EncodedImage(source, name or "an image in memory")
        return image.height, image.width
    with naming_errors(name or os.fspath(source)), open(source, "rb") as file:
        if not file.read(1):
            raise _ReasonError("the file is empty")
        header = _read_header(file)
    return header.height, header.width


def check_image_format(format: str) -> None:
    """Raise a ValueError unless :func:`read_image` knows the format."""
    if format not in IMAGE_FORMATS:
        raise ValueError(
            f"image_format={format!r}: unknown image format: use {', '.join(IMAGE_FORMATS)}"
        )


def convert_color(image_bgr: np.ndarray, format: str) -> np.ndarray:
    """Convert an image in memory, such as a frame of a video.

    Args:
        image_bgr: (H, W, 3) uint8 in BGR.
        format: "RGB", "BGR" or "L" (gray).

    Returns:
        (H, W, C) uint8, as :func:`read_image` returns for the same image; it may be a view.

    Raises:
        ValueError: the format is unknown.
    """
    check_image_format(format)
    return _convert(image_bgr[:, :, ::-1], format)


class EncodedImage:
    """An encoded image with its upright size, known from the header before it is decoded.

    Args:
        data: the content of an image file.
        name: name of the image in messages.

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
            self._header = _read_header(io.BytesIO(data))
        self.height, self.width = self._header.height, self._header.width

    def exact_reduction(self, most: float) -> int:
        """The greatest reduction up to ``most`` for :meth:`decode` that keeps pixels in place: each
        decoded pixel then covers exactly so many pixels per side, counted from the top left."""
        sides = () if self._header.orientation == 1 else (self.height, self.width)
        fitting = (r for r in REDUCTIONS if r <= most and not any(side % r for side in sides))
        return max(fitting, default=1)

    def decode(self, format: str = "RGB", reduction: int = 1) -> np.ndarray:
        """Decode the image, upright.

        Args:
            format: "RGB", "BGR" or "L" (gray).
            reduction: 1, 2, 4 or 8. A JPEG is decoded at this fraction of its size, each side
                rounded up; any other image at its full size.

        Returns:
            (H, W, C) uint8, C = 1 for "L" and 3 otherwise; usually not contiguous.

        Raises:
            UndecodableImageError: the data are truncated or damaged, or have no 8-bit form.
            ValueError: the format is unknown.
        """
        check_image_format(format)
        with naming_errors(self._name):
            pixels = self._decode_fast(reduction) if self._header.fast else None
            if pixels is None:
                pixels = _decode(self._data, reduction)
            return _convert(_upright(pixels, self._header.orientation), format)

    def _decode_fast(self, reduction: int) -> np.ndarray | None:
        """(height, width, 3) uint8 in RGB as stored, or None if OpenCV cannot decode it."""
        reduction = reduction if self._data.startswith(JPEG_ENDS[0]) else 1
        flags = REDUCTIONS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            pixels = cv2.imdecode(np.frombuffer(self._data, np.uint8), flags)
        except cv2.error:  # Pillow has the clearer message
            return None
        return None if pixels is None else pixels[:, :, ::-1]


# Headers


class _Header(NamedTuple):
    """What is known about an image before it is decoded.

    Attributes:
        height, width: of the upright image.
        orientation: EXIF orientation of the decoded pixels, 1 to 8.
        fast: whether OpenCV can decode it.
    """

    height: int
    width: int
    orientation: int
    fast: bool


def _read_header(file: IO[bytes]) -> _Header:
    """Read the header of an image; damaged data raise almost any exception."""
    file.seek(0)
    with _without_warnings(), Image.open(file) as image:
        width, height = image.size
        orientation = _orientation(image, file)
        fast = False
        if image.format == "TIFF":
            # Whether the size that Pillow returns is upright depends on its version.
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            width, height = tags[Tag.ImageWidth], tags[Tag.ImageLength]
        elif image.format in ("JPEG", "MPO"):
            # Gray and YCbCr of 8 bits; libraries differ in the conversion of CMYK and YCCK.
            fast = getattr(image, "bits", 0) == 8 and getattr(image, "layers", 0) in (1, 3)
            fast = fast and _ends_with(file, JPEG_ENDS[1])
        elif image.format == "PNG":
            file.seek(24)
            bits, color = file.read(2)
            # Gray, RGB, gray with alpha and RGBA; not palettes.
            fast = bits == 8 and color in (0, 2, 4, 6) and _ends_with(file, PNG_ENDS[1])
            fast = fast and not getattr(image, "is_animated", False)
    if orientation >= 5:
        height, width = width, height
    if image.format == "TIFF":
        orientation = 1  # Pillow decodes it upright
    return _Header(height, width, orientation, fast)


def _ends_with(file: IO[bytes], last: bytes) -> bool:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - len(last)))
    return file.read() == last


def _orientation(image: Image.Image, file: IO[bytes]) -> int:
    """EXIF orientation of an opened image, 1 to 8; 1 if it is missing or damaged."""
    try:
        if image.format == "PNG" and not _has_late_metadata(file):
            exif = Image.Image.getexif(image)  # PngImageFile's decodes the image first
        else:
            exif = image.getexif()
        value = exif.get(Tag.Orientation, 1)
    except Exception:  # Pillow raises almost anything on damaged EXIF data
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _has_late_metadata(file: IO[bytes]) -> bool:
    """Whether a PNG has metadata after its pixels, where Pillow finds it only by decoding."""
    position = file.tell()
    try:
        file.seek(len(PNG_ENDS[0]))
        pixels = False
        while len(chunk := file.read(8)) == 8:
            pixels |= chunk[4:] == b"IDAT"
            if pixels and chunk[4:] in PNG_METADATA:
                return True
            file.seek(int.from_bytes(chunk[:4], "big") + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(position)  # where Pillow continues to read


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide Pillow's warnings: files that cannot be decoded are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Pixels


def _decode(data: bytes, reduction: int) -> np.ndarray:
    """Decode with Pillow.

    Returns:
        (height, width, 3) uint8 in RGB or (height, width) uint8 gray; as stored, a TIFF upright.
    """
    with _without_warnings(), Image.open(io.BytesIO(data)) as image:
        bits = 16
        inverted = False
        if image.format == "TIFF":
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            bits = min(tags.get(Tag.BitsPerSample, (16,))[0], 16)
            inverted = tags.get(Tag.PhotometricInterpretation) == 0
        if reduction > 1 and image.format in ("JPEG", "MPO"):
            size = (max(1, image.width // reduction), max(1, image.height // reduction))
            image.draft(image.mode, size)
        image.load()
        if image.mode == "F":
            raise _ReasonError("float pixels have no fixed range: convert it to 8 or 16 bits")
        if image.mode == "I" or image.mode.startswith("I;16"):
            pixels = _upper_byte(np.asarray(image), bits)
            # Pillow inverts white-is-zero up to 8 bits only.
            return 255 - pixels if inverted and bits == 16 else pixels
        # Premultiplied alpha is divided out before it is dropped.
        straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
        if straight:
            image = image.convert(straight)  # type: ignore[assignment]
        return np.array(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))


def _upper_byte(values: np.ndarray, bits: int) -> np.ndarray:
    """Gray of ``bits`` bits in a wider integer type -> uint8."""
    if values.size and (int(values.min()) < 0 or int(values.max()) >= 1 << bits):
        raise _ReasonError(
            f"gray values from {values.min()} to {values.max()} do not fit {bits} bits: convert it"
            " to 8 or 16 bits"
        )
    return (values >> (bits - 8)).astype(np.uint8)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
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
            # Pillow's weights, whichever library decoded the pixels.
            pixels = np.array(Image.fromarray(pixels).convert("L"))
        return pixels[:, :, None]
    if pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    return pixels[:, :, ::-1] if format == "BGR" else pixels
