"""A small Mask R-CNN on the built-in shapes: three minutes on two CPU cores."""

from detectron2.config import LazyCall as L

from crossmae_det.detection import ResizeToFit
from crossmae_det.engine.hooks import cosine_schedule

from ..coco.mask_rcnn_crossmae_vit_b_100ep import dataloader, model, optimizer, train

dataloader.image_size = 96
dataloader.train.dataset.names = "shapes_train"
dataloader.test.dataset.names = "shapes_val"
dataloader.train.total_batch_size = 4
dataloader.train.num_workers = 1
# No jitter of the scale: the run sees every image once.
dataloader.train.mapper.augmentations = [
    dataloader.train.mapper.augmentations[0],
    L(ResizeToFit)(max_size="${dataloader.image_size}"),
]

# 12 x 12 tokens need neither windows nor relative positions.
model.backbone.net.update(
    embed_dim=192,
    depth=6,
    num_heads=3,
    patch_size=8,
    pretrain_img_size=96,
    window_size=0,
    use_rel_pos=False,
    drop_path_rate=0.0,
)
# Strides 8 and 16.
model.backbone.update(scale_factors=(1.0, 0.5), out_channels=64, top_block=None)
_levels = ["p3", "p4"]
_scales = [1 / 8, 1 / 16]
_rpn, _heads = model.proposal_generator, model.roi_heads
_rpn.in_features = _heads.box_in_features = _levels
_rpn.anchor_generator.update(sizes=[[32], [56]], strides=[8, 16])
_rpn.head.conv_dims = [-1]
_rpn.update(batch_size_per_image=64, pre_nms_topk=(200, 200), post_nms_topk=(50, 50))
# Few boxes of each image, half of them objects.
_heads.update(batch_size_per_image=16, positive_fraction=0.5)
_heads.box_pooler.scales = _heads.mask_pooler.scales = _scales
_heads.box_pooler.sampling_ratio = 1
_heads.box_head.update(conv_dims=[], fc_dims=[256])
_heads.mask_head.conv_dims = [64, 64, 64]  # two convolutions, then the deconvolution
# The boxes would drown the classes in the layer that both share.
_heads.box_predictor.loss_weight = {"loss_box_reg": 0.5}
# One regression and one mask for all classes: each learns from every object.
_heads.box_predictor.cls_agnostic_bbox_reg = True
_heads.mask_head.num_classes = 1

optimizer.lr = "${crossmae.linear_lr:1e-3,${dataloader.train.total_batch_size},4}"
optimizer.weight_decay = 0.05
optimizer.fused = True
optimizer.params.update(lr_decay=1.0, backbone_lr_factor=0.5)
lr_multiplier = L(cosine_schedule)(max_iter="${train.max_iter}", warmup_iters=45)

train.output_dir = "./output/demo"
train.epochs = 1  # 1,000 iterations
train.clip_grad.enabled = True
train.checkpointer.period = 100
train.eval_period = 0
train.log_period = 10
