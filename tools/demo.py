#!/usr/bin/env python3
"""Draw the detections of a trained model into images and videos, and write them as COCO results.

Files that cannot be decoded are skipped and named; the exit code is then 1.
"""

import argparse
import sys

from crossmae_det.detection.predictor import predict_files
from crossmae_det.engine import run_tool
from crossmae_det.engine.launch import start_log
from crossmae_det.model_zoo import get_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config-file", required=True, help="lazy or yaml config, or a run's own config.yaml"
    )
    parser.add_argument(
        "--input", nargs="+", required=True, help="images, folders, quoted patterns, videos"
    )
    parser.add_argument("--output", required=True, help="folder for pictures and predictions.json")
    parser.add_argument(
        "--score-threshold", type=float, default=0.5, help="leave out detections below this score"
    )
    parser.add_argument(
        "--ema", action="store_true", help="use the averaged weights of the run (train.ema)"
    )
    parser.add_argument(
        "--opts",
        nargs="*",
        default=[],
        help="overrides of the config; train.init_checkpoint (MODEL.WEIGHTS) names the weights",
    )
    args = parser.parse_args()
    start_log()
    cfg = get_config(args.config_file, args.opts, trained=True)
    weights = "ema" if args.ema else "model"
    if predict_files(cfg, args.input, args.output, args.score_threshold, weights):
        sys.exit(1)


if __name__ == "__main__":
    run_tool(main)
