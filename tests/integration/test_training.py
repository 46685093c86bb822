"""The training tools as a user starts them: kill and resume, several processes, evaluation."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.config import instantiate
from pycocotools.coco import COCO

from crossmae_det.checkpoint import read_checkpoint
from crossmae_det.engine import run
from crossmae_det.model_zoo import get_config
from crossmae_det.utils import save_checkpoint

CONFIG = "coco/mask_rcnn_crossmae_vit_b_100ep"

# A detector whose loss is the mean over its images of a smooth function of each: only then can two
# processes equal one. So no proposals (which of them are best is a matter of rounding) and no
# random choice of anchors. The large epsilon keeps Adam from making steps of rounding errors.
PROPOSAL_NETWORK = """
from detectron2.modeling.meta_arch import ProposalNetwork
from crossmae_det.model_zoo import get_config

_cfg = get_config("{config}")
dataloader, lr_multiplier, model = _cfg.dataloader, _cfg.lr_multiplier, _cfg.model
optimizer, train = _cfg.optimizer, _cfg.train
model._target_ = ProposalNetwork
for _key in ("roi_heads", "input_format"):
    model.pop(_key)
model.backbone.net.drop_path_rate = 0.0
_rpn = model.proposal_generator
_rpn.update(batch_size_per_image=2000, positive_fraction=1.0, loss_weight=20.0)
optimizer.update(lr=0.01, eps=0.001)
lr_multiplier.warmup_iters = 0
train.max_iter = 4
train.checkpointer.period = 1
train.visualizer = None
"""


def start(repo, tool, *arguments, launcher=(), environment=None, **options):
    command = [sys.executable, *launcher, str(repo / "tools" / tool), *map(str, arguments)]
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    return subprocess.Popen(
        command,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(process):
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def weights(folder):
    return read_checkpoint(folder / "model_final.pth")["model"]


def assert_quiet(log, folder):
    """A start logs two lines about itself, and no warnings of libraries."""
    assert "Warning" not in log and "not built correctly" not in log
    starts = [line for line in log.splitlines() if "crossmae_det.engine.launch" in line]
    assert len(starts) == 2 and "torch" in starts[0] and str(folder) in starts[1]
    assert "sys.platform" in (folder / "log.txt").read_text()  # the environment


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def test_a_killed_run_resumes_to_the_same_bits(repo, tiny_overrides, tmp_path):
    options = [
        *tiny_overrides,
        "train.max_iter=8",
        "train.checkpointer.period=3",
        "train.ema.enabled=True",
        "train.visualizer=null",
        "dataloader.train.num_workers=1",
    ]
    arguments = ["--config-file", f"{CONFIG}.py"]
    log = finish(start(repo, "lazyconfig_train_net.py", *arguments, *options))
    assert_quiet(log, tmp_path / "output")

    killed = [*options, f"train.output_dir={tmp_path}/killed"]
    process = start(repo, "lazyconfig_train_net.py", *arguments, *killed, start_new_session=True)
    tag = tmp_path / "killed" / "last_checkpoint"
    while process.poll() is None and not tag.exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model_final.pth").exists()

    log = finish(start(repo, "lazyconfig_train_net.py", *arguments, "--resume", *killed))
    first = int(re.search(r"Starting training from iteration (\d+)", log)[1])
    assert first == int(re.search(r"Resumed from .*model_(\d+).pth", log)[1]) + 1 > 0
    assert_same_bits(weights(tmp_path / "output"), weights(tmp_path / "killed"))
    ema = [read_checkpoint(tmp_path / d / "model_final.pth")["ema"] for d in ("output", "killed")]
    assert_same_bits(*ema)
    metrics = [json.loads(line) for line in (tmp_path / "killed/metrics.json").open()]
    names = {name for entry in metrics for name in entry}
    assert {"ema/bbox/AP", "bbox/AP", "lr/layer_00", "lr/heads", "grad_norm"} <= names


@pytest.mark.parametrize("launcher", ["--num-gpus", "torchrun"])
def test_two_processes_train_as_one(repo, tiny_overrides, tmp_path, launcher):
    config = tmp_path / "proposal_network.py"
    config.write_text(PROPOSAL_NETWORK.format(config=f"{CONFIG}.py"))
    options = [option for option in tiny_overrides if "roi_heads" not in option]
    one = get_config(str(config), [*options, f"train.output_dir={tmp_path}/one"])
    run(one, Namespace(eval_only=False, resume=False))
    arguments = ["--config-file", config]
    if launcher == "torchrun":
        module = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        process = start(repo, "lazyconfig_train_net.py", *arguments, *options, launcher=module)
    else:
        arguments += ["--num-gpus", "2", "--dist-url", "auto"]
        process = start(repo, "lazyconfig_train_net.py", *arguments, *options)
    log = finish(process)
    assert "device cpu x 2 processes" in log
    assert_quiet(log, tmp_path / "output")
    expected, got = weights(tmp_path / "one"), weights(tmp_path / "output")
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5)
    # The last iteration alone moved them by far more than that.
    earlier = read_checkpoint(tmp_path / "one" / "model_0000002.pth")["model"]
    assert (earlier["backbone.net.pos_embed"] - got["backbone.net.pos_embed"]).abs().max() > 1e-4


def test_yaml_training_evaluation_and_inference(repo, tiny_sets, tmp_path):
    train_set, val_set = tiny_sets
    output = tmp_path / "output"
    options = [
        *["DATASETS.TRAIN", f"('{train_set}',)", "DATASETS.TEST", f"('{val_set}',)"],
        *["INPUT.IMAGE_SIZE", "64", "MODEL.VIT.EMBED_DIM", "32", "MODEL.VIT.DEPTH", "2"],
        *["MODEL.VIT.NUM_HEADS", "2", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2"],
        *["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", f"{output}"],
        *["SOLVER.GRADIENT_ACCUMULATION_STEPS", "2"],
        *["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.ROI_BOX_HEAD.CONV_DIM", "16"],
        *["MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"],
    ]
    log = finish(start(repo, "train_net.py", "--config-file", f"{CONFIG}.yaml", *options))
    assert "| segm |" in log

    options += ["MODEL.WEIGHTS", f"{output}/model_final.pth"]
    run(get_config(f"{CONFIG}.yaml", options), Namespace(eval_only=True, resume=False))
    results = json.loads((output / "inference" / "results.json").read_text())
    assert {"bbox", "segm"} == results["results"].keys()
    assert results["context"]["checkpoint"] == f"{output}/model_final.pth"
    assert results["context"]["images"] == 3

    # Inference from the run's own config, which needs neither the yaml nor the data.
    folder = tmp_path / "input"
    folder.mkdir()
    image = cv2.imread(str(min(Path(val_set.rpartition(":")[2]).iterdir())))
    cv2.imwrite(str(folder / "a.png"), image)
    video = cv2.VideoWriter(str(folder / "b.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 5, (64, 64))
    for _ in range(3):
        video.write(image)
    video.release()
    arguments = ["--config-file", output / "config.yaml", "--input", folder]
    arguments += ["--output", tmp_path / "drawn", "--score-threshold", "0.0"]
    weights_option = f"train.init_checkpoint={output}/model_final.pth"
    finish(start(repo, "demo.py", *arguments, "--opts", weights_option))
    assert cv2.imread(str(tmp_path / "drawn" / "a.png")) is not None
    capture = cv2.VideoCapture(str(tmp_path / "drawn" / "b.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    detections = COCO(str(tmp_path / "drawn" / "images.json")).loadRes(
        str(tmp_path / "drawn" / "predictions.json")
    )
    assert detections.getImgIds() == [1, 2, 3, 4]
    assert detections.dataset["annotations"]


def test_the_main_job_on_real_photographs(repo, shared_data, tmp_path):
    """The COCO config, made small, on COCO's own names: 80 images to train on, 80 to evaluate."""
    options = [
        *["dataloader.image_size=64", "dataloader.train.total_batch_size=2", "train.max_iter=2"],
        *["model.backbone.net.size=tiny", "model.backbone.net.depth=2", "train.amp.enabled=False"],
        *["model.roi_heads.box_head.conv_dims=[16]", "model.roi_heads.box_head.fc_dims=[32]"],
        *["dataloader.train.num_workers=0", f"train.output_dir={tmp_path}"],
    ]
    environment = {"DETECTRON2_DATASETS": str(shared_data)}
    arguments = ["--config-file", f"{CONFIG}.py", *options]
    log = finish(start(repo, "lazyconfig_train_net.py", *arguments, environment=environment))
    assert "images used" in log
    assert "COCO AP on 80 of the 80 images of 'coco_2017_val'" in log
    results = json.loads((tmp_path / "inference" / "results.json").read_text())["results"]
    assert len([name for name in results["segm"] if name.startswith("AP-")]) == 80


def test_the_report_of_the_initial_weights_is_saved(tiny_overrides, tiny_sets, tmp_path):
    cfg = get_config(f"{CONFIG}.py", [*tiny_overrides, "train.max_iter=1", "train.visualizer=null"])
    backbone = instantiate(cfg.model.backbone.net)
    state = dict(backbone.state_dict())
    del state["blocks.1.norm1.bias"]
    save_checkpoint({"model": state | {"blocks.1.extra": torch.ones(1)}}, tmp_path / "a.pth")
    cfg.train.init_checkpoint = str(tmp_path / "a.pth")
    allowed = dict(allow_missing=["*.norm1.bias"], allow_unexpected=["*.extra"])
    run(cfg, Namespace(eval_only=False, resume=False, **allowed))
    report = json.loads((tmp_path / "output" / "init_checkpoint.json").read_text())
    assert report["unexpected"] == ["blocks.1.extra"]
    assert "backbone.net.blocks.1.norm1.bias" in report["initialized"]
    assert "backbone.net.blocks.1.norm1.weight" in report["loaded"]


def test_averaged_weights_are_evaluated_and_used(repo, tiny_overrides, tiny_sets, tmp_path):
    options = [*tiny_overrides, "train.max_iter=2", "train.visualizer=null"]
    options += ["train.ema.enabled=True"]
    trained = run(get_config(f"{CONFIG}.py", options), Namespace(eval_only=False, resume=False))
    checkpoint = f"train.init_checkpoint={tmp_path}/output/model_final.pth"
    cfg = get_config(str(tmp_path / "output" / "config.yaml"), [checkpoint])
    again = run(cfg, Namespace(eval_only=True, resume=False))
    assert json.dumps(again) == json.dumps(trained)


def test_all_switches_together(tiny_overrides, tmp_path):
    options = [
        *["train.max_iter=3", "train.amp.enabled=True", "train.amp.dtype=bf16"],
        *["train.gradient_accumulation_steps=2"],
        *["train.ema.enabled=True", "train.clip_grad.enabled=True", "train.eval_period=2"],
        *["model.backbone.net.use_act_checkpoint=True", "model.backbone.net.freeze_blocks=1"],
    ]
    # The real backend compiles C++ for minutes; the graphs and the names are the same without it.
    options += ["train.compile.enabled=True", "train.compile.backend=aot_eager"]
    cfg = get_config(f"{CONFIG}.py", [*tiny_overrides, *options])
    results = run(cfg, Namespace(eval_only=False, resume=False))
    assert {"bbox", "segm", "ema"} == results.keys()
    folder = tmp_path / "output"
    assert {"curves.png", "predictions.png", "model_final.pth", "model_best.pth"} <= {
        path.name for path in folder.iterdir()
    }
    for name in ("curves.png", "predictions.png"):
        assert cv2.imread(str(folder / name)).std() > 10  # something is drawn
    # The frozen parts are as they were made, and the class of the best AP is known.
    metrics = [json.loads(line) for line in (folder / "metrics.json").open()]
    assert not any("lr/layer_01" in entry for entry in metrics)
    assert any("lr/layer_02" in entry for entry in metrics)
    assert read_checkpoint(folder / "model_best.pth")["metric_name"] == "segm/AP"


def test_a_box_only_set_trains_a_faster_rcnn(tiny_sets, tiny_overrides, tmp_path):
    boxes_only = []
    for spec in tiny_sets:
        json_file, _, images = spec.rpartition(":")
        content = json.loads(Path(json_file).read_text())
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        path = tmp_path / f"{os.path.basename(json_file)}"
        path.write_text(json.dumps(content))
        boxes_only.append(f"{path}:{images}")
    options = [
        *tiny_overrides,
        f"dataloader.train.dataset.names='{boxes_only[0]}'",
        f"dataloader.test.dataset.names='{boxes_only[1]}'",
        "train.max_iter=2",
    ]
    cfg = get_config(f"{CONFIG}.py", options)
    results = run(cfg, Namespace(eval_only=False, resume=False))
    assert results.keys() == {"bbox"}
    names = weights(tmp_path / "output")
    assert not any("mask_head" in name for name in names)
