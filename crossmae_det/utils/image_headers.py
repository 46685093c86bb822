"""Headers of encoded images: the upright size, the orientation, and what can decode the pixels."""

import io
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

from PIL import Image

# First and last bytes of what OpenCV decodes. OpenCV 4 fills the missing part of a truncated file
# with gray, without a word, so those are left to Pillow, which rejects them.
JPEG_ENDS = (b"\xff\xd8", b"\xff\xd9")
PNG_ENDS = (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")
# Markers of a JPEG's frame header, which has its size, and of the segments that hold EXIF or XMP.
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_METADATA_MARKER = 0xE1
# What such a segment has where it may hold an orientation: EXIF's tag in either byte order, XMP's.
_ORIENTATION_SIGNS = (b"\x01\x12", b"\x12\x01", b"tiff:Orientation")
# EXIF's tag of the orientation.
_ORIENTATION_TAG = 0x0112
# Chunks of a PNG that may hold an orientation: EXIF, and EXIF or XMP as text.
_PNG_METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")


class Header(NamedTuple):
    """What is known of an encoded image before its pixels are decoded.

    Attributes:
        height: of the upright image.
        width: of the upright image.
        orientation: EXIF orientation, 1 to 8, of the decoded pixels.
        fast: whether OpenCV decodes it.
    """

    height: int
    width: int
    orientation: int
    fast: bool


def read_header(source: bytes | IO[bytes]) -> Header:
    """Read the header of an image.

    Args:
        source: an encoded image, or an open file that has one.

    Raises:
        Exception: of almost any class, for data that is damaged or no image.
    """
    if isinstance(source, bytes):
        return _read_jpeg_header(source) or _read_any_header(io.BytesIO(source))
    return _read_any_header(source)


def _read_jpeg_header(data: bytes) -> Header | None:
    """Read the header of a JPEG that has no orientation; None for any other image.

    Pillow parses all of a JPEG's header, which takes a twentieth of the time of decoding it.
    """
    place = 2
    if not data.startswith(JPEG_ENDS[0]):
        return None
    while data[place : place + 1] == b"\xff" and place + 10 <= len(data):
        marker = data[place + 1]
        if not 0xC0 <= marker < 0xFF:
            return None
        if marker in _FRAME_MARKERS:
            height = int.from_bytes(data[place + 5 : place + 7], "big")
            width = int.from_bytes(data[place + 7 : place + 9], "big")
            fast = _is_plain_jpeg(data[place + 4], data[place + 9]) and data.endswith(JPEG_ENDS[1])
            limit = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
            if not 0 < height * width <= limit:
                return None  # Pillow says why
            return Header(height, width, 1, fast)
        following = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == _METADATA_MARKER:
            segment = data[place:following]
            if any(sign in segment for sign in _ORIENTATION_SIGNS):
                return None
        place = following
    return None


def _is_plain_jpeg(bits: int, components: int) -> bool:
    """Gray and YCbCr of 8 bits; each library has conversions of its own for CMYK and YCCK."""
    return bits == 8 and components in (1, 3)


def _read_any_header(file: IO[bytes]) -> Header:
    """Read the header of any image, from its file or from memory."""
    file.seek(0)
    with without_warnings(), Image.open(file) as image:
        width, height = image.size
        orientation = _orientation(image, file)
        if image.format == "TIFF":
            # Whether the size is that of the upright image depends on Pillow's version.
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            width, height = tags[256], tags[257]
        fast = False
        if image.format in ("JPEG", "MPO"):
            fast = _is_plain_jpeg(getattr(image, "bits", 0), getattr(image, "layers", 0))
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
        orientation = 1  # Pillow turns its pixels upright
    return Header(height, width, orientation, fast)


def _ends_with(file: IO[bytes], last: bytes) -> bool:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - len(last)))
    return file.read() == last


def _orientation(image: Image.Image, file: IO[bytes]) -> int:
    """EXIF orientation of an opened image, 1 to 8; 1 where there is none or it is damaged."""
    try:
        if image.format != "PNG":
            exif = image.getexif()
        elif _has_late_metadata(file):
            exif = image.getexif()  # decodes the image first
        else:
            exif = Image.Image.getexif(image)
        value = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # Pillow meets damaged EXIF data with almost any exception
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _has_late_metadata(file: IO[bytes]) -> bool:
    """Whether a PNG has metadata after its pixels, which Pillow reads only with them."""
    place = file.tell()
    try:
        file.seek(len(PNG_ENDS[0]))
        pixels = False
        while len(chunk := file.read(8)) == 8:
            pixels |= chunk[4:] == b"IDAT"
            if pixels and chunk[4:] in _PNG_METADATA:
                return True
            file.seek(int.from_bytes(chunk[:4], "big") + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(place)  # Pillow goes on reading here


@contextmanager
def without_warnings() -> Iterator[None]:
    """Without Pillow's warnings: a file can be decoded or not, which is said elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
