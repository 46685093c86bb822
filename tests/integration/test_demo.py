"""The command demo: both stages, interrupted and continued."""

import json
import signal
import subprocess
import sys
import time

import pytest

from crossmae_det.__main__ import main
from crossmae_det.tools.demo import Progress, clock, last_record

COMMON = [
    *("train.amp.enabled=False", "train.log_period=1", "train.checkpointer.period=2"),
    *("dataloader.train.num_workers=0", "dataloader.train.total_batch_size=2"),
    "dataloader.image_size=64",
]


@pytest.fixture
def arguments(tiny_sets, tmp_path):
    """The demo with models and datasets that are small enough for a test."""
    train_set, val_set = tiny_sets
    encoder = ("embed_dim=32", "depth=2", "num_heads=2")
    return [
        *("demo", "--output", str(tmp_path)),
        *("--pretraining", *COMMON, f"dataloader.train.dataset.name={train_set.split(':')[1]}"),
        *(f"model.encoder.{value}" for value in encoder),
        *("model.decoder_dim=32", "model.decoder_depth=2", "train.max_iter=80"),
        *("--detector", *COMMON, "model.backbone.net.pretrain_img_size=64", "train.max_iter=2"),
        *(f"model.backbone.net.{value}" for value in encoder),
        f"dataloader.train.dataset.names={train_set}",
        f"dataloader.test.dataset.names={val_set}",
    ]


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """What a command changes in its process, and how those that it starts run."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def run(arguments, capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""
    code = 0
    try:
        main(arguments)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_an_interrupted_demo_is_continued_and_a_complete_one_is_kept(arguments, tmp_path, capfd):
    pretraining, detector = tmp_path / "demo_pretrain", tmp_path / "demo"
    command = [sys.executable, "-m", "crossmae_det", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (pretraining / "last_checkpoint").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert not (pretraining / "model_final.pth").exists()
    stopped = (pretraining / "metrics.json").read_bytes()

    code, output, error = run(arguments, capfd)
    assert code == 0, error
    assert (pretraining / "metrics.json").read_bytes().startswith(stopped)
    results = json.loads((detector / "inference" / "results.json").read_text())["results"]
    assert f"{results['segm']['AP50']:.1f}" in output
    assert "1/2" in output and "2/2" in output
    assert f"{detector}/report.html" in output and (detector / "report.html").is_file()
    log = (detector / "log.txt").read_text()
    assert f"weights from {pretraining}/model_final.pth" in log

    weights = (detector / "model_final.pth").stat().st_mtime_ns
    code, output, error = run(arguments, capfd)
    assert code == 0, error
    assert f"complete, in {detector}" in output
    assert (detector / "model_final.pth").stat().st_mtime_ns == weights


def test_a_stage_that_fails_ends_the_demo(arguments, tmp_path, capfd):
    (tmp_path / "demo_pretrain").write_text("")  # where the folder of the run should be
    code, _, error = run(arguments, capfd)
    assert code == 2
    assert "demo_pretrain" in error and "Traceback" not in error
    assert not (tmp_path / "demo").exists()


def test_the_time_that_is_left_counts_the_later_stages(capsys):
    progress = Progress("a stage", 100, remaining_stages=2)
    progress.first, progress.done = (10.0, 20), 60
    step = (30 - 10) / (60 - 20)
    alone = Progress("the last stage", 100, remaining_stages=0)
    alone.first, alone.done = progress.first, progress.done
    last = alone.seconds_left(30.0)
    assert last == pytest.approx(40 * step, rel=0.5)
    assert progress.seconds_left(30.0) - last == pytest.approx(2 * (last + 60 * step))
    with alone:
        alone.update(100, 0.25)
    assert "100/100, loss 0.250" in capsys.readouterr().out
    assert clock(119.7) == "2:00"


def test_only_metrics_of_the_running_stage_are_read(tmp_path):
    path = tmp_path / "metrics.json"
    assert last_record(path, since=0) is None
    path.write_text('{"iteration": 3, "total_loss": 1.5}\n{"iteration": 3, "bbox/AP": 2}\n{"iter')
    assert last_record(path, since=0)["total_loss"] == 1.5
    assert last_record(path, since=path.stat().st_mtime + 1) is None
