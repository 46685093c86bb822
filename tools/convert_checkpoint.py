#!/usr/bin/env python3
"""Convert a checkpoint, or show what it holds: ``crossmae-det convert``."""

from crossmae_det.__main__ import run_command

if __name__ == "__main__":
    run_command("convert")
