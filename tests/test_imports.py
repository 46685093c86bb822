"""The house rules: imports run one way, and the lower rooms do without detectron2."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "crossmae_det"
FOLDERS = ("crossmae_det", "configs", "tools", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (REPO / folder).rglob("*.py"))
# Imports go from a higher rank to a lower one only. Rooms of one rank keep to themselves, but for
# the two that any of them may use.
RANKS = {"layers": 0, "utils": 0, "modeling": 1, "sampling": 1, "data": 2, "model_zoo": 4}
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py")))
COMMON = ("checkpoint", "visualization")


def imported_rooms(path):
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


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    rank = RANKS.get(room, 3)
    for path in files:
        for other in imported_rooms(path):
            below = RANKS.get(other, 3) < rank
            assert below or other == room or (rank == 3 and other in COMMON), f"{path} -> {other}"


def test_the_lower_rooms_import_without_detectron2():
    lower = ("utils", "layers", "modeling", "sampling", "pretraining")
    rooms = [room for room in lower if room in ROOMS]
    program = (
        "import sys, importlib.abc\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'detectron2': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, p=None: None if n == 'detectron2' else find(n, p)\n"
        "import pkgutil, importlib\n"
        f"for room in {rooms}:\n"
        "    module = importlib.import_module('crossmae_det.' + room)\n"
        "    for info in pkgutil.iter_modules(module.__path__, module.__name__ + '.'):\n"
        "        importlib.import_module(info.name)\n"
        "assert 'detectron2' not in sys.modules\n"
        "print('imported')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "imported\n", result.stderr


def test_importing_the_package_registers_the_backbones():
    program = (
        "import crossmae_det\n"
        "from detectron2.modeling import BACKBONE_REGISTRY\n"
        "print('build_crossmae_vit_pyramid_backbone' in BACKBONE_REGISTRY)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_files_are_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400
