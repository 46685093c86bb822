"""Files of others: what lies beside their weights, and which of their weights are taken."""

import collections
import datetime
import enum
import json
import os
import pathlib
import pickle
import types
from argparse import Namespace

import numpy as np
import pytest
import torch
from checkpoint_models import SIZES, Detector
from timm.models.vision_transformer import VisionTransformer
from tool_calls import call_tool, load_tool

from crossmae_det.checkpoint import convert, extract_state_dict, inspect, load, read_checkpoint
from crossmae_det.checkpoint.reading import split_prefix
from crossmae_det.modeling import ViT

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def defaults():
    content = collections.defaultdict(list)
    content["loss"] += [1.0, 2.0]
    return content


# Beside the weights: (what is saved, what is read).
BESIDE = {
    "numpy float": (np.float64(0.5), 0.5),
    "numpy float16": (np.float16(0.5), 0.5),
    "numpy int": (np.int64(-3), -3),
    "numpy bool": (np.bool_(True), True),
    "numpy text": (np.str_("best"), "best"),
    "numpy array": (np.arange(3, dtype=np.int32), torch.arange(3, dtype=torch.int32)),
    "path": (pathlib.PurePosixPath("/data/run 1"), "/data/run 1"),
    "native path": (pathlib.Path("a/b"), os.path.join("a", "b")),
    "windows path": (pathlib.PureWindowsPath("C:\\data"), "C:\\data"),
    "defaultdict": (defaults(), {"loss": [1.0, 2.0]}),
    "defaultdict of numbers": (collections.defaultdict(int, a=1), {"a": 1}),
    "nested defaultdict": ({"x": defaults()}, {"x": {"loss": [1.0, 2.0]}}),
    "OrderedDict": (collections.OrderedDict(a=1), {"a": 1}),
    "Counter": (collections.Counter("aab"), {"a": 2, "b": 1}),
    "deque": (collections.deque([1, 2], maxlen=5), [1, 2]),
    "set": ({3}, [3]),
    "frozenset": (frozenset({3}), [3]),
    "size": (torch.Size([2, 3]), (2, 3)),
    "namespace": (types.SimpleNamespace(lr=0.1), Namespace(lr=0.1)),
    "command line": (Namespace(lr=0.1, data=pathlib.Path("x")), Namespace(lr=0.1, data="x")),
    "date": (datetime.datetime(2024, 5, 1, 12), datetime.datetime(2024, 5, 1, 12)),
    "zoned date": (
        datetime.datetime(2024, 5, 1, tzinfo=datetime.timezone.utc),
        datetime.datetime(2024, 5, 1, tzinfo=datetime.timezone.utc),
    ),
    "duration": (datetime.timedelta(hours=3), datetime.timedelta(hours=3)),
    "bytes": (b"\x00\xff", b"\x00\xff"),
    "none and numbers": ([None, True, 1, 2.5, "x", (1, 2)], [None, True, 1, 2.5, "x", (1, 2)]),
}
WRITERS = {
    "torch": lambda content, path: torch.save(content, path),
    "old torch": lambda content, path: torch.save(
        content, path, _use_new_zipfile_serialization=False
    ),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "pickle 2": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", BESIDE)
def test_plain_values_beside_the_weights_are_read(tmp_path, kind, writer):
    saved, expected = BESIDE[kind]
    if "pickle" in writer and isinstance(saved, torch.Size):
        pytest.skip("a pickle of arrays has nothing of torch")
    weights = WEIGHTS
    if "pickle" in writer:
        weights = {name: tensor.numpy() for name, tensor in WEIGHTS.items()}
    path = tmp_path / "a.pth"
    WRITERS[writer]({"model": weights, "epoch": 3, "beside": saved}, path)
    content = read_checkpoint(path)
    got = content["beside"]
    if isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected)
    else:
        assert (list(got) if isinstance(got, set) else got) == expected
    state = extract_state_dict(content, path)
    assert all(torch.equal(state[name], WEIGHTS[name]) for name in WEIGHTS)
    # Also where the weights lie at the top of the file, as in timm's and Hugging Face's.
    WRITERS[writer]({**weights, "epoch": 3, "beside": saved}, path)
    top = extract_state_dict(read_checkpoint(path), path)
    assert set(WEIGHTS) <= set(top) <= {*WEIGHTS, "beside"}


class Mode(enum.Enum):
    BEST = 1


class Config:
    pass


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("beside", [Mode.BEST, Config(), Config, collections.defaultdict(Config)])
def test_classes_of_others_are_rejected_with_a_way_out(tmp_path, beside, writer):
    path = tmp_path / "a.pth"
    WRITERS[writer]({"model": {}, "beside": beside}, path)
    with pytest.raises(ValueError, match=r"a.pth .* asks for .*test_foreign_files.*weights_only"):
        read_checkpoint(path)


def dino(**beside):
    """A checkpoint as DINO writes it, and the encoder in it."""
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0
    )
    torch.nn.init.normal_(vit.pos_embed)
    teacher = {f"backbone.{name}": tensor for name, tensor in vit.state_dict().items()}
    teacher["head.mlp.0.weight"] = torch.zeros(4, 16)
    student = {f"module.{name}": tensor + 1 for name, tensor in teacher.items()}
    content = {"student": student, "teacher": teacher, "epoch": 3, "args": Namespace(lr=0.1)}
    return content | beside, vit.state_dict()


@pytest.mark.parametrize(
    ("prefix", "offset"),
    [
        *(("teacher.backbone.", 0), ("teacher.backbone", 0), ("backbone.", 0)),
        ("teacher.", 0),
        *(("student.backbone.", 1), ("student.module.backbone.", 1)),
    ],
)
@pytest.mark.parametrize("behind", [False, True])
def test_a_prefix_selects_a_part(tmp_path, prefix, offset, behind):
    content, encoder = dino()
    path = tmp_path / "dino.pth"
    torch.save(content, path)
    model = Detector()
    report = load(model, f"{path}:{prefix}") if behind else load(model, path, prefix=prefix)
    assert "backbone.net.blocks.0.attn.qkv.weight" in report.loaded
    for name, tensor in model.backbone.net.state_dict().items():
        if "rel_pos" not in name:
            assert torch.equal(tensor, encoder[name] + offset)
    assert inspect(f"{path}:{prefix}").class_token
    if prefix == "teacher.":
        return  # with DINO's head, of which timm knows nothing
    convert(path, tmp_path / "vit.safetensors", "timm", prefix=prefix)
    timm = read_checkpoint(tmp_path / "vit.safetensors")
    assert all(torch.equal(timm[name], encoder[name] + offset) for name in encoder)


def test_dino_loads_as_it_is(tmp_path):
    content, encoder = dino()
    torch.save(content, tmp_path / "dino.pth")
    model = Detector()
    report = load(model, tmp_path / "dino.pth")
    assert torch.equal(model.backbone.net.pos_embed, encoder["pos_embed"])
    beside = {"backbone.cls_token", "backbone.norm.weight", "backbone.norm.bias"}
    assert set(report.dropped) == {*beside, "head.mlp.0.weight"}


def test_which_of_several_weights_is_taken(caplog):
    entries = {name: {"w": torch.full((1,), float(i))} for i, name in enumerate(DEFAULT + AVERAGED)}
    for first in range(len(DEFAULT)):
        content = {name: entries[name] for name in (*reversed(DEFAULT[first:]), *AVERAGED)}
        assert extract_state_dict(content, "a.pth")["w"] == first
    for first, name in enumerate(AVERAGED):
        content = {n: entries[n] for n in ("model", *reversed(AVERAGED[first:]))}
        ema = extract_state_dict(content, "a.pth", weights="ema")
        assert ema["w"] == entries[name]["w"]
        assert extract_state_dict(content, "a.pth", prefix=name)["w"] == entries[name]["w"]
    with caplog.at_level("INFO", "crossmae_det"):
        extract_state_dict({"model": entries["model"], "model_ema": entries["model_ema"]}, "a.pth")
    assert "a.pth: the weights are those under 'model'" in caplog.text
    assert "model_ema" in caplog.text


DEFAULT = ("model", "state_dict", "model_state_dict", "teacher")
AVERAGED = ("ema", "model_ema", "state_dict_ema")


def test_weights_under_other_names_are_listed_with_the_way_out(tmp_path):
    weights = ViT(**SIZES).state_dict()
    content = {"target_encoder": weights, "predictor": {"w": torch.zeros(1)}, "epoch": 3}
    path = tmp_path / "jepa.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match="target_encoder.*--prefix") as error:
        load(Detector(), path)
    assert "predictor" in str(error.value) and "\n" not in str(error.value)
    assert load(Detector(), f"{path}:target_encoder.").loaded
    with pytest.raises(ValueError, match="nothing below .*encoder.'; names begin with .*blocks"):
        load(Detector(), f"{path}:target_encoder.encoder.", prefix="")
    with pytest.raises(ValueError, match="jepa.pth"):
        load(Detector(), path, prefix="nowhere.")


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("a.pth", ("a.pth", "")),
        ("a.pth:teacher.", ("a.pth", "teacher.")),
        ("/x/y.pth:student.backbone", ("/x/y.pth", "student.backbone")),
        ("https://host:80/a.pth", ("https://host:80/a.pth", "")),
        ("https://host:80/a.pth:model.", ("https://host:80/a.pth", "model.")),
        ("http://host:80", ("http://host:80", "")),
        ("hf://owner/name@main:teacher.", ("hf://owner/name@main", "teacher.")),
        ("detectron2://a/b.pkl", ("detectron2://a/b.pkl", "")),
        ("C:\\a.pth", ("C:\\a.pth", "")),
        ("C:/a.pth", ("C:/a.pth", "")),
    ],
)
def test_a_part_is_named_behind_the_file(location, expected):
    assert split_prefix(location) == expected


def test_a_file_with_a_colon_is_a_file(tmp_path):
    path = tmp_path / "a:b.pth"
    torch.save({"model": WEIGHTS}, path)
    assert read_checkpoint(path)["model"].keys() == WEIGHTS.keys()


def test_the_tool_takes_a_prefix(tmp_path, monkeypatch, repo):
    torch.save(dino()[0], tmp_path / "dino.pth")
    facts = tmp_path / "facts.json"
    arguments = (tmp_path / "dino.pth", "--inspect", "--prefix", "teacher.backbone.")
    main = load_tool(repo, "convert_checkpoint").main
    call_tool(main, monkeypatch, "convert_checkpoint", *arguments, "--json", facts)
    assert json.loads(facts.read_text())["embed_dim"] == 16
