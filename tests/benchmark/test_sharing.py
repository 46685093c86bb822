"""Training steps alone and beside a busy process."""

import json
import subprocess

import pytest

from crossmae_det.__main__ import main
from crossmae_det.benchmark import sharing

TINY = [
    *("dataloader.image_size=32", "model.encoder.embed_dim=16", "model.encoder.depth=2"),
    *("model.encoder.num_heads=2", "model.encoder.patch_size=8", "model.decoder_dim=16"),
    *("model.decoder_depth=1", "model.decoder_num_heads=2", "dataloader.train.total_batch_size=4"),
]


def test_every_setting_is_timed_and_no_process_is_left(tiny_sets, tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen

    def note(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", note)
    monkeypatch.setattr(sharing, "SETTINGS", {"one thread": {"OMP_NUM_THREADS": "1"}})
    images = tiny_sets[0].rpartition(":")[2]
    overrides = [f"dataloader.train.dataset.name={images}", *TINY]
    command = ["benchmark", "--sharing", "pretraining/crossmae_vit_b_800ep.py", "--repeats", "2"]
    main([*command, "--json", str(tmp_path / "a.json"), "--opts", *overrides])
    (row,) = json.loads((tmp_path / "a.json").read_text())["sharing"]
    assert row["name"] == "one thread"
    assert row["alone"]["median"] > 0 and row["beside"]["median"] > 0
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_a_worker_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(sharing, "SETTINGS", {"one thread": {}})
    monkeypatch.setattr(sharing, "__name__", "no.such.module")
    with pytest.raises(ValueError, match="has failed"):
        sharing.measure_sharing("pretraining/crossmae_vit_b_800ep.py", [], 1)
