#!/usr/bin/env python3
"""Draw detections into images and videos: ``crossmae-det predict``."""

from crossmae_det.__main__ import run_command

if __name__ == "__main__":
    run_command("predict")
