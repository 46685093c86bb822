import logging
import re
import warnings

import pytest

from crossmae_det.engine import launch


@pytest.fixture
def _warnings_as_before():
    handlers = logging.getLogger("py.warnings").handlers
    level = logging.getLogger("torch").level
    yield
    logging.captureWarnings(False)
    logging.getLogger("py.warnings").handlers = handlers
    logging.getLogger("torch").setLevel(level)


def say_something():
    logger = logging.getLogger("crossmae_det.engine.test")
    logger.debug("details")
    logger.info("progress")
    logging.getLogger("detectron2.data.common").info("Serializing")


def test_the_terminal_has_less_than_the_file(tmp_path, capsys):
    launch.start_log(str(tmp_path))
    say_something()
    terminal = capsys.readouterr().out
    assert "progress" in terminal and "details" not in terminal and "Serializing" not in terminal
    file = (tmp_path / "log.txt").read_text()
    assert all(word in file for word in ("progress", "details", "Serializing"))


@pytest.mark.usefixtures("_warnings_as_before")
def test_the_terminal_belongs_to_the_first_process(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch.comm, "get_rank", lambda: 1)
    launch.start_log(str(tmp_path))
    say_something()
    warnings.warn("careful", stacklevel=1)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    file = (tmp_path / "log.txt.rank1").read_text()
    assert all(word in file for word in ("progress", "details", "careful"))


def test_versions_are_one_line():
    assert re.fullmatch(r"crossmae_det \S+, torch \S+, detectron2 \S+", launch.versions())
