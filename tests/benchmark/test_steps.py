"""Steps of a tiny model. Nothing here depends on how long anything took."""

from functools import partial

import pytest
import torch
from torch import nn

from crossmae_det.benchmark import PRECISIONS, Measurement, ModelSpec, Spread, time_steps
from crossmae_det.benchmark.steps import (
    GemmRate,
    Shape,
    TrainingStepCase,
    largest_linear_shapes,
    step_section,
)
from crossmae_det.benchmark.workers import OUT_OF_MEMORY
from crossmae_det.modeling import ViT
from crossmae_det.pretraining import MAE, CrossMAE

CPU = torch.device("cpu")


def pretraining_spec(kind=CrossMAE):
    def build():
        encoder = ViT(32, 8, embed_dim=48, depth=2, num_heads=3)
        return kind(encoder, decoder_dim=16, decoder_depth=1, decoder_num_heads=2)

    return ModelSpec(kind.__name__, build, lambda model: torch.optim.AdamW(model.parameters()), 32)


class Linear(nn.Module):
    """A linear layer that checks its inputs in training, or fails."""

    def __init__(self, precision, trouble=False):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.precision, self.trouble = precision, trouble

    def forward(self, images):
        product = self.linear(images.float().mean(dim=(2, 3)))
        if images.device.type != "meta":
            assert self.training and images.dtype == torch.uint8
            assert product.dtype == PRECISIONS[self.precision]
            if self.trouble:
                raise MemoryError
        return {"loss_a": product.float().sum(), "loss_b": product.float().pow(2).sum()}


def linear(name, precision="fp32", trouble=False):
    def optimizer(model):
        return torch.optim.AdamW(model.parameters())

    return ModelSpec(name, partial(Linear, precision, trouble), optimizer, (8, 6))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_steps_of_several_models(precision):
    builds = [partial(linear, name, precision) for name in "ab"]
    section = time_steps(builds, batch_size=5, precision=precision, repeats=2, device=CPU)
    assert [step["name"] for step in section.records] == ["a", "b"]
    assert section.values["gemm_shapes"] == ["5x3x4"]
    assert section.values["gemm_flops_per_second"].low > 0
    for step in section.records:
        assert step["flops"] == 2 * 2 * 5 * 3 * 4  # no gradient of the images
        assert step["failure"] == ""
        assert len(step["seconds"]) == len(step["gemm_rates"]) == 2
        assert min(step["seconds"]) > 0 and step["efficiency"].low > 0


def test_a_step_that_runs_out_of_memory_is_a_row():
    builds = [partial(linear, "large", trouble=True), partial(linear, "small")]
    section = time_steps(builds, batch_size=5, precision="fp32", repeats=1, device=CPU)
    assert section.rows[0][2] == section.values["steps"][0]["failure"] == OUT_OF_MEMORY
    assert len(section.rows[0]) == len(section.rows[1]) == len(section.headers)
    assert section.rows[1][-3:-1] == ["-", "-"]  # nothing to compare with
    assert section.values["steps"][1]["median_seconds"] > 0

    section = time_steps(builds[:1], batch_size=5, precision="fp32", repeats=1, device=CPU)
    assert section.values["gemm_flops_per_second"] is None


def step_case(name, build, flops=0):
    settings = dict(batch_size=8, precision="fp32", device="cpu")
    return TrainingStepCase(name=name, build=build, flops=flops, **settings)


@pytest.mark.parametrize("kind", [MAE, CrossMAE])
def test_a_step_trains_and_leaves_no_gradients(kind):
    spec = pretraining_spec(kind)
    model = spec.build()
    before = {name: value.clone() for name, value in model.named_parameters()}
    step_case("", partial(pretraining_spec, kind)).step(
        model, spec.optimizer(model), spec.images(2, "cpu")
    )
    changed = {name for name, value in model.named_parameters() if not value.equal(before[name])}
    assert before.keys() - changed == {"encoder.pos_embed"}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gemms_have_the_shapes_of_the_largest_linear_layers():
    # 3 images of 5 tokens (4 of 16 patches, and the class token): the MLP of the encoder.
    assert largest_linear_shapes(pretraining_spec(), 3) == [Shape(15, 48, 192), Shape(15, 192, 48)]
    assert Shape(15, 48, 192).flops == 2 * 15 * 48 * 192
    rate = GemmRate([Shape(4, 3, 2), Shape(5, 6, 7), Shape(4, 3, 2)], CPU, torch.float32)
    assert rate.shapes == [Shape(4, 3, 2), Shape(5, 6, 7)]
    assert rate() > 0


def test_the_table_of_steps():
    rates = [40.0, 20.0, 40.0]
    measured = [
        Measurement(step_case("slow", linear, 60), [2.0, 4.0, 2.0], rates, 2**21),
        Measurement(step_case("fast", linear, 30), [1.0, 2.0, 1.5], rates, 2**20),
    ]
    section = step_section(measured, GemmRate([Shape(4, 3, 2)], CPU, torch.float32))
    slow, fast = section.values["steps"]
    assert slow["time_ratio"] == Spread(1, 1, 1)
    assert fast["time_ratio"] == Spread(0.5, 0.5, 0.75)
    assert (slow["memory_ratio"], fast["memory_ratio"]) == (1, 0.5)
    # 60 FLOPs at 40 FLOP/s take 1.5 s; the step took 2 s.
    assert slow["efficiency"] == Spread(0.75, 0.75, 0.75)
    assert (slow["median_seconds"], slow["images_per_second"]) == (2, 4)
    assert slow["p90_seconds"] == pytest.approx(3.6)
    assert section.values["gemm_flops_per_second"] == Spread(40, 20, 40)
    assert section.values["gemm_shapes"] == ["4x3x2"]
    fast_row = dict(zip(section.headers, section.rows[1], strict=True))
    assert fast_row["config"] == "fast" and fast_row["MiB"] == "1"
    assert fast_row["time x first (range)"] == "0.500 (0.500 to 0.750)"
    assert fast_row["memory x"] == "0.50"


def test_an_empty_batch_is_rejected():
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        time_steps([pretraining_spec], batch_size=0, precision="fp32", repeats=1, device=CPU)
