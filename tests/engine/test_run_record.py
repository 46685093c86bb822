import json
import logging
import sys

import pytest
import torch

from crossmae_det.engine.hooks import METRICS
from crossmae_det.engine.run_record import FILE, ReportUpdates, read_record, recorded

CPU = torch.device("cpu")
START = {
    "iteration": 0,
    "max_iter": 9,
    "config_file": "demo/mask_rcnn.py",
    "overrides": ["train.seed=1"],
}


class Report:
    def __init__(self, error=None):
        self.calls = []
        self.error = error

    def begin(self, config_file):
        self.calls.append(config_file)

    def write(self, *, final):
        self.calls.append(final)
        if self.error:
            raise self.error


def test_start_and_end_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["crossmae-det train", "--config-file", "my config.py"])
    with recorded(str(tmp_path), None, CPU, START):
        (start,) = read_record(tmp_path)["starts"]
        assert "end" not in read_record(tmp_path)
    assert start["command"] == "crossmae-det train --config-file 'my config.py'"
    assert start["environment"]["torch"] == torch.__version__
    assert start["environment"]["device"] == "cpu"
    assert {key: start[key] for key in START} == START
    assert read_record(tmp_path)["end"]["state"] == "ended"


@pytest.mark.parametrize(
    "error, state, message",
    [
        (ValueError("a\n b"), "failed", "a b"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
    ],
)
def test_the_record_has_the_error_that_ended_the_run(tmp_path, error, state, message):
    (tmp_path / METRICS).write_text("{}\n")
    report = Report()
    with pytest.raises(type(error)), recorded(str(tmp_path), report, CPU, START):
        raise error
    end = read_record(tmp_path)["end"]
    assert (end["state"], end["error"]) == (state, message)
    assert report.calls == [START["config_file"], True]


def test_a_resumed_run_keeps_its_starts_and_a_new_one_drops_them(tmp_path):
    for iteration, starts in ((0, 1), (5, 2), (9, 3), (0, 1)):
        with recorded(str(tmp_path), None, CPU, START | {"iteration": iteration}):
            assert len(read_record(tmp_path)["starts"]) == starts
            assert "end" not in read_record(tmp_path)


def test_a_failing_report_does_not_fail_the_run(tmp_path, caplog):
    (tmp_path / METRICS).write_text("{}\n")
    with (
        caplog.at_level(logging.WARNING),
        recorded(str(tmp_path), Report(RuntimeError("no ink")), CPU, START),
    ):
        pass
    assert "no ink" in caplog.text and f"crossmae-det report {tmp_path}" in caplog.text
    assert read_record(tmp_path)["end"]["state"] == "ended"


def test_a_broken_record_is_a_user_error_and_does_not_stop_a_resumed_run(tmp_path, caplog):
    (tmp_path / FILE).write_text('{"starts": [')
    with pytest.raises(ValueError) as error:
        read_record(tmp_path)
    assert FILE in str(error.value) and "\n" not in str(error.value)
    with recorded(str(tmp_path), None, CPU, START | {"iteration": 3}):
        pass
    assert len(json.loads((tmp_path / FILE).read_text())["starts"]) == 1


def test_the_report_is_updated_after_evaluations_but_the_last(tmp_path):
    (tmp_path / METRICS).write_text("{}\n")
    report = Report()
    hook = ReportUpdates(report, str(tmp_path), period=2)
    hook.trainer = type("Trainer", (), {"max_iter": 6})
    written = []
    for iteration in range(6):
        hook.trainer.iter = iteration
        hook.after_step()
        written.append(len(report.calls))
    assert written == [0, 1, 1, 2, 2, 2]  # the last one is written when the run has ended
    assert report.calls == [False, False]
