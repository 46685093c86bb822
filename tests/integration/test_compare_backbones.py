"""The command that trains detectors from several backbones and compares them."""

import json
import os
import subprocess
import sys

from crossmae_det.engine.config import resolve, save
from crossmae_det.model_zoo import get_config
from crossmae_det.modeling import ViT
from crossmae_det.utils import save_checkpoint


def test_a_comparison_trains_from_each_backbone_and_resumes(repo, tiny_overrides, tmp_path):
    backbone = ViT(64, 16, embed_dim=32, depth=4, num_heads=2)
    save_checkpoint({"model": backbone.state_dict()}, tmp_path / "backbone.pth")
    config = "coco/mask_rcnn_crossmae_vit_b_100ep.py"
    options = [*tiny_overrides, "train.max_iter=5", "train.visualizer=null"]
    command = [
        *(sys.executable, repo / "tools" / "compare_backbones.py", "--seeds", "1"),
        *("--config-file", config),
        *("--backbones", f"given={tmp_path}/backbone.pth", "random="),
        *("--output", tmp_path / "runs"),
        *("--opts", *options),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run():
        return subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True
        )

    # One of the runs is there already, as after a stop: it is not trained again.
    done = tmp_path / "runs" / "random_seed0" / "inference"
    done.mkdir(parents=True)
    options += ["train.seed=0", f"train.output_dir={done.parent}", "train.init_checkpoint="]
    cfg = get_config(config, [*options, "train.eval_period=0"])
    save(cfg, resolve(cfg), done.parent / "config.yaml")
    content = {"results": {"bbox": {"AP": 50.0}, "segm": {"AP": 40.0}}, "context": {}}
    (done / "results.json").write_text(json.dumps(content))
    process = run()
    assert process.returncode == 2  # other metrics than those of the other runs
    content["results"] = {task: {"AP": 50.0, "AP50": 60.0} for task in ("bbox", "segm")}
    (done / "results.json").write_text(json.dumps(content))
    process = run()
    assert process.returncode == 0, process.stderr
    log = (tmp_path / "runs" / "given_seed0" / "log.txt").read_text()
    assert f"weights from {tmp_path}/backbone.pth" in log
    comparison = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert comparison["runs"]["random"] == [
        {"box AP": 50.0, "box AP50": 60.0, "mask AP": 50.0, "mask AP50": 60.0}
    ]
    lead = comparison["summary"]["given"]["box AP"] - 50
    assert comparison["summary"]["given"]["box AP lead"] == lead
    assert f"{lead:+.1f}" in process.stdout
    assert comparison["training"]["each detector"]["iterations"] == 5
