from .crossmae_vit_b_448_800ep import dataloader, lr_multiplier, model, optimizer, train

# The published schedule at 448 x 448, with half of the warm-up as well: 20 of 400 epochs.
train.epochs = 400
