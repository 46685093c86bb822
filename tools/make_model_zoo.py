#!/usr/bin/env python3
"""Write MODEL_ZOO.md from the data files of the package, or check that it is what they give."""

import argparse
import sys
from pathlib import Path

from crossmae_det.benchmark.zoo_page import PAGE, is_up_to_date, updated, write_page
from crossmae_det.engine import run_tool
from crossmae_det.model_zoo.records import FOLDER, read_records, write_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if the page is another"
    )
    action.add_argument(
        "--measure",
        action="store_true",
        help="first count parameters and FLOPs of every config anew, into measured.json",
    )
    parser.add_argument(
        "--data", type=Path, default=FOLDER, metavar="FOLDER", help="the records (default: ours)"
    )
    parser.add_argument(
        "--page", type=Path, default=PAGE, metavar="FILE", help="default: MODEL_ZOO.md"
    )
    args = parser.parse_args()
    if args.check:
        if not is_up_to_date(args.page, args.data):
            print(
                f"{args.page} is not what {args.data} gives: run python tools/make_model_zoo.py",
                file=sys.stderr,
            )
            sys.exit(1)
        return
    if args.measure:
        write_records("measured", updated(read_records("measured", args.data)), args.data)
    write_page(args.page, args.data)


if __name__ == "__main__":
    run_tool(main)
