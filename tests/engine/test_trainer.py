"""The training loop: steps, precision, resuming, and what stops it."""

import itertools
import math

import pytest
import torch
from torch import nn

from crossmae_det.engine.trainer import NonFiniteError, Trainer, split_batch


class Regression(nn.Module):
    """Mean squared error of a linear map, with noise, so that random numbers matter."""

    def __init__(self, noise=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2)
        self.noise = noise

    def forward(self, samples):
        x = torch.stack([sample["x"] for sample in samples])
        y = self.linear(x + self.noise * torch.randn_like(x))
        return {"loss_a": y.square().mean(), "loss_b": y.float().abs().mean()}


class Batches:
    """Batch i depends on i alone."""

    def __init__(self, bad=None):
        self.start, self.bad = 0, bad

    def start_at(self, iteration):
        self.start = iteration

    def __iter__(self):
        for i in itertools.count(self.start):
            generator = torch.Generator().manual_seed(i)
            xs = torch.randn(4, 3, generator=generator)
            if i == self.bad:
                xs[2] = math.nan
            yield [{"x": x, "file_name": f"{i}_{k}.jpg"} for k, x in enumerate(xs)]


def train(iterations, *, noise=0.0, start=0, state=None, bad=None, **options):
    model = Regression(noise)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = Trainer(model, Batches(bad), optimizer, **options)
    if state is not None:
        model.load_state_dict(state["model"])
        trainer.load_state_dict(state["trainer"])
    trainer.train(start, iterations)
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_a_step_matches_plain_pytorch():
    trainer = train(1)
    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sum(model(next(iter(Batches()))).values()).backward()
    optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(weights(trainer), expected)


@pytest.mark.parametrize("accumulation", [2, 3, 4, 9])
def test_accumulation_does_not_change_the_result(accumulation):
    torch.testing.assert_close(
        weights(train(5)), weights(train(5, gradient_accumulation_steps=accumulation))
    )


def test_a_resumed_run_is_bit_exact():
    whole = train(6, noise=0.1)
    half = train(3, noise=0.1)
    state = {"model": half.model.state_dict(), "trainer": half.state_dict()}
    resumed = train(6, noise=0.1, start=3, state=state)
    assert torch.equal(weights(whole), weights(resumed))


def test_the_seed_determines_the_random_numbers():
    assert torch.equal(weights(train(2, noise=0.1)), weights(train(2, noise=0.1)))
    assert not torch.equal(weights(train(2, noise=0.1)), weights(train(2, noise=0.1, seed=1)))


@pytest.mark.parametrize("amp_dtype", ["bf16", "fp16"])
def test_mixed_precision_stays_close(amp_dtype):
    model = Regression()
    trainer = Trainer(
        model, Batches(), torch.optim.AdamW(model.parameters(), lr=0.01), amp_dtype=amp_dtype
    )
    trainer.grad_scaler = torch.amp.GradScaler("cpu", 256.0, enabled=amp_dtype == "fp16")
    trainer.train(0, 5)
    expected = weights(train(5))
    assert not torch.equal(weights(trainer), expected)
    torch.testing.assert_close(weights(trainer), expected, rtol=0.01, atol=0.005)


def test_fp16_skips_a_step_that_overflows_and_lowers_the_scale():
    model = Regression()
    before = model.linear.weight.detach().clone()
    trainer = Trainer(
        model, Batches(), torch.optim.AdamW(model.parameters(), lr=0.01), amp_dtype="fp16"
    )
    trainer.grad_scaler = torch.amp.GradScaler("cpu", 2.0**24)
    trainer.train(0, 1)
    assert torch.equal(model.linear.weight, before)
    assert trainer.grad_scaler.get_scale() == 2.0**23


def test_clipping_bounds_the_gradient():
    trainer = train(1, clip_norm=0.01)
    gradients = [p.grad for p in trainer.model.parameters()]
    assert torch.nn.utils.get_total_norm(gradients) == pytest.approx(0.01, rel=1e-3)
    assert trainer.storage.latest()["grad_norm"][0] > 0.1  # before clipping


def test_a_loss_that_is_not_finite_stops_the_run_with_its_name_and_images():
    with pytest.raises(NonFiniteError) as error:
        train(9, bad=2, gradient_accumulation_steps=2)
    message = str(error.value)
    assert "iteration 2: loss_a is nan, loss_b is nan" in message
    assert "images: 2_2.jpg, 2_3.jpg)" in message  # only that part of the batch


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(monkeypatch):
    model = Regression()
    before = model.linear.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.linear.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match="the gradient's norm is .* 0_0.jpg, 0_1.jpg"):
        Trainer(model, Batches(), optimizer).train(0, 1)
    assert torch.equal(model.linear.weight, before)


def test_fp16_stops_if_no_scale_prevents_the_overflow():
    model = Regression()
    model.linear.weight.register_hook(lambda gradient: gradient * math.inf)
    trainer = Trainer(
        model, Batches(), torch.optim.AdamW(model.parameters(), lr=0.01), amp_dtype="fp16"
    )
    trainer.grad_scaler = torch.amp.GradScaler("cpu", 4.0)
    with pytest.raises(NonFiniteError, match="iteration 3: the gradient's norm is"):
        trainer.train(0, 9)


def test_a_run_may_resume_in_another_precision():
    half = train(2)
    state = {"model": half.model.state_dict(), "trainer": half.state_dict()}
    assert train(4, start=2, state=state, amp_dtype="fp16").iter == 4


@pytest.mark.parametrize(
    ("options", "key"),
    [({"clip_norm": 0.0}, "train.clip_grad.max_norm"), ({"amp_dtype": "fp8"}, "train.amp.dtype")],
)
def test_bad_options_are_rejected(options, key):
    with pytest.raises(ValueError, match=key):
        train(1, **options)


def test_split_batch_keeps_order_and_samples():
    assert split_batch([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4, 5]]
    assert split_batch([1, 2], 5) == [[1], [2]]
    parts = split_batch(torch.arange(6).view(3, 2), 2)
    assert [tuple(part.shape) for part in parts] == [(1, 2), (2, 2)]
    assert torch.equal(torch.cat(parts), torch.arange(6).view(3, 2))


class HalfRead(Regression):
    """A model with a layer that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.unread = nn.Linear(2, 2)


@pytest.mark.parametrize("find_unused", [None, False, True])
def test_parameters_without_gradient_are_named(find_unused, tmp_path, caplog):
    model = HalfRead()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if find_unused is None:
        Trainer(model, Batches(), optimizer).train(0, 2)
        assert "2 parameters get no gradient, 'unread.weight'" in caplog.text
        return
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
        trainer = Trainer(parallel, Batches(), optimizer)
        if find_unused:
            trainer.train(0, 2)
        else:
            with pytest.raises(ValueError, match="'unread.weight'.*find_unused_parameters=True"):
                trainer.train(0, 2)
    finally:
        torch.distributed.destroy_process_group()
