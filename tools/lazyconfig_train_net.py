#!/usr/bin/env python3
"""Train or evaluate a lazy config: ``crossmae-det train``."""

from crossmae_det.__main__ import run_command

if __name__ == "__main__":
    run_command("train")
