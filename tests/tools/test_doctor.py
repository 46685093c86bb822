"""``crossmae-det doctor``: the report, and what it says about an incomplete environment."""

import json

import pytest
from tool_calls import command

import crossmae_det
from crossmae_det.layers import attention_backends
from crossmae_det.tools import doctor as doctor_module


@pytest.fixture
def doctor(tmp_path):
    def call(*arguments, **options):
        done = command("doctor", "--json", *arguments, cwd=tmp_path, **options)
        assert "Traceback" not in done.stderr
        return done.returncode, json.loads(done.stdout)

    return call


def test_the_report_of_a_complete_environment(doctor, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    (tmp_path / "sets" / "imagenet" / "train").mkdir(parents=True)
    code, report = doctor()
    assert code == 0 and report["Problems"] == {}
    versions = report["Versions"]
    assert versions["crossmae_det"].startswith(crossmae_det.__version__)
    assert versions["detectron2"].startswith("0.6") and versions["torch"]
    assert report["CPU and threads"]["torch threads"].startswith("1 ")
    assert report["Chosen automatically"]["device"] == "cpu"
    assert report["Chosen automatically"]["global block, training"].startswith("chunked")
    assert report["Datasets"]["found"] == "imagenet_train"
    assert str(tmp_path / "sets") in report["Free disk space"]["datasets"]


def test_every_attention_backend_is_explained():
    assert {"auto", *doctor_module.REASONS} == {*attention_backends.BACKENDS}


def test_without_detectron2(doctor):
    code, report = doctor(missing=["detectron2"])
    assert code == 1
    assert any("crossmae-det install-detectron2" in text for text in report["Problems"].values())
    assert report["Chosen automatically"]["device"] == "cpu"
    assert "detectron2" in report["Datasets"]["not available"]


def test_without_torch(doctor):
    code, report = doctor(missing=["torch", "detectron2"])
    assert code == 1 and "torch" in report["GPU"]["not available"]
    assert report["CPU and threads"]["cores"] and report["Free disk space"]["output"]


def test_two_builds_of_opencv_are_a_problem(doctor, tmp_path, monkeypatch):
    info = tmp_path / "site" / "opencv_contrib_python_headless-5.0.dist-info"
    info.mkdir(parents=True)
    name = "opencv-contrib-python-headless"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 5.0\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{crossmae_det.__path__[0]}/..")
    code, report = doctor(missing=["detectron2"])
    assert code == 1
    assert any(f"{name} 5.0" in text for text in report["Problems"].values())


def test_a_broken_library_is_a_problem(doctor, tmp_path, monkeypatch):
    (tmp_path / "site" / "timm").mkdir(parents=True)
    (tmp_path / "site" / "timm" / "__init__.py").write_text("raise ImportError('another torch')")
    path = f"{tmp_path / 'site'}:{crossmae_det.__path__[0]}/.."
    monkeypatch.setenv("PYTHONPATH", path)
    code, report = doctor(missing=["detectron2"])
    assert code == 1
    assert any("timm" in text and "another torch" in text for text in report["Problems"].values())
