"""Finding images in folders and by the paths of an annotation file; summaries of what was found."""

import logging
import unicodedata

import numpy as np
import pytest
from image_files import encode, photo
from shorthand import one_line

from crossmae_det.utils.image_files import (
    IMAGE_SUFFIXES,
    SAMPLED_HEADERS,
    file_sizes,
    is_image_file,
    locate,
    sampled_sizes,
    suffix_counts,
    walk_images,
)
from crossmae_det.utils.image_reading import UndecodableImageError


def test_images_at_any_depth_but_no_hidden_ones(tmp_path):
    files = ["a.PNG", "deep/er/b.tif", "deep/c.gif"]
    for name in [*files, ".hidden.png", ".git/d.png", "deep/._c.png", "notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "deep" / "er" / "up").symlink_to(tmp_path)  # leads back
    (tmp_path / "other").mkdir()
    (tmp_path / "deep" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "e.jpg").touch()
    found = list(walk_images(str(tmp_path)))
    assert found == ["a.PNG", "deep/c.gif", "deep/er/b.tif", "deep/linked/e.jpg"]
    assert is_image_file("/some/where/A.JPEG") and not is_image_file("/some/._A.JPEG")
    assert {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff"} <= set(IMAGE_SUFFIXES)


def test_a_summary_has_sizes_and_names_a_bad_file(tmp_path):
    for index, size in enumerate([(10, 20), (30, 40), (5, 8)]):
        (tmp_path / f"{index}.png").write_bytes(encode(photo(*size, finest=4)))
    (tmp_path / "3.png").write_bytes(b"")
    paths = [str(tmp_path / f"{index}.png") for index in range(4)]
    text = file_sizes(paths)
    assert "8x5" in text and "40x30" in text and "20x10" in text
    assert "1 of 4" in text and "3.png" in text and "\n" not in text
    assert suffix_counts(["a.png", "b/c.PNG", "d.jpg"]) == "2 png, 1 jpg"


def test_a_summary_of_a_large_set_is_a_sample(monkeypatch):
    asked = []

    def read_size(index):
        asked.append(index)
        if index % 2:
            raise UndecodableImageError("odd.png: is odd", "odd.png")
        return 7, 9

    text = sampled_sizes(read_size, 10**6)
    assert len(asked) == SAMPLED_HEADERS and {0, 10**6 - 1} <= set(asked)
    assert np.ptp(asked) == 10**6 - 1
    assert "9x7" in text and "odd.png" in text
    monkeypatch.setattr("crossmae_det.utils.image_files.SAMPLING_SECONDS", 0.0)
    asked.clear()
    sampled_sizes(read_size, 10**6)
    assert len(asked) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_summary_of_few_images(count):
    assert "3x2" in sampled_sizes(lambda index: (2, 3), count)


@pytest.fixture
def folder(tmp_path):
    for name in ("IMG_1.JPG", "caf\u00e9.png", "one/x.png", "Two/X.png", "A.png", "a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "name, file",
    [
        ("img_1.jpg", "IMG_1.JPG"),
        ("upload\\IMG_1.jpg ", "IMG_1.JPG"),
        (unicodedata.normalize("NFD", "caf\u00e9.png"), "caf\u00e9.png"),
        ("https://host/Caf%C3%A9.PNG?sig=1", "caf\u00e9.png"),
        ("data/two/x.PNG", "Two/X.png"),
        ("a.png", "a.png"),
        ("A.png", "A.png"),
    ],
)
def test_other_case_and_unicode_form(folder, name, file, caplog):
    with caplog.at_level(logging.WARNING):
        assert locate([name], str(folder), "set.json") == [str(folder / file)]
    assert bool(caplog.records) == (name != file)


def test_case_that_leaves_two_files_is_named(folder):
    with pytest.raises(FileNotFoundError) as raised:
        locate(["a.PNG"], str(folder), "set.json")
    assert "a.PNG" in one_line(raised) and "2 files" in one_line(raised)
