#!/usr/bin/env python3
"""Measure what backbones, pretraining and loaders cost.

benchmark.py --backbones detectron2-vit-base vit-base --image-sizes 512 1024
benchmark.py --backbones vit-small swin-tiny timm/convnext_tiny --part detector --train
benchmark.py --growth base
benchmark.py --pretraining --step
benchmark.py --data coco_2017_val
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from crossmae_det import benchmark
from crossmae_det.benchmark import cases
from crossmae_det.benchmark.comparison import PARTS, check_earlier, check_sizes
from crossmae_det.benchmark.loading import crop_loading, detection_loading
from crossmae_det.benchmark.measuring import check_repeats
from crossmae_det.benchmark.report import DETECTION_SIZE, plot_sections
from crossmae_det.engine import resolve_device, run_tool
from crossmae_det.model_zoo.resolvers import image_set
from crossmae_det.modeling import SIZES
from crossmae_det.pretraining import find_images

CONFIGS = [
    f"pretraining/{name.format(size)}.py"
    for size in "sbl"
    for name in ("mae_vit_{}_800ep", "crossmae_vit_{}_800ep", "crossmae_vit_{}_800ep_pred75")
]
CROP_SIZE = 224
GROWTH_SIZES = [256, 384, 512, 768, 1024, 1280, 1536]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--backbones",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(cases.BACKBONES)}, timm/NAME, a checkpoint, or CONFIG[=CHECKPOINT];"
        " ours also with @ and an attention backend or act-checkpoint behind it;"
        " the others are compared with the first",
    )
    what.add_argument(
        "--growth", choices=SIZES, metavar="SIZE", help="blocks of our ViT by size of the image"
    )
    what.add_argument(
        "--pretraining",
        nargs="*",
        metavar="CONFIG",
        help="decoder and forward FLOPs of these configs"
        " (default: MAE, and CrossMAE at a prediction ratio of 0.25 and 0.75; S, B and L)",
    )
    what.add_argument(
        "--step",
        action="store_true",
        help="also time and memory of training steps of the configs, interleaved; all are in memory"
        " together",
    )
    what.add_argument(
        "--data",
        metavar="DATASET",
        help="images/s of one core over these images, beside the usual pipeline; of a detection"
        " dataset, with large-scale jitter, too",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--part",
        choices=PARTS,
        default="alone",
        help="backbones alone (default), with their pyramid, or in Mask R-CNN",
    )
    how.add_argument("--train", action="store_true", help="forward, backward and optimizer")
    how.add_argument("--image-sizes", type=int, nargs="+", metavar="PIXELS", help="default: 1024")
    how.add_argument("--batch-sizes", type=int, nargs="+", default=[1], metavar="N")
    how.add_argument(
        "--prediction-ratios",
        type=float,
        nargs="+",
        default=[],
        metavar="RATIO",
        help="of --pretraining: every CrossMAE with these fractions of the patches predicted",
    )
    how.add_argument(
        "--decoder-depths",
        type=int,
        nargs="+",
        default=[],
        metavar="BLOCKS",
        help="of --pretraining: every CrossMAE with so many blocks in its decoder",
    )
    how.add_argument("--compile", action="store_true", help="compile the backbones")
    how.add_argument("--batch-size", type=int, default=32, help="of --step (default: 32)")
    how.add_argument(
        "--precision", choices=benchmark.PRECISIONS, default="fp32", help="default: fp32"
    )
    how.add_argument("--repeats", type=int, default=10, help="default: 10")
    how.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    out = parser.add_argument_group("where results go")
    out.add_argument("--json", metavar="FILE", help="all digits")
    out.add_argument("--csv", metavar="FILE", help="the tables, for spreadsheets")
    out.add_argument("--markdown", metavar="FILE", help="the tables, for a README")
    out.add_argument("--plots", metavar="FOLDER", help="pictures as PNG and SVG")
    out.add_argument(
        "--against", metavar="JSON", help="compare with an earlier run's JSON, backbone by backbone"
    )
    parser.add_argument("--opts", nargs="*", default=[], help="overrides, of every config")
    args = parser.parse_args()
    if all(mode is None for mode in (args.backbones, args.growth, args.pretraining, args.data)):
        parser.error("nothing to measure: name --backbones, --growth, --pretraining or --data")
    if args.step and args.pretraining is None:
        parser.error("--step times the configs of --pretraining: name it, too")
    if (args.prediction_ratios or args.decoder_depths) and args.pretraining is None:
        parser.error(
            "prediction ratios and decoder depths are those of --pretraining: name it, too"
        )
    configs = any(map(cases.is_config, args.backbones or []))
    if args.opts and args.pretraining is None and not configs:
        parser.error("--opts overrides configs, and none is named")
    if (args.growth or args.step) and len(args.batch_sizes) > 1:
        parser.error("--growth takes one of --batch-sizes, and --step takes --batch-size")
    if args.data and len(args.image_sizes or []) > 1:
        parser.error("--data takes one of --image-sizes")
    if args.growth and (args.backbones or args.data):
        parser.error("--growth is of a series of --image-sizes of its own: call it alone")
    if args.against and not args.backbones:
        parser.error("--against compares backbones: name --backbones, too")
    return args


# What was asked for and has been checked: a call measures it.
Measurement = Callable[[], Iterable[benchmark.Section]]


def compared(args: argparse.Namespace, device: str) -> Measurement:
    for name in args.backbones:
        cases.check_name(name, args.opts)
    groups = [
        [
            benchmark.BackboneCase(
                name=name,
                build=partial(cases.build, name, args.part, size, args.opts),
                part=args.part,
                image_size=size,
                batch_size=batch,
                train=args.train,
                precision=args.precision,
                device=device,
                compiled=args.compile,
            )
            for name in args.backbones
        ]
        for size in args.image_sizes
        for batch in args.batch_sizes
    ]
    earlier = None
    if args.against:
        earlier = benchmark.read_json(args.against)
        check_earlier((case for group in groups for case in group), earlier)

    def measure() -> Iterator[benchmark.Section]:
        yield from benchmark.comparison_sections(benchmark.compare(groups, args.repeats), earlier)

    return measure


def growth(args: argparse.Namespace, device: str) -> Measurement:
    # Their tables are made for one size, and resampled at the others.
    builds = {
        kind: partial(cases.build_block, args.growth, kind, DETECTION_SIZE)
        for kind in ("windowed", "global")
    }
    case = benchmark.BackboneCase(
        name=f"vit-{args.growth}",
        build=builds["global"],
        part="alone",
        image_size=DETECTION_SIZE,
        batch_size=args.batch_sizes[0],
        train=args.train,
        precision=args.precision,
        device=device,
        compiled=args.compile,
    )

    def measure() -> Iterator[benchmark.Section]:
        yield benchmark.grow(case, builds, args.image_sizes, args.repeats)

    return measure


def pretraining(args: argparse.Namespace, device: str) -> Measurement:
    # The learning rate follows from the batch size.
    overrides = [f"dataloader.train.total_batch_size={args.batch_size}", *args.opts]
    builds = [
        partial(cases.pretraining_spec, device, config, overrides, variation)
        for config in args.pretraining or CONFIGS
        for variation in cases.variations(config, args.prediction_ratios, args.decoder_depths)
    ]
    specs = [build() for build in builds]
    costs = [(spec.name, benchmark.pretraining_cost(spec)) for spec in specs]

    def measure() -> Iterator[benchmark.Section]:
        yield benchmark.pretraining_section(costs)
        if args.step:
            yield benchmark.time_steps(
                builds,
                batch_size=args.batch_size,
                precision=args.precision,
                repeats=args.repeats,
                device=torch.device(device),
            )

    return measure


def loading(args: argparse.Namespace, device: str) -> Measurement:
    images = find_images(image_set(args.data))

    def measure() -> Iterator[benchmark.Section]:
        yield crop_loading(args.data, images, CROP_SIZE, args.repeats)
        yield from detection_loading(args.data, args.image_sizes[0], args.repeats)

    return measure


def measurements(args: argparse.Namespace) -> tuple[list[Measurement], torch.device]:
    """What was asked for, ready to be measured; what cannot be is refused here."""
    device = resolve_device(args.device)
    if str(device) not in ("cpu", "cuda", "cuda:0"):
        raise ValueError(
            f"--device {args.device}: measurements are of cpu and cuda; CUDA_VISIBLE_DEVICES names"
            " the GPU"
        )
    check_repeats(args.repeats)
    if not args.image_sizes:
        args.image_sizes = GROWTH_SIZES if args.growth else [DETECTION_SIZE]
    check_sizes(args.image_sizes, args.batch_sizes)
    modes = (
        (args.backbones, compared),
        (args.growth, growth),
        (args.pretraining, pretraining),
        (args.data, loading),
    )
    return [prepare(args, device.type) for asked, prepare in modes if asked is not None], device


def main() -> None:
    args = parse_arguments()
    prepared, device = measurements(args)
    writers = (
        (args.json, benchmark.Report.write_json),
        (args.csv, benchmark.Report.write_csv),
        (args.markdown, benchmark.Report.write_markdown),
    )
    files = [(Path(path), write) for path, write in writers if path]
    folders = [path.parent for path, _ in files] + ([Path(args.plots)] if args.plots else [])
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    sections = [section for measure in prepared for section in measure()]
    command = shlex.join(["python", *sys.argv])
    report = benchmark.Report(command, benchmark.environment(device), sections)
    print(report)
    for path, write in files:
        write(report, path)
    if args.plots:
        plot_sections(sections, args.plots)


if __name__ == "__main__":
    run_tool(main)
