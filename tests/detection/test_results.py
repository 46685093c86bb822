import json
import math
from pathlib import Path

import numpy as np
import pytest

from crossmae_det.detection import format_table, write_results
from crossmae_det.detection.evaluator import format_per_class


def test_results_keep_full_precision_and_become_null_where_not_finite(tmp_path):
    path = tmp_path / "deep" / "results.json"
    results = {
        "bbox": {"AP": 1 / 3, "APs": math.nan, "APl": np.float32(math.inf)},
        "n": np.int64(4),
    }
    context = {"checkpoint": Path("a/model.pth"), "seconds": math.nan, "sizes": (1, np.float64(2))}
    write_results(path, results, context=context)
    assert json.loads(path.read_text()) == {
        "results": {"bbox": {"AP": 1 / 3, "APs": None, "APl": None}, "n": 4},
        "context": {"checkpoint": "a/model.pth", "seconds": None, "sizes": [1, 2.0]},
    }
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(path, {"bbox": {"AP": 1.0}}, context={})
    old = path.read_text()

    def broken(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dump", broken)
    with pytest.raises(OSError, match="no space left"):
        write_results(path, {"bbox": {"AP": 2.0}}, context={})
    assert path.read_text() == old
    assert list(tmp_path.iterdir()) == [path]


def test_table_has_a_row_per_task_and_no_classes():
    table = format_table(
        {
            "bbox": {"AP": 27.204, "AP50": 40.0, "AP-cat": 3.0},
            "segm": {"AP": 21.4, "AP50": math.nan},
            "ema": {"bbox": {"AP": 28.0}},
        }
    )
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] == [
        ["", "AP", "AP50"],
        [":---------", "------:", "-------:"],
        ["bbox", "27.20", "40.00"],
        ["segm", "21.40", "-"],
        ["ema bbox", "28.00", "-"],
    ]


def test_table_without_numbers():
    assert format_table({}) == "no results"
    assert format_table({"bbox": {}}) == "no results"


def test_per_class_table_shows_every_class_once():
    names = [f"thing {i}" for i in range(20)]
    results = {
        "bbox": {"AP": 1.0, **{f"AP-{name}": float(i) for i, name in enumerate(names)}},
        "segm": {"AP": 1.0, **{f"AP-{name}": math.nan for name in names}},
    }
    lines = format_per_class(results).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [cell.strip() for line in lines[2:] for cell in line.split("|")[1:-1]]
    for i, name in enumerate(names):
        at = cells.index(name)
        assert cells.count(name) == 1
        assert cells[at + 1 : at + 3] == [f"{i:.2f}", "-"]
    assert format_per_class({"bbox": {"AP": 1.0}}) == ""
