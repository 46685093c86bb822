"""CrossMAE on the plain ViT, size B."""

from detectron2.config import LazyCall as L

from crossmae_det.modeling import build_vit
from crossmae_det.pretraining import CrossMAE

model = L(CrossMAE)(
    encoder=L(build_vit)(
        size="base",  # sets the four that follow; a value here replaces that of the size
        embed_dim=None,
        depth=None,
        num_heads=None,
        patch_size=None,
        img_size="${dataloader.image_size}",
        use_act_checkpoint=False,
    ),
    decoder_dim=512,
    decoder_depth=12,
    decoder_num_heads=16,
    mask_ratio=0.75,
    prediction_ratio=0.25,  # of all patches: a third of those that are masked
    feature_blocks=None,  # the decoder reads every block of the encoder
    use_input_feature=True,
    decoder_self_attention=False,
    norm_pix_loss=True,
)
