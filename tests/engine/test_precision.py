"""What of a detector stays in float32 under mixed precision."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode

from crossmae_det.engine.trainer import autocast
from crossmae_det.model_zoo import get_config


class KernelInputs(TorchDispatchMode):
    """Notes the types of what reaches the kernel of an operator, after autocast's conversions."""

    def __init__(self, name):
        super().__init__()
        self.name, self.types = name, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == self.name:
            self.types.append([x.dtype for x in args if isinstance(x, torch.Tensor)])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("training", [False, True])
def test_boxes_and_scores_are_float32_in_nms_and_box_coding(
    precision, training, tiny_overrides, monkeypatch
):
    torch.manual_seed(0)
    cfg = get_config("coco/mask_rcnn_crossmae_vit_b_100ep.py", tiny_overrides)
    cfg.model.roi_heads.num_classes = 3
    cfg.model.roi_heads.box_predictor.test_score_thresh = 0.0
    model = instantiate(cfg.model).train(training)
    decoded = []
    apply_deltas = Box2BoxTransform.apply_deltas

    def note(self, deltas, boxes):
        decoded.append(apply_deltas(self, deltas, boxes))
        return decoded[-1]

    monkeypatch.setattr(Box2BoxTransform, "apply_deltas", note)
    truth = Instances((64, 64))
    truth.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 50.0]]))
    truth.gt_classes = torch.tensor([1])
    batch = [{"image": torch.randint(256, (3, 64, 64), dtype=torch.uint8), "instances": truth}]
    model.roi_heads.mask_on = False
    with (
        EventStorage(),
        KernelInputs("torchvision::nms") as nms,
        torch.set_grad_enabled(training),
        autocast(torch.device("cpu"), precision),
    ):
        output = model(batch)
    assert nms.types and all(types == [torch.float32] * 2 for types in nms.types)
    assert decoded and all(boxes.dtype == torch.float32 for boxes in decoded)
    if not training:
        assert output[0]["instances"].pred_boxes.tensor.dtype == torch.float32
