#!/usr/bin/env python3
"""Measure backbones, pretraining steps and data loaders: ``crossmae-det benchmark``."""

from crossmae_det.__main__ import run_command

if __name__ == "__main__":
    run_command("benchmark")
