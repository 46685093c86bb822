"""Parameters and FLOPs of models, counted from the shapes of their tensors.

A FLOP is a floating-point operation: a multiply-add is two. Matrix products and convolutions are
counted, including those of attention and of the inter-block sum. Elementwise work (norms,
activations, softmax, the optimizer) is not counted, nor is the selection of boxes and the sampling
of their features in a detector.

Models are on torch's meta device, which takes no memory. Attention is two matrix products there;
torch's counter (2.14) does not count the fused kernel of a CPU.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from fvcore.nn import parameter_count
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from crossmae_det.benchmark.report import Column, Section
from crossmae_det.engine.trainer import total_loss

# The method that the others are compared with.
BASELINE = "MAE"


@dataclass(frozen=True)
class ModelSpec:
    """A model to benchmark, built where and when it is needed.

    Attributes:
        name: for tables.
        build: returns the model, which maps images to a dict of losses, on torch's default
            device.
        optimizer: returns the optimizer of a model.
        image_size: in pixels, int or (H, W).
    """

    name: str
    build: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    image_size: int | tuple[int, int]

    def build_on_meta(self) -> nn.Module:
        """The model without its values: all shapes, at no cost in time and memory."""
        with torch.device("meta"):
            return self.build()

    def images(self, count: int, device: torch.device | str) -> Tensor:
        """A batch of noise in the format of a loader: (N, 3, H, W) uint8.

        Raises:
            ValueError: ``count`` is not positive.
        """
        if count < 1:
            raise ValueError(f"the batch size must be at least 1, got {count}")
        shape = (count, 3, *to_2tuple(self.image_size))
        return torch.randint(256, shape, dtype=torch.uint8, device=device)


def flops_of(function: Callable, argument: Any) -> tuple[dict[str, int], Any]:
    """FLOPs by module name ("Global" is the total), and the return value of the function."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = function(argument)
    return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}, result


def step_flops(spec: ModelSpec, batch_size: int) -> int:
    """FLOPs of the forward and the backward pass of one batch.

    Raises:
        ValueError: ``batch_size`` is not positive.
    """
    model = spec.build_on_meta()
    with FlopCounterMode(display=False) as counter:
        total_loss(model(spec.images(batch_size, "meta"))).backward()
    return counter.get_total_flops()


@dataclass(frozen=True)
class PretrainingCost:
    """Cost of the forward pass of a pretraining model for one image.

    Attributes:
        image_size: in pixels, int or (H, W).
        method: class of the model.
        prediction_ratio: fraction of all patches that are predicted.
        decoder_depth: blocks of the decoder.
        encoder_parameters: parameters outside the decoder.
        decoder_parameters: parameters of the decoder.
        decoder_flops: FLOPs of the decoder, from the encoder's tokens to pixels.
        encoder_flops: FLOPs outside the decoder.
    """

    image_size: int | tuple[int, int]
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

    def ratios(self, costs: Sequence["PretrainingCost"]) -> dict[str, float]:
        """Parameters and FLOPs relative to the MAE among ``costs`` with the same encoder FLOPs.

        Returns:
            "decoder_parameters", "decoder_flops" and "total_flops"; empty without such an MAE.
        """
        for other in costs:
            if other.method == BASELINE and other.encoder_flops == self.encoder_flops:
                keys = ("decoder_parameters", "decoder_flops", "total_flops")
                return {key: getattr(self, key) / getattr(other, key) for key in keys}
        return {}


def pretraining_cost(spec: ModelSpec) -> PretrainingCost:
    """Count a pretraining model.

    Raises:
        ValueError: the model has no decoder.
    """
    model: Any = spec.build_on_meta()
    if not isinstance(getattr(model, "decoder", None), nn.Module):
        raise ValueError(f"{spec.name}: not a pretraining model; it has no decoder")
    flops, _ = flops_of(model, spec.images(1, "meta"))
    parameters = parameter_count(model)
    # By difference: the model calls a method of the encoder other than ``forward``, which the
    # counter does not attribute to a module.
    decoder_flops = flops[f"{type(model).__name__}.decoder"]
    return PretrainingCost(
        image_size=spec.image_size,
        method=type(model).__name__,
        prediction_ratio=model.prediction_ratio,
        decoder_depth=len(model.decoder.blocks),
        encoder_parameters=parameters[""] - parameters["decoder"],
        decoder_parameters=parameters["decoder"],
        decoder_flops=decoder_flops,
        encoder_flops=flops["Global"] - decoder_flops,
    )


def pretraining_section(costs: Sequence[tuple[str, PretrainingCost]]) -> Section:
    """The costs of named models as a table, each beside the MAE of its size."""
    everything = [cost for _, cost in costs]
    ratio, against = f"ratio_to_{BASELINE}", f"x {BASELINE}"
    return Section(
        key="pretraining",
        title="Cost of pretraining: forward pass of one image",
        columns=[
            Column("config", "name"),
            Column("predicted", "prediction_ratio", "g"),
            Column("depth", "decoder_depth"),
            Column("decoder M params", "decoder_parameters", ".1f", 1e-6),
            Column(against, f"{ratio}.decoder_parameters", ".2f"),
            Column("decoder GFLOPs", "decoder_flops", ".2f", 1e-9),
            Column(against, f"{ratio}.decoder_flops", ".2f"),
            Column("total GFLOPs", "total_flops", ".2f", 1e-9),
            Column(against, f"{ratio}.total_flops", ".2f"),
        ],
        records=[
            {"name": name, **asdict(cost), "total_flops": cost.total_flops}
            | {ratio: cost.ratios(everything)}
            for name, cost in costs
        ],
        notes=[
            "2 FLOPs per multiply-add; all matrix products, attention included.",
            f"Predicted: fraction of all patches; depth: decoder blocks; {against}: relative to the"
            f" {BASELINE} with the same encoder.",
        ],
    )


@dataclass(frozen=True)
class DetectionCost:
    """Cost of the forward pass of a detector for one square image.

    Attributes:
        image_size: side of the image in pixels.
        proposals: input boxes of the box heads: the most that the RPN keeps in evaluation.
        detections: input boxes of the mask head: the most that are kept per image in evaluation;
            0 without a mask head.
        parameters: by part: "backbone", "pyramid", "rpn", "box_heads", "mask_head".
        flops: by part, with the parts of :func:`backbone_parts` for the backbone.
    """

    image_size: int
    proposals: int
    detections: int
    parameters: dict[str, int]
    flops: dict[str, int]


def detection_cost(name: str, model: Any, image_size: int | tuple[int, int]) -> DetectionCost:
    """Count a detector of detectron2 with a backbone, a pyramid, an RPN, box heads and a mask head.

    Args:
        name: for error messages.
        model: the detector, on the meta device; it is put into evaluation mode.
        image_size: in pixels; the image must be square.

    Returns:
        Its cost, with as many proposals and detections as it allows per image.

    Raises:
        ValueError: the model is not such a detector, or the image is not square.
    """
    side, width = to_2tuple(image_size)
    if side != width:
        raise ValueError(f"{name}: the image is not square: {image_size}")
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

    def head_flops(head: nn.Module, boxes: int, pooler: Any) -> int:
        pooled = torch.empty(boxes, channels, *pooler.output_size, device="meta")
        return flops_of(head, pooled)[0]["Global"]

    flops = backbone_parts(pyramid, counts)
    flops["rpn"] = flops_of(rpn.rpn_head, [levels[name] for name in rpn.in_features])[0]["Global"]
    flops["box_heads"] = sum(
        head_flops(nn.Sequential(*stage), proposals, heads.box_pooler) for stage in stages
    )
    flops["mask_head"] = 0
    if heads.mask_on:
        # Not its forward method, which also selects classes and needs the boxes for that.
        flops["mask_head"] = head_flops(heads.mask_head.layers, detections, heads.mask_pooler)
    parameters = parameter_count(model)
    backbone = parameters[f"backbone.{backbone_of(pyramid)[0]}".rstrip(".")]
    return DetectionCost(
        image_size=side,
        proposals=proposals,
        detections=detections,
        parameters={
            "backbone": backbone,
            "pyramid": parameters["backbone"] - backbone,
            "rpn": parameters["proposal_generator"],
            "box_heads": parameters["roi_heads.box_head"] + parameters["roi_heads.box_predictor"],
            "mask_head": parameters["roi_heads.mask_head"],
        },
        flops=flops,
    )


def _listed(module: Any) -> list[Any]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def backbone_of(pyramid: Any) -> tuple[str, Any]:
    """Prefix ("net.") and backbone of a pyramid; for a backbone alone, "" and itself."""
    for name in ("net", "bottom_up"):
        if hasattr(pyramid, name):
            return f"{name}.", getattr(pyramid, name)
    return "", pyramid


def backbone_parts(model: Any, counts: Mapping[str, int]) -> dict[str, int]:
    """FLOPs of a backbone by part.

    Args:
        model: a backbone, alone or in a pyramid.
        counts: FLOPs by the name of the module, from :func:`flops_of`.

    Returns:
        "windowed_blocks", "global_blocks" and "patch_embedding" for a ViT with windows,
        "backbone" for any other; also "pyramid" if there is one.
    """
    prefix, backbone = backbone_of(model)
    root = type(model).__name__
    whole = counts.get(f"{root}.{prefix}".rstrip("."), counts["Global"])
    parts = {"backbone": whole}
    blocks = getattr(backbone, "blocks", ())
    if len(blocks) and all(hasattr(block, "window_size") for block in blocks):
        parts = {"windowed_blocks": 0, "global_blocks": 0}
        for index, block in enumerate(blocks):
            kind = "windowed_blocks" if block.window_size else "global_blocks"
            parts[kind] += counts[f"{root}.{prefix}blocks.{index}"]
        parts["patch_embedding"] = whole - sum(parts.values())
    if prefix:
        parts["pyramid"] = counts["Global"] - whole
    return parts
