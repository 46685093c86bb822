"""The losses on a validation set: what they are, and that computing them changes nothing."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage, get_event_storage
from timm.layers import DropPath
from torch import nn

from crossmae_det.engine.validation import ValidationLoss, losses_on
from crossmae_det.model_zoo import get_config
from crossmae_det.modeling import ViT
from crossmae_det.pretraining import CrossMAE


class Noisy(nn.Module):
    """A model with everything that training draws or changes, and a loss in training mode only."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Sequential(nn.Dropout(0.5), DropPath(0.5))

    def forward(self, batch):
        if not self.training:
            return batch
        get_event_storage().put_scalar("roi_heads/num_fg_samples", 7)
        y = self.drop(self.norm(self.linear(batch)))
        return {"loss_a": y.square().mean(), "loss_b": (torch.rand(len(batch)) * y[:, 0]).mean()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Noisy()
    model.norm.running_mean.fill_(0.3)
    return model


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, generator=generator) for size in (4, 4, 2)]


def test_it_is_the_mean_over_images_of_the_losses_without_noise(model, batches):
    expected = sum(
        len(batch)
        * nn.functional.batch_norm(model.linear(batch), model.norm.running_mean, torch.ones(3))
        .square()
        .mean()
        .item()
        for batch in batches
    )
    losses = losses_on(model, batches)
    assert losses["loss_a"] == pytest.approx(expected / 10, rel=1e-4)
    assert losses["total_loss"] == pytest.approx(losses["loss_a"] + losses["loss_b"])


def state_of_the_process():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_nothing_changes(model, batches):
    model.train()
    model.drop.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    state = state_of_the_process()
    with EventStorage() as storage:
        losses_on(model, batches)
        assert not storage.latest()
    assert state_of_the_process() == state
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_after_an_error(model):
    model.train()
    with pytest.raises(RuntimeError):
        losses_on(model, [torch.zeros(2, 5)])
    assert all(module.training for module in model.modules())


def test_it_depends_on_weights_and_seed_alone(model, batches):
    first = losses_on(model, batches, seed=1)
    torch.rand(3)
    model.train(not model.training)
    assert losses_on(model, batches, seed=1) == first
    assert losses_on(model, batches, seed=2)["loss_b"] != first["loss_b"]
    with torch.no_grad():
        model.linear.weight.mul_(2)
    assert losses_on(model, batches, seed=1)["loss_a"] != first["loss_a"]


def test_a_set_without_images_is_rejected(model):
    with pytest.raises(ValueError, match=r"dataloader\.validation"):
        losses_on(model, [])


def test_a_detector_on_its_own_test_set(tiny_overrides):
    cfg = get_config("coco/mask_rcnn_crossmae_vit_b_100ep.py", tiny_overrides)
    torch.manual_seed(0)
    detector = instantiate(cfg.model)
    loader = instantiate(cfg.dataloader.validation)
    losses = losses_on(detector, loader)
    assert len(loader) == 3
    assert losses == losses_on(detector, loader)
    assert losses.keys() == {
        *("total_loss", "loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc")
    }
    # The mean over images of what the model gives in training, but for drop path.
    detector.train()
    detector.backbone.eval()
    with EventStorage(), torch.no_grad():
        given = [detector(batch)["loss_rpn_loc"].item() for batch in loader]
    assert losses["loss_rpn_loc"] == pytest.approx(sum(given) / 3, rel=0.1)


def test_a_pretraining_model():
    torch.manual_seed(0)
    encoder = ViT(16, 4, embed_dim=12, depth=2, num_heads=2, drop_path_rate=0.5)
    model = CrossMAE(encoder, decoder_dim=8, decoder_depth=2, decoder_num_heads=2)
    batches = list(torch.randn(3, 2, 3, 16, 16))
    losses = losses_on(model, batches)
    assert losses == losses_on(model, batches)
    assert losses["total_loss"] == losses["loss_reconstruction"]
    assert losses != losses_on(model, batches, seed=1)  # other patches are masked


@pytest.mark.parametrize(
    ("period", "max_iter", "expected"),
    [(3, 7, [2, 5, 6]), (3, 6, [2, 5]), (0, 4, [3])],
)
def test_when_it_is_measured(model, batches, period, max_iter, expected):
    hook = ValidationLoss(batches, period, None)
    trainer = hook.trainer = SimpleNamespace(model=model, max_iter=max_iter, iter=0)
    measured = []
    trainer.storage = SimpleNamespace(
        put_scalars=lambda **values: measured.append((hook.measured_iter, values))
    )
    for trainer.iter in range(max_iter):
        hook.after_step()
    trainer.iter = max_iter
    hook.after_train()
    assert [iteration for iteration, _ in measured] == expected
    assert all(values["val/total_loss"] > 0 for _, values in measured)


def test_not_after_a_run_that_failed(model, batches):
    hook = ValidationLoss(batches, 0, None)
    hook.trainer = SimpleNamespace(model=model, max_iter=5, iter=4)
    hook.after_train()
    assert hook.measured_iter == -1
