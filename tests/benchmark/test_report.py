"""Tables in every format, JSON, and plots."""

import csv
import json

import cv2
import pytest
import torch

from crossmae_det.benchmark import Report, Section, Spread, environment, read_json
from crossmae_det.benchmark.report import (
    JSON_VERSION,
    Column,
    driver_version,
    plot_sections,
    published_ap,
)

PUBLISHED = {
    "backbone": "vit-base",
    "image_size": 1024,
    "batch_size": 1,
    "failure": "",
    "flops": 9e11,
    "median_seconds": 1.0,
    "peak_bytes": 2**30,
    "train": False,
    "precision": "fp32",
    "device": "cpu",
}


@pytest.fixture
def report():
    columns = [
        Column("name", "name"),
        Column("images/s", "rate", ".2f"),
        Column("ms", "seconds", ".0f", 1e3),
        Column("range", "range", ".1f"),
    ]
    records = [
        {"name": "a", "rate": 0.5012, "seconds": 0.01, "range": Spread(2, 1, 3), "failure": ""},
        {"name": "b", "failure": "out of memory"},
    ]
    section = Section("speed", "Speed", columns, records, ["Measured twice.", "On two cores."])
    return Report("python tools/benchmark.py", {"CPU": "abacus", "cores": 2}, [section])


def test_cells_are_formatted_and_failures_shown(report):
    assert report.sections[0].rows == [
        ["a", "0.50", "10", "2.0 (1.0 to 3.0)"],
        ["b", "out of memory", "-", "-"],
    ]


def test_the_terminal_shows_tables_notes_and_the_environment(report):
    text = str(report)
    for part in ("Speed", "images/s", "0.50", "Measured twice.", "CPU: abacus, cores: 2"):
        assert part in text


def test_markdown(report, tmp_path):
    report.write_markdown(tmp_path / "new" / "table.md")
    text = (tmp_path / "new" / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0] == ["name", "images/s", "ms", "range"] and cells[2][:3] == ["a", "0.50", "10"]
    assert "Measured twice. On two cores." in text and "abacus" in text


def test_json_has_full_precision(report, tmp_path):
    report.write_json(tmp_path / "results.json")
    content = read_json(tmp_path / "results.json")
    assert content["version"] == JSON_VERSION
    assert content["command"] == "python tools/benchmark.py"
    assert content["environment"] == {"CPU": "abacus", "cores": 2}
    first, second = content["speed"]
    assert first["rate"] == 0.5012 and first["range"] == {"median": 2, "low": 1, "high": 3}
    assert second["failure"] == "out of memory"


def test_csv(report, tmp_path):
    report.write_csv(tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["section", "name", "images/s", "ms", "range"]
    assert rows[2] == ["speed", "b", "out of memory", "-", "-"]


@pytest.mark.parametrize("text", ["no json", "[]", '{"version": 0}', "{}"])
def test_results_of_another_version_are_rejected(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_the_environment_names_the_machine():
    found = environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__ and found["device"] == "cpu"
    assert found["cores"] >= 1 and found["threads"] == torch.get_num_threads()
    assert found["CPU"]


def plotted(tmp_path, key, values):
    """Plot a section and check that every file is an image; returns their names."""
    files = plot_sections([Section(key, "", [], [], [], values)], tmp_path)
    for file in files:
        if file.suffix == ".png":
            image = cv2.imread(str(file))
            assert image.std() > 5 and min(image.shape[:2]) > 400
        else:
            assert "<svg" in file.read_text()
    return {file.name for file in files}


def test_plots_of_latency_and_precision(tmp_path):
    """vit-base has published AP, at 1024 pixels."""
    other = PUBLISHED | {"backbone": "other"}
    failed = {"backbone": "other", "image_size": 2048, "batch_size": 1, "failure": "no memory"}
    records = [
        PUBLISHED,
        other,
        other | {"image_size": 512, "batch_size": 2},
        failed | {"flops": 1},
    ]
    names = {"latency.png", "latency.svg", "precision.png", "precision.svg"}
    assert plotted(tmp_path, "backbones", records) == names


def test_failures_are_not_plotted(tmp_path):
    other = PUBLISHED | {"backbone": "other", "failure": "no memory"}
    assert plotted(tmp_path, "backbones", [other]) == set()
    assert not list(tmp_path.iterdir())


def test_plot_of_growth(tmp_path):
    points = [dict(image_size=s, median_seconds=s**2 / 1e6, peak_bytes=0) for s in (256, 512)]
    failed = {"image_size": 1024, "failure": "no memory"}
    curve = dict(time_exponent=2.0, memory_exponent=None, points=[*points, failed])
    values = {"windowed": curve, "global": curve}
    assert plotted(tmp_path, "growth", values) == {"growth.png", "growth.svg"}
    assert json.dumps(values)


def test_published_ap_by_backbone():
    known = published_ap()
    assert (known["vit-base"].weights, known["vit-base"].box_ap) == ("CrossMAE", 52.1)
    assert known["detectron2-vit-large"].box_ap == 55.5


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22\nGCC", "550.54.14"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Rel", "580.65.06"),
        ("something else", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_version_of_the_driver(tmp_path, text, version):
    file = tmp_path / "version"
    if text is not None:
        file.write_text(text)
    assert driver_version(file) == version
