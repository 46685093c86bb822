"""detectron2's ViTDet Mask R-CNN with this package's ViT and pyramid, size B."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from crossmae_det.detection import PartiallySupervisedMaskHead, SimpleFeaturePyramid, vit_backbone

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model

model.backbone.update(_target_=SimpleFeaturePyramid, square_pad="${dataloader.image_size}")
model.backbone.net = L(vit_backbone)(
    size="base",  # sets embed_dim, depth and num_heads, unless they are given
    embed_dim=None,
    depth=None,
    num_heads=None,
    patch_size=16,
    in_chans="${crossmae.count:${model.pixel_mean}}",  # 1 for model.input_format "L"
    img_size="${dataloader.image_size}",
    pretrain_img_size=224,
    window_size=14,
    global_blocks=None,  # four, evenly spaced
    use_rel_pos=True,
    drop_path_rate=0.1,
    use_act_checkpoint=False,
    freeze_blocks=0,
    attention_backend="auto",  # or eager, sdpa, folded, flex, chunked: same results
    out_feature="last_feat",
)

# The heads follow model.backbone.out_channels and the widths of their own layers.
_channels, _heads = "${model.backbone.out_channels}", model.roi_heads
model.proposal_generator.head.in_channels = _channels
_heads.box_head.input_shape = L(ShapeSpec)(channels=_channels, height=7, width=7)
_heads.mask_head.input_shape = L(ShapeSpec)(channels=_channels, height=14, width=14)
_heads.box_predictor.input_shape = L(ShapeSpec)(channels="${model.roi_heads.box_head.fc_dims[0]}")

# The classes are those of the data. Objects may lack masks; if all do, the model is a Faster R-CNN.
_heads.num_classes = "${crossmae.count:${dataloader.categories}}"
_heads.mask_head._target_ = PartiallySupervisedMaskHead
_heads.mask_in_features = (
    "${crossmae.if:${dataloader.train.mapper.use_instance_mask},${.box_in_features}}"
)
