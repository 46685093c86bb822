"""No record without its origin: what is wrong is refused in one line."""

import json

import pytest

from crossmae_det.model_zoo.records import FOLDER, read_records, write_records


def test_what_is_written_is_what_was_read(tmp_path):
    for name in ("published", "measured", "checkpoints"):
        records = read_records(name)
        write_records(name, records, tmp_path)
        assert read_records(name, tmp_path) == records
        # So that a file that a tool has written differs from the old one in the numbers only.
        assert (tmp_path / f"{name}.json").read_text() == (FOLDER / f"{name}.json").read_text()


def without(key):
    return lambda row: row.pop(key)


def with_value(key, value):
    return lambda row: row.__setitem__(key, value)


@pytest.mark.parametrize(
    ("name", "find", "change", "message"),
    [
        (
            "published",
            lambda records: records["tables"][0]["rows"][2],
            without("origin"),
            "row 3 of 'COCO with ViTDet's Mask R-CNN' has no origin",
        ),
        (
            "published",
            lambda records: records["tables"][0]["rows"][0],
            with_value("origin", []),
            "row 1 of .* has no origin",
        ),
        (
            "published",
            lambda records: records["tables"][0]["rows"][0],
            with_value("origin", ["hearsay"]),
            "has an origin that the file does not explain: 'hearsay'",
        ),
        (
            "published",
            lambda records: records["tables"][0]["rows"][0],
            without("box AP"),
            "row 1 of .* has no 'box AP'",
        ),
        (
            "published",
            lambda records: records["origins"]["crossmae_table_2"],
            without("url"),
            "the origin 'crossmae_table_2' must have text and url",
        ),
        (
            "published",
            lambda records: records["origins"]["crossmae_table_2"],
            with_value("command", "make demo"),
            "the origin 'crossmae_table_2' must have text and url",
        ),
        (
            "measured",
            lambda records: records["origins"]["demo"],
            without("command"),
            "the origin 'demo' must have command and machine",
        ),
        (
            "measured",
            lambda records: records["origins"]["demo"],
            with_value("machine", "some machine"),
            "the origin 'demo' is on no machine of the file's",
        ),
        ("measured", lambda records: records["costs"], without("origin"), "'costs' has no origin"),
        (
            "checkpoints",
            lambda records: records["pretraining"][0],
            with_value("license", ""),
            "row 1 of 'pretraining' does not say its license",
        ),
        (
            "checkpoints",
            lambda records: records["detection"][1],
            without("url"),
            "row 2 of 'detection' has no 'url'",
        ),
        ("checkpoints", lambda records: records, without("origins"), "there is no 'origins'"),
    ],
)
def test_bad_records_are_refused(name, find, change, message, tmp_path):
    records = read_records(name)
    change(find(records))
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(records))
    with pytest.raises(ValueError, match=message) as error:
        read_records(name, tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_json_or_not_there_is_refused(tmp_path):
    (tmp_path / "published.json").write_text("{'single': 'quotes'}")
    with pytest.raises(ValueError, match="published.json is not JSON"):
        read_records("published", tmp_path)
    with pytest.raises(FileNotFoundError, match="measured.json"):
        read_records("measured", tmp_path)
