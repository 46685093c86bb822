"""Weights & Biases and MLflow: what they hold after a run, without a network."""

import importlib.util
import json
import logging
import math
import struct

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicWriter
from torch import nn

from crossmae_det.engine import loggers
from crossmae_det.engine.loggers import LoggedRun, build_loggers
from crossmae_det.engine.trainer import Trainer

OFF = {
    "wandb": {"enabled": False, "project": "p", "entity": None, "name": None, "tags": ["t"]},
    "mlflow": {"enabled": False, "tracking_uri": None, "experiment": "e", "name": None},
}
# More than MLflow takes at once, with a name that it rejects.
CLASSES = ["a//b & (c): 'ä'", *(f"class {i}" for i in range(1100))]
SETTINGS = {"train.seed": 3, "model.size": "tiny", **{f"many.{i}": i for i in range(150)}}


def options(folder, tracker, **changes):
    enabled = OFF[tracker] | {"enabled": True} | changes
    return {**OFF, "output_dir": str(folder), tracker: enabled}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        return {"loss_a": self.weight.square().sum(), "loss_b": self.weight.abs().sum()}


class Measure(HookBase):
    """Validation losses and an image in the second iteration, and an AP after the last one."""

    def after_step(self):
        if self.trainer.iter == 1:
            self.trainer.storage.put_scalar("val/total_loss", 0.25, smoothing_hint=False)
            image = torch.zeros(3, 4, 6, dtype=torch.uint8)
            image[0] = 200
            self.trainer.storage.put_image("drawn", image)

    def after_train(self):
        self.trainer.storage.put_scalar("segm/AP", 12.5, smoothing_hint=False)
        self.trainer.storage.put_scalar("segm/APs", math.nan, smoothing_hint=False)
        for name in CLASSES:
            self.trainer.storage.put_scalar(f"segm/AP-{name}", 7.0, smoothing_hint=False)


def run(folder, chosen, start=0, end=4):
    """Train for a few iterations with loggers; the folder has a config and a checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("a: 1\n")
    (folder / "model_final.pth").write_bytes(b"")
    (folder / "inference").mkdir(exist_ok=True)
    (folder / "inference" / "results.json").write_text("{}")
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    trainer = Trainer(model, [[0]] * (end - start), optimizer, log_period=2)
    trainer.register_hooks([Measure(), LoggedRun(chosen), PeriodicWriter(chosen, period=2)])
    trainer.train(start, end)


def blocks(content):
    """The records of a file in LevelDB's log format, after a header of 7 bytes."""
    position, record = 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # a block of the file ends here
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def read_wandb(folder):
    """The records in the files of offline runs: (run ids, history rows, summary, config)."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its process writes the files; they are whole when it has ended
    ids, rows, summary, config = [], [], {}, {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in blocks(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.append(record.run.run_id)
                updates = record.run.config.update
                config |= {item.key: json.loads(item.value_json) for item in updates}
            if record.HasField("history"):
                items = record.history.item
                rows.append(
                    {
                        item.key or ".".join(item.nested_key): json.loads(item.value_json)
                        for item in items
                    }
                )
            if record.HasField("summary"):
                summary |= {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.summary.update
                }
    return ids, rows, summary, config


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "run"


def test_wandb_holds_the_run_and_a_resumed_run_continues_it(offline):
    run(offline, build_loggers(options(offline, "wandb"), SETTINGS))
    ids, rows, summary, config = read_wandb(offline)
    assert config["train.seed"] == 3 and config["model.size"] == "tiny"
    losses = {row["iteration"]: row["total_loss"] for row in rows if "total_loss" in row}
    assert list(losses) == [1, 3] and losses[1] > losses[3]
    assert [row["iteration"] for row in rows if row.get("val/total_loss") == 0.25] == [1]
    assert [row["iteration"] for row in rows if row.get("segm/AP") == 12.5] == [4]
    (drawn,) = [row for row in rows if any(key.startswith("drawn") for key in row)]
    assert drawn["iteration"] == 1
    assert str(offline.resolve() / "model_final.pth") in str(summary)
    files = offline / "wandb" / "latest-run" / "files"
    assert (files / "config.yaml").exists()
    assert (files / "inference" / "results.json").exists()

    run(offline, build_loggers(options(offline, "wandb"), SETTINGS), start=4, end=6)
    again = read_wandb(offline)
    assert len(again[0]) > len(ids) and set(again[0]) == set(ids) and len(set(ids)) == 1
    # A new run in the folder is another one.
    run(offline, build_loggers(options(offline, "wandb"), SETTINGS))
    assert len(set(read_wandb(offline)[0])) == 2


def test_mlflow_holds_the_run_and_a_resumed_run_continues_it(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs MLflow: pip install mlflow")
    pytest.importorskip("sqlalchemy", reason="needs MLflow's database: pip install mlflow")
    folder, uri = tmp_path / "run", f"sqlite:///{tmp_path}/runs.db"
    monkeypatch.chdir(tmp_path)  # where MLflow puts images and files
    given = options(folder, "mlflow", tracking_uri=uri, name="n")
    run(folder, build_loggers(given, SETTINGS))
    run(folder, build_loggers(given, SETTINGS), start=4, end=6)
    client = mlflow.MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert found.info.run_name == "n" and found.info.status == "FINISHED"
    assert found.data.params["train.seed"] == "3" and len(found.data.params) == len(SETTINGS)
    history = client.get_metric_history(found.info.run_id, "total_loss")
    assert [metric.step for metric in history] == [1, 3, 5]
    assert found.data.metrics["val/total_loss"] == 0.25
    assert found.data.metrics["segm/AP"] == 12.5 and "segm/APs" not in found.data.metrics
    per_class = [name for name in found.data.metrics if name.startswith("segm/AP-")]
    assert len(per_class) == len(CLASSES)
    assert found.data.tags["checkpoint.model_final"] == str(folder.resolve() / "model_final.pth")
    artifacts = [file.path for file in client.list_artifacts(found.info.run_id)]
    assert {"config.yaml", "inference", "images"} <= set(artifacts)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named(name, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=f"train.{name}.enabled=True: .*pip install {name}"):
        build_loggers(options(tmp_path, name), SETTINGS)
    assert build_loggers({**OFF, "output_dir": str(tmp_path)}, SETTINGS) == []


class Broken(loggers.ExperimentLogger):
    """A tracker without its server."""

    NAME = "json"  # a package that is installed

    def start(self, run_id):
        if self.options.get("refuse"):
            raise RuntimeError("no\nserver")
        return "1"

    def send(self, lines, images):
        raise ConnectionError("the server is gone")

    def finish(self, files, checkpoints):
        raise AssertionError("it was left out")


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "run", [Broken(str(tmp_path / "run"), SETTINGS, {})])
    (record,) = [each for each in caplog.records if each.name == loggers.__name__]
    assert "the server is gone" in record.getMessage()


def test_a_tracker_that_cannot_start_is_an_error(tmp_path, caplog):
    folder = str(tmp_path / "run")
    # The second one is not started.
    trackers = [Broken(folder, SETTINGS, {"refuse": True}), Broken(folder, SETTINGS, {})]
    with pytest.raises(ValueError, match="train.json: json cannot start: no server"):
        run(tmp_path / "run", trackers)
    assert not [each for each in caplog.records if each.name == loggers.__name__]
