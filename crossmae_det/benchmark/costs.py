"""What is compared: a model by name, made where and when it is needed.

Parameters and FLOPs of a model, from the shapes of its tensors alone.

A FLOP is a floating-point operation, so a multiply-add is two. What is counted are the products of
matrices, those of attention and of the inter-block sum among them; what is done once for each
element (norms, activations, softmax, the optimizer) is not.

Models are on torch's meta device. There attention is two products; of the fused kernel that it is
on a CPU, torch's counter (2.14) sees nothing at all.

Parameters and FLOPs of a detector, part by part, from the shapes of its tensors alone.

FLOPs are those of :mod:`crossmae_det.benchmark.costs`: of products of matrices, convolutions among
them, on the meta device. A detector also sorts boxes and samples features inside them; that is not
counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from crossmae_det.benchmark.report import Section
from crossmae_det.engine.trainer import total_loss


@dataclass(frozen=True)
class Candidate:
    """A model under comparison.

    Attributes:
        name: for the tables.
        build: makes the model, which maps images to a dictionary of losses, on torch's default
            device.
        optimizer: makes the optimizer of a model.
        image_size: side of its images in pixels, int or (H, W).
    """

    name: str
    build: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    image_size: int | tuple[int, int]

    def build_on_meta(self) -> nn.Module:
        """The model without its numbers: all of its shapes, in no time and no memory."""
        with torch.device("meta"):
            return self.build()

    def images(self, count: int, device: torch.device | str) -> Tensor:
        """A batch of noise, as a loader gives it: (N, 3, H, W) uint8.

        Raises:
            ValueError: ``count`` is not positive.
        """
        if count < 1:
            raise ValueError(f"the batch size must be at least 1, got {count}")
        shape = (count, 3, *to_2tuple(self.image_size))
        return torch.randint(256, shape, dtype=torch.uint8, device=device)


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
        decoder_flops: FLOPs of the decoder, from the backbone's tokens to pixels.
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
    # By difference: the backbone is entered through a method of its own, where no counter sees a
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


@dataclass(frozen=True)
class DetectionCost:
    """What a detector costs in the forward pass of one square image.

    Attributes:
        name: of the candidate.
        image_size: side of the image in pixels.
        proposals: boxes that the box heads see: as many as the RPN hands on in evaluation.
        detections: boxes that the mask head sees: as many as are kept of an image in evaluation; 0
            without a mask head.
        parameters: number of them by part: "backbone", "pyramid", "rpn", "box_heads", "mask_head".
        flops: FLOPs by part, where the backbone is divided into "windowed_blocks", "global_blocks"
            and "patch_embedding".
    """

    name: str
    image_size: int
    proposals: int
    detections: int
    parameters: dict[str, int]
    flops: dict[str, int]

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


def detection_cost(candidate: Candidate) -> DetectionCost:
    """Count a detector of detectron2 with a backbone, a pyramid, an RPN, box heads and a mask head.

    Args:
        candidate: the detector; its ``image_size`` is the side of a square.

    Returns:
        Its cost, with as many proposals and detections as it allows for an image.

    Raises:
        ValueError: the model is no such detector, or the image is not square.
    """
    side, width = to_2tuple(candidate.image_size)
    if side != width:
        raise ValueError(f"{candidate.name}: the image is not square: {candidate.image_size}")
    return detector_cost(candidate.name, candidate.build_on_meta(), side)


def detector_cost(name: str, model: Any, side: int) -> DetectionCost:
    """As :func:`detection_cost`, of a model that is on the meta device.

    Args:
        name: for tables.
        model: the detector.
        side: of the square image in pixels.
    """
    if not hasattr(model, "backbone") or not hasattr(model, "roi_heads"):
        raise ValueError(f"{name}: not a detector with a backbone, a pyramid and heads")
    model.eval()
    pyramid, rpn, heads = model.backbone, model.proposal_generator, model.roi_heads
    # A cascade has a list of heads, each of which sees all proposals.
    stages = list(zip(_listed(heads.box_head), _listed(heads.box_predictor), strict=True))
    proposals = rpn.post_nms_topk[False]
    detections = stages[-1][1].test_topk_per_image if heads.mask_on else 0

    counts, levels = flops_of(pyramid, torch.empty(1, 3, side, side, device="meta"))
    channels = levels[heads.box_in_features[0]].shape[1]

    def inside(boxes: int, pooler: Any) -> Tensor:
        """What a pooler cuts out of the pyramid: (boxes, C, H, W)."""
        return torch.empty(boxes, channels, *pooler.output_size, device="meta")

    flops = backbone_parts(pyramid, counts)
    flops["rpn"] = flops_of(rpn.rpn_head, [levels[name] for name in rpn.in_features])[0]["Global"]
    flops["box_heads"] = flops["mask_head"] = 0
    for head, predictor in stages:
        box_counts, _ = flops_of(
            nn.Sequential(head, predictor), inside(proposals, heads.box_pooler)
        )
        flops["box_heads"] += box_counts["Global"]
    if heads.mask_on:
        # Its forward method also chooses among classes, which needs the boxes themselves.
        mask_input = inside(detections, heads.mask_pooler)
        flops["mask_head"] = flops_of(heads.mask_head.layers, mask_input)[0]["Global"]
    backbone_parameters = parameters_of(backbone_of(pyramid)[1])
    return DetectionCost(
        name=name,
        image_size=side,
        proposals=proposals,
        detections=detections,
        parameters={
            "backbone": backbone_parameters,
            "pyramid": parameters_of(pyramid) - backbone_parameters,
            "rpn": parameters_of(rpn),
            "box_heads": parameters_of(heads.box_head) + parameters_of(heads.box_predictor),
            "mask_head": parameters_of(heads.mask_head) if heads.mask_on else 0,
        },
        flops=flops,
    )


def _listed(module: Any) -> list[Any]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def backbone_of(backbone: Any) -> tuple[str, Any]:
    """The backbone below a pyramid, after its name and a dot; a backbone without one is its own."""
    for name in ("net", "bottom_up"):
        if hasattr(backbone, name):
            return f"{name}.", getattr(backbone, name)
    return "", backbone


def backbone_parts(backbone: Any, counts: Mapping[str, int]) -> dict[str, int]:
    """The FLOPs of a backbone by part.

    Args:
        backbone: a backbone, alone or below a pyramid.
        counts: FLOPs by the name of the module, as torch's counter names them.

    Returns:
        "backbone", of one of blocks "windowed_blocks", "global_blocks" and "patch_embedding"; and
        "pyramid" where there is one.
    """
    inside, backbone = backbone_of(backbone)
    root = type(backbone).__name__
    whole = counts.get(f"{root}.{inside}".rstrip("."), counts["Global"])
    parts = {}
    blocks = getattr(backbone, "blocks", ())
    if len(blocks) and all(hasattr(block, "window_size") for block in blocks):
        for kind, windowed in (("windowed_blocks", True), ("global_blocks", False)):
            parts[kind] = sum(
                counts[f"{root}.{inside}blocks.{index}"]
                for index, block in enumerate(blocks)
                if bool(block.window_size) == windowed
            )
        parts["patch_embedding"] = whole - sum(parts.values())
    else:
        parts["backbone"] = whole
    if inside:
        parts["pyramid"] = counts["Global"] - whole
    return parts
