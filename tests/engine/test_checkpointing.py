"""Checkpoints of a run, and what a resumed run takes from them and from its config."""

import logging

import pytest
import torch
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import LinearParamScheduler
from omegaconf import OmegaConf
from shorthand import one_line
from torch import nn

from crossmae_det.data import ResumableLoader
from crossmae_det.engine import checkpointing
from crossmae_det.engine.checkpointing import (
    Checkpointer,
    PeriodicCheckpointer,
    changes,
    check_changes,
    check_model,
    settings,
)
from crossmae_det.engine.hooks import LearningRateSchedule
from crossmae_det.engine.trainer import Trainer


class Counter:
    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_resume_restores_the_model_and_the_checkpointables(tmp_path):
    model, counter = nn.Linear(2, 2), Counter()
    counter.count = 5
    Checkpointer(model, str(tmp_path), counter=counter).save("model_0000004")
    other, fresh = nn.Linear(2, 2), Counter()
    Checkpointer(other, str(tmp_path), counter=fresh).resume()
    assert torch.equal(other.weight, model.weight) and fresh.count == 5


def test_a_run_with_keys_of_an_earlier_version_resumes(tmp_path):
    model = nn.Linear(2, 2)
    old = {"train.accumulation": 1, "optimizer.params.trunk_lr_factor": 1.0, "train.seed": 0}
    Checkpointer(model, str(tmp_path), run_settings=old).save("model_0000004")
    new = {"train.gradient_accumulation_steps": 1, "train.seed": 0}
    resumed = Checkpointer(nn.Linear(2, 2), str(tmp_path), run_settings=new).resume()
    assert {change.key for change in resumed.changes} == (old.keys() | new.keys()) - {"train.seed"}


def test_a_missing_checkpointable_is_an_error_unless_optional(tmp_path):
    model = nn.Linear(2, 2)
    Checkpointer(model, str(tmp_path)).save("model_0000004")
    with pytest.raises(ValueError, match="it has no 'counter'"):
        Checkpointer(model, str(tmp_path), counter=Counter()).resume()
    resumed = Checkpointer(model, str(tmp_path), ema=Counter()).resume(optional=["ema"])
    assert resumed.missing == ["ema"]


def test_a_process_that_does_not_save_writes_nothing(tmp_path):
    Checkpointer(nn.Linear(2, 2), str(tmp_path), save_to_disk=False).save("model_0000004")
    assert not list(tmp_path.iterdir())


def test_a_repeated_iteration_number_is_the_newest_checkpoint(tmp_path):
    checkpointer = Checkpointer(nn.Linear(2, 2), str(tmp_path))

    def steps(hook, iterations):
        hook.max_iter = 100
        for iteration in iterations:
            hook.step(iteration)
        return {path.stem for path in tmp_path.glob("model_*.pth")}

    hook = PeriodicCheckpointer(checkpointer, 2, max_to_keep=2)
    assert steps(hook, range(6)) == {"model_0000003", "model_0000005"}
    # As after a change of the batch size: 6 iterations are now 2.
    hook = PeriodicCheckpointer(checkpointer, 2, max_to_keep=2)
    hook.resume()
    assert steps(hook, [2, 3]) == {"model_0000003", "model_0000005"}
    assert steps(hook, [4, 5, 6, 7]) == {"model_0000005", "model_0000007"}
    assert checkpointer.get_checkpoint_file().endswith("model_0000007.pth")


def test_only_a_checkpoint_of_a_run_is_resumed(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "last_checkpoint").write_text("weights.pth")
    with pytest.raises(ValueError) as error:
        Checkpointer(nn.Linear(2, 2), str(tmp_path)).resume()
    assert "weights.pth" in one_line(error) and "train.init_checkpoint" in one_line(error)


def test_processes_must_agree_that_there_is_a_checkpoint(tmp_path, monkeypatch):
    checkpointer = Checkpointer(nn.Linear(2, 2), str(tmp_path))
    assert not checkpointer.has_run()
    monkeypatch.setattr(checkpointing.comm, "all_gather", lambda seen: [True, seen])
    with pytest.raises(ValueError) as error:
        checkpointer.has_run()
    assert str(tmp_path) in one_line(error)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    assert checkpointer.has_run()


class Model(nn.Module):
    """A loss of three parameters, named a, b and c; records the samples it has seen."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.ones(n)) for n in (1, 2, 3))
        self.seen = []

    def forward(self, batch):
        self.seen += batch
        x = torch.tensor(batch, dtype=torch.float32).mean()
        return {"loss": sum((p * x).square().sum() for p in (self.a, self.b, self.c))}


def load_number(item, seed_sequence):
    return item


def run(
    iterations,
    *,
    start=None,
    batch_size=2,
    groups=("abc",),
    optimizer=torch.optim.AdamW,
    max_iter=100,
    seed=0,
    **options,
):
    """Train for some iterations, from scratch or from the state that an earlier call returned."""
    model = Model()
    trained = [{"params": [getattr(model, name) for name in names]} for names in groups]
    for name in "abc":
        getattr(model, name).requires_grad_(name in "".join(groups))
    optim = optimizer(trained, **({"lr": 0.1} | options))
    loader = ResumableLoader(range(7), load_number, batch_size, seed=seed)
    trainer = Trainer(model, loader, optim, seed=seed)
    schedule = LRMultiplier(optim, LinearParamScheduler(1, 0), max_iter)
    trainer.register_hooks([LearningRateSchedule(scheduler=schedule)])
    first = 0
    if start is not None:
        model.load_state_dict(start["model"])
        trainer.load_state_dict(start["trainer"])
        first = trainer.iter + 1
    trainer.train(first, first + iterations)
    trainer.iter -= 1  # of the last iteration, as in a hook
    return {"model": model.state_dict(), "trainer": trainer.state_dict()}, trainer


def moments(trainer):
    """The first moment of every trained parameter, by name."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    state = trainer.optimizer.state
    return {names[id(p)]: values["exp_avg"].clone() for p, values in state.items()}


def test_resuming_with_the_same_settings_is_bit_exact():
    whole, _ = run(6)
    half, _ = run(3)
    again, trainer = run(3, start=half)
    assert trainer.start_iter == 3
    assert all(torch.equal(again["model"][name], whole["model"][name]) for name in "abc")
    assert (
        whole["trainer"]["optimizer"]["param_groups"]
        == (again["trainer"]["optimizer"]["param_groups"])
    )


def test_hyperparameters_come_from_the_config():
    half, before = run(3, lr=0.1, weight_decay=0.5, betas=(0.5, 0.6), eps=1e-3)
    new = dict(lr=0.7, weight_decay=0.0, betas=(0.8, 0.9), eps=1e-5)
    _, after = run(0, start=half, max_iter=10, **new)
    (group,) = after.optimizer.param_groups
    assert {name: group[name] for name in ("weight_decay", "betas", "eps")} == {
        name: new[name] for name in ("weight_decay", "betas", "eps")
    }
    assert group["initial_lr"] == 0.7
    assert group["lr"] == pytest.approx(0.7 * (1 - 3 / 10))  # the new schedule at iteration 3
    assert all(torch.equal(moments(before)[name], moments(after)[name]) for name in "abc")


def test_optimizer_state_is_matched_by_parameter_name(caplog):
    half, before = run(3, groups=("abc",))
    with caplog.at_level(logging.WARNING, "crossmae_det"):
        _, regrouped = run(0, start=half, groups=("c", "ab"))
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        frozen, fewer = run(0, start=half, groups=("cb",))
        assert "1 parameters are no longer trained" in caplog.text and "first: a" in caplog.text
    old = moments(before)
    assert {name: value.tolist() for name, value in moments(regrouped).items()} == {
        name: value.tolist() for name, value in old.items()
    }
    assert moments(fewer).keys() == set("bc")
    assert torch.equal(moments(fewer)["c"], old["c"])
    with caplog.at_level(logging.WARNING, "crossmae_det"):
        caplog.clear()
        _, thawed = run(1, start=frozen, groups=("abc",))
    assert "1 parameters were not trained before" in caplog.text and "first: a" in caplog.text
    steps = {
        name: thawed.optimizer.state[getattr(thawed.model, name)]["step"].item() for name in "abc"
    }
    assert steps == {"a": 1, "b": 4, "c": 4}


def test_optimizer_state_without_names_is_matched_by_order():
    half, before = run(3, groups=("ab", "c"))
    del half["trainer"]["parameter_names"]
    _, after = run(0, start=half, groups=("ab", "c"), lr=0.3)
    assert all(torch.equal(moments(before)[name], moments(after)[name]) for name in "abc")
    for groups in (("ab",), ("c", "ab")):
        with pytest.raises(ValueError) as error:
            run(0, start=half, groups=groups)
        assert "no parameter names" in one_line(error)


def test_settings_that_need_other_optimizer_state_are_rejected():
    half, _ = run(3)
    with pytest.raises(ValueError) as error:
        run(1, start=half, amsgrad=True)
    assert "max_exp_avg_sq" in one_line(error)
    other, _ = run(3, amsgrad=True)
    assert run(1, start=other)[1].iter == 3


@pytest.mark.parametrize(("first", "second", "start"), [(2, 4, 1), (4, 2, 6), (2, 3, 2), (3, 2, 4)])
def test_another_batch_size_continues_with_the_next_image(first, second, start):
    half, before = run(3, batch_size=first)
    rest, after = run(5, start=half, batch_size=second)
    assert after.start_iter == start
    loader = iter(ResumableLoader(range(7), load_number, 1))
    images = before.model.seen + after.model.seen
    assert images == [next(loader)[0] for _ in images]
    # Resume again, without a change.
    again, last = run(2, start=rest, batch_size=second)
    assert last.start_iter == after.start_iter + 5
    images += last.model.seen
    loader = iter(ResumableLoader(range(7), load_number, 1))
    assert images == [next(loader)[0] for _ in images]
    assert again["trainer"]["images_seen"] == len(images)


def test_settings_are_compared_by_value():
    flags = {"allow_objects": True}
    old = {
        "optimizer": {"_target_": torch.optim.AdamW, "betas": (0.9, 0.999), "lr": 0.1},
        "dataloader": {"categories": {1: "a", 7: "b"}, "list": [{"x": 1}, {"x": 2}]},
        "model": {"act": nn.GELU, "none": None, "gone": 3},
    }
    # As read from a config.yaml.
    same = old | {"optimizer": old["optimizer"] | {"_target_": "torch.optim.AdamW"}}
    first, second = (settings(OmegaConf.create(cfg, flags=flags)) for cfg in (old, same))
    assert changes(first, second) == []
    same["optimizer"]["lr"] = 0.2
    same["dataloader"] = {"categories": {1: "a", 7: "c"}, "list": [{"x": 1}, {"x": 3}]}
    same["model"] = {"act": nn.ReLU, "none": None, "new": 4}
    found = changes(first, settings(OmegaConf.create(same, flags=flags)))
    keys = ["dataloader.categories", "dataloader.list.1.x"]
    assert [change.key for change in found] == [
        *keys,
        *["model.act", "model.gone", "model.new", "optimizer.lr"],
    ]
    assert "optimizer.lr: 0.1 -> 0.2" in map(str, found)


def test_keys_of_yaml_configs_are_compared_one_by_one():
    old, new = (
        settings(OmegaConf.create({"model": {"config": f"MODEL:\n  DEPTH: {depth}\nSEED: 1\n"}}))
        for depth in (2, 3)
    )
    assert [str(change) for change in changes(old, new)] == ["model.config.MODEL.DEPTH: 2 -> 3"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"optimizer._target_": "torch.optim.SGD"}, ["a.pth", "AdamW", "SGD"]),
        ({"dataloader.categories": {1: "cat"}}, ["a.pth", "2 (cat, dog)", "1 (cat)"]),
        ({"dataloader.categories": {1: "dog", 2: "cat"}}, ["a.pth", "dog, cat"]),
        ({"dataloader.categories": {3: "cat", 4: "dog"}, "train.seed": 1}, None),
    ],
)
def test_another_optimizer_and_other_classes_are_rejected(changed, words):
    old = {
        "optimizer._target_": "torch.optim.AdamW",
        "dataloader.categories": {1: "cat", 2: "dog"},
        "train.seed": 0,
    }
    found = changes(old, old | changed)
    if words is None:
        check_changes("a.pth", found)
        return
    with pytest.raises(ValueError) as error:
        check_changes("a.pth", found)
    assert all(word in one_line(error) for word in words)


def test_another_model_is_rejected():
    state = {"x": torch.zeros(2), "y": torch.zeros(3)}
    check_model("a.pth", state, dict(state), [])
    found = changes({"model.dim": 2}, {"model.dim": 4})
    for other, words in [
        (state | {"x": torch.zeros(4)}, ["'x'", "(2,)", "(4,)", "model.dim: 2 -> 4"]),
        ({"x": state["x"]}, ["'y'", "missing"]),
        (state | {"z": torch.zeros(1)}, ["'z'", "missing"]),
    ]:
        with pytest.raises(ValueError) as error:
            check_model("a.pth", state, other, found)
        assert all(word in one_line(error) for word in ["a.pth", *words])
