"""Validation losses, the best checkpoint, and early stopping."""

import copy
import json
import logging
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage, get_event_storage
from timm.layers import DropPath
from torch import nn

from crossmae_det.checkpoint import read_checkpoint
from crossmae_det.engine.checkpointing import Checkpointer
from crossmae_det.engine.validation import (
    BestCheckpointer,
    EarlyStopping,
    ValidationLoss,
    losses_on,
    sign_of,
)
from crossmae_det.model_zoo import get_config
from crossmae_det.modeling import ViT
from crossmae_det.pretraining import CrossMAE


class Noisy(nn.Module):
    """A model with all kinds of noise and training state, and losses in training mode only."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Sequential(nn.Dropout(0.5), DropPath(0.5))

    def forward(self, batch):
        if not self.training:
            return batch
        get_event_storage().put_scalar("roi_heads/num_fg_samples", 7)
        y = self.drop(self.norm(self.linear(batch)))
        return {"loss_a": y.square().mean(), "loss_b": (torch.rand(len(batch)) * y[:, 0]).mean()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Noisy()
    model.norm.running_mean.fill_(0.3)
    return model


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, generator=generator) for size in (4, 4, 2)]


def test_validation_losses_are_means_over_images_without_noise(model, batches):
    expected = sum(
        len(batch)
        * nn.functional.batch_norm(model.linear(batch), model.norm.running_mean, torch.ones(3))
        .square()
        .mean()
        .item()
        for batch in batches
    )
    losses = losses_on(model, batches)
    assert losses["loss_a"] == pytest.approx(expected / 10, rel=1e-4)
    assert losses["total_loss"] == pytest.approx(losses["loss_a"] + losses["loss_b"])


def state_of_the_process():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_validation_changes_no_state(model, batches):
    model.train()
    model.drop.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    state = state_of_the_process()
    with EventStorage() as storage:
        losses_on(model, batches)
        assert not storage.latest()
    assert state_of_the_process() == state
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_after_an_error(model):
    model.train()
    with pytest.raises(RuntimeError):
        losses_on(model, [torch.zeros(2, 5)])
    assert all(module.training for module in model.modules())


def test_validation_losses_depend_on_weights_and_seed_alone(model, batches):
    first = losses_on(model, batches, seed=1)
    torch.rand(3)
    model.train(not model.training)
    assert losses_on(model, batches, seed=1) == first
    assert losses_on(model, batches, seed=2)["loss_b"] != first["loss_b"]
    with torch.no_grad():
        model.linear.weight.mul_(2)
    assert losses_on(model, batches, seed=1)["loss_a"] != first["loss_a"]


def test_an_empty_validation_set_is_rejected(model):
    with pytest.raises(ValueError, match=r"dataloader\.validation"):
        losses_on(model, [])


def test_validation_losses_of_a_detector(tiny_overrides):
    cfg = get_config("coco/mask_rcnn_crossmae_vit_b_100ep.py", tiny_overrides)
    torch.manual_seed(0)
    detector = instantiate(cfg.model)
    loader = instantiate(cfg.dataloader.validation)
    losses = losses_on(detector, loader)
    assert len(loader) == 3
    assert losses == losses_on(detector, loader)
    assert losses.keys() == {
        *("total_loss", "loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc")
    }
    # The mean over images of the losses in training mode, without drop path.
    detector.train()
    detector.backbone.eval()
    with EventStorage(), torch.no_grad():
        given = [detector(batch)["loss_rpn_loc"].item() for batch in loader]
    assert losses["loss_rpn_loc"] == pytest.approx(sum(given) / 3, rel=0.1)


def test_validation_losses_of_a_pretraining_model():
    torch.manual_seed(0)
    encoder = ViT(16, 4, embed_dim=12, depth=2, num_heads=2, drop_path_rate=0.5)
    model = CrossMAE(encoder, decoder_dim=8, decoder_depth=2, decoder_num_heads=2)
    batches = list(torch.randn(3, 2, 3, 16, 16))
    losses = losses_on(model, batches)
    assert losses == losses_on(model, batches)
    assert losses["total_loss"] == losses["loss_reconstruction"]
    assert losses != losses_on(model, batches, seed=1)  # other patches are masked


@pytest.mark.parametrize(
    ("period", "max_iter", "expected"),
    [(3, 7, [2, 5, 6]), (3, 6, [2, 5]), (0, 4, [3])],
)
def test_iterations_with_a_validation(model, batches, period, max_iter, expected):
    hook = ValidationLoss(batches, period, None)
    trainer = hook.trainer = SimpleNamespace(model=model, max_iter=max_iter, iter=0, settle=int)
    measured = []
    trainer.storage = SimpleNamespace(
        put_scalars=lambda **values: measured.append((hook.measured_iter, values))
    )
    for trainer.iter in range(max_iter):
        hook.after_step()
    trainer.iter = max_iter
    hook.after_train()
    assert [iteration for iteration, _ in measured] == expected
    assert all(values["val/total_loss"] > 0 for _, values in measured)


def test_no_validation_after_a_failed_run(model, batches):
    hook = ValidationLoss(batches, 0, None)
    hook.trainer = SimpleNamespace(model=model, max_iter=5, iter=4, settle=int)
    hook.after_train()
    assert hook.measured_iter == -1


@pytest.mark.parametrize(
    ("metric", "mode", "sign"),
    [
        ("segm/AP", "auto", 1),
        ("val/total_loss", "auto", -1),
        ("val/loss_mask", "auto", -1),
        ("val/loss_mask", "max", 1),
        ("segm/AP", "min", -1),
    ],
)
def test_sign_of_a_metric(metric, mode, sign):
    assert sign_of(metric, mode) == sign


def naive_stop(values, patience, sign):
    """Index of the evaluation at which a run ends, or None."""
    best, waited = None, 0
    for index, value in enumerate(values):
        if best is None or sign * value > sign * best:
            best, waited = value, 0
        else:
            waited += 1
        if waited >= patience:
            return index
    return None


def hook_of(folder, **options):
    checkpointer = Checkpointer(nn.Linear(1, 1), str(folder))
    options = {"metrics": ["segm/AP", "val/total_loss"], "patience": 2, "mode": "auto"} | options
    return EarlyStopping(checkpointer, period=10, **options)


def drive(hook, series, start_iter=0, max_iter=1000, name="segm/AP"):
    """Run the hook with an evaluation every 10 iterations; returns the number of iterations."""
    storage = SimpleNamespace(latest=dict)
    trainer = SimpleNamespace(storage=storage, start_iter=start_iter, iter=0, max_iter=max_iter)
    hook.trainer = trainer
    hook.before_train()
    trainer.iter = start_iter
    latest = {"total_loss": (1.0, 0)}
    while trainer.iter < trainer.max_iter and (trainer.iter + 1) // 10 <= len(series):
        if (trainer.iter + 1) % 10 == 0:
            latest[name] = (series[(trainer.iter + 1) // 10 - 1], trainer.iter)
        storage.latest = lambda: latest
        hook.after_step()
        trainer.iter += 1
    return trainer.iter


@pytest.mark.parametrize(
    ("series", "name"),
    [
        ([1.0, 2.0, 2.0, 1.5, 9.0], "segm/AP"),  # equal is not better
        ([1.0, 2.0, 1.9, 2.1, 2.0, 2.05, 9.0], "segm/AP"),
        ([3.0, 2.0, 2.5, 1.0, 1.5, 1.2, 0.1], "val/total_loss"),
        ([1.0, 2.0, 3.0], "segm/AP"),
    ],
)
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_run_ends_after_patience_evaluations_without_improvement(
    tmp_path, series, name, patience
):
    done = drive(hook_of(tmp_path, patience=patience), series, name=name)
    index = naive_stop(series, patience, -1 if "loss" in name else 1)
    assert done == (len(series) * 10 + 9 if index is None else 10 * (index + 1))
    assert (tmp_path / "model_final.pth").exists() == (index is not None)


def test_nan_is_never_better(tmp_path):
    assert drive(hook_of(tmp_path), [math.nan, math.nan, math.nan, 5.0]) == 30
    assert drive(hook_of(tmp_path), [math.nan, 1.0, math.nan, 0.5, 5.0]) == 40
    assert drive(hook_of(tmp_path), [1.0, math.nan, math.nan, 5.0]) == 30
    content = (tmp_path / EarlyStopping.FILE).read_text()
    assert json.loads(content, parse_constant=pytest.fail)["values"]["19"] is None


def test_the_log_gives_the_reason_and_the_best_checkpoint(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "crossmae_det"):
        drive(hook_of(tmp_path), [1.0, 7.5, 2.0, 3.0])
    (line,) = [m for m in caplog.messages if "Early stopping" in m]
    for part in ("40 iterations", "segm/AP", "7.5", "2 evaluations", f"{tmp_path}/model_best.pth"):
        assert part in line


def test_a_resumed_run_continues_to_count(tmp_path):
    assert drive(hook_of(tmp_path), [3.0, 1.0], max_iter=1000) == 29
    # It was killed in iteration 29; its last checkpoint is of iteration 24.
    assert drive(hook_of(tmp_path), [3.0, 1.0, 2.0, 9.0], start_iter=25) == 30
    # A stopped run stays stopped,
    hook = hook_of(tmp_path)
    assert drive(hook, [], start_iter=30) == 30
    assert hook.trainer.max_iter == 30
    # unless the patience is raised.
    series = [3.0, 1.0, 2.0, 2.5, 2.0, 9.0]
    assert drive(hook_of(tmp_path, patience=4), series, start_iter=30) == 50


def test_evaluations_after_the_checkpoint_do_not_count(tmp_path):
    drive(hook_of(tmp_path), [3.0, 1.0])
    hook = hook_of(tmp_path)
    drive(hook, [3.0, 4.0, 3.5], start_iter=15)
    assert hook.values == {9: 3.0, 19: 4.0, 29: 3.5}


def test_a_new_run_in_the_folder_restarts_the_count(tmp_path):
    drive(hook_of(tmp_path), [3.0, 1.0, 1.0])
    drive(hook_of(tmp_path), [])
    assert not (tmp_path / EarlyStopping.FILE).exists()


def test_another_metric_restarts_the_count(tmp_path, caplog):
    drive(hook_of(tmp_path), [3.0, 1.0])
    hook = hook_of(tmp_path, metrics=["val/total_loss"])
    with caplog.at_level(logging.WARNING, "crossmae_det"):
        drive(hook, [0.0, 0.0, 4.0, 5.0], start_iter=25, name="val/total_loss")
    assert hook.values == {29: 4.0, 39: 5.0}
    assert "segm/AP" in caplog.text


def test_early_stopping_ignores_the_last_iteration(tmp_path):
    hook = hook_of(tmp_path, patience=1)
    drive(hook, [3.0, 1.0], max_iter=20)
    assert list(hook.values) == [9]
    assert not (tmp_path / "model_final.pth").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"patience": 0}, ["train.early_stopping.patience", "0"]),
        ({"metrics": []}, ["train.early_stopping.metrics"]),
        ({"mode": "best"}, ["best", "auto, min, max"]),
    ],
)
def test_bad_options_are_rejected(tmp_path, options, parts):
    with pytest.raises(ValueError) as error:
        hook_of(tmp_path, **options)
    assert all(part in str(error.value) for part in parts)


def test_early_stopping_needs_evaluations(tmp_path):
    checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path))
    with pytest.raises(ValueError, match=r"train\.eval_period"):
        EarlyStopping(checkpointer, ["segm/AP"], patience=1, mode="auto", period=0)


def test_an_unmeasured_metric_is_named(tmp_path):
    hook = hook_of(tmp_path, metrics=["segm/APP"])
    with pytest.raises(ValueError, match=r"train\.early_stopping\.metrics.*segm/APP"):
        drive(hook, [3.0])


@pytest.mark.parametrize("text", ["{", "[]", '{"metric": "segm/AP", "values": {"a": 1}}'])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / EarlyStopping.FILE).write_text(text)
    with pytest.raises(ValueError, match=EarlyStopping.FILE):
        drive(hook_of(tmp_path), [], start_iter=10)


def judge(hook, values, start_iter=0):
    """Run the hook after evaluations with these metrics, one per iteration."""
    storage = SimpleNamespace(latest=dict)
    hook.trainer = SimpleNamespace(storage=storage, start_iter=start_iter, iter=0, max_iter=100)
    hook.before_train()
    for iteration, metrics in enumerate(values, start_iter):
        storage.latest = lambda m=metrics, i=iteration: {k: (v, i) for k, v in m.items()}
        hook.after_step()


def test_the_best_checkpoint_survives_a_restart(tmp_path):
    model = nn.Linear(1, 1)
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    metrics = ["segm/AP", "bbox/AP"]
    best = {"segm/AP": np.float64(5.0), "bbox/AP": 9.0}  # evaluators return numpy scalars
    series = [{}, {"segm/AP": 3.0}, best, {"segm/AP": 4.0}]
    judge(BestCheckpointer(checkpointer, metrics), series)
    best = read_checkpoint(tmp_path / "model_best.pth")
    assert (best["best_metric"], best["iteration"], best["metric_name"]) == (5.0, 2, "segm/AP")
    # --resume does not continue from it.
    assert checkpointer.get_checkpoint_file().endswith("model_0000001.pth")

    judge(BestCheckpointer(checkpointer, metrics), [{"segm/AP": 4.5}], start_iter=4)
    assert read_checkpoint(tmp_path / "model_best.pth")["iteration"] == 2
    judge(BestCheckpointer(checkpointer, metrics), [{"segm/AP": float("nan")}], start_iter=5)
    assert read_checkpoint(tmp_path / "model_best.pth")["iteration"] == 2
    judge(BestCheckpointer(checkpointer, metrics), [{"segm/AP": 6.0}], start_iter=6)
    assert read_checkpoint(tmp_path / "model_best.pth")["iteration"] == 6
    # A new run in the folder starts its own ranking.
    judge(BestCheckpointer(checkpointer, metrics), [{"bbox/AP": 1.0}])
    assert read_checkpoint(tmp_path / "model_best.pth")["metric_name"] == "bbox/AP"


def test_the_best_checkpoint_has_the_lowest_loss(tmp_path):
    checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path))

    def best(series, start_iter=0, mode="auto"):
        hook = BestCheckpointer(checkpointer, ["val/total_loss"], mode)
        judge(hook, [{"val/total_loss": value} for value in series], start_iter)
        content = read_checkpoint(tmp_path / "model_best.pth")
        return content["best_metric"], content["iteration"]

    assert best([3.0, 2.0, math.nan, 2.5]) == (2.0, 1)
    assert best([2.2], start_iter=4) == (2.0, 1)
    assert best([1.5], start_iter=5) == (1.5, 5)
    assert best([1.0, 4.0], mode="max") == (4.0, 1)


def test_an_unmeasured_best_metric_warns_once(tmp_path, caplog):
    checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path))
    latest = {"segm/AP": (1.0, 1)}

    def run(metrics, period):
        hook = BestCheckpointer(checkpointer, metrics, period=period)
        storage = SimpleNamespace(latest=lambda: latest)
        trainer = hook.trainer = SimpleNamespace(storage=storage, start_iter=0, max_iter=9)
        hook.before_train()
        for trainer.iter in range(9):
            hook.after_step()
        trainer.iter = 9
        hook.after_train()
        warnings = [m for m in caplog.messages if "train.best_checkpoint.metrics" in m]
        caplog.clear()
        return warnings

    for period in (2, 0):
        (line,) = run(["foo/AP"], period)
        assert "foo/AP" in line
    assert not run(["foo/AP"], None)  # a run without evaluations
    assert not (tmp_path / "model_best.pth").exists()
    assert not run(["foo/AP", "segm/AP"], 2)
    assert (tmp_path / "model_best.pth").exists()
