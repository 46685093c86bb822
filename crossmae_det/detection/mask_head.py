"""The mask head for data in which some objects have a mask and others only a box.

Legend: B boxes, C channels.
"""

import torch
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY, MaskRCNNConvUpsampleHead
from detectron2.structures import Instances
from torch import Tensor


@ROI_MASK_HEAD_REGISTRY.register()
class PartiallySupervisedMaskHead(MaskRCNNConvUpsampleHead):
    """detectron2's mask head, trained on the objects that have a mask.

    Objects without a mask only count for the losses of the boxes: those with ``gt_has_mask`` False,
    and all in an image without ``gt_masks``. If every object has a mask, nothing differs from
    ``MaskRCNNConvUpsampleHead``; the parameters always have its names.
    """

    def forward(self, x: Tensor, instances: list[Instances]):
        """Predict masks.

        Args:
            x: (B, C, height, width) features of B boxes over all images.
            instances: the boxes of each image; in training with the fields of their objects.

        Returns:
            ``{"loss_mask": scalar}`` in training, else ``instances`` with ``pred_masks``.
        """
        if self.training:
            keep = [_has_mask(boxes, x.device) for boxes in instances]
            kept = torch.cat(keep)
            if not kept.all():
                x = x[kept]
                instances = [boxes[mask] for boxes, mask in zip(instances, keep, strict=True)]
        return super().forward(x, instances)


def _has_mask(boxes: Instances, device: torch.device) -> Tensor:
    """(number of boxes) bool: whether the object of each has a mask."""
    if boxes.has("gt_has_mask"):
        return boxes.gt_has_mask
    return torch.full((len(boxes),), boxes.has("gt_masks"), device=device)
