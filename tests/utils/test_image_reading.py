"""One reader for every kind of image, and its errors for those that it cannot read."""

import io
import struct
import warnings

import cv2
import numpy as np
import pytest
from image_files import encode, photo
from image_kinds import KINDS, encode_kind
from PIL import Image
from shorthand import one_line

from crossmae_det.utils.image_files import IMAGE_SUFFIXES
from crossmae_det.utils.image_reading import (
    EncodedImage,
    UndecodableImageError,
    image_size,
    read_image,
)

PHOTO = photo(20, 29, seed=1, finest=4)


def supported(kind):
    return f".{kind.split()[1]}" in (*IMAGE_SUFFIXES, ".mpo")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_is_read_upright(tmp_path, kind):
    if not supported(kind):
        pytest.skip("this Pillow does not decode it")
    for orientation in range(1, 9):
        encoded = encode_kind(kind, PHOTO, orientation)
        if encoded is None:
            continue
        data, expected, tolerance = encoded
        path = tmp_path / f"{orientation}.{kind.split()[1]}"
        path.write_bytes(data)
        pixels = read_image(path)
        assert (pixels.dtype, pixels.shape) == (np.uint8, expected.shape)
        assert pixels.flags.c_contiguous and pixels.flags.writeable
        difference = np.abs(pixels.astype(int) - expected)
        assert difference.max() <= tolerance, (orientation, difference.max())
        assert image_size(path) == image_size(data) == expected.shape[:2]
        np.testing.assert_array_equal(read_image(data), pixels)
        np.testing.assert_array_equal(read_image(str(path), "BGR"), pixels[:, :, ::-1])
        gray = np.asarray(Image.fromarray(pixels).convert("L"))
        np.testing.assert_array_equal(read_image(path, "L"), gray[:, :, None])


def gray_tiff(values, bits, white_is_zero=False):
    """A gray TIFF of one strip, big-endian packed, whatever Pillow can write."""
    height, width = values.shape
    binary = "".join(f"{value:0{bits}b}" for value in values.ravel())
    strip = int(binary, 2).to_bytes(len(binary) // 8, "big")
    if bits == 16:
        strip = values.astype("<u2").tobytes()
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1)]
    tags += [(262, 3, 0 if white_is_zero else 1), (273, 4, 8), (277, 3, 1), (278, 4, height)]
    tags += [(279, 4, len(strip))]
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory + bytes(4)


def test_gray_of_12_bits_and_gray_whose_white_is_zero():
    gray = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    twelve = gray_tiff(gray.astype(int) * 16 + 7, 12)
    np.testing.assert_array_equal(read_image(twelve, "L")[:, :, 0], gray)
    inverted = gray_tiff((255 - gray.astype(int)) * 257, 16, white_is_zero=True)
    np.testing.assert_array_equal(read_image(inverted, "L")[:, :, 0], gray)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_frames_is_read(file_format):
    frames = [Image.fromarray(np.full((8, 9, 3), level, np.uint8)) for level in (50, 150, 250)]
    buffer = io.BytesIO()
    frames[0].save(buffer, file_format, save_all=True, append_images=frames[1:])
    pixels = read_image(buffer.getvalue())
    assert pixels.shape == (8, 9, 3) and np.abs(pixels.astype(int) - 50).max() <= 3
    assert image_size(buffer.getvalue()) == (8, 9)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "jpg" in kind or "png" in kind])
def test_opencv_decodes_what_pillow_decodes(monkeypatch, kind):
    for orientation, reduction in ((1, 1), (6, 1), (1, 2), (8, 4), (3, 8)):
        data = encode_kind(kind, photo(45, 67), orientation)[0]
        image = EncodedImage(data, "an image")
        mine = image.decode(reduction=reduction)
        with monkeypatch.context() as context:
            context.setattr(cv2, "imdecode", lambda *_: None)
            pillows = image.decode(reduction=reduction)
        assert mine.shape == pillows.shape
        assert np.abs(mine.astype(int) - pillows).max() <= 2
        divisor = reduction if "jpg" in kind else 1
        assert mine.shape[:2] == (-(-45 // divisor), -(-67 // divisor))
        assert (image.height, image.width) == (45, 67)


# What cannot be read


def bad_images():
    tiff = io.BytesIO()
    Image.fromarray(np.zeros((5, 6), np.float32)).save(tiff, "TIFF")
    deep = io.BytesIO()
    Image.fromarray(np.full((5, 6), 70000, np.int32)).save(deep, "TIFF")
    return {"empty": b"", "text": b"no image", "float": tiff.getvalue(), "32 bits": deep.getvalue()}


@pytest.mark.parametrize("kind", [*bad_images(), "absent", "folder"])
def test_a_file_that_is_not_an_image_is_named_in_one_line(tmp_path, kind):
    path = tmp_path / "bad.png"
    if kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.write_bytes(bad_images()[kind])
    with pytest.raises(UndecodableImageError) as error:
        read_image(path)
    assert one_line(error).startswith(f"{path}: ") and error.value.file_name == str(path)
    if kind not in ("float", "32 bits"):
        with pytest.raises(UndecodableImageError, match=r"bad\.png"):
            image_size(path)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if supported(kind)])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_never_completed(monkeypatch, kind, share):
    data = encode_kind(kind.replace("late", ""), photo(60, 70, finest=64))[0]
    data = data.removesuffix(b"\0 and more")
    # What OpenCV 4 makes of such an image; OpenCV 5 rejects it.
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.full((60, 70, 3), 128, np.uint8))
    with pytest.raises(UndecodableImageError) as error, warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(data[: int(len(data) * share)], name="cut.img")
    assert one_line(error).startswith("cut.img: ")


def test_too_many_pixels_are_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for file_format in ("JPEG", "PNG"):
        data = encode(photo(20, 30), file_format)
        for read in (read_image, image_size):
            with pytest.raises(UndecodableImageError, match="MAX_IMAGE_PIXELS") as error:
                read(data, name="big")
            one_line(error)
    assert read_image(encode(photo(10, 15)), name="small").shape == (10, 15, 3)


def test_an_unknown_format_is_an_error_of_one_line():
    for name in ("rgb", "RGBA", "YUV-BT.601", None):
        with pytest.raises(ValueError, match="image_format") as error:
            read_image(encode(PHOTO), name)
        assert not isinstance(error.value, UndecodableImageError)
        one_line(error)


def test_a_damaged_orientation_is_ignored():
    exif = Image.Exif()
    exif[274] = 9
    assert image_size(encode(PHOTO, "JPEG", exif=exif)) == PHOTO.shape[:2]
    data = encode(PHOTO, "JPEG", exif=b"Exif\0\0II*\0 nonsense")
    assert read_image(data).shape == PHOTO.shape
