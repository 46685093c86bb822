"""The published recipe of pretraining: data, optimizer and schedule, for CrossMAE and for MAE.

Keys to set: ``dataloader.image_size``, ``dataloader.train.dataset.name`` and
``dataloader.train.total_batch_size``, ``train.epochs``, ``model.encoder.size`` and
``model.prediction_ratio``. The learning rate, the iterations and the periods are derived from them.
A dataset is a name ("imagenet_train", or one registered in detectron2), a folder of images, a list
file, ``annotations.json:image_folder``, or tar shards: ``shards/{000..127}.tar``.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler
from timm.optim import param_groups_weight_decay

from crossmae_det.model_zoo.resolvers import image_set
from crossmae_det.pretraining import (
    build_pretraining_loader,
    build_validation_loader,
    load_images,
)
from crossmae_det.pretraining.visualizer import ReconstructionVisualizer

from .train import train

dataloader = dict(
    image_size=224,
    dataset_info="${dataset.info:${.train.dataset}}",  # kept in a run's saved config as `recorded`
    recorded={},
    train=L(build_pretraining_loader)(
        dataset=L(image_set)(name="imagenet_train"),
        image_size="${dataloader.image_size}",
        total_batch_size=4096,
        crop_scale=(0.2, 1.0),
        flip=True,
        num_workers=8,
        seed="${train.seed}",
        # Large datasets have bad files: they are skipped, counted and logged. False stops at one.
        skip_undecodable=True,
        device="${train.device}",
    ),
    # Held-out images, for their reconstruction loss; named like those of the training set.
    validation=L(build_validation_loader)(
        dataset=L(image_set)(name=""),
        image_size="${dataloader.image_size}",
        batch_size=32,
        max_images=512,
        num_workers="${dataloader.train.num_workers}",
    ),
)

optimizer = L(torch.optim.AdamW)(
    # No decay of biases and norms. The engine sets the model.
    params=L(param_groups_weight_decay)(weight_decay="${..weight_decay}"),
    # 1.5e-4 for 256 images, times the fraction of the masked patches that is predicted; MAE
    # predicts them all.
    lr=(
        "${crossmae.pretraining_lr:1.5e-4,${dataloader.train.total_batch_size},"
        "${oc.select:model.prediction_ratio,${model.mask_ratio}},${model.mask_ratio}}"
    ),
    betas=(0.9, 0.95),
    weight_decay=0.05,
    fused=True,  # one pass over the weights; on CPUs the default takes eight
)

# 40 of 800 epochs of warm-up, then half a cosine from 1 to 0 over the other 760.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_factor=0.001,
    warmup_length=40 / 800,
    rescale_interval=True,
)

train.update(
    epochs=800,
    # 800 epochs x 1,281,167 images of ImageNet / 4096 = 250,228 iterations.
    max_iter=(
        "${dataset.iterations:${train.epochs},"
        "${dataloader.train.dataset},${dataloader.train.total_batch_size}}"
    ),
    eval_period="${train.checkpointer.period}",  # of the validation loss
)
train.validation_loss.enabled = "${crossmae.if:${dataloader.validation.dataset.name},true,false}"
train.best_checkpoint.metrics = ["val/total_loss"]
train.compile.module = ""  # the whole model
train.visualizer = L(ReconstructionVisualizer)(
    output_dir="${train.output_dir}",
    images=L(load_images)(
        dataset="${dataloader.train.dataset}", image_size="${dataloader.image_size}", count=8
    ),
    period="${train.checkpointer.period}",
)
