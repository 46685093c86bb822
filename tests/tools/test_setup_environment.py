"""The decisions of tools/setup_environment.py, with pip and the imports replaced."""

import importlib.util
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PINNED = {"torch": "2.14.1", "torchvision": "0.29.1"}
MINIMUM = {"torch": "2.7", "torchvision": "0.22"}
LIBGL = "ImportError: libGL.so.1: cannot open shared object file: No such file or directory"


@pytest.fixture(scope="module")
def tool():
    path = REPOSITORY / "tools" / "setup_environment.py"
    spec = importlib.util.spec_from_file_location("setup_environment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Machine:
    """An environment with one OpenCV, on a machine where only ``importable`` builds import."""

    def __init__(self, *importable: str):
        self.importable = importable
        self.installed: str | None = None
        self.calls: list[tuple[str, ...]] = []

    def fit(self, tool, build: str) -> str:
        self.installed = build
        return tool.fit_opencv(build, "5.0.0.93", self.import_error, self.pip)

    def import_error(self) -> str | None:
        assert self.installed is not None
        return None if self.installed in self.importable else LIBGL

    def pip(self, *arguments: str) -> None:
        self.calls.append(arguments)
        self.installed = arguments[1].split("==")[0] if arguments[0] == "install" else None


@pytest.mark.parametrize("build", ["opencv-python", "opencv-contrib-python-headless"])
def test_an_opencv_that_imports_stays(tool, build, capsys):
    machine = Machine(build)
    assert machine.fit(tool, build) == build
    assert machine.calls == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("build", ["opencv-python", "opencv-contrib-python"])
def test_without_libgl_the_headless_build_takes_its_place(tool, build, capsys):
    machine = Machine(f"{build}-headless")
    assert machine.fit(tool, build) == f"{build}-headless"
    # Uninstalled first: the two write the same files.
    assert machine.calls == [
        ("uninstall", "--yes", build),
        ("install", f"{build}-headless==5.0.0.93"),
    ]
    (line,) = capsys.readouterr().out.splitlines()
    assert "libGL.so.1" in line and f"{build}-headless" in line


def test_an_opencv_that_never_imports_is_reported(tool):
    for build in ("opencv-python", "opencv-python-headless"):
        with pytest.raises(tool.SetupError, match="headless 5.0.0.93 cannot be imported.*libGL"):
            Machine().fit(tool, build)


@pytest.mark.parametrize(
    ("installed", "kept"),
    [
        ({}, set()),
        (PINNED, set()),
        ({"torch": "2.14.1"}, set()),  # a setup that was interrupted
        ({"torch": "2.7.0+cu128", "torchvision": "0.22.0+cu128"}, {"torch", "torchvision"}),
        ({"torch": "2.14.1+cpu", "torchvision": "0.29.1+cpu"}, {"torch", "torchvision"}),
        ({"torch": "2.14.1", "torchvision": "0.29.1+cpu"}, {"torch", "torchvision"}),
    ],
)
def test_a_users_own_torch_is_kept_with_its_torchvision(tool, installed, kept):
    assert tool.torch_to_keep(installed, PINNED, MINIMUM) == kept


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({"torch": "2.6.0", "torchvision": "0.21.0"}, "torch 2.6.0 .* older than 2.7"),
        ({"torch": "2.7.0", "torchvision": "0.9.1"}, "torchvision 0.9.1 .* older than 0.22"),
        ({"torch": "2.9.0+cpu"}, r"torch 2.9.0\+cpu but no torchvision"),
        ({"torchvision": "0.23.0"}, "torchvision 0.23.0 but no torch:"),
    ],
)
def test_an_unsuitable_torch_is_an_error(tool, installed, message):
    with pytest.raises(tool.SetupError, match=message) as caught:
        tool.torch_to_keep(installed, PINNED, MINIMUM)
    assert "\n" not in str(caught.value)


def test_lines_of_kept_distributions_are_left_out(tool):
    lines = [
        "torch==2.14.1",
        "torchvision==0.29.1",
        "opencv_python==5.0",
        'numpy==2; python_version >= "3"',
    ]
    assert tool.without(lines, {"torch", "opencv-python"}) == [lines[1], lines[3]]
    assert tool.without(lines, set()) == lines


def test_a_python_outside_a_virtual_environment_is_an_error(tool, monkeypatch):
    monkeypatch.setattr(tool.sys, "prefix", tool.sys.base_prefix)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    with pytest.raises(tool.SetupError, match="make setup"):
        tool.set_up()


def test_pinned_and_minimum_versions_of_torch_are_read_from_the_project(tool):
    pinned, minimum = tool.pinned_torch(), tool.minimum_torch()
    assert pinned.keys() == minimum.keys() == {"torch", "torchvision"}
    assert all(tool.release(minimum[name]) <= tool.release(pinned[name]) for name in pinned)
    assert tool.release(minimum["torch"]) == (2, 7)
