"""Which processes are started for a job, and over what they exchange tensors."""

from argparse import Namespace

import pytest
import torch
from omegaconf import OmegaConf
from shorthand import one_line
from torch import distributed

from crossmae_det.engine import launch


def arguments(**given):
    defaults = dict(
        num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto", eval_only=False, resume=False
    )
    return Namespace(**(defaults | given))


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
    """What would be started: the arguments of start_processes, and of the group's creation."""
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


def test_so_it_does_under_torchrun(tmp_path, two_gpus, started, monkeypatch):
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
        ("cpu", {"num_gpus": 1, "num_machines": 2}, "--dist-url auto"),
    ],
)
def test_what_cannot_be_started_is_rejected(tmp_path, two_gpus, started, device, given, message):
    with pytest.raises(ValueError) as error:
        launch.run_distributed(print, arguments(**given), config(tmp_path, device))
    assert message in one_line(error)
    assert not started


def test_a_used_folder_is_rejected_before_anything_is_started(tmp_path, started):
    (tmp_path / "model_final.pth").touch()
    with pytest.raises(ValueError) as error:
        launch.run_distributed(print, arguments(num_gpus=2), config(tmp_path, "cpu"))
    assert "--overwrite" in one_line(error)
    assert not started


def test_a_config_of_no_job_is_rejected(tmp_path, started):
    cfg = config(tmp_path, "cpu")
    del cfg.train
    with pytest.raises(ValueError) as error:
        launch.run_distributed(print, arguments(), cfg)
    assert "no train" in one_line(error)
