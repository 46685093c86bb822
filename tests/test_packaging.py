"""Packaging: setup.py, requirements/, and a wheel built from this tree."""

import ast
import configparser
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import crossmae_det

REPOSITORY = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# Required by other packages, not imported: see the comments in setup.py.
NOT_IMPORTED = {"setuptools", "shapely", "tensorboard", "torchvision"}
# Loggers, imported by runs that enable them.
OPTIONAL = {"mlflow", "wandb"}
# Modules whose distribution has another name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "hydra": "hydra-core",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}

BLOCKER = """
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "detectron2", "crossmae_det"}:
            raise ImportError(f"setup.py imported {name}")

sys.meta_path.insert(0, Blocker())
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


def pins(*names: str) -> list[Requirement]:
    """Every requirement in some files of requirements/."""
    lines = [
        line
        for name in names
        for line in (REPOSITORY / "requirements" / name).read_text(encoding="utf-8").splitlines()
    ]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def active(requirements: list[Requirement], python: str) -> list[tuple[str, str]]:
    """(name, version) of the pins for one Python version."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    chosen = []
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"{requirement} is not a pin"
            chosen.append((canonicalize_name(requirement.name), specifier.version))
    return chosen


@pytest.fixture
def declared(monkeypatch) -> dict[str, Requirement]:
    """install_requires of setup.py, by name."""
    captured: dict = {}
    monkeypatch.delenv("CROSSMAE_DET_OPENCV", raising=False)
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: captured.update(arguments))
    runpy.run_path("setup.py")
    requirements = [Requirement(line) for line in captured["install_requires"]]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel of this tree, built in a copy: building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("crossmae_det", "configs"):
        shutil.copytree(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    environment = dict(os.environ, CROSSMAE_DET_OPENCV="opencv-python-headless")
    subprocess.run([*command, "-w", str(folder), str(source)], check=True, env=environment)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_setup_imports_neither_torch_nor_detectron2():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == crossmae_det.__version__


def test_wheel_contains_every_config_module_and_record(wheel):
    expected = {
        f"crossmae_det/model_zoo/configs/{path.relative_to(REPOSITORY / 'configs').as_posix()}"
        for pattern in ("*.py", "*.yaml")
        for path in (REPOSITORY / "configs").rglob(pattern)
    }
    assert expected
    expected |= {
        path.relative_to(REPOSITORY).as_posix()
        for pattern in ("*.py", "py.typed", "data/*.json", "data/*.j2", "data/*.css", "data/*.js")
        for path in (REPOSITORY / "crossmae_det").rglob(pattern)
    }
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_wheel_has_the_command(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(name).decode())
    assert dict(entries["console_scripts"]) == {"crossmae-det": "crossmae_det.__main__:main"}


def test_wheel_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Metadata.from_email(wheel.read(name), validate=False)
    assert str(metadata.version) == crossmae_det.__version__
    assert "Apache-2.0" in (metadata.license, metadata.license_expression)
    assert str(metadata.requires_python) == ">=3.10"
    requirements = {requirement.name for requirement in metadata.requires_dist}
    # Built with CROSSMAE_DET_OPENCV=opencv-python-headless.
    assert "opencv-python-headless" in requirements
    assert "opencv-python" not in requirements
    # It is not on PyPI: `pip install .` would fail.
    assert "detectron2" not in requirements


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_lie_in_the_ranges_of_setup(declared, python):
    pinned = dict(active(pins("runtime.txt"), python))
    assert declared.keys() <= pinned.keys()
    for name, requirement in declared.items():
        assert requirement.specifier.contains(pinned[name]), f"{name} {pinned[name]}: {requirement}"


@pytest.mark.parametrize("python", PYTHONS)
def test_every_distribution_is_pinned_once(python):
    names = [name for name, _ in active(pins("runtime.txt", "dev.txt", "constraints.txt"), python)]
    assert sorted(names) == sorted(set(names))


def test_build_constraints_agree_with_the_runtime_pins():
    assert ("setuptools", dict(active(pins("build.txt"), "3.12"))["setuptools"]) in active(
        pins("runtime.txt"), "3.12"
    )


def imported_modules(*folders: str) -> set[str]:
    """Top-level names of every module that the sources in these folders import."""
    names = set()
    for folder in folders:
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names.add(node.module.split(".")[0])
    return names


def test_setup_declares_exactly_what_the_package_imports(declared):
    modules = imported_modules("crossmae_det", "configs", "tools") - set(sys.stdlib_module_names)
    modules -= {"crossmae_det", "detectron2", *OPTIONAL}
    modules -= {path.stem for path in (REPOSITORY / "tools").glob("*.py")}
    used = {canonicalize_name(DISTRIBUTIONS.get(module, module)) for module in modules}
    assert used - declared.keys() == set(), "imported, but not in setup.py"
    assert declared.keys() - used - NOT_IMPORTED == set(), "in setup.py, but never imported"
