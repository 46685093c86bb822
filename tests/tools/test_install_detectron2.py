"""install-detectron2 without the network: a small archive stands in for the carrier."""

import base64
import csv
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.utils import parse_wheel_filename

from crossmae_det.tools import install_detectron2

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "tools" / "install_detectron2.py"

CARRIER = {
    "LabGym/__init__.py": "LICENSE = 'another'\n",
    "LabGym/detectron2/": "",
    "LabGym/detectron2/__init__.py": "from LabGym.detectron2.utils import env\nA = '0.6'\n",
    "LabGym/detectron2/utils/__init__.py": "",
    "LabGym/detectron2/utils/env.py": "import LabGym.detectron2.utils as utils\nNAME = 'naïve'\n",
    "LabGym/detectron2/model_zoo/configs/base.yaml": "_BASE_: other.yaml\n",
    "LabGym/gui.py": "import LabGym.detectron2\n",
    "labgym-3.1.2.dist-info/RECORD": "",
}


def write_carrier(path: Path, names=tuple(CARRIER), date=(2016, 1, 1, 0, 0, 0)) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name, date), CARRIER[name])
    return path


@pytest.fixture
def wheel(tmp_path) -> Path:
    return install_detectron2.build_wheel(write_carrier(tmp_path / "carrier.whl"), tmp_path)


def run(*arguments: str, pythonpath: Path | None = None) -> subprocess.CompletedProcess:
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if pythonpath is not None:
        environment["PYTHONPATH"] = str(pythonpath)
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment
    )


def test_wheel_holds_detectron2_under_its_own_name_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    assert sorted(files) == [
        "detectron2-0.6.dist-info/METADATA",
        "detectron2-0.6.dist-info/RECORD",
        "detectron2-0.6.dist-info/WHEEL",
        "detectron2-0.6.dist-info/top_level.txt",
        "detectron2/__init__.py",
        "detectron2/model_zoo/configs/base.yaml",
        "detectron2/utils/__init__.py",
        "detectron2/utils/env.py",
    ]
    assert files["detectron2/__init__.py"].startswith("from detectron2.utils import env\n")
    assert files["detectron2/utils/env.py"] == "import detectron2.utils as utils\nNAME = 'naïve'\n"
    assert not any("LabGym" in text for name, text in files.items() if "dist-info" not in name)


def test_wheel_record_lists_every_file_with_its_hash_and_size(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    rows = list(csv.reader(io.StringIO(files["detectron2-0.6.dist-info/RECORD"].decode())))
    assert sorted(name for name, _, _ in rows) == sorted(files)
    for name, digest, size in rows:
        if name.endswith("/RECORD"):
            assert (digest, size) == ("", "")
            continue
        expected = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).decode()
        assert digest == "sha256=" + expected.rstrip("=")
        assert int(size) == len(files[name])


def test_wheel_name_and_metadata_are_valid(wheel):
    name, version, _, tags = parse_wheel_filename(wheel.name)
    assert (name, str(version), [str(tag) for tag in tags]) == (
        "detectron2",
        "0.6",
        ["py3-none-any"],
    )
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read("detectron2-0.6.dist-info/METADATA")
    metadata = Metadata.from_email(data, validate=True)
    assert (metadata.name, str(metadata.version)) == ("detectron2", "0.6")
    requirements = {requirement.name: requirement for requirement in metadata.requires_dist}
    assert not requirements["setuptools"].specifier.contains("82.0.0")
    assert requirements["iopath"].specifier.contains("0.1.9")


def test_same_carrier_contents_give_the_same_bytes(tmp_path, wheel):
    again = tmp_path / "again"
    again.mkdir()
    carrier = write_carrier(again / "c.whl", tuple(reversed(CARRIER)), (2020, 2, 2, 2, 2, 2))
    assert install_detectron2.build_wheel(carrier, again).read_bytes() == wheel.read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_pip_installs_the_wheel(wheel, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
    assert (target / "detectron2/utils/env.py").is_file()
    assert (target / "detectron2-0.6.dist-info/INSTALLER").is_file()


def test_wrong_sha256_is_an_error(tmp_path):
    carrier = write_carrier(tmp_path / "carrier.whl")
    done = run("--carrier", str(carrier), "--wheel-dir", str(tmp_path / "wheels"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "carrier.whl" in line
    assert hashlib.sha256(carrier.read_bytes()).hexdigest() in line
    assert not (tmp_path / "wheels").exists()


def test_missing_carrier_is_named(tmp_path):
    done = run("--carrier", str(tmp_path / "absent.whl"), "--wheel-dir", str(tmp_path))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "absent.whl is not a file" in line


def test_existing_detectron2_is_kept_and_named():
    folder = Path(importlib.util.find_spec("detectron2").origin).parent
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.py")}
    done = run()
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "is kept" in line
    assert line.endswith(f"in {folder}")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.py")} == before


@pytest.mark.parametrize(
    ("operators", "said"),
    [
        (None, "9.9 without compiled operators,"),
        ("", "9.9 with compiled operators,"),
        ("raise ImportError('undefined symbol')", "do not load (undefined symbol),"),
    ],
)
def test_compiled_operators_of_an_existing_detectron2_are_described(tmp_path, operators, said):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2/__init__.py").write_text("print('noise')\n__version__ = '9.9'\n")
    if operators is not None:
        (tmp_path / "detectron2/_C.py").write_text(operators)
    done = run(pythonpath=tmp_path)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert "noise" not in done.stdout


def test_existing_detectron2_that_does_not_import_is_reported(tmp_path):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2/__init__.py").write_text(
        "raise RuntimeError('built for another torch')"
    )
    done = run(pythonpath=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "built for another torch" in line
    assert "pip uninstall detectron2" in line
