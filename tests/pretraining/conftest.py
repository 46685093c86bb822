import numpy as np
import pytest
from image_files import COUNT, encode, shade, write_shard


@pytest.fixture
def folder(tmp_path):
    """COUNT images in one folder, 0.png to 6.png."""
    path = tmp_path / "flat"
    path.mkdir()
    for index in range(COUNT):
        (path / f"{index}.png").write_bytes(encode(np.full((9, 12, 3), shade(index), np.uint8)))
    return path


@pytest.fixture
def shards(tmp_path):
    """The same images in three tar shards: 0 1, 2 3 4 and 5 6."""
    path = tmp_path / "shards"
    path.mkdir()
    for number, names in enumerate(("01", "234", "56")):
        write_shard(path / f"set-{number}.tar", names)
    return path
