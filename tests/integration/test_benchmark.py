"""The commands that measure. Nothing here depends on how long anything took."""

import json
import os
import subprocess
import sys
from functools import partial

import cv2
import numpy as np
import pytest
from tool_calls import call_tool, command

from crossmae_det.__main__ import main
from crossmae_det.benchmark.report import JSON_VERSION

MAE = "pretraining/mae_vit_b_800ep.py"
CROSSMAE = "pretraining/crossmae_vit_b_800ep.py"
TINY = [
    "--opts",
    "dataloader.image_size=32",
    "model.encoder.embed_dim=24",
    "model.encoder.depth=2",
    "model.encoder.num_heads=2",
    "model.decoder_dim=16",
    "model.decoder_depth=2",
    "model.decoder_num_heads=2",
]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        cv2.imwrite(str(folder / f"{index}.jpg"), rng.integers(0, 256, (40, 50, 3), np.uint8))
    return folder


@pytest.fixture
def run_benchmark(repo, monkeypatch):
    """Run the tool in this process."""
    return partial(call_tool, repo, monkeypatch, "benchmark")


@pytest.fixture
def error(run_benchmark, capsys):
    """Run the tool on invalid input; its last line on standard error."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            run_benchmark(*arguments)
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert captured.out == "" and "Traceback" not in captured.err
        return captured.err.strip().splitlines()[-1]

    return call


def test_everything_in_one_command(repo, tmp_path, images):
    command = [
        *(sys.executable, "tools/benchmark.py", "--pretraining", MAE, CROSSMAE, "--step"),
        *("--data", images, "--batch-size", 2, "--repeats", 2, "--device", "cpu"),
        *("--json", tmp_path / "results.json", "--markdown", tmp_path / "table.md", *TINY),
    ]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=repo,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["command"].startswith("python tools/benchmark.py --pretraining")
    assert results["environment"]["device"] == "cpu"
    mae, crossmae = results["pretraining"]
    assert (mae["name"], crossmae["name"]) == ("mae_vit_b_800ep", "crossmae_vit_b_800ep")
    assert crossmae["ratio_to_MAE"]["total_flops"] == (crossmae["total_flops"] / mae["total_flops"])
    step = results["step"]
    assert (step["batch_size"], step["precision"]) == (2, "fp32")
    assert [s["name"] for s in step["steps"]] == ["mae_vit_b_800ep", "crossmae_vit_b_800ep"]
    for case in step["steps"]:
        assert len(case["seconds"]) == len(case["gemm_rates"]) == 2
        assert case["failure"] == "" and case["peak_bytes"] > 0
    assert results["data"]["images"] == 3 and results["data"]["image_size"] == 224
    assert results["data"]["ratio"]["low"] > 0

    markdown = (tmp_path / "table.md").read_text()
    for text in (done.stdout, markdown):
        assert "GFLOP/s" in text and "images/s" in text and str(images) in text
        assert results["environment"]["CPU"] in text and results["command"] in text
    assert "| crossmae_vit_b_800ep " in markdown


def test_flops_of_vit_base_are_those_of_the_paper(run_benchmark, tmp_path):
    crossmae_75 = CROSSMAE.replace(".py", "_pred75.py")
    run_benchmark("--pretraining", MAE, CROSSMAE, crossmae_75, "--json", tmp_path / "results.json")
    costs = json.loads((tmp_path / "results.json").read_text())["pretraining"]
    # The paper: about 10 GFLOPs against 4.1.
    decoders = [round(cost["decoder_flops"] / 1e9, 1) for cost in costs]
    assert decoders == [10.7, 4.1, 10.5]
    assert [cost["prediction_ratio"] for cost in costs] == [0.75, 0.25, 0.75]


def test_crossmae_with_other_ratios_and_depths(run_benchmark, tmp_path):
    variations = ("--prediction-ratios", 0.25, 0.5, "--decoder-depths", 1, 12)
    file = tmp_path / "results.json"
    run_benchmark("--pretraining", MAE, CROSSMAE, *variations, "--json", file)
    mae, *costs = json.loads(file.read_text())["pretraining"]
    assert (mae["name"], mae["decoder_depth"]) == ("mae_vit_b_800ep", 8)
    found = {(c["prediction_ratio"], c["decoder_depth"]): c["decoder_flops"] for c in costs}
    assert [*found] == [(0.25, 1), (0.25, 12), (0.5, 1), (0.5, 12)]
    assert found[0.25, 1] < found[0.5, 1] < found[0.25, 12] < found[0.5, 12]
    assert costs[0]["name"] == "crossmae_vit_b_800ep prediction_ratio=0.25 decoder_depth=1"


def test_without_configs_mae_and_crossmae_of_three_sizes_are_compared(run_benchmark, capsys):
    run_benchmark("--pretraining", *TINY)
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if "_800ep" in line.split(" ")[0]]
    assert names == [
        name.format(size)
        for size in "sbl"
        for name in ("mae_vit_{}_800ep", "crossmae_vit_{}_800ep", "crossmae_vit_{}_800ep_pred75")
    ]


def test_invalid_input_is_an_error_of_one_line(error, tmp_path):
    assert "--backbones" in error()
    assert "--pretraining" in error("--step", "--data", tmp_path)
    assert "--pretraining" in error("--backbones", "vit-tiny", "--decoder-depths", 4)
    line = error("--pretraining", CROSSMAE, "--prediction-ratios", 0.9)
    assert "prediction_ratio" in line and "0.9" in line
    line = error("--pretraining", "pretraining/mae_vit_b_800epochs.py")
    assert "'pretraining/mae_vit_b_800epochs" in line and f"'{MAE}'" in line
    line = error("--pretraining", MAE, "--opts", "model.prediction_ratio=0.5")
    assert "'model.prediction_ratio'" in line
    assert "abacus" in error("--pretraining", MAE, "--device", "abacus")
    assert str(tmp_path) in error("--data", tmp_path)
    assert "nowhere" in error("--data", "nowhere")
    (tmp_path / "0.jpg").write_bytes(b"no image")
    assert "0.jpg" in error("--data", tmp_path)


def test_a_missing_gpu_is_an_error(error, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "GPU" in error("--pretraining", MAE, "--device", "cuda")


@pytest.mark.parametrize("flag, name", [("--batch-size", "batch size"), ("--repeats", "repeats")])
def test_numbers_that_must_be_positive(error, flag, name):
    line = error("--pretraining", MAE, "--step", "--device", "cpu", flag, 0, *TINY)
    assert f"{name} must be at least 1, got 0" in line


def test_backbones_in_one_command(repo, tmp_path):
    """In a process of its own: the cases start others."""
    command = [
        *(sys.executable, "tools/benchmark.py", "--backbones", "detectron2-vit-tiny", "vit-tiny"),
        *("--image-sizes", "64", "--repeats", "1", "--device", "cpu", "--train"),
        *("--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv"),
        *("--plots", tmp_path / "plots"),
    ]
    process = subprocess.run(list(map(str, command)), cwd=repo, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "a.json").read_text())
    detectron2, ours = results["backbones"]
    assert ours["parameters"] == detectron2["parameters"]
    assert (
        ours["flops"] < detectron2["flops"]
    )  # 4 x 4 patches: nothing is projected for the padding
    assert set(ours["flops_by_part"]) == {"windowed_blocks", "global_blocks", "patch_embedding"}
    assert ours["median_seconds"] > 0 and ours["peak_bytes"] > 0 and not ours["failure"]
    assert "time x detectron2-vit-tiny" in process.stdout
    assert "section,backbone,pixels" in (tmp_path / "a.csv").read_text()
    assert {path.name for path in (tmp_path / "plots").iterdir()} >= {"latency.png", "latency.svg"}


def test_everything_on_a_gpu_in_small_on_a_cpu(tmp_path):
    groups = ["parity", "backbones-tiny"]
    done = command(
        *("benchmark-gpu", "--device", "cpu", "--minutes", "30", "--output", tmp_path / "gpu"),
        *("--groups", *groups),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu" / "benchmark_gpu.json").read_text())
    assert results["command"].startswith("crossmae-det benchmark-gpu --device cpu")
    assert set(results) == {"version", "command", "environment", *groups}
    assert all(record["failure"] == "" for group in groups for record in results[group])
    for record in results["parity"]:
        assert 0 < record["gradient_mean"] < 0.05
    first, *others = (each for each in results["backbones-tiny"] if each["mode"] == "step")
    assert first["case"] == "detectron2-vit-tiny" and "speed_ratio" not in first
    assert [each["case"] for each in others] == [f"vit-tiny{at}" for at in ("", "@sdpa", "@eager")]
    assert all(each["speed_ratio"]["low"] > 0 for each in others)
    names = {path.name for path in (tmp_path / "gpu").iterdir()}
    assert names >= {"benchmark_gpu.md", "backbones-tiny.png", "backbones-tiny.svg"}
    assert "backbones-tiny: vit-tiny step: median ms" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "abacus"), ("abacus",)),
        (("--device", "cpu", "--minutes", "0.1"), ("--minutes 0.1", "at least 1")),
        (("--device", "cpu", "--groups", "parity", "all"), ("'all'", "pretraining-s")),
        ((), ("GPU",)),
    ],
)
def test_invalid_options_of_the_gpu_benchmark(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(["benchmark-gpu", *arguments, "--output", str(tmp_path / "gpu")])
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words)
    assert not (tmp_path / "gpu").exists()


def test_invalid_backbones_are_an_error_of_one_line(error, tmp_path):
    sizes = ("--image-sizes", "64")
    assert "'vit-base'" in error("--backbones", "vit-bas", *sizes)
    assert "multiple of 32" in error("--backbones", "vit-tiny", "--image-sizes", "100")
    for name, version in (("old.json", 0), ("new.json", JSON_VERSION)):
        (tmp_path / name).write_text(json.dumps({"version": version, "backbones": []}))
    earlier = ("--backbones", "vit-tiny", *sizes, "--against")
    assert "old.json" in error(*earlier, tmp_path / "old.json")
    assert "no backbone in common" in error(*earlier, tmp_path / "new.json")
    assert "--opts" in error("--backbones", "vit-tiny", "--opts", "train.seed=1")
    config = "coco/mask_rcnn_crossmae_vit_s_100ep.py"
    line = error("--backbones", config, "--opts", "model.backbone.net.windows=7")
    assert "'model.backbone.net.windows'" in line
    assert "at least two image sizes" in error("--growth", "tiny", "--device", "cpu", *sizes)
    assert "--growth" in error("--growth", "tiny", "--data", tmp_path)
    assert "--batch-sizes" in error("--growth", "tiny", "--batch-sizes", 1, 2)
    assert "--device" in error("--backbones", "vit-tiny", "--device", "meta")
