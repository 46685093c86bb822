"""Imports run one way, and the lower packages import without detectron2."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "crossmae_det"
# A package imports from the lines above its own only.
ORDER = (
    ("utils", "layers"),
    ("modeling", "data"),
    ("checkpoint",),
    ("engine",),
    ("pretraining", "classification", "detection"),
    ("segmentation",),
    ("model_zoo",),
    ("export", "benchmark", "report"),
    ("tools",),
)
RANKS = {package: rank for rank, packages in enumerate(ORDER) for package in packages}
WITHOUT_DETECTRON2 = (
    *("utils", "layers", "modeling", "data", "checkpoint", "pretraining", "classification"),
)
PACKAGES = sorted(p.name for p in PACKAGE.iterdir() if p.is_dir() and list(p.glob("*.py")))


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("crossmae_det."):
                yield name.split(".")[1]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    assert package in RANKS, f"add {package} to ORDER"
    files = list((PACKAGE / package).rglob("*.py"))
    assert files
    for path in files:
        for other in imported_packages(path):
            if other in PACKAGES:
                below = RANKS[other] < RANKS[package]
                assert below or other == package, f"{path} -> {other}"


def test_lower_packages_import_without_detectron2():
    program = (
        "import sys, importlib.abc\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'detectron2': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, p=None: None if n == 'detectron2' else find(n, p)\n"
        "import pkgutil, importlib\n"
        f"for package in {WITHOUT_DETECTRON2}:\n"
        "    module = importlib.import_module('crossmae_det.' + package)\n"
        "    for info in pkgutil.iter_modules(module.__path__, module.__name__ + '.'):\n"
        "        importlib.import_module(info.name)\n"
        "assert 'detectron2' not in sys.modules\n"
        "print('imported')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "imported\n", result.stderr


def test_importing_the_package_registers_the_backbones_and_little_else():
    program = (
        "import sys, crossmae_det\n"
        "print([m for m in ('crossmae_det.engine', 'matplotlib') if m in sys.modules])\n"
        "from detectron2.modeling import BACKBONE_REGISTRY\n"
        "print('build_crossmae_vit_pyramid_backbone' in BACKBONE_REGISTRY)\n"
        "print(callable(crossmae_det.engine.run), hasattr(crossmae_det, 'no_such_package'))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "[]\nTrue\nTrue False\n", result.stderr
