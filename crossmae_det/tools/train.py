"""Commands that train: train, evaluate, and compare for many runs of one detector."""

import argparse
import re
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from omegaconf import DictConfig

from crossmae_det.__main__ import CommandParser
from crossmae_det.benchmark.comparison import comparison_table, read_metrics, summarize
from crossmae_det.engine import argument_parser, run, run_distributed
from crossmae_det.engine.config import is_run_of
from crossmae_det.model_zoo import get_config, usage_examples
from crossmae_det.utils.files import write_json


def train(parser: ArgumentParser) -> None:
    """Train the model of a lazy or yaml config: pretraining, detection, classification.

    The run is written to train.output_dir, by default output/NAME_OF_CONFIG. --resume continues it.
    """
    _start(_training_parser(parser).parse_intermixed_args())


def evaluate(parser: ArgumentParser) -> None:
    """Evaluate a trained detector: the same as train --eval-only.

    For a run's own config.yaml, the weights are its best checkpoint, or its last; for other configs
    train.init_checkpoint=PATH names them. Results are written to train.output_dir/inference.
    """
    parser = _training_parser(parser)
    for action in parser._actions:
        if action.dest in ("eval_only", "resume", "overwrite"):
            action.help = argparse.SUPPRESS
    args = parser.parse_intermixed_args()
    args.eval_only = True
    _start(args)


def _training_parser(parser: ArgumentParser) -> ArgumentParser:
    chosen = argument_parser(parser.description or "", usage_examples(parser.prog))
    chosen.prog = parser.prog
    return chosen


def _read_config(args: Namespace) -> DictConfig:
    return get_config(args.config_file, args.opts, trained=args.eval_only)


def _start(args: Namespace) -> None:
    # An error in the config ends here, before any process starts.
    run_distributed(job, args, _read_config(args))


def job(args: Namespace) -> None:
    """What every process of ``train`` runs; importable, as processes are started by spawn."""
    # Read anew in every process: a config file may register datasets.
    run(_read_config(args), args)


def compare(parser: CommandParser) -> None:
    """Train a detector from several backbones, with several seeds, and compare the AP.

    Started again with the same --output, a comparison that was stopped continues. A run of another
    config, or from a checkpoint that has changed since, is trained anew.

    Example:
      crossmae-det compare --config-file demo/mask_rcnn.py --output output/compare \\
          --backbones pretrained=output/demo_pretrain/model_final.pth random=
    """
    parser.add_config("config of the detector")
    parser.add_argument(
        "--backbones",
        nargs="+",
        required=True,
        metavar="NAME=CHECKPOINT",
        help="initial weights, random where nothing follows the =; the last is the reference that"
        " the others are compared with",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs per backbone (default: 3)")
    parser.add_argument("--output", required=True, help="folder for the runs and comparison.json")
    args = parser.parse_args()
    backbones = [backbone.partition("=")[::2] for backbone in args.backbones]
    if args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
    names = [name for name, _ in backbones]
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name) or names.count(name) > 1:
            raise ValueError(
                f"--backbones: '{name}' names a folder of runs: use a unique name of letters,"
                " digits, '.', '_' and '-'"
            )
    if "evaluator" not in get_config(args.config_file, args.opts).dataloader:
        raise ValueError(f"{args.config_file} is not a detection config: it has no evaluator")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
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
                command = [sys.executable, "-m", "crossmae_det", "train"]
                command += ["--resume" if same else "--overwrite"]
                command += ["--config-file", args.config_file, *options]
                if code := subprocess.run(command).returncode:
                    sys.exit(code)
            runs[name].append(read_metrics(results))
    write_json(Path(args.output, "comparison.json"), {"runs": runs, "summary": summarize(runs)})
    print(f"AP with {args.config_file}, mean ± standard deviation over {args.seeds} seeds:")
    print(comparison_table(runs))
