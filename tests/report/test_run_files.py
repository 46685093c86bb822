"""What is read from the folder of a run, and what it says about how far the run is."""

import json
import os
import socket

import pytest
from sample_runs import detection_metrics, record, write_lines, write_run

from crossmae_det.report.config_diff import differences, flatten
from crossmae_det.report.run_files import read_run


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "run", detection_metrics())
    return tmp_path / "run"


def status(folder, content):
    (folder / "run.json").write_text(json.dumps(content))
    return read_run(folder).status


@pytest.mark.parametrize(
    "end, state, text",
    [
        ({"state": "ended"}, "finished", "finished, 100 iterations"),
        ({"state": "failed", "error": "no <disk>"}, "failed", "failed at iteration 100 of 500"),
        ({"state": "interrupted"}, "stopped", "interrupted at iteration 100 of 500"),
        (None, "stopped", "stopped at iteration 100 of 500"),
    ],
)
def test_states(folder, end, state, text):
    content = record(ended=False, max_iter=500) | ({"end": end} if end else {})
    found = status(folder, content)
    assert (found.state, found.text) == (state, text)
    assert found.error == ("no <disk>" if state == "failed" else "")


def test_a_run_whose_process_lives_is_running(folder):
    here = {"host": socket.gethostname(), "pid": os.getpid()}
    assert status(folder, record(ended=False, max_iter=500, **here)).state == "running"
    for other in ({"pid": 2**22 + 1}, {"pid": None}, {"pid": -1}, {"host": "elsewhere"}):
        changed = record(ended=False, max_iter=500, **here | other)
        assert status(folder, changed).state == "stopped"


def test_early_stopping(folder):
    (folder / "early_stopping.json").write_text("{}")
    assert status(folder, record(max_iter=500)).text == "stopped early at iteration 100 of 500"
    assert status(folder, record(max_iter=100)).state == "finished"


def test_a_run_without_record_is_finished_if_it_has_its_last_weights(folder):
    assert read_run(folder).status.text == "stopped at iteration 100"
    (folder / "model_final.pth").touch()
    assert read_run(folder).status.state == "finished"


def test_time_is_that_of_the_record_or_of_the_iterations(folder):
    assert read_run(folder).seconds == pytest.approx(0.2 * 100)
    (folder / "run.json").write_text(json.dumps(record()))
    assert read_run(folder).seconds == 600
    resumed = record()
    resumed["starts"] *= 2
    (folder / "run.json").write_text(json.dumps(resumed))
    assert read_run(folder).seconds == pytest.approx(0.2 * 100)


def test_a_config_runs_no_code(folder, tmp_path):
    mark = tmp_path / "mark"
    text = f"train: {{x: !!python/object/apply:os.mkdir ['{mark}'], y: !!python/tuple [1, 2]}}\n"
    (folder / "config.yaml").write_text(text)
    run = read_run(folder)
    assert run.option("train.y") == [1, 2] and not mark.exists() and not run.problems


def test_differences_of_configs():
    text = "MODEL:\n  DEVICE: cpu\n"
    recipe = {"a": {"b": 1, "c": [{"d": 1}, {"d": 2}]}, "model": {"config": text}, "e": None}
    changed = {"a": {"b": 1.5, "c": [{"d": 1}]}, "model": {"config": text.replace("cpu", "cuda")}}
    ignored = {"train": {"output_dir": "x"}, "dataloader": {"recorded": {"x": 1}}}
    assert differences([recipe, changed | ignored]) == [
        ("a.b", ["1", "1.5"]),
        ("a.c.1.d", ["2", "(not set)"]),
        ("e", ["null", "(not set)"]),
        ("model.config.MODEL.DEVICE", ["cpu", "cuda"]),
    ]
    assert differences([recipe, recipe]) == []
    assert flatten({"names": ["ä", "b"], "empty": {}, "text": ""}) == {
        "names": "[ä, b]",
        "empty": "{}",
        "text": "''",
    }


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda folder: None, ["does not exist"]),
        (lambda folder: folder.touch(), ["is a file"]),
        (lambda folder: folder.mkdir(), ["metrics.json", "results.json"]),
        (lambda folder: write_lines(folder, []), ["metrics.json", "no metrics"]),
    ],
)
def test_a_folder_without_a_run_is_a_user_error(tmp_path, make, words):
    folder = tmp_path / "none"
    make(folder)
    with pytest.raises(ValueError) as error:
        read_run(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    assert all(word in message for word in words)


def test_everything_of_a_run_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "all"))
    assert run.name == "all" and run.iterations == 100 and run.max_iter == 100
    assert run.batch_size == 8 and run.results.keys() == {"", "ema"} and not run.problems
    assert run.option("optimizer.lr") == 0.001 and run.option("no.such.key") is None
