from argparse import Namespace

import pytest
from omegaconf import OmegaConf
from shorthand import one_line

from crossmae_det.engine.launch import check_folder, claim_folder, find_run

RUN = ["last_checkpoint", "model_0000099.pth", "model_best.pth", "metrics.json"]
OWN = ["weights.pth", "model_of_mine.pth", "photo.jpg", "config.yaml", "log.txt"]


@pytest.fixture
def folder(tmp_path):
    """Makes files in the folder of a run; gives its config and what is in it."""

    def make(*names, init_checkpoint=""):
        for name in names:
            path = tmp_path / "output" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        return OmegaConf.create(
            {
                "train": {
                    "output_dir": str(tmp_path / "output"),
                    "init_checkpoint": init_checkpoint,
                }
            }
        )

    def content():
        return {
            str(path.relative_to(tmp_path / "output"))
            for path in (tmp_path / "output").rglob("*")
            if path.is_file()
        }

    return make, content


def arguments(**given):
    return Namespace(**({"eval_only": False, "resume": False, "overwrite": False} | given))


@pytest.mark.parametrize("name", [*RUN, "model_final.pth", "model_before_nonfinite.pth"])
def test_a_folder_with_a_run_is_rejected_in_one_line(folder, name):
    make, content = folder
    cfg = make(name, "photo.jpg")
    with pytest.raises(ValueError) as error:
        claim_folder(cfg, arguments())
    message = one_line(error)
    assert name in message and "--resume" in message and "--overwrite" in message
    assert content() == {name, "photo.jpg"}
    make("last_checkpoint")
    for accepted in ({"eval_only": True}, {"resume": True}):
        assert claim_folder(cfg, arguments(**accepted)) == []
    assert content() == {name, "photo.jpg", "last_checkpoint"}


def test_resuming_does_not_guess_the_checkpoint(folder):
    make, content = folder
    cfg = make("model_final.pth", "model_best.pth")
    with pytest.raises(ValueError) as error:
        claim_folder(cfg, arguments(resume=True))
    assert "model_final.pth" in one_line(error) and "last_checkpoint" in one_line(error)


def test_a_folder_with_files_of_the_user_only_is_not_used(folder):
    make, content = folder
    cfg = make(*OWN, "inference/mine.json")
    for overwrite in (False, True):
        assert claim_folder(cfg, arguments(overwrite=overwrite)) == []
    assert content() == {*OWN, "inference/mine.json"}


def test_a_folder_that_is_not_there_is_made(folder, tmp_path):
    make, _ = folder
    assert claim_folder(make(), arguments()) == []
    assert (tmp_path / "output").is_dir()


def test_overwrite_removes_the_run_and_nothing_else(folder, tmp_path):
    make, content = folder
    results = ["inference/results.json", "reconstructions/0000002.png", "early_stopping.json"]
    cfg = make(*OWN, *RUN, *results, "events.out.tfevents.1.host", ".model_0000199.77.pth")
    removed = claim_folder(cfg, arguments(overwrite=True))
    assert content() == set(OWN)
    assert {*RUN, "inference"} <= set(removed)
    assert find_run(tmp_path / "output") == []


def test_overwrite_does_not_remove_what_the_run_starts_from(folder, tmp_path):
    make, content = folder
    cfg = make(*RUN, init_checkpoint=str(tmp_path / "output" / "model_best.pth"))
    with pytest.raises(ValueError) as error:
        check_folder(cfg, arguments(overwrite=True))
    assert "model_best.pth" in one_line(error)
    assert content() == set(RUN)
    elsewhere = make(*RUN, init_checkpoint=str(tmp_path / "output" / "weights.pth"))
    make("weights.pth")
    claim_folder(elsewhere, arguments(overwrite=True))
    assert content() == {"weights.pth"}


def test_resume_and_overwrite_exclude_each_other(folder):
    make, _ = folder
    with pytest.raises(ValueError) as error:
        check_folder(make(), arguments(resume=True, overwrite=True))
    assert "--resume" in one_line(error) and "--overwrite" in one_line(error)
