"""``crossmae-det`` and ``python -m crossmae_det``, as a user starts them."""

import importlib
import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from tool_calls import call_tool, command

import crossmae_det
from crossmae_det import model_zoo
from crossmae_det.__main__ import (
    COMMANDS,
    STANDALONE,
    WAITING,
    CommandParser,
    main,
    set_threads,
)

TOOLS = {
    "analyze_decoder": "analyze",
    "benchmark": "benchmark",
    "compare_backbones": "compare",
    "convert_checkpoint": "convert",
    "demo": "predict",
    "knn": "knn",
    "lazyconfig_train_net": "train",
    "make_model_zoo": "zoo",
    "train_net": "train",
    "visualize_reconstruction": "reconstruct",
}


def call(capsys, *arguments):
    """Run a command in this process: (exit code, stdout, stderr)."""
    code = 0
    try:
        main(list(map(str, arguments)))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_the_list_of_commands_needs_no_library():
    everything = ("torch", "numpy", "cv2", "detectron2", "omegaconf")
    for arguments in ((), ("--help",), ("--version",)):
        done = command(*arguments, missing=everything)
        assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == f"crossmae-det {crossmae_det.__version__}\n"
    lines = command(missing=everything).stdout.splitlines()
    for name, (_, summary) in COMMANDS.items():
        assert any(line.split() == [name, *summary.split()] for line in lines)


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "crossmae_det", "--version"],
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"crossmae-det {crossmae_det.__version__}\n"
    assert not {"torch", "detectron2"} & {
        line.split("|")[-1].strip() for line in done.stderr.split("\n")
    }


def test_an_unknown_command_is_named_with_the_nearest(capsys):
    code, _, error = call(capsys, "trian")
    assert code == 2 and "'trian'" in error and "'train'" in error


@pytest.fixture(autouse=True)
def _restored_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_describes_itself(capsys, name):
    code, text, _ = call(capsys, name, "--help")
    assert code == 0 and text.startswith(f"usage: crossmae-det {name} ")
    function = getattr(
        importlib.import_module(f"crossmae_det.tools.{COMMANDS[name][0]}"), name.replace("-", "_")
    )
    assert function.__doc__.split("\n")[0] in text
    if name == "train":
        assert all(config in text for config in model_zoo.list())


@pytest.mark.parametrize("name", TOOLS)
def test_every_script_is_its_command(repo, monkeypatch, capsys, name):
    with pytest.raises(SystemExit) as stop:
        call_tool(repo, monkeypatch, name, "--help")
    script = capsys.readouterr().out
    assert stop.value.code == 0 and script.startswith(f"usage: {name}.py ")
    _, text, _ = call(capsys, TOOLS[name], "--help")
    assert script.split("\n\n")[1] == text.split("\n\n")[1]  # the description


def test_there_is_a_script_for_every_tool(repo):
    others = {"install_detectron2", "setup_environment"}
    assert {path.stem for path in (repo / "tools").glob("*.py")} == {*TOOLS} | others


def test_options_and_overrides_stand_in_any_order():
    parser = CommandParser()
    parser.add_config("a config")
    parser.add_argument("--input", nargs="+")
    expected = ["train.seed=1", "model.a.b=2"]
    for words in (
        ["train.seed=1", "model.a.b=2", "--config-file", "c", "--input", "x=1.png", "y"],
        ["--config-file", "c", "--input", "x=1.png", "y", "train.seed=1", "model.a.b=2"],
        ["--input", "x=1.png", "y", "--opts", "train.seed=1", "model.a.b=2", "--config-file", "c"],
    ):
        args = parser.parse_args(words)
        assert (args.opts, args.input, args.config_file) == (expected, ["x=1.png", "y"], "c")
    args = parser.parse_args(["--config-file", "c.yaml", "SOLVER.EPOCHS", "3"])
    assert args.opts == ["SOLVER.EPOCHS", "3"]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in STANDALONE])
def test_without_detectron2_every_command_says_how_to_get_it(name):
    done = command(name, "--help", missing=["detectron2"])
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "crossmae-det install-detectron2" in line


def test_a_user_error_is_one_line(capsys):
    code, _, error = call(capsys, "train", "--config-file", "demo/mask_rcn.py")
    (line,) = error.splitlines()
    assert (
        code == 2 and line.startswith("crossmae-det train: error: ") and "demo/mask_rcnn.py" in line
    )


def test_the_zoo_lists_every_config_and_checkpoint(capsys):
    code, text, _ = call(capsys, "zoo")
    assert code == 0 and all(name in text for name in model_zoo.list())
    content = json.loads(call(capsys, "zoo", "--json")[1])
    rows = {row["config"]: row for row in content["configs"]}
    assert [*rows] == model_zoo.list()
    row = rows["coco/mask_rcnn_crossmae_vit_b_100ep.py"]
    assert 110 < row["M parameters"] < 112 and "MAE: 51.2 / 45.5" in row["AP"]
    url = model_zoo.get_checkpoint_url("pretraining/crossmae_vit_b_800ep_pred75.py")
    assert any(file["url"] == url for file in content["checkpoints"])


def test_train_evaluate_and_predict(tiny_overrides, tmp_path):
    """Two processes; then the run's own config."""
    config = ["--config-file", "coco/mask_rcnn_crossmae_vit_b_100ep.py"]
    options = [*tiny_overrides, "train.max_iter=1", "train.visualizer=null"]
    done = command("train", "--num-gpus", 2, *config, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    run = tmp_path / "output"
    (run / "inference" / "results.json").unlink()
    own = ["--config-file", run / "config.yaml"]
    done = command("evaluate", *own, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bbox" in json.loads((run / "inference" / "results.json").read_text())["results"]
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((64, 64, 3), np.uint8))
    done = command(
        *("predict", *own, "--output", "drawn", "--input", "image.png", "train.device=cpu"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "drawn" / "predictions.json").is_file()


def test_threads_wait_passively_unless_the_user_says_otherwise(monkeypatch, tmp_path):
    for name in (*WAITING, "KMP_BLOCKTIME", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    set_threads(str(tmp_path), str(tmp_path / "none"))
    assert {name: os.environ.get(name) for name in WAITING} == WAITING
    assert "OMP_NUM_THREADS" not in os.environ
    for name in WAITING:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    set_threads(str(tmp_path), str(tmp_path / "none"))
    assert os.environ["OMP_WAIT_POLICY"] == "active" and "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, None),
        ({"a/b": "max 100000"}, None),
        ({"a/b": "350000 100000"}, "3"),
        ({"a": "50000 100000", "a/b": "800000 100000"}, "1"),  # that of the group around it
        ({"": "200000 100000"}, "2"),  # in a container the own group is the root
        ({"a/b": "99900000 100000"}, None),  # more than there are
    ],
)
def test_the_threads_are_limited_like_the_control_group(limits, expected, monkeypatch, tmp_path):
    monkeypatch.setattr("crossmae_det.__main__._usable_cores", lambda: 16)
    own = tmp_path / "self"
    own.write_text("3:cpu:/x\n0::/a/b\n")
    for group, limit in limits.items():
        (tmp_path / "cgroup" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / group / "cpu.max").write_text(f"{limit}\n")
    for users in (None, "5"):
        monkeypatch.setenv("OMP_NUM_THREADS", users or "")
        if users is None:
            monkeypatch.delenv("OMP_NUM_THREADS")
        set_threads(str(tmp_path / "cgroup"), str(own))
        assert os.environ.get("OMP_NUM_THREADS") == (users or expected)
