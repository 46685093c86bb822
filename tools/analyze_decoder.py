#!/usr/bin/env python3
"""Show where an MAE's mask tokens attend, or which features a CrossMAE's decoder blocks read."""

import argparse

from crossmae_det.engine import run_tool
from crossmae_det.engine.train import load_pretrained
from crossmae_det.model_zoo import get_config
from crossmae_det.model_zoo.resolvers import image_set
from crossmae_det.pretraining import MAE
from crossmae_det.pretraining.analysis import decoder_attention, feature_usage
from crossmae_det.pretraining.crops import load_images
from crossmae_det.pretraining.masked_image_model import MaskedImageModel
from crossmae_det.pretraining.visualizer import draw_decoder_attention, draw_feature_usage
from crossmae_det.utils.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config-file", required=True, help="pretraining config, or a run's own config.yaml"
    )
    parser.add_argument(
        "--input", help="image, folder or other set of images; by default the config's training set"
    )
    parser.add_argument(
        "--num-images", type=int, default=64, help="how many images of the set (default: 64)"
    )
    parser.add_argument("--output", required=True, help="folder for the picture and the JSON")
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
        raise ValueError(f"{args.config_file} is not a pretraining config: it has no decoder")
    dataset = args.input or cfg.dataloader.train.dataset.name
    images = load_images(image_set(dataset), cfg.dataloader.image_size, args.num_images)
    if isinstance(model, MAE):
        path = f"{args.output}/decoder_attention"
        result = decoder_attention(model, images)
        draw_decoder_attention(result.mass.numpy(), result.relative.numpy(), f"{path}.png")
    else:
        path = f"{args.output}/feature_usage"
        result = feature_usage(model, images)
        draw_feature_usage(
            result.weights.numpy(), result.contribution.numpy(), result.names, f"{path}.png"
        )
    print(result.table())
    source = {"checkpoint": cfg.train.init_checkpoint, "dataset": dataset}
    write_json(f"{path}.json", source | result.as_dict(), indent=2)
    print(f"{path}.png and .json written")


if __name__ == "__main__":
    run_tool(main)
