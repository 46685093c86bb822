import os
import pickle

import pytest
import torch

from crossmae_det.checkpoint import atomic_path, read_checkpoint, save_checkpoint


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_round_trip(tmp_path):
    path = tmp_path / "sub" / "a.pth"
    save_checkpoint({"model": {"w": torch.arange(3.0)}, "iteration": 7}, path)
    data = read_checkpoint(path)
    assert data["iteration"] == 7 and data["model"]["w"].tolist() == [0, 1, 2]
    assert [p.name for p in path.parent.iterdir()] == ["a.pth"]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_told_in_one_line_and_the_old_checkpoint_is_intact(tmp_path, monkeypatch):
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


@pytest.mark.parametrize(
    "kind", ["hostile", "hostile pickle", "text", "truncated", "list", "empty"]
)
def test_anything_but_tensors_and_plain_values_is_refused(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    if kind == "hostile":
        torch.save({"model": Hostile()}, path)
    elif kind == "hostile pickle":
        path.write_bytes(pickle.dumps(Hostile()))
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "truncated":
        save_checkpoint({"model": {"w": torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "list":
        torch.save([torch.zeros(1)], path)
    else:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="a.pth") as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        read_checkpoint(tmp_path / "nowhere.pth")
