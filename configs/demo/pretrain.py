"""CrossMAE with a small ViT on the built-in shapes: three minutes on two CPU cores."""

from ..pretraining.crossmae_vit_b_800ep import dataloader, lr_multiplier, model, optimizer, train

dataloader.image_size = 96
dataloader.train.dataset.name = "shapes_train"
dataloader.train.total_batch_size = 16
dataloader.train.num_workers = 1
# Small crops are blurred by the enlargement, and little is learned from them in so few steps.
dataloader.train.crop_scale = (0.4, 1.0)

# The ViT of demo/mask_rcnn.py.
model.encoder.update(embed_dim=192, depth=6, num_heads=3, patch_size=8)
model.update(decoder_dim=128, decoder_depth=4, decoder_num_heads=4)

# The published learning rate is for runs a hundred times as long.
optimizer.lr = "${crossmae.linear_lr:1.5e-3,${dataloader.train.total_batch_size},16}"
lr_multiplier.warmup_length = 0.1

train.output_dir = "./output/demo_pretrain"
train.epochs = 6.4  # 1,600 iterations
train.checkpointer.period = 200
train.log_period = 10
