"""ViTDet Mask R-CNN, ViT-B, for 50 to 2,000 annotated images on one GPU.

Set ``dataloader.train.dataset.names`` and ``dataloader.test.dataset.names``, each to
``annotations.json:image_folder``, or the first alone to a dataset with splits, such as
``yolo:data.yaml``; and ``train.init_checkpoint`` to pretrained weights. The settings and how they
were measured: docs/benchmarks.md, "Small datasets".
"""

from detectron2.config import LazyCall as L

from crossmae_det.engine.hooks import cosine_schedule

from ..coco.mask_rcnn_crossmae_vit_b_100ep import dataloader, model, optimizer, train

dataloader.train.total_batch_size = 4
# Half to twice the size: reduced to a tenth, an image shows little, and there are few of them.
dataloader.train.mapper.augmentations[1].update(min_scale=0.5, max_scale=2.0)

# Half of the blocks stay as pretrained, which saves time and memory; a smaller ViT lost no AP.
# Without pretrained weights, all blocks are trained.
model.backbone.net.freeze_blocks = "${crossmae.if:${train.init_checkpoint},6,0}"

# The published rate for any batch size: the linear rule would give 6.25e-6 here. Larger rates were
# even better for a smaller ViT.
optimizer.lr = 1e-4
lr_multiplier = L(cosine_schedule)(max_iter="${train.max_iter}", warmup_iters=100)

train.epochs = 100
train.clip_grad.enabled = True
# Twenty evaluations of AP and validation loss; five in a row without a better AP end the run. All
# epochs run if there is no validation set.
train.eval_period = "${crossmae.fraction:${train.max_iter},20,1}"
train.checkpointer.period = "${train.eval_period}"
_has_test_set = "${crossmae.if:${oc.select:dataloader.test.dataset.names,null},true,false}"
train.validation_loss.enabled = _has_test_set
train.early_stopping.update(enabled=_has_test_set, patience=5)
