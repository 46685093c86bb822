"""Which mixed precision a device has, and what stays in float32."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode

from crossmae_det.engine.precision import amp_dtype, autocast
from crossmae_det.model_zoo import get_config


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, None),
        ({"avx512_bf16": True}, "bf16"),
        ({"neon": True, "bf16": True}, "bf16"),
        ({}, None),
    ],
)
def test_the_precision_follows_the_cpu(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    cpu = torch.device("cpu")
    assert amp_dtype({"amp": {"enabled": True, "dtype": "auto"}}, cpu) == expected
    assert amp_dtype({"amp": {"enabled": True, "dtype": "fp16"}}, cpu) == "fp16"
    assert amp_dtype({"amp": {"enabled": False, "dtype": "auto"}}, cpu) is None


@pytest.mark.parametrize(("ampere", "expected"), [(True, "bf16"), (False, "fp16")])
def test_the_precision_follows_the_gpu(monkeypatch, ampere, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: ampere)
    options = {"amp": {"enabled": True, "dtype": "auto"}}
    assert amp_dtype(options, torch.device("cuda")) == expected


class KernelInputs(TorchDispatchMode):
    """Records the dtypes of the inputs of an operator's kernel, after autocast's conversions."""

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
