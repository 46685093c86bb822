"""Small models, and files of their weights."""

import torch

from crossmae_det.detection import SimpleFeaturePyramid, ViTBackbone
from crossmae_det.modeling import ViT
from crossmae_det.pretraining import CrossMAE
from crossmae_det.utils import save_checkpoint

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


class Detector(torch.nn.Module):
    def __init__(self, **overrides):
        super().__init__()
        backbone = ViTBackbone(**(SIZES | {"use_rel_pos": True} | overrides))
        self.backbone = SimpleFeaturePyramid(backbone, "last_feat", 4, (1.0, 0.5))


def save(tmp_path, state, **beside):
    path = tmp_path / "weights.pth"
    save_checkpoint({"model": state, **beside}, path)
    return path


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def autoencoder(**sizes):
    return CrossMAE(
        ViT(**(SIZES | sizes)), decoder_dim=8, decoder_depth=2, decoder_num_heads=2, mask_ratio=0.5
    )
