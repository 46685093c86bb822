#!/usr/bin/env python3
"""Install detectron2 without a compiler.

detectron2 is not on PyPI, but one PyPI wheel carries its whole pure-Python source under another
package name. This script takes that source out, gives it back its own name, packs it as a wheel of
its own and installs that wheel with pip, so that ``pip show detectron2`` and ``pip uninstall
detectron2`` work. A detectron2 that is already there is left alone.

The result lacks the compiled ``detectron2._C`` (rotated boxes, deformable convolution, the C++ COCO
evaluation), which Mask R-CNN on a plain ViT does not use. Standard library only: it runs before
anything else is installed.
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
CARRIER_PACKAGE = "LabGym"
# The only part of the carrier that is used: detectron2's own source, Copyright Meta, Apache-2.0.
# Everything else in the carrier is under another license and never leaves the downloaded file.
SOURCE_PREFIX = f"{CARRIER_PACKAGE}/detectron2/"

UPSTREAM = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
VERSION = "0.6"
WHEEL_NAME = f"detectron2-{VERSION}-py3-none-any.whl"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
# The runtime needs of detectron2 0.6, without the pins that its main branch has outgrown.
REQUIREMENTS = (
    "Pillow>=7.1",
    "black",
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.1",
    "iopath>=0.1.7,<0.2",
    "matplotlib",
    "omegaconf>=2.1,<2.4",
    "packaging",
    "pycocotools>=2.0.2",
    "setuptools<82",  # detectron2.model_zoo imports pkg_resources
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)
METADATA = "\n".join(
    [
        "Metadata-Version: 2.1",
        "Name: detectron2",
        f"Version: {VERSION}",
        "Summary: Detectron2 is FAIR's next-generation research platform for object detection"
        " and segmentation (pure-Python build).",
        "Home-page: https://github.com/facebookresearch/detectron2",
        "Author: FAIR",
        "License: Apache-2.0",
        "Requires-Python: >=3.7",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS),
        "",
        f"Pure-Python build of detectron2 {VERSION}, without `detectron2._C`.",
        f"Packed by crossmae_det from the PyPI distribution {CARRIER}.",
        "",
    ]
)
WHEEL_METADATA = (
    "Wheel-Version: 1.0\nGenerator: crossmae_det\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
)

# Prints what is said of a detectron2 that is already there. Compiled operators that were built
# against another torch do not load; detectron2 then runs without them.
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
    """What stopped the installation, in one line for the user."""


def existing_detectron2() -> str | None:
    """Version and folder of the detectron2 that this Python already has, or None."""
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        return None
    # In a process of its own: importing detectron2 takes torch with it, and may fail. Started in
    # this script's folder, so that a `detectron2` folder where the user stands is not taken for it.
    probe = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=Path(__file__).resolve().parent,
        capture_output=True,
        text=True,
    )
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        raise InstallError(
            f"the detectron2 in {Path(spec.origin).parent} does not import ({reason});"
            " repair it, or remove it with `pip uninstall detectron2` and run this again"
        )
    return f"{probe.stdout.strip().splitlines()[-1]}, in {Path(spec.origin).parent}"


def download_carrier(folder: Path) -> Path:
    """Download the carrier wheel into ``folder`` with pip and check its sha256."""
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        # The wheel is py3-none-any; a fixed version keeps its Requires-Python from refusing ours.
        "--no-deps", "--only-binary=:all:", "--python-version", "3.10",
        "--dest", str(folder), CARRIER,
    ]
    # fmt: on
    if subprocess.run(command).returncode != 0:
        raise InstallError(
            f"pip could not download {CARRIER} from the package index; try again, give a downloaded"
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

        names = sorted(
            name
            for name in source.namelist()
            if name.startswith(SOURCE_PREFIX) and not name.endswith("/")
        )
        for name in names:
            data = source.read(name).replace(
                f"{CARRIER_PACKAGE}.detectron2".encode(), b"detectron2"
            )
            add("detectron2/" + name.removeprefix(SOURCE_PREFIX), data)
        add(f"{DIST_INFO}/METADATA", METADATA.encode())
        add(f"{DIST_INFO}/WHEEL", WHEEL_METADATA.encode())
        add(f"{DIST_INFO}/top_level.txt", b"detectron2\n")
        # RECORD lists itself without a hash, which is why its own line must be there before `add`.
        record.append(f"{DIST_INFO}/RECORD,,")
        add(f"{DIST_INFO}/RECORD", "".join(f"{line}\n" for line in record).encode())
    return target


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--wheel-dir", type=Path, help="write the wheel here and install nothing")
    parser.add_argument(
        "--carrier", type=Path, help=f"the downloaded wheel of {CARRIER} (default: ask pip for it)"
    )
    options = parser.parse_args(arguments)
    try:
        if options.wheel_dir is None and (found := existing_detectron2()):
            print(f"detectron2 is already installed and is kept: {found}")
            return 0
        with tempfile.TemporaryDirectory() as scratch_name:
            scratch = Path(scratch_name)
            if options.carrier is not None and not options.carrier.is_file():
                raise InstallError(f"{options.carrier} is not a file")
            print(
                f"building detectron2 {VERSION} (pure Python) from the PyPI distribution {CARRIER}"
            )
            carrier = options.carrier or download_carrier(scratch)
            check_sha256(carrier)
            folder = options.wheel_dir or scratch
            folder.mkdir(parents=True, exist_ok=True)
            wheel = build_wheel(carrier, folder)
            if options.wheel_dir is not None:
                print(f"wrote {wheel}")
                return 0
            # fmt: off
            installed = subprocess.run([
                sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                str(wheel),
            ])
            # fmt: on
            if installed.returncode != 0:
                raise InstallError(f"pip could not install {wheel.name}")
            print(f"installed {wheel.name}; remove it with `pip uninstall detectron2`")
    except (InstallError, OSError) as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
