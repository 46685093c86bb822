"""Parameters and FLOPs of a detector, part by part, from the shapes of its tensors alone.

FLOPs are those of :mod:`crossmae_det.benchmark.flops`: of products of matrices, convolutions among
them, on the meta device. A detector also sorts boxes and samples features inside them; that is not
counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from crossmae_det.benchmark.candidate import Candidate
from crossmae_det.benchmark.flops import flops_of, parameters_of


@dataclass(frozen=True)
class DetectionCost:
    """What a detector costs in the forward pass of one square image.

    Attributes:
        name: of the candidate.
        image_size: side of the image in pixels.
        proposals: boxes that the box heads see: as many as the RPN hands on in evaluation.
        detections: boxes that the mask head sees: as many as are kept of an image in evaluation; 0
            without a mask head.
        parameters: number of them by part: "trunk", "pyramid", "rpn", "box_heads", "mask_head".
        flops: FLOPs by part, where the trunk is divided into "windowed_blocks", "global_blocks" and
            "patch_embedding".
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
    """Count a detector of detectron2 with a trunk, a pyramid, an RPN, box heads and a mask head.

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
        raise ValueError(f"{name}: not a detector with a trunk, a pyramid and heads")
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
    trunk_parameters = parameters_of(trunk_of(pyramid)[1])
    return DetectionCost(
        name=name,
        image_size=side,
        proposals=proposals,
        detections=detections,
        parameters={
            "trunk": trunk_parameters,
            "pyramid": parameters_of(pyramid) - trunk_parameters,
            "rpn": parameters_of(rpn),
            "box_heads": parameters_of(heads.box_head) + parameters_of(heads.box_predictor),
            "mask_head": parameters_of(heads.mask_head) if heads.mask_on else 0,
        },
        flops=flops,
    )


def _listed(module: Any) -> list[Any]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def trunk_of(backbone: Any) -> tuple[str, Any]:
    """The trunk below a pyramid, after its name and a dot; a backbone without one is its own."""
    for name in ("net", "bottom_up"):
        if hasattr(backbone, name):
            return f"{name}.", getattr(backbone, name)
    return "", backbone


def backbone_parts(backbone: Any, counts: Mapping[str, int]) -> dict[str, int]:
    """The FLOPs of a backbone by part.

    Args:
        backbone: a trunk, alone or below a pyramid.
        counts: FLOPs by the name of the module, as torch's counter names them.

    Returns:
        "trunk", of one of blocks "windowed_blocks", "global_blocks" and "patch_embedding"; and
        "pyramid" where there is one.
    """
    inside, trunk = trunk_of(backbone)
    root = type(backbone).__name__
    whole = counts.get(f"{root}.{inside}".rstrip("."), counts["Global"])
    parts = {}
    blocks = getattr(trunk, "blocks", ())
    if len(blocks) and all(hasattr(block, "window_size") for block in blocks):
        for kind, windowed in (("windowed_blocks", True), ("global_blocks", False)):
            parts[kind] = sum(
                counts[f"{root}.{inside}blocks.{index}"]
                for index, block in enumerate(blocks)
                if bool(block.window_size) == windowed
            )
        parts["patch_embedding"] = whole - sum(parts.values())
    else:
        parts["trunk"] = whole
    if inside:
        parts["pyramid"] = counts["Global"] - whole
    return parts
