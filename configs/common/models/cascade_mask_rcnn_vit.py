"""ViTDet's Cascade Mask R-CNN, size B: three box heads instead of one."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from .mask_rcnn_vit import model

_cascade = model_zoo.get_config("common/models/cascade_rcnn.py").model.roi_heads
_heads = model.roi_heads
_box_head = _heads.pop("box_head")
_heads.pop("box_predictor")
_heads.pop("proposal_matcher")
_heads._target_ = _cascade._target_
# Overrides of the first head apply to all three.
_heads.box_heads = [_box_head, *["${model.roi_heads.box_heads[0]}"] * 2]
_heads.box_predictors = _cascade.box_predictors
for _predictor in _heads.box_predictors:
    _predictor.input_shape = L(ShapeSpec)(channels="${model.roi_heads.box_heads[0].fc_dims[0]}")
_heads.proposal_matchers = _cascade.proposal_matchers
