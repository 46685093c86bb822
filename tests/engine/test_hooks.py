"""Hooks, schedules and the file of metrics."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage, JSONWriter
from torch import nn

from crossmae_det.engine.hooks import (
    Evaluation,
    LayerLearningRates,
    MetricsWriter,
    ModelEMA,
    cosine_schedule,
    step_schedule,
)
from crossmae_det.utils.plots import read_metrics


def test_ema_matches_the_recursion_and_restarts_from_the_weights():
    model = nn.Linear(2, 2)
    ema = ModelEMA(model, decay=0.9)
    ema.trainer = SimpleNamespace(when_confirmed=lambda action: action())
    expected = None
    for step in range(4):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.after_step()
        now = torch.full((2, 2), float(step))
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    torch.testing.assert_close(ema.model.weight.detach(), expected)
    assert ema.model.weight is not model.weight
    ema.restart()
    assert torch.equal(ema.model.weight, model.weight) and ema.averaged.n_averaged == 0


def test_a_decay_out_of_range_is_rejected():
    with pytest.raises(ValueError, match=r"train\.ema\.decay=1"):
        ModelEMA(nn.Linear(1, 1), decay=1)


@pytest.mark.parametrize(("iteration", "evaluations"), [(9, 0), (10, 1)])
def test_a_run_that_failed_in_its_last_iteration_is_not_evaluated(iteration, evaluations):
    calls = []
    hook = Evaluation(0, lambda: calls.append(1))
    hook.trainer = SimpleNamespace(iter=iteration, max_iter=10, settle=int)
    hook.after_train()
    assert len(calls) == evaluations


def test_the_learning_rate_of_every_layer_is_logged(caplog):
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(4)]
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters[:1], "lr": 0.1, "name": "layer_00"},
            {"params": parameters[1:2], "lr": 0.1, "weight_decay": 0, "name": "layer_00_no_decay"},
            {"params": parameters[2:3], "lr": 0.2, "name": "heads"},
            {"params": parameters[3:], "lr": 0.3},
        ]
    )
    logged = {}
    storage = SimpleNamespace(put_scalar=lambda name, value, **_: logged.update({name: value}))
    hook = LayerLearningRates()
    hook.trainer = SimpleNamespace(optimizer=optimizer, storage=storage)
    with caplog.at_level(logging.INFO, "crossmae_det"):
        hook.before_train()
    table = [line.split() for line in caplog.text.splitlines()[3:]]
    assert table == [
        ["layer_00", "3", "0.1", "0.01"],
        ["layer_00_no_decay", "3", "0.1", "0"],
        ["heads", "3", "0.2", "0.01"],
        ["3", "3", "0.3", "0.01"],
    ]
    hook.before_step()
    assert logged == {"lr/layer_00": 0.1, "lr/heads": 0.2}


def test_step_schedule_after_a_linear_warmup():
    schedule = step_schedule(1000, [0.5, 0.9], gamma=0.1, warmup_iters=50)
    rates = [schedule(i / 1000) for i in (0, 25, 50, 499, 500, 899, 900, 999)]
    assert rates == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_schedule_after_a_linear_warmup():
    schedule = cosine_schedule(1000, warmup_iters=100)
    end = 0.5 * (1 + math.cos(math.pi * 0.1))  # the cosine where the warm-up ends
    assert schedule(0.05) == pytest.approx((0.001 + end) / 2, rel=1e-3)
    assert schedule(0.5) == pytest.approx(0.5)
    assert schedule(0.999) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("max_iter", [1, 2, 7])
def test_schedules_of_short_runs(max_iter):
    schedule = step_schedule(max_iter, [8 / 9, 26 / 27], warmup_iters=250)
    assert all(0 < schedule(i / max_iter) <= 1 for i in range(max_iter))
    assert schedule(0.5) == 1


def test_a_schedule_without_iterations_is_rejected():
    with pytest.raises(ValueError, match="got 0"):
        cosine_schedule(0, warmup_iters=10)


def write(writer, series):
    for iteration, scalars in enumerate(series):
        with EventStorage(iteration) as storage:
            storage.put_scalars(smoothing_hint=False, **scalars)
            writer.write()
    writer.close()


def test_metrics_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "metrics.json"
    series = [{"AP": math.nan, "total_loss": 1.5}, {"AP": -math.inf, "total_loss": math.inf}]
    write(MetricsWriter(str(path)), series)

    def fail(name):
        raise AssertionError(f"{name} is not JSON")

    lines = [json.loads(line, parse_constant=fail) for line in path.read_text().splitlines()]
    assert lines == [
        {"AP": None, "iteration": 0, "total_loss": 1.5},
        {"AP": None, "iteration": 1, "total_loss": None},
    ]
    read = read_metrics(path)
    assert read["total_loss"][0] == 1.5 and math.isnan(read["total_loss"][1])


def test_finite_metrics_match_the_writer_of_detectron2(tmp_path):
    series = [{"a": 0.1 + 0.2, "b": 3}, {"a": 1e-30}, {}]
    for name, kind in (("ours", MetricsWriter), ("detectron2", JSONWriter)):
        write(kind(str(tmp_path / name)), series)
    assert (tmp_path / "ours").read_text() == (tmp_path / "detectron2").read_text()


def test_a_run_without_metrics_leaves_no_file(tmp_path):
    write(MetricsWriter(str(tmp_path / "metrics.json")), [])
    assert not list(tmp_path.iterdir())
