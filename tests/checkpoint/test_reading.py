import argparse
import collections
import functools
import http.server
import io
import json
import os
import pickle
import struct
import threading
import warnings
import zipfile

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch

from crossmae_det.checkpoint import extract_state_dict, read_checkpoint
from crossmae_det.checkpoint.safe_pickle import ADMITTED
from crossmae_det.utils import save_checkpoint

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def arrays(order="C"):
    return {name: np.array(tensor.numpy(), order=order) for name, tensor in WEIGHTS.items()}


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


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_arrays(tmp_path, protocol, order):
    content = {
        "model": collections.OrderedDict(arrays(order)),
        "__author__": "me",
        "n": np.int64(3),
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    got = read_checkpoint(tmp_path / "a.pkl")
    assert_weights(got["model"])
    assert got["__author__"] == "me" and got["n"] == 3


def test_pickles_of_arrays_in_another_order_of_bytes(tmp_path):
    content = {"a": np.arange(3, dtype=">f4"), "none": np.zeros((0, 2), np.float16)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    got = read_checkpoint(tmp_path / "a.pkl")
    assert got["a"].tolist() == [0, 1, 2] and got["none"].shape == (0, 2)


def test_safetensors_whatever_the_suffix(tmp_path):
    for name in ("a.safetensors", "a.bin"):
        safetensors.torch.save_file(WEIGHTS, tmp_path / name)
        assert_weights(read_checkpoint(tmp_path / name))


def test_a_folder_with_one_checkpoint_with_parts_or_of_a_run(tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    safetensors.torch.save_file(WEIGHTS, one / "model.safetensors")
    (one / "config.json").write_text("{}")
    assert_weights(read_checkpoint(one))

    parts = tmp_path / "parts"
    parts.mkdir()
    files = {name: f"model-{name}.safetensors" for name in WEIGHTS}
    for name, file in files.items():
        safetensors.torch.save_file({name: WEIGHTS[name]}, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert_weights(read_checkpoint(parts))
    safetensors.torch.save_file(WEIGHTS, parts / "model-b.safetensors")
    with pytest.raises(ValueError, match="model-b.safetensors repeats 'a' of another part"):
        read_checkpoint(parts)
    (parts / "model-a.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lists model-a.safetensors, which is not there"):
        read_checkpoint(parts)

    run = tmp_path / "run"
    for name in ("model_0000009.pth", "model_final.pth"):
        save_checkpoint({"model": WEIGHTS if "final" in name else {}}, run / name)
    with pytest.raises(ValueError, match=r"holds 2 checkpoints \(model_0000009.pth, .*: name one"):
        read_checkpoint(run)
    (run / "last_checkpoint").write_text("model_final.pth")
    assert_weights(read_checkpoint(run)["model"])

    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "/", "nowhere.pth", "../a.pth"])
def test_a_last_checkpoint_that_is_none(tmp_path, name):
    save_checkpoint({"model": WEIGHTS}, tmp_path / "a.pth")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "last_checkpoint").write_text(name)
    with pytest.raises(FileNotFoundError, match="last_checkpoint names no file beside it"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:abc/a.pth", "cannot fetch http://127.0.0.1:abc/a.pth"),
        ("http://[::1/a.pth", r"cannot fetch http://\[::1/a.pth"),
        ("http://127.0.0.1/../../a.pth", "its path leads upwards"),
        ("s3://bucket/a.pth", "s3://bucket/a.pth: addresses begin with http://, https://, hf://"),
    ],
)
def test_addresses_that_are_none(address, message):
    with pytest.raises((OSError, ValueError), match=message) as error:
        read_checkpoint(address)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', "no json", "[" * 100_000])
def test_an_index_that_is_none(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="index.json is no index of a checkpoint in parts"):
        read_checkpoint(tmp_path)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    outside, inside = tmp_path / "a.safetensors", tmp_path / "folder"
    safetensors.torch.save_file(WEIGHTS, outside)
    inside.mkdir()
    (inside / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../a.safetensors"}}'
    )
    with pytest.raises(FileNotFoundError, match="lists a.safetensors, which is not there"):
        read_checkpoint(inside)


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path; its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_addresses_are_fetched_once(tmp_path, server, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    save_checkpoint({"model": WEIGHTS}, tmp_path / "a.pth")
    assert_weights(read_checkpoint(f"{server}/a.pth")["model"])
    (tmp_path / "a.pth").unlink()
    # As detectron2's configs write it; the names are told from the file, not guessed.
    assert_weights(read_checkpoint(f"{server}/a.pth?matching_heuristics=True")["model"])
    with pytest.raises(OSError, match=r"cannot fetch http://.*/none.pth: .*404") as error:
        read_checkpoint(f"{server}/none.pth")
    assert "\n" not in str(error.value)


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
    with pytest.raises(FileNotFoundError, match="not one checkpoint at its top: name the file"):
        read_checkpoint("hf://owner/model")
    with pytest.raises(ValueError, match="is not of the form hf://owner/repository"):
        read_checkpoint("hf://owner")

    def offline(*args, **options):
        raise RuntimeError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(OSError, match="cannot fetch hf://owner/model/a.pth: no network$"):
        read_checkpoint("hf://owner/model/a.pth")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def archive(path, content, **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in content.items():
            file.writestr(name, data)


def saved(content, **options):
    data = io.BytesIO()
    torch.save(content, data, **options)
    return data.getvalue()


def rewritten(data, change):
    """An archive of torch.save with its pickle changed and its checksums right."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        for name in source.namelist():
            part = source.read(name)
            file.writestr(name, change(part) if name.endswith("data.pkl") else part)
    return target.getvalue()


def doubled(data):
    """An archive of torch.save that has its first numbers twice."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(target, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, about just that
        for name in source.namelist():
            file.writestr(name, source.read(name))
            if name.endswith("/data/0"):
                file.writestr(name, bytes(len(source.read(name))))
    return target.getvalue()


def hostile_files():
    """Name -> bytes."""
    good = saved({"model": WEIGHTS})
    call = pickle.dumps(Hostile())
    # What a pickle is made of: a name, an argument, a call.
    nested = b"\x80\x02cbuiltins\ngetattr\ncposix\nX\x06\x00\x00\x00system\x86R."
    array = pickle.dumps({"model": arrays()})
    empty = io.BytesIO()
    with zipfile.ZipFile(empty, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", bytes(10**7))
    flipped = bytearray(good)
    flipped[good.index(WEIGHTS["a"].numpy().tobytes())] ^= 1
    return {
        "call": call,
        "call in a dict": pickle.dumps({"model": {"a": Hostile()}}),
        "call in torch.save": saved({"model": Hostile()}),
        "call in old torch.save": saved({"model": Hostile()}, _use_new_zipfile_serialization=False),
        "call in place of torch's pickle": rewritten(
            good, lambda _: pickle.dumps(Hostile(), protocol=2)
        ),
        "nested name": nested,
        "nested name in torch.save": rewritten(good, lambda _: nested),
        "eval": b'c__builtin__\neval\n(S\'__import__("os").system("touch executed")\'\ntR.',
        "persistent object": b"\x80\x02X\x01\x00\x00\x00xQ.",
        "extension": b"\x80\x02\x82\x01.",
        "state of a class": b"\x80\x02cnumpy\nndarray\nN}X\x06\x00\x00\x00tensorK\x01s\x86b.",
        "array of objects": pickle.dumps({"a": np.array([Hostile()], dtype=object)}),
        "array without numbers": b"\x80\x02}X\x01\x00\x00\x00acnumpy\nndarray\n)\x81s.",
        "array of any shape": array.replace(b"K\x02K\x03\x86", b"J\xff\xff\xff\x7fK\x03\x86"),
        "memo of any size": b"\x80\x02}r\xff\xff\xff\xff" + b"X\x01\x00\x00\x00ah\x01s.",
        "bytes of any size": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"a.",
        "frame of any size": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
        "key of endless hash": b"\x80\x02})" + b"2\x86" * 45 + b"Ns.",
        "key of endless hash in torch.save": rewritten(
            good, lambda _: b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 45 + b"}h\x00Ns."
        ),
        "key of endless depth": b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
        "key of endless depth in torch.save": rewritten(
            good, lambda _: b"\x80\x02})" + b"\x85" * 300_000 + b"Ns."
        ),
        "bytearray of any size": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        "two parts of one name": doubled(good),
        "name in two lines": saved({"model": {"a\n\x1b[31mred": torch.zeros(1)}}),
        "pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "list": saved([torch.zeros(1)]),
        "number": pickle.dumps(3),
        "text": b"not a checkpoint",
        "nothing": b"",
        "zip bomb": empty.getvalue(),
        "zip with nothing in it": b"PK\x05\x06" + bytes(18),
        "zip with other things in it": rewritten(good, lambda _: b"no pickle"),
        "truncated": good[: len(good) // 2],
        "truncated pickle": array[: len(array) // 2],
        "flipped": bytes(flipped),
        "safetensors header of any size": struct.pack("<Q", 2**60) + b"{}",
        "safetensors cut": safetensors.torch.save(WEIGHTS)[:-1],
    }


@pytest.mark.parametrize("kind", hostile_files())
def test_hostile_and_damaged_files_are_refused_in_one_line_and_nothing_runs(
    tmp_path, kind, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    path.write_bytes(hostile_files()[kind])
    with pytest.raises(ValueError, match="a.pth") as error:
        extract_state_dict(read_checkpoint(path), path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert os.listdir(tmp_path) == ["a.pth"]


def test_the_hostile_files_are_hostile(tmp_path, monkeypatch):
    """Read as they ask to be, they do what the test above says that they do not."""
    monkeypatch.chdir(tmp_path)
    for kind in ("call", "call in a dict", "eval"):
        pickle.loads(hostile_files()[kind])
        os.remove("executed")
    torch.load(io.BytesIO(hostile_files()["call in torch.save"]), weights_only=False)
    os.remove("executed")
    damaged = torch.load(io.BytesIO(hostile_files()["flipped"]), weights_only=True)
    assert not torch.equal(damaged["model"]["a"], WEIGHTS["a"])


def test_what_pickles_may_name_calls_nothing_of_a_library():
    modules = {stand_in.__module__ for stand_in in ADMITTED.values()}
    assert modules == {"crossmae_det.checkpoint.safe_pickle"}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        read_checkpoint(tmp_path / "nowhere.pth")


def test_the_weights_of_a_file():
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
        (3, "entry 'a' is a int, not a tensor"),
        (torch.zeros(1, device="meta"), "'a' is not a plain tensor"),
        (torch.eye(2).to_sparse(), "'a' is not a plain tensor"),
        (torch.zeros(2, dtype=torch.complex64), "'a' is not a plain tensor"),
        (torch.zeros(1).expand(10**9), "'a' is larger than what the file holds of it"),
    ],
)
def test_what_is_no_weight(value, message):
    with pytest.raises(ValueError, match=f"b.pth: {message}"):
        extract_state_dict({"model": {"a": value}}, "b.pth")
    with pytest.raises(ValueError, match="one of its entries has a name"):
        extract_state_dict({3: torch.zeros(1)}, "b.pth")
