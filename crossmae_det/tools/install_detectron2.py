"""The command install-detectron2: install detectron2 from PyPI, without a compiler.

It imports the standard library only and runs from its file, before anything else is installed.
"""

import argparse
import base64
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CARRIER = "LabGym==3.1.2"
CARRIER_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
# The only part of the carrier that is used: detectron2's own source, Copyright Meta, Apache-2.0.
# Everything else in the carrier is under another license and never leaves the downloaded file.
SOURCE_PREFIX = "LabGym/detectron2/"
UPSTREAM = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
VERSION = "0.6"
WHEEL_NAME = f"detectron2-{VERSION}-py3-none-any.whl"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
# The requirements are those of detectron2 0.6, without the pins that its main branch has outgrown.
# setuptools 82 removed pkg_resources, which detectron2.model_zoo imports.
METADATA = f"""\
Metadata-Version: 2.1
Name: detectron2
Version: {VERSION}
Summary: FAIR's platform for object detection and segmentation (pure-Python build).
Home-page: https://github.com/facebookresearch/detectron2
Author: FAIR
License: Apache-2.0
Requires-Python: >=3.7
Requires-Dist: Pillow>=7.1
Requires-Dist: black
Requires-Dist: cloudpickle
Requires-Dist: fvcore>=0.1.5,<0.1.6
Requires-Dist: hydra-core>=1.1
Requires-Dist: iopath>=0.1.7,<0.2
Requires-Dist: matplotlib
Requires-Dist: omegaconf>=2.1,<2.4
Requires-Dist: packaging
Requires-Dist: pycocotools>=2.0.2
Requires-Dist: setuptools<82
Requires-Dist: tabulate
Requires-Dist: tensorboard
Requires-Dist: termcolor>=1.1
Requires-Dist: tqdm>4.29.0
Requires-Dist: yacs>=0.1.8

Pure-Python build of detectron2 {VERSION}, without `detectron2._C`.
Packed by crossmae_det from the PyPI distribution {CARRIER}.
"""
WHEEL_METADATA = (
    "Wheel-Version: 1.0\nGenerator: crossmae_det\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
)

# Prints version and kind. Compiled operators that were built against another torch do not load;
# detectron2 then runs without them.
PROBE = """
import importlib.util, detectron2
try:
    from detectron2 import _C
    operators = "with compiled operators"
except ImportError as error:
    operators = "without compiled operators"
    if importlib.util.find_spec("detectron2._C"):
        operators = f"with compiled operators that do not load ({error})"
print(detectron2.__version__, operators)
"""


class InstallError(Exception):
    """What stopped the installation, in one line."""


def existing_detectron2() -> str | None:
    """Version, operators and folder of the installed detectron2, or None.

    Raises:
        InstallError: it is installed and does not import.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    # In a process of its own: importing detectron2 imports torch, and may fail. Not in the user's
    # folder, where a folder `detectron2` would be imported instead.
    probe = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=sys.prefix, capture_output=True, text=True
    )
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        raise InstallError(
            f"the detectron2 in {folder} does not import ({reason}): repair it, or run"
            " `pip uninstall detectron2` and this again"
        )
    return f"{probe.stdout.strip().splitlines()[-1]}, in {folder}"


def run_pip(*arguments: str) -> int:
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check"]
    return subprocess.run([*command, *arguments[1:]]).returncode


def download_carrier(folder: Path) -> Path:
    """Download the carrier wheel into ``folder`` with pip."""
    # The wheel is py3-none-any: a fixed Python version satisfies its Requires-Python.
    any_python = ("--only-binary=:all:", "--python-version", "3.10")
    if run_pip("download", "--no-deps", *any_python, "--dest", str(folder), CARRIER):
        raise InstallError(
            f"pip could not download {CARRIER} from the package index: try again, give a downloaded"
            f" file with --carrier, or install upstream's build: {UPSTREAM}"
        )
    (path,) = folder.glob("*.whl")
    return path


def check_sha256(path: Path) -> None:
    """Raise InstallError unless ``path`` is the carrier wheel, byte for byte."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != CARRIER_SHA256:
        raise InstallError(f"{path.name} has sha256 {digest}, expected {CARRIER_SHA256}: not used")


def build_wheel(carrier: Path, folder: Path) -> Path:
    """Write detectron2's own wheel into ``folder`` from the source inside ``carrier``.

    The same carrier always gives the same bytes: entries are sorted and carry no time stamp.
    """
    target = folder / WHEEL_NAME
    record = []
    with zipfile.ZipFile(carrier) as source, zipfile.ZipFile(target, "w") as wheel:

        def add(name: str, data: bytes) -> None:
            entry = zipfile.ZipInfo(name)  # its default date is 1980-01-01
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            wheel.writestr(entry, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{name},sha256={digest},{len(data)}")

        for name in sorted(source.namelist()):
            if name.startswith(SOURCE_PREFIX) and not name.endswith("/"):
                data = source.read(name).replace(b"LabGym.detectron2", b"detectron2")
                add("detectron2/" + name.removeprefix(SOURCE_PREFIX), data)
        add(f"{DIST_INFO}/METADATA", METADATA.encode())
        add(f"{DIST_INFO}/WHEEL", WHEEL_METADATA.encode())
        add(f"{DIST_INFO}/top_level.txt", b"detectron2\n")
        # RECORD lists itself without a hash, which is why its own line must be there before `add`.
        record.append(f"{DIST_INFO}/RECORD,,")
        add(f"{DIST_INFO}/RECORD", "".join(f"{line}\n" for line in record).encode())
    return target


def install_detectron2(parser: argparse.ArgumentParser) -> int:
    """Install detectron2 without a compiler; an installed detectron2 is kept.

    detectron2 is not on PyPI, but the PyPI wheel LabGym==3.1.2 contains its pure-Python source
    under another name (Copyright Meta, Apache-2.0; the rest of that wheel is not used). This
    command checks the wheel's SHA-256, extracts that source, restores the name, and installs the
    result with pip.

    The compiled detectron2._C is missing (rotated boxes, deformable convolution, C++ COCO
    evaluation); Mask R-CNN with a plain ViT does not use it. If you need it, build detectron2:
    https://detectron2.readthedocs.io/en/latest/tutorials/install.html
    """
    parser.add_argument("--wheel-dir", type=Path, help="write the wheel here and install nothing")
    parser.add_argument(
        "--carrier", type=Path, help=f"a downloaded wheel of {CARRIER} (default: download it)"
    )
    options = parser.parse_args()
    try:
        if options.wheel_dir is None and (found := existing_detectron2()):
            print(f"detectron2 is already installed and is kept: {found}")
            return 0
        if options.carrier is not None and not options.carrier.is_file():
            raise InstallError(f"{options.carrier} is not a file")
        with tempfile.TemporaryDirectory() as scratch:
            print(f"building detectron2 {VERSION} (pure Python) from the PyPI package {CARRIER}")
            carrier = options.carrier or download_carrier(Path(scratch))
            check_sha256(carrier)
            folder = options.wheel_dir or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            wheel = build_wheel(carrier, folder)
            if options.wheel_dir is not None:
                print(f"wrote {wheel}")
                return 0
            if run_pip("install", str(wheel)):
                raise InstallError(f"pip could not install {wheel.name}: its message is above")
            print(f"installed {wheel.name}; remove it with `pip uninstall detectron2`")
    except (InstallError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(install_detectron2(argparse.ArgumentParser(description=__doc__.split("\n\n")[0])))
