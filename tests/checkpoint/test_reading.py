"""Where checkpoints are, their formats, and which of their tensors are the weights."""

import argparse
import functools
import http.server
import json
import sys
import threading
from argparse import Namespace

import huggingface_hub
import pytest
import safetensors.torch
import torch
from checkpoint_models import SIZES, Detector
from detectron2.utils.file_io import Detectron2Handler
from timm.models.vision_transformer import VisionTransformer
from tool_calls import call_tool

from crossmae_det.checkpoint import convert, extract_state_dict, inspect, load, read_checkpoint
from crossmae_det.checkpoint.reading import split_prefix
from crossmae_det.modeling import ViT
from crossmae_det.utils import save_checkpoint

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def assert_weights(got):
    assert got.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype


def test_files_of_torch_save(tmp_path):
    for zipped in (True, False):
        content = {"model": WEIGHTS, "iteration": 7, "args": argparse.Namespace(lr=0.1)}
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        got = read_checkpoint(tmp_path / "a.pth")
        assert_weights(got["model"])
        assert got["iteration"] == 7 and got["args"].lr == 0.1


def test_safetensors_whatever_the_suffix(tmp_path):
    for name in ("a.safetensors", "a.bin"):
        safetensors.torch.save_file(WEIGHTS, tmp_path / name)
        assert_weights(read_checkpoint(tmp_path / name))


def test_folders_of_a_file_of_shards_and_of_a_run(tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    safetensors.torch.save_file(WEIGHTS, one / "model.safetensors")
    (one / "config.json").write_text("{}")
    assert_weights(read_checkpoint(one))

    shards = tmp_path / "parts"
    shards.mkdir()
    files = {name: f"model-{name}.safetensors" for name in WEIGHTS}
    for name, file in files.items():
        safetensors.torch.save_file({name: WEIGHTS[name]}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert_weights(read_checkpoint(shards))
    safetensors.torch.save_file(WEIGHTS, shards / "model-b.safetensors")
    with pytest.raises(ValueError, match="model-b.safetensors repeats 'a'"):
        read_checkpoint(shards)
    (shards / "model-a.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lists model-a.safetensors"):
        read_checkpoint(shards)

    run = tmp_path / "run"
    for name in ("model_0000009.pth", "model_final.pth"):
        save_checkpoint({"model": WEIGHTS if "final" in name else {}}, run / name)
    with pytest.raises(ValueError, match=r"model_0000009.pth, "):
        read_checkpoint(run)
    (run / "last_checkpoint").write_text("model_final.pth")
    assert_weights(read_checkpoint(run)["model"])

    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "/", "nowhere.pth", "../a.pth"])
def test_an_invalid_last_checkpoint(tmp_path, name):
    save_checkpoint({"model": WEIGHTS}, tmp_path / "a.pth")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "last_checkpoint").write_text(name)
    with pytest.raises(FileNotFoundError, match="last_checkpoint"):
        read_checkpoint(folder)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', "no json", "[" * 100_000])
def test_an_invalid_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="index.json"):
        read_checkpoint(tmp_path)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    outside, inside = tmp_path / "a.safetensors", tmp_path / "folder"
    safetensors.torch.save_file(WEIGHTS, outside)
    inside.mkdir()
    (inside / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../a.safetensors"}}'
    )
    with pytest.raises(FileNotFoundError, match="lists a.safetensors"):
        read_checkpoint(inside)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        read_checkpoint(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:abc/a.pth", "cannot download http://127.0.0.1:abc/a.pth"),
        ("http://[::1/a.pth", r"cannot download http://\[::1/a.pth"),
        ("http://127.0.0.1/../../a.pth", r"cannot download http://127.0.0.1/../../a.pth"),
        ("s3://bucket/a.pth", r"s3://bucket/a.pth.*http://, https://, hf://"),
    ],
)
def test_invalid_addresses(address, message):
    with pytest.raises((OSError, ValueError), match=message) as error:
        read_checkpoint(address)
    assert "\n" not in str(error.value)


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path; its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_urls_are_cached(tmp_path, server, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    save_checkpoint({"model": WEIGHTS}, tmp_path / "a.pth")
    assert_weights(read_checkpoint(f"{server}/a.pth")["model"])
    (tmp_path / "a.pth").unlink()
    # As in detectron2's configs; keys are never guessed.
    assert_weights(read_checkpoint(f"{server}/a.pth?matching_heuristics=True")["model"])
    with pytest.raises(OSError, match=r"cannot download http://.*/none.pth: .*404") as error:
        read_checkpoint(f"{server}/none.pth")
    assert "\n" not in str(error.value)


def test_addresses_of_detectron2(tmp_path, server, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Detectron2Handler, "S3_DETECTRON2_PREFIX", f"{server}/zoo/")
    save_checkpoint({"model": WEIGHTS}, tmp_path / "zoo" / "a.pth")
    assert_weights(read_checkpoint("detectron2://a.pth")["model"])
    monkeypatch.setitem(sys.modules, "detectron2.utils.file_io", None)
    with pytest.raises(ValueError, match="detectron2://a.pth: .* need detectron2"):
        read_checkpoint("detectron2://a.pth")


def test_the_hub(tmp_path, monkeypatch):
    safetensors.torch.save_file(WEIGHTS, tmp_path / "model.safetensors")
    asked = []

    def one(repo, file, revision):
        asked.append((repo, file, revision))
        return str(tmp_path / file)

    def folder(repo, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        return str(tmp_path)

    listed = ["README.md", "model.safetensors", "model.pth", "deep/b.safetensors"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", folder)
    assert_weights(read_checkpoint("hf://owner/model@main/model.safetensors"))
    assert_weights(read_checkpoint("hf://owner/model"))
    assert asked == [
        ("owner/model", "model.safetensors", "main"),
        ("owner/model", None, ["model.safetensors"]),
    ]
    listed[:] = ["small.pth", "large.pth"]
    with pytest.raises(FileNotFoundError, match="hf://owner/model/FILE"):
        read_checkpoint("hf://owner/model")
    with pytest.raises(ValueError, match="is not of the form hf://owner/repository"):
        read_checkpoint("hf://owner")

    def offline(*args, **options):
        raise RuntimeError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(OSError, match="cannot download hf://owner/model/a.pth: no network$"):
        read_checkpoint("hf://owner/model/a.pth")


def test_weights_without_wrappers():
    assert_weights(extract_state_dict(WEIGHTS, "a.pth"))
    assert_weights(extract_state_dict({"model": WEIGHTS, "epoch": 3}, "a.pth"))
    assert_weights(extract_state_dict({"state_dict": WEIGHTS}, "a.pth"))
    for wrapper in ("module._orig_mod.", "_orig_mod.module.", "module.module.", "model."):
        wrapped = {f"{wrapper}{name}": tensor for name, tensor in WEIGHTS.items()}
        assert_weights(extract_state_dict(wrapped, "a.pth"))
    assert_weights(extract_state_dict({"model": "vit_base", "state_dict": WEIGHTS}, "a.pth"))
    for key in ("ema", "model_ema", "state_dict_ema"):
        assert_weights(extract_state_dict({"model": {}, key: WEIGHTS}, "a.pth", weights="ema"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "'a' is a int, not a tensor"),
        (torch.zeros(1, device="meta"), "'a' is not a plain tensor"),
        (torch.eye(2).to_sparse(), "'a' is not a plain tensor"),
        (torch.zeros(2, dtype=torch.complex64), "'a' is not a plain tensor"),
        (torch.zeros(1).expand(10**9), "'a' is larger than its data in the file"),
    ],
)
def test_entries_that_are_not_weights(value, message):
    with pytest.raises(ValueError, match=f"b.pth: {message}"):
        extract_state_dict({"model": {"a": value}}, "b.pth")
    with pytest.raises(ValueError, match="b.pth"):
        extract_state_dict({3: torch.zeros(1)}, "b.pth")


DEFAULT = ("model", "state_dict", "model_state_dict", "teacher")
AVERAGED = ("ema", "model_ema", "state_dict_ema")


def test_the_entry_that_counts(caplog):
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
    assert all(word in caplog.text for word in ("a.pth", "'model'", "model_ema"))


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


def test_dino_loads_as_it_is(tmp_path):
    content, encoder = dino()
    torch.save(content, tmp_path / "dino.pth")
    model = Detector()
    report = load(model, tmp_path / "dino.pth")
    assert torch.equal(model.backbone.net.pos_embed, encoder["pos_embed"])
    beside = {"backbone.cls_token", "backbone.norm.weight", "backbone.norm.bias"}
    assert set(report.dropped) == {*beside, "head.mlp.0.weight"}


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


def test_other_entries_are_listed(tmp_path):
    weights = ViT(**SIZES).state_dict()
    content = {"target_encoder": weights, "predictor": {"w": torch.zeros(1)}, "epoch": 3}
    path = tmp_path / "jepa.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match="target_encoder.*--prefix") as error:
        load(Detector(), path)
    assert "predictor" in str(error.value) and "\n" not in str(error.value)
    assert load(Detector(), f"{path}:target_encoder.").loaded
    with pytest.raises(ValueError, match="jepa.pth.*'target_encoder.encoder.'.*blocks"):
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
def test_a_prefix_after_the_location(location, expected):
    assert split_prefix(location) == expected


def test_a_file_with_a_colon_is_a_file(tmp_path):
    path = tmp_path / "a:b.pth"
    torch.save({"model": WEIGHTS}, path)
    assert read_checkpoint(path)["model"].keys() == WEIGHTS.keys()


def test_the_tool_takes_a_prefix(tmp_path, monkeypatch, repo):
    torch.save(dino()[0], tmp_path / "dino.pth")
    facts = tmp_path / "facts.json"
    arguments = (tmp_path / "dino.pth", "--inspect", "--prefix", "teacher.backbone.")
    call_tool(repo, monkeypatch, "convert_checkpoint", *arguments, "--json", facts)
    assert json.loads(facts.read_text())["embed_dim"] == 16
