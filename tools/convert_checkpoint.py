#!/usr/bin/env python3
"""Convert a checkpoint to the names and the file format of others, or tell what it holds.

convert_checkpoint.py mae_pretrain_vit_base.pth --inspect
convert_checkpoint.py output/model_final.pth vit.safetensors --to timm
"""

import argparse

from crossmae_det.checkpoint import convert, inspect
from crossmae_det.checkpoint.conversion import TARGETS
from crossmae_det.engine import add_loading_arguments, run_tool
from crossmae_det.utils.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="file, folder, http(s):// or hf://owner/repository[/file]")
    parser.add_argument(
        "output",
        nargs="?",
        help="file to write; its suffix names the format: .pth, .safetensors"
        " or, for vitdet and native, .pkl",
    )
    parser.add_argument("--to", choices=TARGETS, help="names to write")
    parser.add_argument(
        "--inspect", action="store_true", help="print format, sizes and parameters instead"
    )
    parser.add_argument(
        "--weights", choices=["model", "ema"], default="model", help="which of a run's weights"
    )
    add_loading_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the facts or the report as JSON, too")
    args = parser.parse_args()
    if args.inspect == bool(args.output) or args.inspect == bool(args.to):
        parser.error("name OUTPUT and --to, or --inspect")
    if args.inspect:
        info = inspect(args.input, weights=args.weights, prefix=args.prefix)
        print(info)
        result = info.to_dict()
    else:
        report = convert(
            args.input,
            args.output,
            args.to,
            weights=args.weights,
            prefix=args.prefix,
            allow_missing=args.allow_missing,
            allow_unexpected=args.allow_unexpected,
        )
        print(f"{report}\nwritten to {args.output} ({args.to})")
        result = report.to_dict()
    if args.json:
        write_json(args.json, result, indent=2)


if __name__ == "__main__":
    run_tool(main)
