"""Files that hold more than tensors: plain values are read, and nothing is executed."""

import collections
import datetime
import enum
import io
import os
import pathlib
import pickle
import struct
import types
import warnings
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import safetensors.torch
import torch

from crossmae_det.checkpoint import extract_state_dict, read_checkpoint
from crossmae_det.checkpoint.safe_pickle import ADMITTED

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def arrays(order="C"):
    return {name: np.array(tensor.numpy(), order=order) for name, tensor in WEIGHTS.items()}


def assert_weights(got):
    assert got.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype


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


def test_pickled_arrays_of_another_byte_order(tmp_path):
    content = {"a": np.arange(3, dtype=">f4"), "none": np.zeros((0, 2), np.float16)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    got = read_checkpoint(tmp_path / "a.pkl")
    assert got["a"].tolist() == [0, 1, 2] and got["none"].shape == (0, 2)


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
def test_other_classes_are_rejected(tmp_path, beside, writer):
    path = tmp_path / "a.pth"
    WRITERS[writer]({"model": {}, "beside": beside}, path)
    with pytest.raises(ValueError, match=r"a.pth .*test_safe_pickle.*weights_only"):
        read_checkpoint(path)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


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
def test_hostile_files_are_rejected_in_one_line_and_nothing_runs(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    path.write_bytes(hostile_files()[kind])
    with pytest.raises(ValueError, match="a.pth") as error:
        extract_state_dict(read_checkpoint(path), path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert os.listdir(tmp_path) == ["a.pth"]


def test_the_hostile_files_are_hostile(tmp_path, monkeypatch):
    """The plain readers do execute or accept them."""
    monkeypatch.chdir(tmp_path)
    for kind in ("call", "call in a dict", "eval"):
        pickle.loads(hostile_files()[kind])
        os.remove("executed")
    torch.load(io.BytesIO(hostile_files()["call in torch.save"]), weights_only=False)
    os.remove("executed")
    damaged = torch.load(io.BytesIO(hostile_files()["flipped"]), weights_only=True)
    assert not torch.equal(damaged["model"]["a"], WEIGHTS["a"])


def test_pickles_call_nothing_outside_the_module():
    modules = {stand_in.__module__ for stand_in in ADMITTED.values()}
    assert modules == {"crossmae_det.checkpoint.safe_pickle"}
