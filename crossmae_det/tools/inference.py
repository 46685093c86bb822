"""Commands that use trained weights: predict, reconstruct, analyze, knn, convert."""

import sys
from argparse import ArgumentParser, Namespace
from os.path import basename
from typing import Any

import torch
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig
from tabulate import tabulate

from crossmae_det.__main__ import CommandParser
from crossmae_det.checkpoint import convert as convert_checkpoint
from crossmae_det.checkpoint import inspect, load
from crossmae_det.checkpoint.conversion import TARGETS
from crossmae_det.classification import knn_accuracy, labeled_features
from crossmae_det.detection.predictor import predict_files
from crossmae_det.engine import add_loading_arguments, resolve_device
from crossmae_det.engine.config import build_model, check_ranges
from crossmae_det.engine.launch import start_log
from crossmae_det.engine.train import load_pretrained
from crossmae_det.model_zoo import get_config
from crossmae_det.model_zoo.resolvers import image_set
from crossmae_det.pretraining import MAE
from crossmae_det.pretraining.analysis import decoder_attention, feature_usage
from crossmae_det.pretraining.crops import load_images, named_images
from crossmae_det.pretraining.masked_image_model import MaskedImageModel
from crossmae_det.pretraining.visualizer import draw_decoder_attention, draw_feature_usage
from crossmae_det.utils.files import write_json
from crossmae_det.utils.plots import image_grid

DETECTION_CONFIG = "lazy or yaml detection config, or config.yaml of a run"
PRETRAINING_CONFIG = "pretraining config, or config.yaml of a run"


def predict(parser: CommandParser) -> None:
    """Draw detections into images and videos, and write them as COCO results.

    Files that cannot be decoded are skipped and named; the exit code is then 1.

    Examples:
      crossmae-det predict --config-file output/mask_rcnn/config.yaml \\
          --input photo.jpg folder 'more/*.png' video.mp4 --output predictions
      crossmae-det predict --config-file coco/mask_rcnn_crossmae_vit_b_100ep.py \\
          --input photo.jpg --output predictions train.init_checkpoint=detector.pth
    """
    parser.add_config(DETECTION_CONFIG)
    parser.add_argument(
        "--input", nargs="+", required=True, help="images, folders, quoted patterns, videos"
    )
    parser.add_argument("--output", required=True, help="folder for images and predictions.json")
    parser.add_argument(
        "--score-threshold", type=float, default=0.5, help="minimum score (default: 0.5)"
    )
    parser.add_argument(
        "--ema", action="store_true", help="use the averaged weights of the run (train.ema)"
    )
    args = parser.parse_args()
    start_log()
    cfg = get_config(args.config_file, args.opts, trained=True)
    weights = "ema" if args.ema else "model"
    if predict_files(cfg, args.input, args.output, args.score_threshold, weights):
        sys.exit(1)


def _pretrained(args: Namespace) -> tuple[DictConfig, MaskedImageModel]:
    """The config that the arguments name, and its trained model."""
    cfg = get_config(args.config_file, args.opts, trained=True)
    model = load_pretrained(cfg)
    if not isinstance(model, MaskedImageModel):
        raise ValueError(f"{args.config_file} is not a pretraining config: it has no decoder")
    return cfg, model


def reconstruct(parser: CommandParser) -> None:
    """Draw images as a pretraining model sees them: original, masked, predicted, pasted.

    Example:
      crossmae-det reconstruct --config-file output/demo_pretrain/config.yaml \\
          --input photo.jpg folder --output reconstruction.png
    """
    parser.add_config(PRETRAINING_CONFIG)
    parser.add_argument(
        "--input", required=True, nargs="+", help="images, folders or other image datasets"
    )
    parser.add_argument("--output", required=True, help="PNG file to write")
    parser.add_argument(
        "--num-images", type=int, default=8, help="images of each dataset (default: 8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the masks (default: 0)")
    args = parser.parse_args()
    cfg, model = _pretrained(args)
    named = [
        item
        for dataset in args.input
        for item in named_images(image_set(dataset), cfg.dataloader.image_size, args.num_images)
    ]
    names, images = [name for name, _ in named], torch.stack([image for _, image in named])
    panels = model.reconstruct(images, model.fixed_noise(images, args.seed))
    rows = list(zip(names, panels.psnr.tolist(), strict=True))
    captions = [f"{basename(name)}, {value:.2f} dB" for name, value in rows]
    image_grid(panels.columns, captions, args.output)
    print(tabulate(rows, headers=["image", "PSNR of masked patches, dB"], floatfmt=".2f"))
    print(f"loss over all masked patches {panels.loss:.4f}; images written to {args.output}")


def analyze(parser: CommandParser) -> None:
    """Show where mask tokens of an MAE attend, or which features a CrossMAE decoder reads.

    Example:
      crossmae-det analyze --config-file output/demo_pretrain/config.yaml --output analysis
    """
    parser.add_config(PRETRAINING_CONFIG)
    parser.add_argument(
        "--input", help="image, folder or other image dataset (default: the training set)"
    )
    parser.add_argument(
        "--num-images", type=int, default=64, help="images of the dataset (default: 64)"
    )
    parser.add_argument("--output", required=True, help="folder for the figure and the JSON")
    args = parser.parse_args()
    cfg, model = _pretrained(args)
    dataset = args.input or cfg.dataloader.train.dataset.name
    images = load_images(image_set(dataset), cfg.dataloader.image_size, args.num_images)
    if isinstance(model, MAE):
        path = f"{args.output}/decoder_attention"
        attention = decoder_attention(model, images)
        draw_decoder_attention(attention.mass.numpy(), attention.relative.numpy(), f"{path}.png")
        table, values = attention.table(), attention.as_dict()
    else:
        path = f"{args.output}/feature_usage"
        usage = feature_usage(model, images)
        weights, contribution = usage.weights.numpy(), usage.contribution.numpy()
        draw_feature_usage(weights, contribution, usage.names, f"{path}.png")
        table, values = usage.table(), usage.as_dict()
    print(table)
    source = {"checkpoint": cfg.train.init_checkpoint, "dataset": dataset}
    write_json(f"{path}.json", source | values, indent=2)
    print(f"written to {path}.png and {path}.json")


def knn(parser: CommandParser) -> None:
    """Measure the k-NN accuracy of the frozen encoder of a pretraining model.

    train.init_checkpoint=PATH points to any weights that contain the encoder. Without it the
    encoder is random, with train.seed.

    Example:
      crossmae-det knn --config-file output/pretrain/config.yaml --train data/train --test data/val
    """
    parser.add_config(PRETRAINING_CONFIG)
    parser.add_argument(
        "--train", required=True, help="folder of the training images, one sub-folder per class"
    )
    parser.add_argument("--test", required=True, help="folder of test images, in the same layout")
    parser.add_argument("--neighbors", type=int, default=20, help="neighbors (default: 20)")
    parser.add_argument(
        "--skip-undecodable",
        action="store_true",
        help="skip undecodable images and name them; by default they are an error",
    )
    args = parser.parse_args()
    start_log()
    cfg = get_config(args.config_file, args.opts, trained=True)
    check_ranges(cfg, training=False)
    seed_all_rng(cfg.train.seed)
    model: Any = build_model(cfg).to(resolve_device(cfg.train.device)).eval()
    if not hasattr(model, "encoder"):
        raise ValueError(f"{args.config_file} is not a pretraining config: it has no model.encoder")
    checkpoint = cfg.train.init_checkpoint
    if checkpoint:
        print(load(model.encoder, checkpoint))
    size, skip = cfg.dataloader.image_size, args.skip_undecodable
    train, test = (
        labeled_features(folder, model.features, size, skip_undecodable=skip)
        for folder in (args.train, args.test)
    )
    if train[2] != test[2]:
        raise ValueError(f"{args.train} and {args.test} do not have the same classes")
    accuracy = knn_accuracy(train[:2], test[:2], args.neighbors)
    print(
        f"k-NN accuracy {accuracy:.2f} % on {len(test[1])} images of {len(test[2])} classes"
        f" (k = {args.neighbors}, {len(train[1])} training images,"
        f" {checkpoint or f'random encoder, seed {cfg.train.seed}'})"
    )


def convert(parser: ArgumentParser) -> None:
    """Convert a checkpoint to the names and file format of other projects, or show what it holds.

    Examples:
      crossmae-det convert mae_pretrain_vit_base.pth --inspect
      crossmae-det convert output/mask_rcnn/model_final.pth vit.safetensors --to timm
    """
    parser.add_argument("input", help="file, folder, http(s):// or hf://OWNER/REPOSITORY[/FILE]")
    parser.add_argument(
        "output",
        nargs="?",
        help="file to write; its suffix is the file format: .pth, .safetensors"
        " or, for vitdet and native, .pkl",
    )
    parser.add_argument("--to", choices=TARGETS, help="naming scheme to write")
    parser.add_argument(
        "--inspect", action="store_true", help="print format, sizes and parameters instead"
    )
    parser.add_argument(
        "--weights", choices=["model", "ema"], default="model", help="which weights of a run"
    )
    add_loading_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the result as JSON")
    args = parser.parse_args()
    if args.inspect == bool(args.output) or args.inspect == bool(args.to):
        parser.error("give OUTPUT and --to, or --inspect")
    if args.inspect:
        result: Any = inspect(args.input, weights=args.weights, prefix=args.prefix)
        print(result)
    else:
        names = ("weights", "prefix", "allow_missing", "allow_unexpected")
        options = {name: getattr(args, name) for name in names}
        result = convert_checkpoint(args.input, args.output, args.to, **options)
        print(f"{result}\nwritten to {args.output} ({args.to})")
    if args.json:
        write_json(args.json, result.to_dict(), indent=2)
