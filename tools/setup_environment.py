#!/usr/bin/env python3
"""Install what crossmae_det needs into the virtual environment that runs this script.

``make setup`` creates the environment and calls this. It installs the versions pinned in
``requirements/``, detectron2, and this project itself (editable). What a user has put there before
stays: a torch and torchvision in the range that setup.py states, a detectron2, an OpenCV.
Standard library only: it runs before anything else is installed.
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
# One module, cv2, in four distributions that overwrite each other's files: only one may be there.
OPENCV_BUILDS = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)
# Imported at the end, in one process; torchvision fails here when it belongs to another torch.
MODULES = "torch, torchvision, timm, cv2, pycocotools.mask, faster_coco_eval, detectron2.model_zoo"


class SetupError(Exception):
    """What stopped the set-up, in one line for the user."""


def say(message: str) -> None:
    print(f"setup: {message}", flush=True)


def normalized(name: str) -> str:
    """The one spelling of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_versions() -> dict[str, str]:
    """Name -> version of every distribution in this environment."""
    found = {dist.metadata["Name"]: dist.version for dist in distributions()}
    return {normalized(name): version for name, version in found.items() if name}


def release(version: str) -> tuple[int, ...]:
    """The numbers a version starts with: "2.14.1+cu130" -> (2, 14, 1)."""
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
    """Which of torch and torchvision are the user's own and stay as they are: both, or none.

    Args:
        installed: name -> version of what the environment has.
        pinned: as from ``pinned_torch``.
        minimum: as from ``minimum_torch``.

    Raises:
        SetupError: one of the user's own is too old, or the other half of the pair is missing.
            Which torchvision belongs to a torch depends on where that torch came from.
    """
    own = {name for name in TORCH if installed.get(name, pinned[name]) != pinned[name]}
    for name in sorted(own):
        if release(installed[name]) < release(minimum[name]):
            raise SetupError(
                f"the {name} {installed[name]} in this environment is older than {minimum[name]}:"
                " upgrade it, or set up in an environment without it"
            )
    missing = [name for name in TORCH if name not in installed]
    if own and missing:
        (name,) = own
        raise SetupError(
            f"this environment has {name} {installed[name]} but no {missing[0]}: install the"
            f" {missing[0]} that belongs to it, from where that {name} came from"
        )
    return set(TORCH) if own else set()


def without(lines: Iterable[str], names: Collection[str]) -> list[str]:
    """The lines of a requirements file, less those of the distributions in ``names``."""
    return [
        line
        for line in lines
        if normalized(re.split(r"[=<>!~;\[ ]", line, maxsplit=1)[0]) not in names
    ]


def fit_opencv(
    build: str, version: str, import_error: Callable[[], str | None], pip: Callable[..., None]
) -> str:
    """See to it that OpenCV imports on this machine.

    opencv-python links to the libraries of a desktop, libGL.so.1 first of all. Where they are
    missing, the headless build of the same version takes its place: it lacks only the windows on a
    screen, which this project never opens.

    Args:
        build: the installed distribution, one of ``OPENCV_BUILDS``.
        version: its version.
        import_error: tries ``import cv2`` in a process of its own; the error's text, or None.
        pip: runs pip with the arguments it is given.

    Returns:
        The distribution that is installed afterwards, and imports.

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
    """The last line of the error that ``import modules`` ends with in a new process, or None."""
    # Not in the repository's root: what counts is the installed package.
    done = subprocess.run(
        [sys.executable, "-c", f"import {modules}"], cwd=sys.prefix, capture_output=True, text=True
    )
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def run_pip(*arguments: str, environment: Mapping[str, str] | None = None) -> None:
    """Run this environment's pip in the repository's root, quietly.

    Raises:
        SetupError: pip failed; its own message is on the terminal already.
    """
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check"]
    if subprocess.run(
        [*command, *arguments[1:]], cwd=REPOSITORY, env={**os.environ, **(environment or {})}
    ).returncode:
        raise SetupError(f"`pip {' '.join(arguments)}` failed; its message is above")


def install_requirements(kept: Collection[str]) -> None:
    """Install the pinned requirements, less the distributions in ``kept``."""
    lines = [
        line
        for name in ("runtime.txt", "dev.txt")
        for line in (REQUIREMENTS / name).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    # Relative, as pip splits these two variables at spaces. Newer versions of pip read the second.
    build = "requirements/build.txt"
    environment = {
        "PIP_CONSTRAINT": f"{os.environ.get('PIP_CONSTRAINT', '')} {build}".strip(),
        "PIP_BUILD_CONSTRAINT": f"{os.environ.get('PIP_BUILD_CONSTRAINT', '')} {build}".strip(),
    }
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text("\n".join(without(lines, kept)) + "\n", encoding="utf-8")
        constraints = str(REQUIREMENTS / "constraints.txt")
        # --use-pep517: older pips would install source distributions without making a wheel.
        run_pip(
            *("install", "--use-pep517", "-r", str(wanted), "-c", constraints),
            environment=environment,
        )


def set_up() -> None:
    """Everything, one line said per step.

    Raises:
        SetupError: a step failed.
    """
    if sys.prefix == sys.base_prefix and not os.environ.get("CONDA_PREFIX"):
        raise SetupError(f"{sys.executable} is not in a virtual environment: use `make setup`")
    installed = installed_versions()
    if "pip" not in installed:
        raise SetupError(f"this environment has no pip: run `{sys.executable} -m ensurepip`")

    kept = torch_to_keep(installed, pinned_torch(), minimum_torch())
    if own_opencv := [build for build in OPENCV_BUILDS[1:] if build in installed]:
        kept |= {"opencv-python"}
    for name in sorted(kept & installed.keys()) + own_opencv:
        say(f"keeping {name} {installed[name]}, which was here already")
    say("installing the versions pinned in requirements/ (a few GB the first time: torch, CUDA)")
    install_requirements(kept)

    # Before detectron2, whose import takes OpenCV with it.
    installed = installed_versions()
    (build, *_) = own_opencv or ["opencv-python"]
    build = fit_opencv(build, installed[build], lambda: import_error("cv2"), run_pip)

    say("seeing to detectron2")
    install = [sys.executable, str(REPOSITORY / "tools" / "install_detectron2.py")]
    if subprocess.run(install).returncode:
        raise SetupError("detectron2 could not be installed; the reason is above")

    say("installing crossmae_det itself, editable")
    run_pip(
        *("install", "--no-deps", "--no-build-isolation", "--editable", "."),
        environment={"CROSSMAE_DET_OPENCV": build},
    )
    say("checking that everything imports")
    if reason := import_error(f"{MODULES}, crossmae_det"):
        raise SetupError(f"everything is installed, but an import fails: {reason}")


def main() -> int:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    try:
        set_up()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        # The environment is whole, if not complete: `make setup` may go on from here.
        (Path(sys.prefix) / ".unfinished").unlink(missing_ok=True)
        return 2
    except KeyboardInterrupt:
        print("setup: interrupted; `make setup` starts again", file=sys.stderr)
        return 130
    (Path(sys.prefix) / ".unfinished").unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
