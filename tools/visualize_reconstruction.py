#!/usr/bin/env python3
"""Draw what a pretraining model reconstructs: ``crossmae-det reconstruct``."""

from crossmae_det.__main__ import run_command

if __name__ == "__main__":
    run_command("reconstruct")
