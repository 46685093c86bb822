"""Files that are written whole or not at all."""

import json
import stat

import cv2
import numpy as np
import pytest
import torch

from crossmae_det.checkpoint import read_checkpoint
from crossmae_det.utils import atomic_path, save_checkpoint
from crossmae_det.utils.files import write_image, write_json


def test_replaces_only_when_the_block_succeeds(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".txt"
        temporary.write_text("first")
        assert not target.exists()
    assert target.read_text() == "first"
    with pytest.raises(RuntimeError, match="stop"), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert target.read_text() == "first"
    assert list(target.parent.iterdir()) == [target]


def test_files_are_readable_by_others_as_usual(tmp_path):
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "a.json", [])
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a.json")]
    assert modes[0] == modes[1]


def test_json_takes_numpy_numbers_but_no_nan(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": np.float64(0.1), "b": np.int32(3)})
    assert json.loads(path.read_text()) == {"a": 0.1, "b": 3}
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError, match="object"):
        write_json(path, object())
    assert json.loads(path.read_text()) == {"a": 0.1, "b": 3}


def test_image_keeps_its_pixels_and_an_unknown_suffix_is_named(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    write_image(tmp_path / "a.png", image)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "a.png")), image)
    for name in ("a.xyz", "a"):
        with pytest.raises(ValueError, match=f"{name}: "):
            write_image(tmp_path / name, image)


def test_a_checkpoint_survives_the_round_trip(tmp_path):
    path = tmp_path / "sub" / "a.pth"
    save_checkpoint({"model": {"w": torch.arange(3.0)}, "iteration": 7}, path)
    data = read_checkpoint(path)
    assert data["iteration"] == 7 and data["model"]["w"].tolist() == [0, 1, 2]
    assert [p.name for p in path.parent.iterdir()] == ["a.pth"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save_checkpoint({"iteration": 1}, path)

    def full(data, file):
        file.write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write the checkpoint .*a.pth"):
        save_checkpoint({"iteration": 2}, path)
    assert read_checkpoint(path) == {"iteration": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
