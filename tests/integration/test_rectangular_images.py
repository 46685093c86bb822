"""Rectangular images in pretraining, detection, evaluation and prediction."""

import json
from argparse import Namespace

import pytest
import torch
from detectron2.config import instantiate

from crossmae_det.checkpoint import read_checkpoint
from crossmae_det.detection.predictor import predict_files
from crossmae_det.engine import run
from crossmae_det.model_zoo import get_config

DETECTION = "coco/mask_rcnn_crossmae_vit_b_100ep.py"
TRAIN, EVALUATE = (Namespace(eval_only=only, resume=False) for only in (False, True))


def batches(model):
    """The sizes of the batches that a detector's backbone receives."""
    sizes = set()
    model.backbone.register_forward_pre_hook(lambda _, args: sizes.add(tuple(args[0].shape[2:])))
    return sizes


def test_from_pretraining_to_the_demo(tiny_sets, tiny_overrides, tmp_path):
    pretraining = [
        *("model.encoder.embed_dim=32", "model.encoder.depth=4", "model.encoder.num_heads=2"),
        *("model.decoder_dim=16", "model.decoder_depth=2", "model.decoder_num_heads=2"),
        *("train.device=cpu", "train.amp.enabled=False"),
        "dataloader.image_size=[32,72]",
        "model.encoder.patch_size=8",  # 4 x 9
        f"dataloader.train.dataset.name='{tiny_sets[0]}'",
        *("dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0"),
        *("train.max_iter=1", f"train.output_dir={tmp_path}/pretrained"),
    ]
    run(get_config("pretraining/crossmae_vit_b_800ep.py", pretraining), TRAIN)
    pretrained = tmp_path / "pretrained" / "model_final.pth"
    assert read_checkpoint(pretrained)["position_grid"] == [4, 9]

    options = [item for item in tiny_overrides if "img_size" not in item]
    options += [
        "dataloader.image_size=[64,128]",
        *("model.backbone.net.window_size=3", "model.backbone.net.global_blocks=[3]"),
        "model.backbone.net.pretrain_img_size=[64,144]",
        *("train.max_iter=2", "train.eval_period=0", "train.visualizer.count=1"),
        f"train.init_checkpoint={pretrained}",
    ]
    cfg = get_config(DETECTION, [*options, "model.roi_heads.box_predictor.test_score_thresh=0"])
    cfg_model = instantiate(cfg.model)
    backbone = cfg_model.backbone.net
    sides = {
        len(getattr(block.attn, f"rel_pos_{axis}")) for block in backbone.blocks for axis in "hw"
    }
    assert sides == {2 * 3 - 1, 2 * 4 - 1, 2 * 8 - 1}  # windows, height, width
    assert backbone.blocks[-1].attn.rel_pos_h.shape[0] == 2 * 4 - 1

    sizes = batches(cfg_model)
    loader = instantiate(cfg.dataloader.train)
    for _, batch in zip(range(4), loader, strict=False):
        for sample in batch:
            height, width = sample["image"].shape[1:]
            assert height <= 64 and width <= 128
        with torch.no_grad():
            cfg_model.eval()(batch)
    for sample in instantiate(cfg.dataloader.test):
        assert sample[0]["image"].shape[1:] == (64, 64)  # a square, fitted into 64 x 128
    assert sizes == {(64, 128)}

    results = run(cfg.copy(), TRAIN)
    assert {"bbox", "segm"} <= results.keys()
    report = json.loads((tmp_path / "output" / "init_checkpoint.json").read_text())
    # The encoder's 4 x 9 patches of 8 pixels as patches of 16.
    assert "backbone.net.pos_embed" in report["loaded"]

    final = f"train.init_checkpoint={tmp_path}/output/model_final.pth"
    evaluated = get_config(DETECTION, [*options, final])
    evaluated.model.roi_heads.box_predictor.test_score_thresh = 0.0
    again = run(evaluated.copy(), EVALUATE)
    assert again["segm"] == pytest.approx(results["segm"], nan_ok=True)
    image = tiny_sets[1].partition(".json:")[2]
    predict_files(evaluated, [image], str(tmp_path / "demo"), 0.0)
    assert json.loads((tmp_path / "demo" / "predictions.json").read_text())


def test_a_yaml_config_takes_a_rectangle(tiny_sets):
    train_set, val_set = tiny_sets
    options = [
        *["DATASETS.TRAIN", f"('{train_set}',)", "DATASETS.TEST", f"('{val_set}',)"],
        *["INPUT.IMAGE_SIZE", "(64, 96)", "MODEL.VIT.EMBED_DIM", "32", "MODEL.VIT.DEPTH", "2"],
        *["MODEL.VIT.NUM_HEADS", "2", "MODEL.VIT.WINDOW_SIZE", "0", "MODEL.DEVICE", "cpu"],
        *["MODEL.ROI_BOX_HEAD.CONV_DIM", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"],
        *["DATALOADER.NUM_WORKERS", "0"],
    ]
    cfg = get_config("coco/mask_rcnn_crossmae_vit_b_100ep.yaml", options)
    assert list(cfg.dataloader.train.mapper.augmentations[2].crop_size) == [64, 96]
    model = instantiate(cfg.model).eval()
    attention = model.backbone.net.blocks[0].attn
    assert (len(attention.rel_pos_h), len(attention.rel_pos_w)) == (2 * 4 - 1, 2 * 6 - 1)
    sizes = batches(model)
    with torch.no_grad():
        model(next(iter(instantiate(cfg.dataloader.test))))
    assert sizes == {(64, 96)}


@pytest.mark.parametrize("size", ["[64]", "[64,128,3]", "[64,0]", "[64,96.5]", "-64"])
def test_invalid_image_sizes_are_rejected(size, tiny_overrides):
    cfg = get_config(DETECTION, [*tiny_overrides, f"dataloader.image_size={size}"])
    with pytest.raises(Exception, match="dataloader.image_size") as error:
        run(cfg, TRAIN)
    assert "\n" not in str(error.value.__context__ or error.value)
