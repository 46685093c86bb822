"""Images as files: alone, in folders and in tar shards."""

import io
import math
import tarfile

import cv2
import numpy as np
from PIL import Image

COUNT = 7


def photo(height, width, seed=0, finest=128):
    """(height, width, 3) uint8: smooth, with detail at several scales, as photographs have it."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for cells in (cells for cells in (4, 16, 64, 128) if cells <= finest):
        noise = rng.uniform(-1, 1, (cells, cells, 3)) * 2 / math.sqrt(cells)
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return (127.5 + 100 * np.clip(image, -1.25, 1.25)).astype(np.uint8)


def encode(pixels, file_format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def shade(index):
    """Image ``index`` of a set is all of one shade, by which a crop of it is known."""
    return 30 * index


def write_tar(path, files):
    """Write files, bytes by name, into an uncompressed tar file."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_shard(path, names):
    """Write a shard in WebDataset's format: an image and its class for each name, a number."""
    files = {}
    for name in names:
        pixels = np.full((9, 12, 3), shade(int(name)), np.uint8)
        files |= {f"{name}.png": encode(pixels), f"{name}.cls": name.encode()}
    write_tar(path, files)
