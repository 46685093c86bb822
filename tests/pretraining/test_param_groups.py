import torch

from crossmae_det.modeling import ViT
from crossmae_det.pretraining import MAE, CrossMAE, weight_decay_param_groups


def test_biases_and_norms_are_not_decayed():
    for kind in (CrossMAE, MAE):
        encoder = ViT(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2)
        model = kind(encoder, decoder_dim=8, decoder_depth=2, decoder_num_heads=2)
        decayed, spared = weight_decay_param_groups(model, 0.05)
        assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        in_decayed = {names.pop(id(parameter)) for parameter in decayed["params"]}
        in_spared = {names.pop(id(parameter)) for parameter in spared["params"]}
        assert set(names.values()) == {"encoder.pos_embed"}  # fixed
        assert all(name.endswith(".bias") or "norm" in name for name in in_spared)
        assert not any(name.endswith(".bias") or "norm" in name for name in in_decayed)
        assert {"encoder.cls_token", "decoder.mask_token"} <= in_decayed
        optimizer = torch.optim.AdamW([decayed, spared], lr=1.0)
        assert [group["name"] for group in optimizer.param_groups] == [
            "weights",
            "biases_and_norms_no_decay",
        ]
