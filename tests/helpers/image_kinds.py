"""An image in every kind of file: modes x containers x EXIF orientations."""

import io
import struct
import zlib

import cv2
import numpy as np
from PIL import Image
from PIL.Image import Transpose

# How an upright image is stored under each EXIF orientation.
STORED = {
    **{2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM},
    **{5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_90},
    **{7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_270},
}
# suffix -> Pillow's format, options, greatest difference of a decoded pixel, has orientations
CONTAINERS = {
    "jpg": ("JPEG", {"quality": 98, "subsampling": 0}, 8, True),
    "mpo": ("MPO", {"quality": 98, "subsampling": 0}, 8, True),
    "png": ("PNG", {}, 0, True),
    "tif": ("TIFF", {}, 0, True),
    "webp": ("WEBP", {"lossless": True, "exact": True}, 0, True),
    "avif": ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 8, True),
    "bmp": ("BMP", {}, 0, False),
    "gif": ("GIF", {}, 0, False),
    "ppm": ("PPM", {}, 0, False),
    "jp2": ("JPEG2000", {}, 0, False),
}
# "MODE SUFFIX", with a variant of the container where there are several.
KINDS = (
    *("RGB jpg", "L jpg", "CMYK jpg", "RGB jpg progressive", "RGB jpg trailing", "RGB mpo"),
    *("RGB png", "L png", "1 png", "P png", "P png transparent", "LA png", "RGBA png"),
    *("I;16 png", "RGB16 png", "RGBA16 png", "RGB png late"),
    *("RGB tif", "L tif", "1 tif", "P tif", "CMYK tif", "RGBA tif", "LA tif", "I;16 tif"),
    *("I;16B tif", "I tif", "RGB16 tif", "RGB tif lzw", "I;16 tif lzw", "1 tif fax"),
    *("RGB webp", "RGBA webp", "RGB avif", "RGBA avif", "RGB bmp", "L bmp", "P bmp", "1 bmp"),
    *("P gif", "L gif", "RGB ppm", "L ppm", "I;16 ppm", "RGB jp2", "L jp2", "I;16 jp2"),
)
VARIANTS = {
    "progressive": {"progressive": True},
    "transparent": {"transparency": 3},
    "lzw": {"compression": "tiff_lzw"},
    "fax": {"compression": "group4"},
}


def encode_kind(kind, pixels, orientation=1):
    """Encode an image.

    Args:
        kind: of KINDS.
        pixels: (H, W, 3) uint8 in RGB, upright.
        orientation: EXIF orientation.

    Returns:
        The encoded image, the upright pixels (H, W, 3) uint8 that it stands for, and how much a
        decoded pixel may differ from them; None for an orientation that the container lacks.
    """
    mode, suffix, *variant = kind.split()
    file_format, options, tolerance, oriented = CONTAINERS[suffix]
    if orientation != 1 and not oriented:
        return None
    options = options | {k: v for name in variant for k, v in VARIANTS.get(name, {}).items()}
    image, expected = _in_mode(mode, pixels)
    if orientation != 1:
        image = image.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[274] = orientation
    if mode in ("RGB16", "RGBA16"):
        wide = np.asarray(image).astype(np.uint16) * 257
        data = _png(wide, exif) if suffix == "png" else _tiff(wide, orientation)
    elif "late" in variant:
        data = _png(np.asarray(image), exif, late=True)
    else:
        buffer = io.BytesIO()
        image.save(buffer, file_format, **options, **({"exif": exif} if orientation != 1 else {}))
        data = buffer.getvalue()
    return data + b"\0 and more" * ("trailing" in variant), expected, tolerance


def _in_mode(mode, pixels):
    """The Pillow image of a mode, and the pixels in RGB that it stands for."""
    image = Image.fromarray(pixels)
    gray = image.convert("L")
    alpha = np.linspace(1, 255, gray.width * gray.height).reshape(gray.height, gray.width)
    alpha = Image.fromarray(alpha.astype(np.uint8))
    if mode in ("I;16", "I;16B", "I"):
        dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
        converted, shown = Image.fromarray((np.asarray(gray, int) * 257).astype(dtype)), gray
        assert converted.mode == mode
    elif mode == "LA":
        converted, shown = Image.merge("LA", (gray, alpha)), gray
    elif mode.startswith("RGB"):
        converted, shown = image, image
        if "A" in mode:
            converted = Image.merge("RGBA", (*image.split(), alpha))
    else:
        converted = image.quantize(64) if mode == "P" else image.convert(mode)
        shown = converted
    return converted, np.asarray(shown.convert("RGB"))


def _png(pixels, exif, late=False):
    """8 or 16 bits a channel, with the EXIF data before or after the pixels."""
    reverse = [2, 1, 0, *range(3, pixels.shape[2])]
    data = cv2.imencode(".png", np.ascontiguousarray(pixels[:, :, reverse]))[1].tobytes()
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(content)) + b"eXIf" + content
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + content))
    place = len(data) - 12 if late else 33  # before IEND, or after IHDR
    return data[:place] + chunk + data[place:]


def _tiff(pixels, orientation):
    """16 bits a channel, in one strip."""
    height, width, channels = pixels.shape
    strip = pixels.astype("<u2").tobytes()
    # The bits of the channels do not fit into their tag: header, bits, pixels, tags.
    bits = struct.pack("<4H", 16, 16, 16, 16)
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 2)]
    tags += [(273, 4, 16), (274, 3, orientation), (277, 3, channels)]
    tags += [(278, 4, height), (279, 4, len(strip))]
    directory = struct.pack("<H", len(tags))
    for tag, kind, value in tags:
        count = channels if tag == 258 else 1
        directory += struct.pack("<HHII", tag, kind, count, value)
    return b"II*\0" + struct.pack("<I", 16 + len(strip)) + bits + strip + directory + bytes(4)
