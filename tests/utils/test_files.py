import pytest
import torch

from crossmae_det.checkpoint import read_checkpoint
from crossmae_det.utils import atomic_path, save_checkpoint


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
