#!/usr/bin/env python3
"""Write MODEL_ZOO.md, or check it: ``crossmae-det zoo --write-page``."""

import sys

from crossmae_det.__main__ import run_command

if __name__ == "__main__":
    if not {"--check", "--measure"} & {*sys.argv}:
        sys.argv.append("--write-page")
    run_command("zoo")
