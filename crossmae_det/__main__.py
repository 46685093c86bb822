"""The command line: ``crossmae-det COMMAND``, also ``python -m crossmae_det COMMAND``.

This module imports the standard library only, so that the list of commands appears at once and
``doctor`` and ``install-detectron2`` run where other libraries are missing or broken. A command's
own module is imported when the command runs.
"""

import argparse
import difflib
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import crossmae_det

# Command -> (module of crossmae_det.tools, summary). The function has the name of the command.
COMMANDS = {
    "demo": ("demo", "pretrain, then train a detector, on built-in data in a few minutes"),
    "train": ("train", "train a model from a config: pretraining or detection"),
    "evaluate": ("train", "evaluate a trained detector on its test set"),
    "predict": ("inference", "draw detections into images and videos, and write COCO results"),
    "reconstruct": ("inference", "draw what a pretraining model reconstructs of masked images"),
    "analyze": ("inference", "show what the decoder of a pretraining model attends to"),
    "knn": ("inference", "k-NN accuracy of a frozen encoder on labeled images"),
    "convert": ("inference", "convert a checkpoint to another format, or show what it holds"),
    "benchmark": ("benchmark", "measure FLOPs, time and memory of backbones, steps and loaders"),
    "benchmark-gpu": ("benchmark_gpu", "measure everything on a GPU in ten minutes, with a report"),
    "compare": ("benchmark", "train a detector from several backbones over several seeds"),
    "report": ("report", "make the HTML report of a run, or compare runs"),
    "zoo": ("benchmark", "list the shipped configs and the published checkpoints"),
    "install-detectron2": ("install_detectron2", "install detectron2 without a compiler"),
    "doctor": ("doctor", "report versions, devices, backends, datasets and free space"),
}
# They run without detectron2.
STANDALONE = ("install-detectron2", "doctor")
# What is always an override, wherever it stands: also directly after `--input a.jpg b.jpg`.
OVERRIDE = re.compile(r"[+]?(model|dataloader|optimizer|lr_multiplier|train)\.[][\w.]+=")


# How the threads of an operator on a CPU wait for each other. By default each spins for
# milliseconds, which takes the core from the thread it waits for where another process runs. Read
# when the OpenMP library is loaded, also in processes that this one starts.
WAITING = {
    "OMP_WAIT_POLICY": "passive",  # LLVM's and Intel's library
    "GOMP_SPINCOUNT": "10000",  # GNU's, which torch has on Linux: a fraction of a millisecond
}


class CommandParser(argparse.ArgumentParser):
    """A parser whose options and overrides may stand in any order."""

    takes_config = False

    def add_config(self, description: str) -> None:
        """Add ``--config-file`` and the overrides, which end up in ``opts``."""
        self.takes_config = True
        self.add_argument("--config-file", required=True, metavar="CONFIG", help=description)
        self.add_argument(
            "overrides",
            nargs="*",
            metavar="KEY=VALUE",
            help="overrides of the config, such as train.init_checkpoint=PATH for the weights"
            " (yaml configs: KEY VALUE pairs)",
        )
        self.add_argument("--opts", nargs="*", default=[], help="the same as KEY=VALUE")

    def parse_args(self, args=None, namespace=None):
        if not self.takes_config:
            return super().parse_args(args, namespace)
        words = sys.argv[1:] if args is None else args
        overrides = [word for word in words if OVERRIDE.match(word)]
        rest = [word for word in words if not OVERRIDE.match(word)]
        parsed = self.parse_intermixed_args(rest, namespace)
        parsed.opts = [*overrides, *parsed.overrides, *parsed.opts]
        return parsed


def set_threads(cgroups: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> None:
    """Set how the threads of this process wait, and limit them to the CPUs that it may use.

    Variables of the environment that are set already stay as they are. Without a limit of the
    control group, the number is torch's own: one thread for each core that the process may use.

    Args:
        cgroups: folder of the control groups.
        own: file with the group of this process.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        os.environ.update(WAITING)
    quota = _cpu_quota(Path(cgroups), Path(own))
    if quota < _usable_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, math.floor(quota))))


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_quota(cgroups: Path, own: Path) -> float:
    """CPUs that the control groups of this process allow, as containers set them; or infinity."""
    try:
        paths = re.findall(r"^0::/(.*)$", own.read_text(encoding="utf-8"), re.M)
    except OSError:  # not Linux
        return math.inf
    quotas = [math.inf]
    for folder in {cgroups, *(p for path in paths for p in _folders(cgroups, path))}:
        try:
            limit, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        except (OSError, ValueError):  # no limit of this kind
            continue
        if limit != "max":
            quotas.append(int(limit) / int(period))
    return min(quotas)


def _folders(root: Path, path: str) -> list[Path]:
    """The folder of a group and those of the groups around it."""
    folder = root / path
    return [folder, *(parent for parent in folder.parents if root in parent.parents)]


def run_command(name: str) -> None:
    """Run a command with the arguments in ``sys.argv``, then exit if it failed.

    Args:
        name: a key of :data:`COMMANDS`.
    """
    set_threads()
    module = f"crossmae_det.tools.{COMMANDS[name][0]}"
    if name not in STANDALONE:
        spec = importlib.util.find_spec("detectron2")
        if spec is None or spec.origin is None:  # no origin: a folder of that name
            print(
                "detectron2 is not installed: run 'crossmae-det install-detectron2'",
                file=sys.stderr,
            )
            sys.exit(2)
        crossmae_det.register()
    function = getattr(importlib.import_module(module), name.replace("-", "_"))
    parser = CommandParser(
        prog=Path(sys.argv[0]).name,
        description=inspect.getdoc(function),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if name in STANDALONE:
        sys.exit(function(parser))
    from crossmae_det.engine import run_tool

    run_tool(lambda: function(parser))


def overview() -> str:
    """The text of ``crossmae-det --help``."""
    lines = [f"  {name:<20}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: crossmae-det COMMAND [options]",
            "",
            "CrossMAE pretraining and plain-ViT detectors for detectron2.",
            "",
            "Commands:",
            *lines,
            "",
            "crossmae-det COMMAND --help describes a command; --version prints the version.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names.

    Args:
        arguments: of the command line; None for those of this process.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
    elif name in ("-V", "--version"):
        print(f"crossmae-det {crossmae_det.__version__}")
    elif name in COMMANDS:
        # Child processes that `train` starts get this, too.
        sys.argv = [f"crossmae-det {name}", *rest]
        run_command(name)
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(COMMANDS)}"
        print(f"crossmae-det: error: unknown command '{name}': {hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
