import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from crossmae_det.checkpoint import read_checkpoint
from crossmae_det.engine.checkpointing import Checkpointer
from crossmae_det.engine.hooks import Evaluation, LayerLearningRates, ModelEMA
from crossmae_det.engine.validation import BestCheckpointer


def test_ema_is_the_recursion():
    model = nn.Linear(2, 2)
    ema = ModelEMA(model, decay=0.9)
    expected = None
    for step in range(4):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.after_step()
        now = torch.full((2, 2), float(step))
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    torch.testing.assert_close(ema.model.weight.detach(), expected)
    assert ema.model.weight is not model.weight


def test_ema_refuses_a_decay_out_of_range():
    with pytest.raises(ValueError, match=r"train.ema.decay must lie in \[0, 1\), got 1"):
        ModelEMA(nn.Linear(1, 1), decay=1)


def judge(hook, values, start_iter=0):
    """Run the hook after evaluations that gave ``values``, one an iteration."""
    storage = SimpleNamespace(latest=dict)
    hook.trainer = SimpleNamespace(storage=storage, start_iter=start_iter, iter=0, max_iter=100)
    hook.before_train()
    for iteration, metrics in enumerate(values, start_iter):
        storage.latest = lambda m=metrics, i=iteration: {k: (v, i) for k, v in m.items()}
        hook.after_step()


def test_the_best_checkpoint_is_kept_also_over_a_restart(tmp_path):
    model = nn.Linear(1, 1)
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    metrics = ["segm/AP", "bbox/AP"]
    best = {"segm/AP": np.float64(5.0), "bbox/AP": 9.0}  # evaluators give numpy's numbers
    series = [{}, {"segm/AP": 3.0}, best, {"segm/AP": 4.0}]
    judge(BestCheckpointer(checkpointer, metrics), series)
    best = read_checkpoint(tmp_path / "model_best.pth")
    assert (best["best_metric"], best["iteration"], best["metric_name"]) == (5.0, 2, "segm/AP")
    # It is not what --resume continues from.
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


@pytest.mark.parametrize(("iteration", "evaluations"), [(9, 0), (10, 1)])
def test_a_run_that_failed_in_its_last_iteration_is_not_evaluated(iteration, evaluations):
    calls = []
    hook = Evaluation(0, lambda: calls.append(1))
    hook.trainer = SimpleNamespace(iter=iteration, max_iter=10)
    hook.after_train()
    assert len(calls) == evaluations


def test_the_rate_of_every_layer_is_logged(caplog):
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters[:1], "lr": 0.1, "name": "layer_00"},
            {"params": parameters[1:2], "lr": 0.1, "weight_decay": 0, "name": "layer_00_no_decay"},
            {"params": parameters[2:], "lr": 0.2, "name": "heads"},
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
    ]
    hook.before_step()
    assert logged == {"lr/layer_00": 0.1, "lr/heads": 0.2}
