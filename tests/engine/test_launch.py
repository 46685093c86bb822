"""Arguments, processes, log, run folder and memory of a job."""

import logging
import os
import platform
import re
import subprocess
import sys
import warnings
from argparse import Namespace

import pytest
import torch
from omegaconf import OmegaConf
from shorthand import one_line
from torch import distributed

from crossmae_det.engine import keep_freed_memory, launch
from crossmae_det.engine.launch import check_folder, claim_folder, find_run

# Files of a run, and files of the user.
RUN = ["last_checkpoint", "model_0000099.pth", "model_best.pth", "metrics.json"]
OWN = ["weights.pth", "model_of_mine.pth", "photo.jpg", "config.yaml", "log.txt"]


def arguments(**given):
    defaults = dict(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto")
    flags = dict(eval_only=False, resume=False, overwrite=False)
    return Namespace(**(defaults | flags | given))


def config(tmp_path, device):
    options = {"output_dir": str(tmp_path), "init_checkpoint": "", "device": device}
    others = ("model", "dataloader", "optimizer", "lr_multiplier")
    return OmegaConf.create({"train": options} | {key: {} for key in others})


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that claims two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def started(monkeypatch):
    """The arguments with which processes and their group would be started."""
    calls = {}
    monkeypatch.setattr(
        launch, "start_processes", lambda main, args, **_: calls.update(main=main, args=args)
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: calls.update(gpu=index))
    monkeypatch.setattr(
        distributed,
        "init_process_group",
        lambda backend, **group: calls.update(group, back=backend),
    )
    for name in ("create_local_process_group", "synchronize"):
        monkeypatch.setattr(launch.comm, name, lambda *_: None)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    return calls


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl"), ("auto", "nccl")]
)
def test_the_backend_follows_the_device_of_the_run(tmp_path, two_gpus, started, device, backend):
    ran = []
    args = arguments(num_gpus=2, num_machines=2, machine_rank=1, dist_url="tcp://a:1")
    launch.run_distributed(ran.append, args, config(tmp_path, device))
    started["main"](1, *started["args"])
    assert started["back"] == backend
    assert (started["rank"], started["world_size"]) == (3, 4)
    assert started.get("gpu") == (None if device == "cpu" else 1)
    assert ran == [args]


def test_the_backend_follows_the_device_under_torchrun(tmp_path, two_gpus, started, monkeypatch):
    for name, value in {"LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    launch.run_distributed(lambda _: None, arguments(), config(tmp_path, "cpu"))
    assert started["back"] == "gloo" and "gpu" not in started


@pytest.mark.parametrize(
    ("device", "given", "message"),
    [
        ("cuda", {"num_gpus": 3}, "this machine has 2"),
        ("cuda:1", {"num_gpus": 2}, "train.device=cuda"),
        ("cpu", {"num_gpus": -1}, "--num-gpus"),
        ("cpu", {"num_gpus": 1, "num_machines": 2}, "--dist-url"),
    ],
)
def test_invalid_processes_are_rejected(tmp_path, two_gpus, started, device, given, message):
    with pytest.raises(ValueError) as error:
        launch.run_distributed(print, arguments(**given), config(tmp_path, device))
    assert message in one_line(error)
    assert not started


def test_processes_on_a_cpu_share_the_threads(tmp_path, started, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for processes, expected in ((2, "2"), (8, "1")):
        monkeypatch.setenv("OMP_NUM_THREADS", "5")  # of a user, or the container's limit
        launch.run_distributed(print, arguments(num_gpus=processes), config(tmp_path, "cpu"))
        assert os.environ["OMP_NUM_THREADS"] == expected


def test_a_used_folder_is_rejected_before_processes_start(tmp_path, started):
    (tmp_path / "model_final.pth").touch()
    with pytest.raises(ValueError) as error:
        launch.run_distributed(print, arguments(num_gpus=2), config(tmp_path, "cpu"))
    assert "--overwrite" in one_line(error)
    assert not started


def test_a_config_without_a_key_is_rejected(tmp_path, started):
    cfg = config(tmp_path, "cpu")
    del cfg.train
    with pytest.raises(ValueError) as error:
        launch.run_distributed(print, arguments(), cfg)
    assert "no train" in one_line(error)


@pytest.fixture
def folder(tmp_path):
    """Functions that create files in a run folder (returning its config), and list its files."""

    def make(*names, init_checkpoint=""):
        for name in names:
            path = tmp_path / "output" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        return OmegaConf.create(
            {
                "train": {
                    "output_dir": str(tmp_path / "output"),
                    "init_checkpoint": init_checkpoint,
                }
            }
        )

    def content():
        return {
            str(path.relative_to(tmp_path / "output"))
            for path in (tmp_path / "output").rglob("*")
            if path.is_file()
        }

    return make, content


@pytest.mark.parametrize("name", [*RUN, "model_final.pth", "model_before_nonfinite.pth"])
def test_a_folder_with_a_run_is_rejected_in_one_line(folder, name):
    make, content = folder
    cfg = make(name, "photo.jpg")
    with pytest.raises(ValueError) as error:
        claim_folder(cfg, arguments())
    message = one_line(error)
    assert name in message and "--resume" in message and "--overwrite" in message
    assert content() == {name, "photo.jpg"}
    make("last_checkpoint")
    for accepted in ({"eval_only": True}, {"resume": True}):
        assert claim_folder(cfg, arguments(**accepted)) == []
    assert content() == {name, "photo.jpg", "last_checkpoint"}


def test_resume_does_not_guess_the_checkpoint(folder):
    make, content = folder
    cfg = make("model_final.pth", "model_best.pth")
    with pytest.raises(ValueError) as error:
        claim_folder(cfg, arguments(resume=True))
    assert "model_final.pth" in one_line(error) and "last_checkpoint" in one_line(error)


def test_files_of_the_user_are_not_a_run(folder):
    make, content = folder
    cfg = make(*OWN, "inference/mine.json")
    for overwrite in (False, True):
        assert claim_folder(cfg, arguments(overwrite=overwrite)) == []
    assert content() == {*OWN, "inference/mine.json"}


def test_a_missing_folder_is_created(folder, tmp_path):
    make, _ = folder
    assert claim_folder(make(), arguments()) == []
    assert (tmp_path / "output").is_dir()


def test_a_read_only_folder_is_named_with_its_key(folder, tmp_path, monkeypatch):
    make, _ = folder
    cfg = make("photo.jpg")
    monkeypatch.setattr(launch.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError) as error:
        claim_folder(cfg, arguments())
    assert f"train.output_dir={tmp_path}/output" in one_line(error)


def test_overwrite_removes_the_run_and_nothing_else(folder, tmp_path):
    make, content = folder
    results = ["inference/results.json", "reconstructions/0000002.png", "early_stopping.json"]
    cfg = make(*OWN, *RUN, *results, "events.out.tfevents.1.host", ".model_0000199.77.pth")
    removed = claim_folder(cfg, arguments(overwrite=True))
    assert content() == set(OWN)
    assert {*RUN, "inference"} <= set(removed)
    assert find_run(tmp_path / "output") == []


def test_overwrite_does_not_remove_the_initial_weights(folder, tmp_path):
    make, content = folder
    cfg = make(*RUN, init_checkpoint=str(tmp_path / "output" / "model_best.pth"))
    with pytest.raises(ValueError) as error:
        check_folder(cfg, arguments(overwrite=True))
    assert "model_best.pth" in one_line(error)
    assert content() == set(RUN)
    elsewhere = make(*RUN, init_checkpoint=str(tmp_path / "output" / "weights.pth"))
    make("weights.pth")
    claim_folder(elsewhere, arguments(overwrite=True))
    assert content() == {"weights.pth"}


def test_resume_and_overwrite_exclude_each_other(folder):
    make, _ = folder
    with pytest.raises(ValueError) as error:
        check_folder(make(), arguments(resume=True, overwrite=True))
    assert "--resume" in one_line(error) and "--overwrite" in one_line(error)


@pytest.fixture
def _warnings_as_before():
    handlers = logging.getLogger("py.warnings").handlers
    level = logging.getLogger("torch").level
    yield
    logging.captureWarnings(False)
    logging.getLogger("py.warnings").handlers = handlers
    logging.getLogger("torch").setLevel(level)


def say_something():
    logger = logging.getLogger("crossmae_det.engine.test")
    logger.debug("details")
    logger.info("progress")
    logging.getLogger("detectron2.data.common").info("Serializing")


def test_the_terminal_shows_less_than_the_log_file(tmp_path, capsys):
    launch.start_log(str(tmp_path))
    say_something()
    terminal = capsys.readouterr().out
    assert "progress" in terminal and "details" not in terminal and "Serializing" not in terminal
    file = (tmp_path / "log.txt").read_text()
    assert all(word in file for word in ("progress", "details", "Serializing"))


@pytest.mark.usefixtures("_warnings_as_before")
def test_only_the_first_process_logs_to_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch.comm, "get_rank", lambda: 1)
    launch.start_log(str(tmp_path))
    say_something()
    warnings.warn("careful", stacklevel=1)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    file = (tmp_path / "log.txt.rank1").read_text()
    assert all(word in file for word in ("progress", "details", "careful"))


def test_versions_are_one_line():
    assert re.fullmatch(r"crossmae_det \S+, torch \S+, detectron2 \S+", launch.versions())


FAULTS = """
import resource
import torch
from crossmae_det.engine import keep_freed_memory

def step():
    tensors = [torch.ones(2**23) for _ in range(8)]  # 256 MiB, or 65,536 pages of 4 KiB

def faults():
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

left = faults()
assert keep_freed_memory(torch.device("cpu"))
print(left, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_kept_memory_causes_no_page_faults():
    command = [sys.executable, "-c", FAULTS]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    left, kept = map(int, result.stdout.split())
    assert kept < 0.1 * left


def test_memory_is_not_kept_on_a_gpu():
    assert not keep_freed_memory(torch.device("cuda"))
