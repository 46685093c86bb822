"""The command ``crossmae-det report``."""

import sys

import pytest
from html_pages import Page
from sample_runs import write_run

from crossmae_det.__main__ import main


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)

    def run(*arguments):
        code = 0
        try:
            main(["report", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_one_run(call, tmp_path):
    folder = write_run(tmp_path / "run")
    code, output, _ = call(folder)
    assert code == 0 and output.splitlines()[-1] == str(folder / "report.html")
    assert "Mask AP" in Page(folder / "report.html").text


def test_several_runs(call, tmp_path):
    runs = [write_run(tmp_path / name) for name in ("first", "second")]
    code, output, _ = call(*runs)
    assert code == 0 and output.splitlines()[-1] == "comparison.html"
    assert "Comparison of 2 runs" in Page(tmp_path / "comparison.html").text
    code, output, _ = call(*runs, "--output", "pages/two.html")
    assert code == 0 and (tmp_path / "pages/two.html").is_file()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["no_run"], ["no_run", "does not exist"]),
        (["empty"], ["empty", "metrics.json"]),
        (["run", "empty"], ["empty", "metrics.json"]),
        (["run", "./run"], ["twice"]),
        (["run", "--output", "page.pdf"], ["page.pdf", ".html"]),
        (["run", "--output", "run/metrics.json/page.html"], ["metrics.json"]),
    ],
)
def test_user_errors_are_one_line(call, tmp_path, arguments, words):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    code, _, error = call(*arguments)
    lines = [
        line for line in error.splitlines() if "Warning" not in line and "warnings." not in line
    ]
    assert code == 2 and len(lines) == 1, error
    assert all(word in lines[0] for word in words)
    assert not (tmp_path / "empty/report.html").exists()
