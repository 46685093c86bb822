#!/usr/bin/env python3
"""Draw what a pretraining model makes of images: original, masked, predicted, pasted."""

import argparse
from os.path import basename

import torch
from tabulate import tabulate

from crossmae_det.engine import run_tool
from crossmae_det.engine.train import load_pretrained
from crossmae_det.model_zoo import get_config
from crossmae_det.model_zoo.resolvers import image_set
from crossmae_det.pretraining.crops import named_images
from crossmae_det.pretraining.masked_image_model import MaskedImageModel
from crossmae_det.utils.plots import image_grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config-file", required=True, help="pretraining config, or a run's own config.yaml"
    )
    parser.add_argument(
        "--input", required=True, nargs="+", help="images, folders or other sets of images"
    )
    parser.add_argument("--output", required=True, help="the picture, a PNG")
    parser.add_argument(
        "--num-images", type=int, default=8, help="how many images of each set (default: 8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the masking (default: 0)")
    parser.add_argument(
        "--opts",
        nargs="*",
        default=[],
        help="overrides of the config; train.init_checkpoint names the weights",
    )
    args = parser.parse_args()
    cfg = get_config(args.config_file, args.opts, trained=True)
    model = load_pretrained(cfg)
    if not isinstance(model, MaskedImageModel):
        raise ValueError(f"{args.config_file} is not a pretraining config: nothing is masked there")
    named = [
        item
        for dataset in args.input
        for item in named_images(image_set(dataset), cfg.dataloader.image_size, args.num_images)
    ]
    names, images = [name for name, _ in named], torch.stack([image for _, image in named])
    panels = model.reconstruct(images, model.fixed_noise(images, args.seed))
    values = panels.psnr.tolist()
    captions = [
        f"{basename(name)}, {value:.2f} dB" for name, value in zip(names, values, strict=True)
    ]
    image_grid(panels.columns, captions, args.output)
    rows = zip(names, values, strict=True)
    print(tabulate(rows, headers=["image", "PSNR of masked patches, dB"], floatfmt=".2f"))
    print(f"loss over all masked patches {panels.loss:.4f}; pictures in {args.output}")


if __name__ == "__main__":
    run_tool(main)
