"""Records are checked: every row has an origin."""

import json

import pytest

from crossmae_det.model_zoo.records import FOLDER, read_records, write_records


def test_records_round_trip(tmp_path):
    for name in ("published", "measured", "checkpoints"):
        records = read_records(name)
        write_records(name, records, tmp_path)
        assert read_records(name, tmp_path) == records
        # Files written by a tool differ from the old ones in the numbers only.
        assert (tmp_path / f"{name}.json").read_text() == (FOLDER / f"{name}.json").read_text()


def without(key):
    return lambda row: row.pop(key)


def with_value(key, value):
    return lambda row: row.__setitem__(key, value)


def table_row(number):
    return lambda records: records["tables"][0]["rows"][number]


def origin(name):
    return lambda records: records["origins"][name]


@pytest.mark.parametrize(
    ("name", "find", "change", "message"),
    [
        ("published", table_row(2), without("origin"), "row 3 of '.+' .*origin"),
        ("published", table_row(0), with_value("origin", []), "row 1 of '.+' .*origin"),
        ("published", table_row(0), with_value("origin", ["hearsay"]), "'hearsay'"),
        ("published", table_row(0), without("box AP"), "row 1 of '.+' .*'box AP'"),
        ("published", origin("crossmae_table_2"), without("url"), "'crossmae_table_2' .*url"),
        ("published", origin("crossmae_table_2"), with_value("x", "y"), "'crossmae_table_2'"),
        ("measured", origin("demo"), without("command"), "'demo' .*command"),
        ("measured", origin("demo"), with_value("machine", "some machine"), "'demo' .*machine"),
        ("measured", lambda records: records["costs"], without("origin"), "'costs' .*origin"),
        (
            "checkpoints",
            lambda records: records["pretraining"][0],
            with_value("license", ""),
            "row 1 of 'pretraining' .*license",
        ),
        (
            "checkpoints",
            lambda records: records["detection"][1],
            without("url"),
            "row 2 of 'detection' .*'url'",
        ),
        ("checkpoints", lambda records: records, without("origins"), "'origins'"),
    ],
)
def test_bad_records_are_rejected(name, find, change, message, tmp_path):
    records = read_records(name)
    change(find(records))
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(records))
    with pytest.raises(ValueError, match=message) as error:
        read_records(name, tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_json_or_is_missing_is_rejected(tmp_path):
    (tmp_path / "published.json").write_text("{'single': 'quotes'}")
    with pytest.raises(ValueError, match="published.json is not JSON"):
        read_records("published", tmp_path)
    with pytest.raises(FileNotFoundError, match="measured.json"):
        read_records("measured", tmp_path)
