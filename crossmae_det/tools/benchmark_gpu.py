"""The command that measures everything on a GPU within a given time."""

import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path

import torch

from crossmae_det.benchmark.gpu_report import NAME, gpu_report, write_report
from crossmae_det.benchmark.gpu_suite import SMALL, full_scale, plan
from crossmae_det.benchmark.groups import run_groups
from crossmae_det.engine import resolve_device

# Kept for imports, plots and tables.
RESERVED_SECONDS = 15


def benchmark_gpu(parser: ArgumentParser) -> None:
    """Measure attention, backbones, detectors and pretraining steps on a GPU in ten minutes.

    Writes JSON, Markdown and plots. Cases that do not fit into the time, run out of memory or
    cannot be compiled are rows that say so; the targets of the project are compared first.

    Examples:
      crossmae-det benchmark-gpu
      crossmae-det benchmark-gpu --minutes 30 --groups backbones-large pretraining-l
      crossmae-det benchmark-gpu --device cpu     tiny models, to try the command
    """
    parser.add_argument(
        "--output", default="output/benchmark_gpu", metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--minutes", type=float, default=10, help="time in all (default: 10)")
    parser.add_argument(
        "--groups", nargs="+", metavar="GROUP", help="measure only these, with all of the time"
    )
    parser.add_argument(
        "--device",
        default="cuda",
        help="cuda (default), or cpu: tiny models, whose figures say nothing about a GPU",
    )
    args = parser.parse_args()
    device = resolve_device(args.device)
    if str(device) not in ("cpu", "cuda", "cuda:0"):
        raise ValueError(
            f"--device {args.device}: use cuda or cpu; CUDA_VISIBLE_DEVICES selects the GPU"
        )
    seconds = 60 * args.minutes - RESERVED_SECONDS
    if not seconds > 0:
        raise ValueError(f"--minutes {args.minutes:g}: use at least 1")
    scale = SMALL
    if device.type == "cuda":
        scale = full_scale(torch.cuda.get_device_properties(device).total_memory / 2**30)
    groups = {group.key: group for group in plan(scale, device.type)}
    for key in args.groups or ():
        if key not in groups:
            raise ValueError(f"--groups: unknown group '{key}': use some of {', '.join(groups)}")
    chosen = [group for key, group in groups.items() if key in (args.groups or groups)]
    Path(args.output).mkdir(parents=True, exist_ok=True)

    results = run_groups(
        chosen, device.type, seconds, log=lambda line: print(line, file=sys.stderr, flush=True)
    )
    program = parser.prog if parser.prog.startswith("crossmae-det ") else "crossmae-det"
    command = f"{program} {shlex.join(sys.argv[1:])}".strip()
    report = gpu_report(results, command, device)
    write_report(report, results, args.output)
    print(report)
    print(f"\n{Path(args.output, NAME)}.md, .json, and plots")
