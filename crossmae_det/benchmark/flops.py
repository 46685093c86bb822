"""Parameters and FLOPs of a model, from the shapes of its tensors alone.

A FLOP is a floating-point operation, so a multiply-add is two. What is counted are the products of
matrices, those of attention and of the inter-block sum among them; what is done once for each
element (norms, activations, softmax, the optimizer) is not.

Models are on torch's meta device. There attention is two products; of the fused kernel that it is
on a CPU, torch's counter (2.14) sees nothing at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from crossmae_det.benchmark.candidate import Candidate, total_loss
from crossmae_det.benchmark.report import Section

BASELINE = "MAE"


@dataclass(frozen=True)
class PretrainingCost:
    """What a pretraining model costs in the forward pass of one image.

    Attributes:
        name: of the candidate.
        method: class of the model.
        prediction_ratio: fraction of all patches that are predicted.
        decoder_depth: blocks of the decoder.
        encoder_parameters: number of those of all that is not the decoder.
        decoder_parameters: number of those of the decoder.
        decoder_flops: FLOPs of the decoder, from the trunk's tokens to pixels.
        encoder_flops: FLOPs of all that is not the decoder.
    """

    name: str
    method: str
    prediction_ratio: float
    decoder_depth: int
    encoder_parameters: int
    decoder_parameters: int
    decoder_flops: int
    encoder_flops: int

    @property
    def total_flops(self) -> int:
        return self.encoder_flops + self.decoder_flops


def parameters_of(module: nn.Module) -> int:
    """The number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def flops_of(function: Callable, argument: Any) -> tuple[dict[str, int], Any]:
    """FLOPs by the name of the module, "Global" for all of them, and what the function returns."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = function(argument)
    counts = {name: sum(parts.values()) for name, parts in counter.get_flop_counts().items()}
    return counts, result


def pretraining_cost(candidate: Candidate) -> PretrainingCost:
    """Count a pretraining model, whose decoder is its submodule ``decoder``.

    Raises:
        ValueError: the model has no decoder.
    """
    model: Any = candidate.build_on_meta()
    decoder = getattr(model, "decoder", None)
    if not isinstance(decoder, nn.Module):
        raise ValueError(f"{candidate.name}: not a pretraining model; it has no decoder")
    counts, _ = flops_of(model, candidate.images(1, "meta"))
    # By difference: the trunk is entered through a method of its own, where no counter sees a
    # module begin.
    decoder_flops = counts[f"{type(model).__name__}.decoder"]
    decoder_parameters = parameters_of(decoder)
    return PretrainingCost(
        name=candidate.name,
        method=type(model).__name__,
        prediction_ratio=model.prediction_ratio,
        decoder_depth=len(model.decoder.blocks),
        encoder_parameters=parameters_of(model) - decoder_parameters,
        decoder_parameters=decoder_parameters,
        decoder_flops=decoder_flops,
        encoder_flops=counts["Global"] - decoder_flops,
    )


def step_flops(candidate: Candidate, batch_size: int) -> int:
    """FLOPs of the forward and the backward pass of one batch.

    Raises:
        ValueError: the batch is empty.
    """
    model = candidate.build_on_meta()
    with FlopCounterMode(display=False) as counter:
        total_loss(model(candidate.images(batch_size, "meta"))).backward()
    return counter.get_total_flops()


def baseline_of(cost: PretrainingCost, costs: Sequence[PretrainingCost]) -> PretrainingCost | None:
    """The MAE among ``costs`` whose encoder does the same work; None where there is none."""
    same_size = (c for c in costs if c.encoder_flops == cost.encoder_flops)
    return next((c for c in same_size if c.method == BASELINE), None)


def pretraining_section(costs: Sequence[PretrainingCost]) -> Section:
    """The costs as a table, each beside the MAE of its size."""
    rows, values = [], []
    for cost in costs:
        ratios = _ratios(cost, baseline_of(cost, costs))
        rows.append(
            [
                cost.name,
                f"{cost.prediction_ratio:g}",
                str(cost.decoder_depth),
                f"{cost.decoder_parameters / 1e6:.1f}",
                _ratio(ratios, "decoder_parameters"),
                f"{cost.decoder_flops / 1e9:.2f}",
                _ratio(ratios, "decoder_flops"),
                f"{cost.total_flops / 1e9:.2f}",
                _ratio(ratios, "total_flops"),
            ]
        )
        values.append(
            asdict(cost) | {"total_flops": cost.total_flops, f"ratio_to_{BASELINE}": ratios}
        )
    against = f"x {BASELINE}"
    return Section(
        key="pretraining",
        title="Cost of pretraining: forward pass of one image",
        headers=[
            *("config", "predicted", "depth", "decoder M params", against),
            *("decoder GFLOPs", against, "total GFLOPs", against),
        ],
        rows=rows,
        notes=[
            "2 FLOPs for each multiply-add; all products of matrices, attention included.",
            f"Predicted: fraction of all patches; depth: blocks of the decoder; {against}: over the"
            f" {BASELINE} with the same encoder.",
        ],
        values=values,
    )


def _ratios(cost: PretrainingCost, baseline: PretrainingCost | None) -> dict[str, float]:
    if baseline is None:
        return {}
    names = ("decoder_parameters", "decoder_flops", "total_flops")
    return {name: getattr(cost, name) / getattr(baseline, name) for name in names}


def _ratio(ratios: dict[str, float], name: str) -> str:
    return f"{ratios[name]:.2f}" if ratios else "-"
