"""CrossMAE on CIFAR-10 in an image folder, patch size 4 at 32x32: twenty minutes on two CPU cores.

Set ``dataloader.train.dataset.name`` to the folder.
"""

from .pretrain import dataloader, lr_multiplier, model, optimizer, train

dataloader.image_size = 32
dataloader.train.dataset.name = "datasets/cifar10/train"
dataloader.train.total_batch_size = 128

model.encoder.patch_size = 4

train.output_dir = "./output/cifar10_pretrain"
optimizer.lr = "${crossmae.linear_lr:1.5e-3,${dataloader.train.total_batch_size},128}"
train.epochs = 9  # 9 epochs x 25,000 images / 128 = 1,758 iterations
