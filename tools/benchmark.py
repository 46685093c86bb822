#!/usr/bin/env python3
"""Measure what pretraining costs: FLOPs of models, time of training steps, rate of the loader."""

import argparse
import shlex
import sys

from crossmae_det import benchmark
from crossmae_det.engine import keep_freed_memory, resolve_device, run_tool
from crossmae_det.model_zoo.costs import read_candidate
from crossmae_det.model_zoo.resolvers import image_set
from crossmae_det.pretraining import find_images
from crossmae_det.pretraining.data import RandomCrops

CONFIGS = [
    f"pretraining/{name.format(size)}.py"
    for size in "sbl"
    for name in ("mae_vit_{}_800ep", "crossmae_vit_{}_800ep", "crossmae_vit_{}_800ep_pred75")
]
CROP_SIZE = 224


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--pretraining",
        nargs="*",
        metavar="CONFIG",
        help="decoder and forward FLOPs of these configs"
        " (default: MAE, and CrossMAE at a prediction ratio of 0.25 and 0.75; S, B and L)",
    )
    parser.add_argument(
        "--step",
        action="store_true",
        help="also time training steps of the configs, in turns; all are in memory together",
    )
    parser.add_argument(
        "--data",
        metavar="DATASET",
        help="images/s of one core over these images, beside the usual pipeline",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="of a step (default: 32)")
    parser.add_argument(
        "--precision",
        choices=benchmark.PRECISIONS,
        default="fp32",
        help="of a step (default: fp32)",
    )
    parser.add_argument(
        "--repeats", type=int, default=10, help="of --step and --data (default: 10)"
    )
    parser.add_argument(
        "--device", default="auto", help="of a step, as train.device: cpu, cuda or auto (default)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results with all their digits")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables for a README")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="overrides, of every config"
    )
    args = parser.parse_args()
    if args.pretraining is None and args.data is None:
        parser.error("nothing to measure: name --pretraining or --data")
    if args.step and args.pretraining is None:
        parser.error("--step times the configs of --pretraining: name it, too")
    return args


def main() -> None:
    args = parse_arguments()
    # Refused before anything is measured.
    device = resolve_device(args.device)
    keep_freed_memory(device)  # as in training
    images = None if args.data is None else find_images(image_set(args.data))
    # The learning rate follows from the batch size.
    overrides = [f"dataloader.train.total_batch_size={args.batch_size}", *args.opts]
    sections = []
    if args.pretraining is not None:
        candidates = [read_candidate(config, overrides) for config in args.pretraining or CONFIGS]
        costs = [benchmark.pretraining_cost(candidate) for candidate in candidates]
        sections.append(benchmark.pretraining_section(costs))
    if args.step:
        times = benchmark.time_steps(
            candidates,
            batch_size=args.batch_size,
            precision=args.precision,
            repeats=args.repeats,
            device=device,
        )
        sections.append(benchmark.step_section(times))
    if images is not None:
        ours, usual = RandomCrops(CROP_SIZE), benchmark.UsualCrops(CROP_SIZE)
        rates = benchmark.time_loading(images, ours, usual, args.repeats)
        sections.append(benchmark.loading_section(rates, args.data, CROP_SIZE))
    command = shlex.join(["python", *sys.argv])
    report = benchmark.Report(command, benchmark.environment(device), sections)
    print(report)
    if args.json:
        report.write_json(args.json)
    if args.markdown:
        report.write_markdown(args.markdown)


if __name__ == "__main__":
    run_tool(main)
