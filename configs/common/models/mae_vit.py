"""MAE on the plain ViT, size B: the baseline of CrossMAE."""

from detectron2.config import LazyCall as L

from crossmae_det.pretraining import MAE

from .crossmae_vit import model as _crossmae

model = L(MAE)(
    encoder=_crossmae.encoder,
    decoder_dim=512,
    decoder_depth=8,
    decoder_num_heads=16,
    mask_ratio=0.75,
    norm_pix_loss=True,
)
