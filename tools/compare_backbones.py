#!/usr/bin/env python3
"""Train a detector from several backbones: ``crossmae-det compare``."""

from crossmae_det.__main__ import run_command

if __name__ == "__main__":
    run_command("compare")
