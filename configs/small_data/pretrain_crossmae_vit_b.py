"""CrossMAE, ViT-B, continued from published weights on 50 to 2,000 images of your own.

Set ``dataloader.train.dataset.name`` to the images and ``train.init_checkpoint`` to a CrossMAE
checkpoint with its decoder. For a validation loss, set ``dataloader.validation.dataset.name`` to
held-out images. The settings and how they were measured: docs/benchmarks.md, "Small datasets".
"""

from ..pretraining.crossmae_vit_b_800ep import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.total_batch_size = 32

# One rate for batches of 16 to 64: the published rule would give 6.25e-6 here.
optimizer.lr = 1e-4
lr_multiplier.warmup_length = 0.05

train.epochs = 200
