#!/usr/bin/env python3
"""Install everything that crossmae_det needs into the virtual environment of this Python.

``make setup`` creates the environment and calls this script, which installs the versions pinned in
``requirements/``, detectron2, and this project (editable). It keeps what is already installed: a
torch and torchvision in the range of setup.py, a detectron2, an OpenCV. It imports the standard
library only, as nothing else is installed yet.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIREMENTS = REPOSITORY / "requirements"
TORCH = ("torch", "torchvision")
# Four distributions of one module, cv2, which overwrite each other's files: install only one.
OPENCV_BUILDS = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)
# Imported at the end, in one process; a torchvision built for another torch fails here.
MODULES = "torch, torchvision, timm, cv2, pycocotools.mask, hotcoco, detectron2.model_zoo"


class SetupError(Exception):
    """What stopped the setup, in one line."""


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


def normalized(name: str) -> str:
    """The canonical spelling of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_versions() -> dict[str, str]:
    """Name -> version of every distribution in this environment."""
    found = {dist.metadata["Name"]: dist.version for dist in distributions()}
    return {normalized(name): version for name, version in found.items() if name}


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.14.1+cu130" -> (2, 14, 1)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def find_torch(pattern: str, text: str) -> dict[str, str]:
    """For torch and torchvision, the version that follows ``pattern`` in ``text``."""
    found = {name: re.search(pattern.format(name) + r"([\d.]+)", text, re.M) for name in TORCH}
    return {name: match.group(1) for name, match in found.items() if match}


def pinned_torch() -> dict[str, str]:
    """Name -> version in requirements/runtime.txt."""
    return find_torch("^{}==", (REQUIREMENTS / "runtime.txt").read_text(encoding="utf-8"))


def minimum_torch() -> dict[str, str]:
    """Name -> lowest version that setup.py accepts."""
    return find_torch('"{}>=', (REPOSITORY / "setup.py").read_text(encoding="utf-8"))


def torch_to_keep(
    installed: Mapping[str, str], pinned: Mapping[str, str], minimum: Mapping[str, str]
) -> set[str]:
    """The installed torch and torchvision that are kept: both if one differs from its pin, or none.

    Args:
        installed: name -> version of the environment's distributions.
        pinned: see ``pinned_torch``.
        minimum: see ``minimum_torch``.

    Raises:
        SetupError: an installed one is too old, or the other one is missing: which torchvision
            fits a torch depends on the index that the torch was installed from.
    """
    own = {name for name in TORCH if installed.get(name, pinned[name]) != pinned[name]}
    for name in sorted(own):
        if release(installed[name]) < release(minimum[name]):
            raise SetupError(
                f"{name} {installed[name]} in this environment is older than {minimum[name]}:"
                " upgrade it, or use an environment without it"
            )
    missing = [name for name in TORCH if name not in installed]
    if own and missing:
        (name,) = own
        raise SetupError(
            f"this environment has {name} {installed[name]} but no {missing[0]}: install the"
            f" matching {missing[0]} from the same index"
        )
    return set(TORCH) if own else set()


def without(lines: Iterable[str], names: Collection[str]) -> list[str]:
    """The lines of a requirements file without those of the distributions in ``names``."""
    return [
        line
        for line in lines
        if normalized(re.split(r"[=<>!~;\[ ]", line, maxsplit=1)[0]) not in names
    ]


def fit_opencv(
    build: str, version: str, import_error: Callable[[], str | None], pip: Callable[..., None]
) -> str:
    """Make sure that OpenCV imports on this machine.

    opencv-python links to desktop libraries such as libGL.so.1. If they are missing, it is replaced
    with the headless build of the same version, which lacks only windows; this project opens none.

    Args:
        build: the installed distribution, one of ``OPENCV_BUILDS``.
        version: its version.
        import_error: tries ``import cv2`` in another process and returns the error's text, or None.
        pip: runs pip with its arguments.

    Returns:
        The distribution that is installed now, and imports.

    Raises:
        SetupError: the headless build does not import either.
    """
    reason = import_error()
    if reason is None:
        return build
    if not build.endswith("-headless"):
        headless = f"{build}-headless"
        say(f"{build} cannot be imported here ({reason}): installing {headless} instead")
        pip("uninstall", "--yes", build)
        pip("install", f"{headless}=={version}")
        build, reason = headless, import_error()
    if reason is not None:
        raise SetupError(f"{build} {version} cannot be imported: {reason}")
    return build


def import_error(modules: str) -> str | None:
    """The last line of the error of ``import modules`` in a new process, or None."""
    # Not in the repository's root: the installed package is tested.
    done = subprocess.run(
        [sys.executable, "-c", f"import {modules}"], cwd=sys.prefix, capture_output=True, text=True
    )
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def run_pip(*arguments: str, environment: Mapping[str, str] | None = None) -> None:
    """Run this environment's pip in the repository's root.

    Raises:
        SetupError: pip failed, and has printed its own message.
    """
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check"]
    if subprocess.run(
        [*command, *arguments[1:]], cwd=REPOSITORY, env={**os.environ, **(environment or {})}
    ).returncode:
        raise SetupError(f"`pip {' '.join(arguments)}` failed: its message is above")


def install_requirements(kept: Collection[str]) -> None:
    """Install the pinned requirements without the distributions in ``kept``."""
    lines = [
        line
        for name in ("runtime.txt", "dev.txt")
        for line in (REQUIREMENTS / name).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    # A relative path, as pip splits these variables at spaces. Newer versions read the second one.
    build = "requirements/build.txt"
    environment = {
        "PIP_CONSTRAINT": f"{os.environ.get('PIP_CONSTRAINT', '')} {build}".strip(),
        "PIP_BUILD_CONSTRAINT": f"{os.environ.get('PIP_BUILD_CONSTRAINT', '')} {build}".strip(),
    }
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text("\n".join(without(lines, kept)) + "\n", encoding="utf-8")
        constraints = str(REQUIREMENTS / "constraints.txt")
        # --use-pep517: older versions of pip would install source distributions without a wheel.
        run_pip(
            *("install", "--use-pep517", "-r", str(wanted), "-c", constraints),
            environment=environment,
        )


def set_up() -> None:
    """Run all steps, with one line of output each.

    Raises:
        SetupError: a step failed.
    """
    if sys.prefix == sys.base_prefix and not os.environ.get("CONDA_PREFIX"):
        raise SetupError(f"{sys.executable} is not in a virtual environment: run `make setup`")
    installed = installed_versions()
    if "pip" not in installed:
        raise SetupError(f"this environment has no pip: run `{sys.executable} -m ensurepip`")

    kept = torch_to_keep(installed, pinned_torch(), minimum_torch())
    if own_opencv := [build for build in OPENCV_BUILDS[1:] if build in installed]:
        kept |= {"opencv-python"}
    for name in sorted(kept & installed.keys()) + own_opencv:
        say(f"keeping the installed {name} {installed[name]}")
    say("installing the versions pinned in requirements/ (first time: a few GB for torch and CUDA)")
    install_requirements(kept)

    # Before detectron2, which imports OpenCV.
    installed = installed_versions()
    (build, *_) = own_opencv or ["opencv-python"]
    build = fit_opencv(build, installed[build], lambda: import_error("cv2"), run_pip)

    say("installing detectron2, if it is missing")
    install = [sys.executable, str(REPOSITORY / "tools" / "install_detectron2.py")]
    if subprocess.run(install).returncode:
        raise SetupError("detectron2 could not be installed: the reason is above")

    say("installing crossmae_det, editable")
    run_pip(
        *("install", "--no-deps", "--no-build-isolation", "--editable", "."),
        environment={"CROSSMAE_DET_OPENCV": build},
    )
    say("checking all imports")
    if reason := import_error(f"{MODULES}, crossmae_det"):
        raise SetupError(f"everything is installed, but an import failed: {reason}")


def main() -> int:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    try:
        set_up()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        # The environment is incomplete but not broken: `make setup` continues from here.
        (Path(sys.prefix) / ".unfinished").unlink(missing_ok=True)
        return 2
    except KeyboardInterrupt:
        print("setup: interrupted: `make setup` starts over", file=sys.stderr)
        return 130
    (Path(sys.prefix) / ".unfinished").unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
