"""A check that training learns: a small model overfits eight COCO images.

``tests/integration/overfit_coco.py`` sets the images.
"""

from detectron2.config import LazyCall as L

from crossmae_det.detection import ResizeToFit

from .mask_rcnn import dataloader, lr_multiplier, model, optimizer, train

dataloader.image_size = 320
dataloader.train.total_batch_size = 4
# No augmentation: training images look as they do in the evaluation.
dataloader.train.mapper.augmentations = [L(ResizeToFit)(max_size="${dataloader.image_size}")]
model.backbone.net.patch_size = 16
model.backbone.net.pretrain_img_size = "${dataloader.image_size}"
model.backbone.scale_factors = (4.0, 2.0, 1.0)
model.roi_heads.batch_size_per_image = 64

train.visualizer.score_threshold = 0.5
train.output_dir = "./output/overfit_coco"
optimizer.lr = "${crossmae.linear_lr:1e-3,${dataloader.train.total_batch_size},4}"
train.epochs = 400  # 800 iterations for eight images
train.eval_period = 0
lr_multiplier.warmup_iters = 80
