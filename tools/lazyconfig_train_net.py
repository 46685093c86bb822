#!/usr/bin/env python3
"""Train or evaluate a lazy config: pretraining, detection, classification."""

import sys
from argparse import Namespace

from omegaconf import DictConfig

from crossmae_det.engine import argument_parser, run, run_distributed, run_tool
from crossmae_det.model_zoo import get_config, usage_examples


def read_config(args: Namespace) -> DictConfig:
    return get_config(args.config_file, args.opts, trained=args.eval_only)


def job(args: Namespace) -> None:
    # In every process anew: a config file may register datasets.
    run(read_config(args), args)


def main(description: str) -> None:
    parser = argument_parser(description, usage_examples(f"python {sys.argv[0]}"))
    args = parser.parse_intermixed_args()
    # An error in the config ends here, before any process starts.
    run_distributed(job, args, read_config(args))


if __name__ == "__main__":
    run_tool(lambda: main(__doc__))
