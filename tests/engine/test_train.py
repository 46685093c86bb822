"""What a job builds from its config."""

import torch
from detectron2.config import LazyCall
from omegaconf import OmegaConf
from torch import nn

from crossmae_det.checkpoint import read_checkpoint
from crossmae_det.engine.train import build_optimizer
from crossmae_det.utils import save_checkpoint


def parameters(model, base_lr):
    return [{"params": list(model.parameters()), "lr": base_lr}]


def test_the_state_of_an_optimizer_from_a_config_is_safe_to_read(tmp_path):
    cfg = LazyCall(torch.optim.AdamW)(
        params=LazyCall(parameters)(base_lr=0.5), lr=0.5, betas=[0.8, 0.9]
    )
    optimizer = build_optimizer(
        OmegaConf.create(cfg, flags={"allow_objects": True}), nn.Linear(2, 2)
    )
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert type(optimizer.param_groups[0]["betas"]) is tuple
    save_checkpoint({"optimizer": optimizer.state_dict()}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")["optimizer"]["param_groups"][0]["lr"] == 0.5
