"""A check that training learns: a small model overfits eight COCO images.

``tests/integration/overfit_coco.py`` sets the images.
"""

from .mask_rcnn import dataloader, lr_multiplier, model, optimizer, train

dataloader.image_size = 320
dataloader.train.total_batch_size = 4
# No augmentation: training images look as they do in the evaluation.
del dataloader.train.mapper.augmentations[0]
model.backbone.net.patch_size = 16
# Strides 4, 8 and 16: photographs have small objects.
model.backbone.scale_factors = (4.0, 2.0, 1.0)
_rpn, _heads = model.proposal_generator, model.roi_heads
_rpn.in_features = _heads.box_in_features = ["p2", "p3", "p4"]
_heads.box_pooler.scales = _heads.mask_pooler.scales = [1 / 4, 1 / 8, 1 / 16]
_rpn.anchor_generator.update(sizes=[[16], [32], [64]], strides=[4, 8, 16])
_rpn.update(pre_nms_topk=(300, 300), post_nms_topk=(100, 100))
_heads.batch_size_per_image = 64

train.output_dir = "./output/overfit_coco"
train.epochs = 400  # 800 iterations for eight images
lr_multiplier.warmup_iters = 80
