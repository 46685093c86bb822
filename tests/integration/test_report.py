"""A run writes its report: at evaluations, at the end, and when it fails."""

import re
from argparse import Namespace

import pytest
from html_pages import Page

from crossmae_det.engine import run
from crossmae_det.engine.trainer import NonFiniteError
from crossmae_det.model_zoo import get_config
from crossmae_det.report import RunReport, page

CONFIG = "coco/mask_rcnn_crossmae_vit_b_100ep.py"


@pytest.fixture
def train(tiny_overrides):
    def start(*overrides, resume=False):
        options = [o for o in tiny_overrides if o != "train.report=null"]
        options += ["train.visualizer.count=1", "train.log_period=1", *overrides]
        args = Namespace(eval_only=False, resume=resume, config_file=CONFIG, opts=options)
        return run(get_config(CONFIG, options), args)

    return start


def test_a_run_writes_its_report(train, tmp_path, monkeypatch):
    written = []
    write = RunReport.write

    def spy(self, *, final):
        write(self, final=final)
        text = Page(tmp_path / "output/report.html").text
        written.append((final, text))

    monkeypatch.setattr(RunReport, "write", spy)
    train("train.max_iter=3", "train.eval_period=1")
    assert [final for final, _ in written] == [False, False, True]
    assert "still running, at iteration 1 of 3" in written[0][1]
    text = written[-1][1]
    assert "finished, 3 iterations" in text and CONFIG in text
    report = Page(tmp_path / "output/report.html")
    assert ["dataloader.image_size", "1024", "64"] in report.rows
    assert "cannot be made" not in text and "cannot be read" not in text
    assert {"#accuracy", "#errors", "#classes", "#training", "#data"} <= {
        a["href"] for a in report.having("a")
    }
    assert report.having("img")  # no detection is sure enough, but there are images
    # A resumed run that is complete keeps its recipe.
    train("train.max_iter=3", "optimizer.lr=1e-3", resume=True)
    assert ["dataloader.image_size", "1024", "64"] in Page(tmp_path / "output/report.html").rows


def test_an_evaluation_in_the_folder_of_a_run_updates_its_report(train, tmp_path):
    train("train.max_iter=1", "train.eval_period=0")
    path, own = tmp_path / "output/report.html", str(tmp_path / "output/config.yaml")
    assert "after iteration 1" in Page(path).text
    path.unlink()
    args = Namespace(eval_only=True, resume=False, config_file=own, opts=[])
    run(get_config(own, [], trained=True), args)
    assert re.search(r"with the weights of \S+\.pth", Page(path).text)


def test_the_report_of_a_run_that_failed_says_where_its_state_is(train, tmp_path):
    with pytest.raises(NonFiniteError):
        train("train.max_iter=9", "optimizer.lr=1e30", "lr_multiplier.warmup_iters=0")
    text = Page(tmp_path / "output/report.html").text
    assert "failed at iteration" in text and "output/model_before_nonfinite.pth" in text


def test_a_report_that_fails_does_not_fail_the_run(train, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("out of ink")

    monkeypatch.setattr(page, "write_run_page", fail)
    train("train.max_iter=1", "train.eval_period=0", "train.visualizer=null")
    log = (tmp_path / "output/log.txt").read_text()
    assert "RuntimeError: out of ink" in log and f"crossmae-det report {tmp_path}/output" in log
    assert (tmp_path / "output/model_final.pth").is_file()
    assert not (tmp_path / "output/report.html").exists()


def test_a_yaml_config_has_a_report():
    cfg = get_config("coco/mask_rcnn_crossmae_vit_b_100ep.yaml", [])
    assert cfg.train.report.output_dir == cfg.train.output_dir
