from .pretrain_crossmae_vit_b import dataloader, lr_multiplier, model, optimizer, train

model.encoder.size = "small"
model.update(decoder_dim=256, decoder_num_heads=8)
# Half the width of ViT-B, twice its rate.
optimizer.lr = 2e-4
