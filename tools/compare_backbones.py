#!/usr/bin/env python3
"""Train one detector from different backbones, by one schedule, over several seeds; AP side by
side.

A comparison that was stopped goes on where it was, if it is started again with the same --output. A
run of another config, or from a checkpoint that has changed since, is trained anew.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from crossmae_det.benchmark.comparison import comparison_table, read_metrics, summarize
from crossmae_det.engine import run_tool
from crossmae_det.engine.config import is_run_of
from crossmae_det.model_zoo import get_config
from crossmae_det.utils.files import write_json

TRAIN = Path(__file__).with_name("lazyconfig_train_net.py")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="config of the detector")
    parser.add_argument(
        "--backbones",
        nargs="+",
        required=True,
        metavar="NAME=CHECKPOINT",
        help="where each starts from; nothing after the = is random weights; the last one is what"
        " the others are compared to",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--output", required=True, help="folder for the runs and comparison.json")
    parser.add_argument(
        "--opts", nargs="*", default=[], help="overrides of the config, for all runs"
    )
    args = parser.parse_args()
    backbones = [backbone.partition("=")[::2] for backbone in args.backbones]
    if args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
    names = [name for name, _ in backbones]
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name) or names.count(name) > 1:
            raise ValueError(
                f"--backbones: '{name}' must be a name of its own for each, without slashes and"
                " spaces: it is part of the folder of its runs"
            )
    if "evaluator" not in get_config(args.config_file, args.opts).dataloader:
        raise ValueError(f"{args.config_file} is not a config of a detector: it is not evaluated")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name, _ in backbones}
    for seed in range(args.seeds):
        for name, checkpoint in backbones:
            folder = Path(args.output, f"{name}_seed{seed}")
            options = [f"train.seed={seed}", f"train.output_dir={folder}"]
            options += [f"train.init_checkpoint={checkpoint}", "train.eval_period=0"]
            options = [*args.opts, *options]
            results = folder / "inference" / "results.json"
            same = is_run_of(folder, get_config(args.config_file, options))
            if not (same and results.exists()):
                print(f"{name}, seed {seed}: {'continuing' if same else 'training'} in {folder}")
                how = "--resume" if same else "--overwrite"
                command = [sys.executable, str(TRAIN), how, "--config-file", args.config_file]
                stop = subprocess.run([*command, *options]).returncode
                if stop:
                    sys.exit(stop)
            runs[name].append(read_metrics(results))
    write_json(Path(args.output, "comparison.json"), {"runs": runs, "summary": summarize(runs)})
    print(f"AP after {args.config_file}, mean ± standard deviation over {args.seeds} seeds:")
    print(comparison_table(runs))


if __name__ == "__main__":
    run_tool(main)
