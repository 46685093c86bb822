"""About twenty minutes on two CPU cores: CrossMAE on CIFAR-10 in an image folder, patch 4 at 32x32.

Name the folder: ``dataloader.train.dataset.name=PATH``.
"""

from .pretrain import dataloader, lr_multiplier, model, optimizer, train

dataloader.image_size = 32
dataloader.train.dataset.name = "datasets/cifar10/train"
dataloader.train.total_batch_size = 128

model.encoder.patch_size = 4

train.output_dir = "./output/cifar10_pretrain"
train.epochs = 9
# 9 epochs x 25,000 images / 128 = 1,758 iterations.
train.max_iter = (
    "${dataset.image_iterations:${train.epochs},"
    "${dataloader.train.dataset.name},${dataloader.train.total_batch_size}}"
)
