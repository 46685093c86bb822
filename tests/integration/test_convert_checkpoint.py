"""The convert command, and the memory that loading a large checkpoint takes."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from crossmae_det.checkpoint import read_checkpoint
from crossmae_det.modeling import build_vit
from crossmae_det.pretraining import MAE
from crossmae_det.utils import save_checkpoint


@pytest.fixture
def convert(repo):
    def run(*arguments):
        command = [sys.executable, str(repo / "tools" / "convert_checkpoint.py")]
        return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)

    return run


@pytest.fixture
def mae(tmp_path):
    model = MAE(build_vit("tiny", img_size=32, depth=2), decoder_dim=32, decoder_depth=1)
    save_checkpoint({"model": model.state_dict()}, tmp_path / "mae.pth")
    return tmp_path / "mae.pth"


def test_inspect_and_convert(convert, mae, tmp_path):
    process = convert(mae, "--inspect", "--json", tmp_path / "info.json")
    assert process.returncode == 0, process.stderr
    assert "pretraining model of crossmae_det" in process.stdout
    info = json.loads((tmp_path / "info.json").read_text())
    assert info["embed_dim"] == 192 and info["decoder"] == "MAE"

    output, report = tmp_path / "vit.safetensors", tmp_path / "report.json"
    process = convert(mae, output, "--to", "timm", "--json", report)
    assert process.returncode == 0, process.stderr
    assert f"written to {output} (timm)" in process.stdout
    names = read_checkpoint(output)
    assert sorted(json.loads(report.read_text())["loaded"]) == sorted(names)
    assert "norm.weight" in names and "decoder.mask_token" not in names


def test_errors_are_one_line(convert, mae, tmp_path):
    (tmp_path / "text.pth").write_text("not a checkpoint")
    for arguments, message in (
        ((tmp_path / "text.pth", "--inspect"), "text.pth"),
        ((mae,), "--inspect"),
    ):
        process = convert(*arguments)
        assert process.returncode == 2
        line = process.stderr.strip().splitlines()[-1]
        assert line.startswith("convert_checkpoint.py: error: ") and message in line
        assert "Traceback" not in process.stderr


# Peak of this process's memory beyond what it had with the model built, over the file's size.
MEASURE = """
import re, sys, torch
from crossmae_det.checkpoint import load
from crossmae_det.modeling import build_vit

def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1])

with torch.device("meta"):
    model = build_vit("large")
model.to_empty(device="cpu")  # takes no memory until the weights come
before = kilobytes("VmRSS")
load(model, sys.argv[1], whole=True)
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_checkpoint_takes_little_more_memory_than_its_size(tmp_path):
    path = tmp_path / "large.pth"
    with torch.device("meta"):
        model = build_vit("large")
    # Zeros take as much space as weights.
    save_checkpoint({"model": model.to_empty(device="cpu").state_dict()}, path)
    size = path.stat().st_size
    assert size > 1.2e9
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(path)], capture_output=True, text=True
    )
    path.unlink()
    assert process.returncode == 0, process.stderr
    ratio = 1024 * int(process.stdout.split()[-1]) / size
    print(f"loading ViT-L, {size / 1e9:.2f} GB: {ratio:.2f} x its size, the model included")
    assert 0.9 < ratio <= 1.3
