from .mask_rcnn_crossmae_vit_l_100ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.net.update(size="huge", drop_path_rate=0.5)
# The published ViT-H recipe applies weight decay to every parameter.
optimizer.params.update(lr_decay=0.9, weight_decay_norm=None, weight_decay_pos_embed=None)
