#!/usr/bin/env python3
"""How well a frozen, pretrained backbone tells classes apart: k nearest neighbors of its
features."""

import argparse

from detectron2.utils.env import seed_all_rng

from crossmae_det.checkpoint import load
from crossmae_det.classification import knn_accuracy, labeled_features
from crossmae_det.engine import resolve_device, run_tool
from crossmae_det.engine.config import build_model, check_ranges
from crossmae_det.engine.launch import start_log
from crossmae_det.model_zoo import get_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config-file", required=True, help="pretraining config, or a run's own config.yaml"
    )
    parser.add_argument(
        "--train", required=True, help="folder of the training images, one folder a class"
    )
    parser.add_argument("--test", required=True, help="folder of the test images, likewise")
    parser.add_argument("--neighbors", type=int, default=20, help="how many vote (default: 20)")
    parser.add_argument(
        "--skip-undecodable",
        action="store_true",
        help="leave out images that cannot be decoded, and name them",
    )
    parser.add_argument(
        "--opts",
        nargs="*",
        default=[],
        help="overrides of the config; train.init_checkpoint names the weights, any that has the"
        " backbone; without it the backbone is random, by train.seed",
    )
    args = parser.parse_args()
    start_log()
    cfg = get_config(args.config_file, args.opts, trained=True)
    check_ranges(cfg, training=False)
    seed_all_rng(cfg.train.seed)
    model = build_model(cfg).to(resolve_device(cfg.train.device)).eval()
    if not hasattr(model, "encoder"):
        raise ValueError(f"{args.config_file} is not a pretraining config: it has no model.encoder")
    checkpoint = cfg.train.init_checkpoint
    if checkpoint:
        print(load(model.encoder, checkpoint))
    train, test = (
        labeled_features(
            folder,
            model.features,
            cfg.dataloader.image_size,
            skip_undecodable=args.skip_undecodable,
        )
        for folder in (args.train, args.test)
    )
    if train[2] != test[2]:
        raise ValueError(f"{args.train} and {args.test} do not have the same classes")
    accuracy = knn_accuracy(train[:2], test[:2], args.neighbors)
    print(
        f"k-NN accuracy {accuracy:.2f} % on {len(test[1])} images of {len(test[2])} classes"
        f" (k = {args.neighbors}, {len(train[1])} training images,"
        f" {checkpoint or f'random backbone, seed {cfg.train.seed}'})"
    )


if __name__ == "__main__":
    run_tool(main)
