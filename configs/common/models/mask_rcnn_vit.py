"""ViTDet's Mask R-CNN on the plain ViT, size B."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from crossmae_det.detection import PartiallySupervisedMaskHead, SimpleFeaturePyramid, vit_backbone

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
_constants = model_zoo.get_config("common/data/constants.py").constants

model.pixel_mean = _constants.imagenet_rgb256_mean
model.pixel_std = _constants.imagenet_rgb256_std
model.input_format = "RGB"

model.backbone = L(SimpleFeaturePyramid)(
    net=L(vit_backbone)(
        size="base",  # width, depth and heads; each can be set by itself
        embed_dim=None,
        depth=None,
        num_heads=None,
        patch_size=16,
        in_chans="${crossmae.count:${model.pixel_mean}}",  # 1 for model.input_format "L"
        img_size="${dataloader.image_size}",
        pretrain_img_size=224,
        window_size=14,
        global_blocks=None,  # four, evenly spread
        use_rel_pos=True,
        drop_path_rate=0.1,
        use_act_checkpoint=False,
        freeze_blocks=0,
        attention_backend="auto",  # or eager, sdpa, folded, flex, chunked: same results
        out_feature="last_feat",
    ),
    in_feature="${.net.out_feature}",
    out_channels=256,
    scale_factors=(4.0, 2.0, 1.0, 0.5),
    top_block=L(LastLevelMaxPool)(),
    norm="LN",
    square_pad="${dataloader.image_size}",
)

# Two convolutions in the RPN, four and one fully connected layer in the box head, LayerNorm in both
# heads.
model.proposal_generator.head.conv_dims = [-1, -1]
model.proposal_generator.head.in_channels = "${model.backbone.out_channels}"
_heads = model.roi_heads
_heads.box_head.conv_dims = [256, 256, 256, 256]
_heads.box_head.fc_dims = [1024]
_heads.box_head.conv_norm = _heads.mask_head.conv_norm = "LN"
_heads.box_head.input_shape = L(ShapeSpec)(
    channels="${model.backbone.out_channels}", height=7, width=7
)
_heads.mask_head._target_ = PartiallySupervisedMaskHead  # objects may have a box only
_heads.mask_head.input_shape = L(ShapeSpec)(
    channels="${model.backbone.out_channels}", height=14, width=14
)
_heads.box_predictor.input_shape = L(ShapeSpec)(channels="${model.roi_heads.box_head.fc_dims[0]}")

# The classes are those of the data; without masks there, it is a Faster R-CNN.
_heads.num_classes = "${crossmae.count:${dataloader.categories}}"
_heads.mask_in_features = (
    "${crossmae.when:${dataloader.train.mapper.use_instance_mask},${.box_in_features}}"
)
