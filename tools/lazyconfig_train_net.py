#!/usr/bin/env python3
"""Train or evaluate a lazy config: pretraining, detection, classification."""

from argparse import Namespace

from crossmae_det.engine import argument_parser, run, run_distributed, run_tool
from crossmae_det.model_zoo import get_config


def job(args: Namespace) -> None:
    # In every process anew: a config file may register data sets.
    run(get_config(args.config_file, args.opts), args)


def main(description: str) -> None:
    args = argument_parser(description).parse_args()
    # Rejected before any process starts.
    run_distributed(job, args, get_config(args.config_file, args.opts))


if __name__ == "__main__":
    run_tool(lambda: main(__doc__))
