#!/usr/bin/env python3
"""Show what a pretraining decoder attends to: ``crossmae-det analyze``."""

from crossmae_det.__main__ import run_command

if __name__ == "__main__":
    run_command("analyze")
