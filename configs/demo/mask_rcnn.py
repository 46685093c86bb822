"""A small Mask R-CNN on the built-in shapes: eight minutes on two slow CPU cores."""

from detectron2.config import LazyCall as L

from crossmae_det.engine.hooks import cosine_schedule

from ..coco.mask_rcnn_crossmae_vit_b_100ep import dataloader, model, optimizer, train

dataloader.image_size = 128
dataloader.train.dataset.names = "shapes_train"
dataloader.test.dataset.names = "shapes_val"
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 1
# The shapes vary less in scale than objects in photographs.
dataloader.train.mapper.augmentations[1].update(min_scale=0.7, max_scale=1.4)

# 16 x 16 tokens need neither windows nor relative positions.
model.backbone.net.update(
    embed_dim=192,
    depth=6,
    num_heads=3,
    patch_size=8,
    pretrain_img_size=128,
    window_size=0,
    use_rel_pos=False,
    drop_path_rate=0.0,
)
# Strides 4, 8 and 16.
model.backbone.update(scale_factors=(2.0, 1.0, 0.5), out_channels=64, top_block=None)
_levels = ["p2", "p3", "p4"]
_scales = [1 / 4, 1 / 8, 1 / 16]
_rpn, _heads = model.proposal_generator, model.roi_heads
_rpn.in_features = _heads.box_in_features = _levels
_rpn.anchor_generator.update(sizes=[[16], [32], [64]], strides=[4, 8, 16])
_rpn.head.conv_dims = [-1]
_rpn.update(batch_size_per_image=64, pre_nms_topk=(300, 300), post_nms_topk=(100, 100))
_heads.batch_size_per_image = 32
_heads.box_pooler.scales = _heads.mask_pooler.scales = _scales
_heads.box_head.update(conv_dims=[64], fc_dims=[256])
_heads.mask_head.conv_dims = [64, 64, 64]  # two convolutions, then the deconvolution

optimizer.lr = "${crossmae.linear_lr:1e-3,${dataloader.train.total_batch_size},8}"
optimizer.weight_decay = 0.05
optimizer.params.update(lr_decay=1.0, backbone_lr_factor=0.5)
lr_multiplier = L(cosine_schedule)(max_iter="${train.max_iter}", warmup_iters=45)

train.output_dir = "./output/demo"
# After so few iterations, correct detections have low scores as well.
train.visualizer.score_threshold = 0.25
train.epochs = 0.9  # 450 iterations
train.clip_grad.enabled = True
train.eval_period = "${crossmae.fraction:${train.max_iter},2,1}"
