#!/usr/bin/env python3
"""Measure the k-NN accuracy of a frozen encoder: ``crossmae-det knn``."""

from crossmae_det.__main__ import run_command

if __name__ == "__main__":
    run_command("knn")
