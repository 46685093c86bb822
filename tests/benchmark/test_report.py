import json

import pytest
import torch

from crossmae_det.benchmark import Report, Section, environment
from crossmae_det.benchmark.report import JSON_VERSION


@pytest.fixture
def report():
    section = Section(
        key="speed",
        title="Speed",
        headers=["name", "images/s"],
        rows=[["a", "0.50"], ["b", "10.00"]],
        notes=["Measured twice.", "In turns."],
        values=[{"name": "a", "rate": 0.5012}],
    )
    return Report("python tools/benchmark.py", {"CPU": "abacus", "cores": 2}, [section])


def test_what_the_terminal_shows(report):
    assert str(report).splitlines() == [
        "Speed",
        "",
        "name      images/s",
        "------  ----------",
        "a             0.50",
        "b            10.00",
        "",
        "Measured twice.",
        "In turns.",
        "",
        "python tools/benchmark.py",
        "CPU: abacus, cores: 2",
    ]


def test_markdown(report, tmp_path):
    report.write_markdown(tmp_path / "new" / "table.md")
    assert (tmp_path / "new" / "table.md").read_text().splitlines() == [
        "**Speed**",
        "",
        "| name   |   images/s |",
        "|:-------|-----------:|",
        "| a      |       0.50 |",
        "| b      |      10.00 |",
        "",
        "Measured twice. In turns.",
        "",
        "`python tools/benchmark.py` on CPU: abacus, cores: 2.",
    ]


def test_json_has_all_digits(report, tmp_path):
    report.write_json(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "version": JSON_VERSION,
        "command": "python tools/benchmark.py",
        "environment": {"CPU": "abacus", "cores": 2},
        "speed": [{"name": "a", "rate": 0.5012}],
    }


def test_the_environment_names_the_machine():
    found = environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__ and found["device"] == "cpu"
    assert found["cores"] >= 1 and found["threads"] == torch.get_num_threads()
    assert found["CPU"]
