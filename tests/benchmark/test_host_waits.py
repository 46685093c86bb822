"""Counting what a GPU's host would wait for."""

import json

import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import BitMasks, Boxes, Instances

from crossmae_det.__main__ import main
from crossmae_det.benchmark.host_waits import HostWaits, count_waits
from crossmae_det.model_zoo import get_config


@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        ("item", lambda x: x.sum().item()),
        ("item", lambda x: bool(x.sum() > 0)),
        ("item", lambda x: float(x[0])),
        ("tolist", lambda x: x.tolist()),
        ("numpy", lambda x: x.numpy()),
        ("cpu", lambda x: x.cpu()),
        ("nonzero", lambda x: x.nonzero()),
        ("masked_select", lambda x: x.masked_select(x > 0)),
        ("boolean index", lambda x: x[x > 0]),
        ("boolean index", lambda x: x.clone().__setitem__(x > 0, torch.tensor(1.0))),
        ("unique", lambda x: x.unique()),
        ("equal", lambda x: torch.equal(x, x)),
    ],
)
def test_what_waits_is_counted(kind, operation):
    x = torch.tensor([1.0, -2.0, 3.0])
    with HostWaits() as waits:
        operation(x)
    assert set(waits.counts) == {kind} and waits.counts[kind] == 1


def test_what_does_not_wait_is_not_counted():
    x = torch.tensor([1.0, -2.0, 3.0])
    with HostWaits() as waits:
        y = torch.where(x > 0, x, 0)[torch.tensor([2, 0])]
        y.sum().isfinite().float()
        x.sort(), x.argsort(), x[1:], x.to("cpu", non_blocking=True)
    assert not waits.counts


def build(config, overrides):
    cfg = get_config(config, list(overrides))

    def call():
        model = instantiate(cfg.model)
        cfg.optimizer.params.model = model
        return model, instantiate(cfg.optimizer)

    return call


TINY = [
    *("dataloader.image_size=32", "model.encoder.embed_dim=16", "model.encoder.depth=2"),
    *("model.encoder.num_heads=2", "model.encoder.patch_size=8", "model.decoder_dim=16"),
    *("model.decoder_depth=1", "model.decoder_num_heads=2", "dataloader.train.total_batch_size=4"),
]


@pytest.mark.parametrize("config", ["crossmae_vit_b_800ep", "mae_vit_b_800ep"])
def test_a_step_of_pretraining_never_waits(config):
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    reference, ours, in_model = count_waits(build(f"pretraining/{config}.py", TINY), images)
    assert sum(reference.values()) >= 2  # each loss, and their total
    assert not ours and not in_model


def test_a_step_of_a_detector_waits_in_its_model_only(tiny_overrides):
    truth = Instances((64, 64))
    truth.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 50.0]]))
    truth.gt_classes = torch.tensor([1])
    truth.gt_masks = BitMasks(torch.ones(1, 64, 64, dtype=torch.bool))
    batch = [{"image": torch.randint(256, (3, 64, 64), dtype=torch.uint8), "instances": truth}]
    overrides = [*tiny_overrides, "model.roi_heads.num_classes=3"]
    config = build("coco/mask_rcnn_crossmae_vit_b_100ep.py", overrides)

    def with_fused():
        model, optimizer = config()
        groups = [{"params": group["params"]} for group in optimizer.param_groups]
        return model, torch.optim.AdamW(groups, lr=1e-4, fused=True)

    reference, ours, in_model = count_waits(with_fused, batch)
    assert ours == in_model and sum(in_model.values()) > 5
    assert sum(reference.values()) > sum(ours.values())


def test_the_command_prints_the_counts(tiny_sets, tmp_path):
    images = tiny_sets[0].rpartition(":")[2]
    config = "pretraining/crossmae_vit_b_800ep.py"
    overrides = [f"dataloader.train.dataset.name={images}", *TINY]
    command = ["benchmark", "--host-waits", config, "--json", str(tmp_path / "a.json")]
    main([*command, "--opts", *overrides])
    (row,) = json.loads((tmp_path / "a.json").read_text())["host_waits"]
    assert row["name"] == config and row["ours"] == row["model"] == 0 < row["detectron2"]
