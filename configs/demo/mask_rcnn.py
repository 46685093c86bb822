"""Minutes on two CPU cores: a small Mask R-CNN on the built-in shapes, from random weights."""

from detectron2.config import LazyCall as L

from crossmae_det.engine.schedules import cosine_schedule

from ..coco.mask_rcnn_crossmae_vit_b_100ep import dataloader, model, optimizer, train

dataloader.image_size = 128
dataloader.train.dataset.names = "shapes_train"
dataloader.test.dataset.names = "shapes_val"
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 1
train.max_iter = 1500
