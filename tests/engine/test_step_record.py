"""A step that failed is found after the next one is queued, and has changed nothing."""

import copy
import itertools
import json
import math
import re

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from crossmae_det.checkpoint import read_checkpoint
from crossmae_det.engine.checkpointing import Checkpointer
from crossmae_det.engine.hooks import MetricsWriter, ModelEMA
from crossmae_det.engine.trainer import NonFiniteError, Trainer, skips_on_device


class Regression(nn.Module):
    """Two losses of a linear map; a sample that holds "raise" stands for detectron2's own check."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2)

    def forward(self, samples):
        if any(sample.get("raise") for sample in samples):
            raise FloatingPointError("Predicted boxes contain NaN")
        y = self.linear(torch.stack([sample["x"] for sample in samples]))
        return {"loss_a": y.square().mean(), "loss_b": y.abs().mean()}


class Batches:
    """Batch i depends on i alone; those in ``bad`` give a loss of ``value``, or an error."""

    def __init__(self, bad=(), value=math.nan, error=False):
        self.bad, self.value, self.error = bad, value, error

    def __iter__(self):
        for i in itertools.count():
            xs = torch.randn(4, 3, generator=torch.Generator().manual_seed(i))
            samples = [{"x": x, "file_name": f"{i}_{k}.jpg"} for k, x in enumerate(xs)]
            if i in self.bad and self.error:
                samples[2]["raise"] = True
            elif i in self.bad:
                samples[2]["x"] = xs[2] * self.value
            yield samples


class Metrics(HookBase):
    """Every value that a metric takes, with its iteration."""

    def after_train(self):
        self.values = {
            name: history.values()
            for name, history in self.trainer.storage.histories().items()
            if "data_time" not in name
        }


def build(batches=None, *, later=True, hooks=(), amp_dtype=None, period=1000, **options):
    """A trainer on the CPU that reads a step's results later, as on a GPU."""
    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    trainer = Trainer(
        model, batches or Batches(), optimizer, amp_dtype=amp_dtype, log_period=period, **options
    )
    trainer.reads_later = later
    trainer.grad_scaler = torch.amp.GradScaler("cpu", 8.0, enabled=amp_dtype == "fp16")
    metrics, ema = Metrics(), ModelEMA(model, decay=0.5)
    trainer.register_hooks([ema, *hooks, metrics])
    trainer.metrics, trainer.ema = metrics, ema
    return trainer


def state(trainer):
    """Everything that a step changes."""
    loop = trainer.state_dict()
    del loop["parameter_names"]
    parts = {"model": trainer.model.state_dict(), "ema": trainer.ema.averaged.state_dict()}
    return copy.deepcopy(parts | {"trainer": loop})


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}, {"gradient_accumulation_steps": 3}])
@pytest.mark.parametrize("period", [1, 2, 1000])
def test_the_weights_the_average_and_the_metrics_are_the_same(options, period):
    now, later = (build(later=later, period=period, **options) for later in (False, True))
    now.train(0, 5)
    later.train(0, 5)
    assert_same(state(later), state(now))
    assert later.metrics.values == now.metrics.values
    assert [i for _, i in later.metrics.values["total_loss"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("value", [math.nan, 1e30])  # whose square is not finite
@pytest.mark.parametrize("amp_dtype", [None, "bf16", "fp16"])
@pytest.mark.parametrize(("bad", "end"), [(0, 6), (2, 6), (5, 6)])  # the last one has no next
def test_a_failed_step_changes_nothing(bad, end, amp_dtype, value):
    reached = []

    class Reached(HookBase):
        def before_step(self):
            reached.append(self.trainer.iter)

    trainer = build(Batches([bad], value), amp_dtype=amp_dtype, hooks=[Reached()])
    with pytest.raises(NonFiniteError) as error:
        trainer.train(0, end)
    assert re.search(rf"iteration {bad}: loss_a is (nan|inf).* \(images: {bad}_0", str(error.value))
    assert reached[-1] == min(bad + 1, end - 1)  # it was queued, but it did not step
    assert trainer.iter == bad
    expected = build(amp_dtype=amp_dtype)
    if not bad:
        assert_same(trainer.model.state_dict(), expected.model.state_dict())
        assert trainer.ema.averaged.n_averaged == 0
        assert all(not v["step"] for v in trainer.optimizer.state.values())
        return
    expected.train(0, bad)
    trainer.iter -= 1
    expected.iter -= 1
    assert_same(state(trainer), state(expected))
    assert trainer.metrics.values == expected.metrics.values


def test_only_the_part_that_failed_is_named():
    trainer = build(Batches([1]), gradient_accumulation_steps=2)
    with pytest.raises(NonFiniteError, match=r"\(images: 1_2.jpg, 1_3.jpg\)$"):
        trainer.train(0, 4)


def test_a_gradient_that_is_not_finite_is_named_as_the_cause():
    trainer = build()
    trainer.model.linear.weight.register_hook(lambda gradient: gradient * math.inf)
    before = trainer.model.linear.bias.detach().clone()
    with pytest.raises(NonFiniteError, match="iteration 0: the gradient's norm is .* 0_0.jpg"):
        trainer.train(0, 4)
    assert torch.equal(trainer.model.linear.bias, before)


def test_fp16_skips_a_step_that_overflows_and_lowers_the_scale():
    trainer = build(amp_dtype="fp16")
    trainer.grad_scaler = torch.amp.GradScaler("cpu", 2.0**24)
    before = trainer.model.linear.weight.detach().clone()
    trainer.train(0, 1)
    assert torch.equal(trainer.model.linear.weight, before)
    assert trainer.grad_scaler.get_scale() == 2.0**23
    assert not math.isfinite(trainer.metrics.values["grad_norm"][0][0])


def test_an_error_of_the_model_does_not_hide_the_step_before_it():
    class Both(Batches):
        def __iter__(self):
            yield from itertools.chain(
                itertools.islice(Batches([1]), 2), itertools.islice(Batches([2], error=True), 2, 9)
            )

    with pytest.raises(NonFiniteError, match="iteration 1: loss_a is nan"):
        build(Both()).train(0, 4)
    with pytest.raises(NonFiniteError, match="iteration 2: Predicted boxes contain NaN"):
        build(Batches([2], error=True)).train(0, 4)


def test_a_checkpoint_never_holds_a_step_that_failed(tmp_path):
    class Save(HookBase):
        def after_step(self):
            self.trainer.checkpointer.save(f"model_{self.trainer.iter}", tag=False)

    trainer = build(Batches([2]), hooks=[Save()])
    trainer.checkpointer = Checkpointer(
        trainer.model, str(tmp_path), trainer=trainer, ema=trainer.ema.averaged
    )
    with pytest.raises(NonFiniteError, match="iteration 2"):
        trainer.train(0, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_0.pth", "model_1.pth"]
    expected = build()
    expected.train(0, 2)
    saved = read_checkpoint(tmp_path / "model_1.pth")
    assert_same(saved["model"], expected.model.state_dict())
    assert_same(saved["ema"], expected.ema.averaged.state_dict())
    assert saved["trainer"]["iteration"] == 1


def test_the_metrics_before_a_failed_step_are_written(tmp_path):
    class Write(HookBase):
        def after_train(self):
            MetricsWriter(str(tmp_path / "metrics.json"), window_size=1).write()

    with pytest.raises(NonFiniteError):
        build(Batches([3]), hooks=[Write()]).train(0, 6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    (line,) = [line for line in lines if "total_loss" in line]
    assert line["iteration"] == 2 and math.isfinite(line["total_loss"])


class HostReads(TorchDispatchMode):
    """Counts the operators that make the host wait for a number on the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp_dtype", [None, "fp16"])
def test_a_step_does_not_wait_for_the_device(amp_dtype):
    counts = []

    class Count(HookBase):
        def before_step(self):
            self.mode = HostReads()
            self.mode.__enter__()

        def after_step(self):
            self.mode.__exit__(None, None, None)
            counts.append(self.mode.count)

    trainer = build(amp_dtype=amp_dtype, clip_norm=0.1, gradient_accumulation_steps=2)
    trainer._hooks = [Count(), trainer.metrics]  # the count of averages is on the host anyway
    trainer._hooks[0].trainer = trainer
    trainer.train(0, 4)
    assert counts == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (torch.optim.AdamW, {"fused": True}, True),
        (torch.optim.Adam, {"fused": True}, True),
        (torch.optim.AdamW, {}, False),
        (torch.optim.AdamW, {"foreach": True}, False),
        (torch.optim.SGD, {"fused": True, "momentum": 0.9}, False),
    ],
)
def test_which_optimizers_skip_on_the_device(kind, options, expected):
    assert skips_on_device(kind(nn.Linear(1, 1).parameters(), lr=0.1, **options)) is expected


def test_other_optimizers_are_checked_before_they_step():
    trainer = build(Batches([1]), later=False)
    with pytest.raises(NonFiniteError, match="iteration 1"):
        trainer.train(0, 4)
    expected = build()
    expected.train(0, 1)
    trainer.iter -= 1
    expected.iter -= 1
    assert_same(state(trainer), state(expected))


SCENARIOS = [(True, "loss"), (False, "error"), (True, "error")]  # read later or at once; the cause


def in_process(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    results = []
    for later, cause in SCENARIOS:
        trainer = build(Batches([2] if rank else [], error=cause == "error"), later=later)
        trainer.model = nn.parallel.DistributedDataParallel(trainer.model)
        with pytest.raises(NonFiniteError) as error:
            trainer.train(0, 5)
        weight = trainer.ema.source.linear.weight.detach()
        results.append((str(error.value), trainer.iter, weight, trainer.metrics.values))
    torch.save(results, f"{folder}/{rank}.pt")
    comm.synchronize()
    torch.distributed.destroy_process_group()


def test_processes_stop_together(tmp_path):
    torch.multiprocessing.spawn(in_process, (str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    expected = build(later=False)  # both processes have the same batches
    expected.train(0, 2)
    for (_, cause), first, second in zip(SCENARIOS, *both, strict=True):
        assert first[:2] == second[:2] and first[1] == 2
        words = "loss_a is nan, loss_b is nan" if cause == "loss" else "Predicted boxes contain NaN"
        assert f"iteration 2: {words} (images: 2_0.jpg" in first[0]
        assert torch.equal(first[2], second[2])
        torch.testing.assert_close(first[2], expected.model.linear.weight.detach())
        losses = [value for value, _ in first[3]["total_loss"]]
        wanted = [value for value, _ in expected.metrics.values["total_loss"]]
        assert losses == pytest.approx(wanted)
        assert "total_loss" not in second[3] and len(second[3]["grad_norm"]) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp_dtype", [None, "bf16", "fp16"])
def test_a_step_on_a_gpu_does_not_wait(amp_dtype):
    class OnGPU(Batches):
        def __iter__(self):
            for batch in super().__iter__():
                yield [sample | {"x": sample["x"].cuda()} for sample in batch]

    class Strict(HookBase):
        def before_step(self):
            if self.trainer.iter:  # the first one allocates
                torch.cuda.set_sync_debug_mode("error")

        def after_step(self):
            torch.cuda.set_sync_debug_mode("default")

    model = Regression().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    batches = list(itertools.islice(OnGPU(), 5))
    trainer = Trainer(model, batches, optimizer, amp_dtype=amp_dtype, clip_norm=1, log_period=9)
    assert trainer.reads_later
    trainer.register_hooks([Strict(), ModelEMA(model, decay=0.5)])
    try:
        trainer.train(0, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.storage.latest()["total_loss"][1] == 4
