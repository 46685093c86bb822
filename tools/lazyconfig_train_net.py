#!/usr/bin/env python3
"""Train or evaluate a lazy config: pretraining, detection, classification."""

from crossmae_det.engine import argument_parser, run, run_distributed, run_tool
from crossmae_det.model_zoo import find_config, get_config


def main(description: str) -> None:
    args = argument_parser(description).parse_args()
    args.config_file = find_config(args.config_file)
    cfg = get_config(args.config_file, args.opts)
    run_distributed(run, args, cfg, args)


if __name__ == "__main__":
    run_tool(lambda: main(__doc__))
