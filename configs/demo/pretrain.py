"""Eleven minutes on two slow CPU cores: CrossMAE of the demo's encoder on the built-in shapes."""

from ..pretraining.crossmae_vit_b_800ep import dataloader, lr_multiplier, model, optimizer, train

dataloader.image_size = 128
dataloader.train.dataset.name = "shapes_train"
dataloader.train.total_batch_size = 32
dataloader.train.num_workers = 1
# In so few steps small crops, which are blurred when they are enlarged, teach little.
dataloader.train.crop_scale = (0.4, 1.0)

# The encoder of demo/mask_rcnn.py.
model.encoder.update(embed_dim=192, depth=6, num_heads=3, patch_size=8)
model.update(decoder_dim=128, decoder_depth=4, decoder_num_heads=4)

# The rule for the learning rate is for runs a hundred times as long.
optimizer.lr = "${crossmae.linear_lr:1.5e-3,${dataloader.train.total_batch_size},32}"
lr_multiplier.warmup_length = 0.1

train.output_dir = "./output/demo_pretrain"
train.epochs = 8.64  # 1,080 iterations
