"""ViTDet's Mask R-CNN, ViT-B, for 50 to 2,000 annotated images of one's own, on one GPU.

Name the data, each as ``annotations.json:image_folder``, and the pretrained weights:
``dataloader.train.dataset.names``, ``dataloader.test.dataset.names``, ``train.init_checkpoint``.
docs/benchmarks.md, "Small datasets", says which settings were measured, and on what.
"""

from detectron2.config import LazyCall as L

from crossmae_det.engine.hooks import cosine_schedule

from ..coco.mask_rcnn_crossmae_vit_b_100ep import dataloader, model, optimizer, train

dataloader.train.total_batch_size = 4
# Half to twice the size: a tenth leaves little to see in a photograph of which there are few.
dataloader.train.mapper.augmentations[1].update(min_scale=0.5, max_scale=2.0)

# The first half of the blocks stays as pretrained: a smaller ViT lost nothing by that, and a step
# takes less time and memory. From random weights all are trained.
model.backbone.net.freeze_blocks = "${crossmae.if:${train.init_checkpoint},6,0}"

# The published rate, not scaled down from 64 images, and the same for every batch: the linear rule
# would give 6.25e-6 here. Larger rates were better still for a smaller ViT.
optimizer.lr = 1e-4
lr_multiplier = L(cosine_schedule)(max_iter="${train.max_iter}", warmup_iters=100)

train.epochs = 100
train.clip_grad.enabled = True
# Twenty evaluations, AP and validation loss; five in a row without a better AP end the run. Without
# a validation set all epochs are run.
train.eval_period = "${crossmae.fraction:${train.max_iter},20,1}"
train.checkpointer.period = "${train.eval_period}"
_has_test_set = "${crossmae.if:${oc.select:dataloader.test.dataset.names,null},true,false}"
train.validation_loss.enabled = _has_test_set
train.early_stopping.update(enabled=_has_test_set, patience=5)
