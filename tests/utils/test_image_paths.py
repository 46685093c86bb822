"""Paths that differ from those of the files by case, Unicode form or spaces."""

import logging
import unicodedata

import pytest
from shorthand import one_line

from crossmae_det.utils.image_files import locate


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
