"""CrossMAE, ViT-B, continued on 50 to 2,000 images of one's own, from published weights.

Name the images and the weights, ``dataloader.train.dataset.name`` and ``train.init_checkpoint``
(a whole CrossMAE, with its decoder), and if there are any the images that are held out, for the
validation loss: ``dataloader.validation.dataset.name``. docs/benchmarks.md, "Small datasets", says
which settings were measured, and on what.
"""

from ..pretraining.crossmae_vit_b_800ep import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.total_batch_size = 32

# A rate for batches of 16 to 64, whatever the batch: the published rule would give 6.25e-6 here.
optimizer.lr = 1e-4
lr_multiplier.warmup_length = 0.05

train.epochs = 200
