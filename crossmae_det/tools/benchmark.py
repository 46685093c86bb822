"""Commands that measure: benchmark for costs, compare for AP; zoo lists what is recorded."""

import json
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from crossmae_det import benchmark as bench
from crossmae_det.__main__ import CommandParser
from crossmae_det.benchmark import cases
from crossmae_det.benchmark.comparison import (
    PARTS,
    check_earlier,
    check_sizes,
    comparison_table,
    read_metrics,
    summarize,
    training_time,
)
from crossmae_det.benchmark.evaluation import check_numbers, evaluation_times
from crossmae_det.benchmark.host_waits import waits_section
from crossmae_det.benchmark.loading import crop_loading, detection_loading
from crossmae_det.benchmark.measuring import check_repeats
from crossmae_det.benchmark.report import DETECTION_SIZE, plot_sections
from crossmae_det.benchmark.sharing import measure_sharing
from crossmae_det.benchmark.zoo_page import PAGE, is_up_to_date, updated, write_page
from crossmae_det.engine import resolve_device
from crossmae_det.engine.config import is_run_of
from crossmae_det.model_zoo import get_config
from crossmae_det.model_zoo import list as list_configs
from crossmae_det.model_zoo.records import FOLDER, checkpoints, read_records, write_records
from crossmae_det.model_zoo.resolvers import image_set
from crossmae_det.modeling import SIZES
from crossmae_det.pretraining import find_images
from crossmae_det.utils.files import write_json

CONFIGS = [
    f"pretraining/{name.format(size)}.py"
    for size in "sbl"
    for name in ("mae_vit_{}_800ep", "crossmae_vit_{}_800ep", "crossmae_vit_{}_800ep_pred75")
]
CROP_SIZE = 224
GROWTH_SIZES = [256, 384, 512, 768, 1024, 1280, 1536]

# A measurement whose arguments are checked; calling it measures.
Measurement = Callable[[], Iterable[bench.Section]]


def benchmark(parser: ArgumentParser) -> None:
    """Measure FLOPs, time and memory of backbones, pretraining steps, data loaders and evaluation.

    Examples:
      crossmae-det benchmark --backbones detectron2-vit-base vit-base --image-sizes 512 1024
      crossmae-det benchmark --backbones vit-small timm/convnext_tiny --part detector --train
      crossmae-det benchmark --growth base
      crossmae-det benchmark --pretraining --step
      crossmae-det benchmark --data coco_2017_val
      crossmae-det benchmark --evaluation 2000 100
      crossmae-det benchmark --sharing demo/mask_rcnn.py
      crossmae-det benchmark --host-waits demo/pretrain.py demo/mask_rcnn.py
    """
    _add_arguments(parser)
    args = parser.parse_args()
    _check_arguments(parser, args)
    device = resolve_device(args.device)
    if str(device) not in ("cpu", "cuda", "cuda:0"):
        raise ValueError(
            f"--device {args.device}: use cpu or cuda; CUDA_VISIBLE_DEVICES selects the GPU"
        )
    check_repeats(args.repeats)
    if not args.image_sizes:
        args.image_sizes = GROWTH_SIZES if args.growth else [DETECTION_SIZE]
    check_sizes(args.image_sizes, args.batch_sizes)
    modes = (
        (args.backbones, backbones),
        (args.growth, growth),
        (args.pretraining, pretraining),
        (args.data, loading),
        (args.evaluation, evaluation),
        (args.sharing, sharing),
        (args.host_waits, host_waits),
    )
    # Everything is checked before the first measurement: all of them may take hours.
    prepared = [prepare(args, device.type) for asked, prepare in modes if asked is not None]
    writers = (
        (args.json, bench.Report.write_json),
        (args.csv, bench.Report.write_csv),
        (args.markdown, bench.Report.write_markdown),
    )
    files = [(Path(path), write) for path, write in writers if path]
    for folder in [path.parent for path, _ in files] + ([Path(args.plots)] if args.plots else []):
        folder.mkdir(parents=True, exist_ok=True)
    sections = [section for measure in prepared for section in measure()]
    program = parser.prog if parser.prog.startswith("crossmae-det ") else f"python {sys.argv[0]}"
    command = f"{program} {shlex.join(sys.argv[1:])}"
    report = bench.Report(command, bench.environment(device), sections)
    print(report)
    for path, write in files:
        write(report, path)
    if args.plots:
        plot_sections(sections, args.plots)


def _add_arguments(parser: ArgumentParser) -> None:
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--backbones",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(cases.BACKBONES)}, timm/NAME, a checkpoint, or CONFIG[=CHECKPOINT];"
        " the ViTs of this project take @ and an attention backend or act-checkpoint;"
        " the first name is the baseline",
    )
    what.add_argument("--growth", choices=SIZES, help="blocks of a ViT over image sizes")
    what.add_argument(
        "--pretraining",
        nargs="*",
        metavar="CONFIG",
        help="decoder and forward FLOPs of these configs"
        " (default: MAE, and CrossMAE with prediction ratios 0.25 and 0.75; S, B and L)",
    )
    what.add_argument(
        "--step",
        action="store_true",
        help="also time and memory of training steps of the configs, interleaved; all models are in"
        " memory at the same time",
    )
    what.add_argument(
        "--data",
        metavar="DATASET",
        help="images/s of one core, compared with torchvision; for a detection dataset also of"
        " large-scale jitter",
    )
    what.add_argument(
        "--evaluation",
        nargs=2,
        type=int,
        metavar=("IMAGES", "DETECTIONS"),
        help="COCO evaluation of made-up images with so many detections each, compared with"
        " pycocotools",
    )
    what.add_argument(
        "--sharing",
        metavar="CONFIG",
        help="training steps on the CPU, alone and beside a busy process, by thread settings",
    )
    what.add_argument(
        "--host-waits",
        nargs="+",
        metavar="CONFIG",
        help="how often a training step of these configs waits for a GPU, counted on the CPU",
    )
    how = parser.add_argument_group("how to measure")
    how.add_argument(
        "--part",
        choices=PARTS,
        default="alone",
        help="backbone alone (default), with the pyramid, or in Mask R-CNN",
    )
    how.add_argument("--train", action="store_true", help="forward, backward and optimizer")
    how.add_argument(
        "--image-sizes",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help=f"default: {DETECTION_SIZE}, for --growth {GROWTH_SIZES[0]} to {GROWTH_SIZES[-1]}",
    )
    how.add_argument("--batch-sizes", type=int, nargs="+", default=[1], metavar="N")
    several: dict[str, Any] = {"nargs": "+", "default": []}
    text = "with --pretraining: every CrossMAE with these"
    how.add_argument("--prediction-ratios", type=float, **several, help=f"{text} prediction ratios")
    how.add_argument("--decoder-depths", type=int, **several, help=f"{text} numbers of blocks")
    how.add_argument("--compile", action="store_true", help="compile the backbones")
    how.add_argument("--batch-size", type=int, default=32, help="for --step (default: 32)")
    how.add_argument("--precision", choices=bench.PRECISIONS, default="fp32", help="default: fp32")
    how.add_argument("--repeats", type=int, default=10, help="default: 10")
    how.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    out = parser.add_argument_group("where to write results")
    out.add_argument("--json", metavar="FILE", help="the results in full precision")
    out.add_argument("--csv", metavar="FILE", help="the tables, for spreadsheets")
    out.add_argument("--markdown", metavar="FILE", help="the tables, for a README")
    out.add_argument("--plots", metavar="FOLDER", help="figures as PNG and SVG")
    out.add_argument("--against", metavar="JSON", help="compare --backbones with an earlier --json")
    parser.add_argument("--opts", nargs="*", default=[], help="overrides of every config")


def _check_arguments(parser: ArgumentParser, args: Namespace) -> None:
    of_configs = (args.sharing, args.host_waits)
    modes = (args.backbones, args.growth, args.pretraining, args.data, args.evaluation)
    if all(mode is None for mode in (*modes, *of_configs)):
        parser.error(
            "nothing to measure: add --backbones, --growth, --pretraining, --data, --evaluation,"
            " --sharing or --host-waits"
        )
    if args.pretraining is None:
        if args.step or args.prediction_ratios or args.decoder_depths:
            parser.error("--step, --prediction-ratios and --decoder-depths need --pretraining")
        if args.opts and not any((*of_configs, *map(cases.is_config, args.backbones or []))):
            parser.error("--opts overrides configs, and no config is measured")
    if (args.growth or args.step) and len(args.batch_sizes) > 1:
        parser.error("--growth takes one of --batch-sizes, and --step takes --batch-size")
    if args.data and len(args.image_sizes or []) > 1:
        parser.error("--data takes one of --image-sizes")
    if args.growth and (args.backbones or args.data):
        parser.error("--growth has its own --image-sizes: run it alone")
    if args.against and not args.backbones:
        parser.error("--against compares backbones: add --backbones")


def _case(args: Namespace, device: str, **fields: Any) -> bench.BackboneCase:
    shared = {"train": args.train, "precision": args.precision, "compiled": args.compile}
    return bench.BackboneCase(device=device, **shared, **fields)


def backbones(args: Namespace, device: str) -> Measurement:
    for name in args.backbones:
        cases.check_name(name, args.opts)
    groups = [
        [
            _case(
                args,
                device,
                name=name,
                build=partial(cases.build, name, args.part, size, args.opts),
                part=args.part,
                image_size=size,
                batch_size=batch,
            )
            for name in args.backbones
        ]
        for size in args.image_sizes
        for batch in args.batch_sizes
    ]
    earlier = None
    if args.against:
        earlier = bench.read_json(args.against)
        check_earlier((case for group in groups for case in group), earlier)

    def measure() -> Iterator[bench.Section]:
        yield from bench.comparison_sections(bench.compare(groups, args.repeats), earlier)

    return measure


def growth(args: Namespace, device: str) -> Measurement:
    # Position tables are built for one size and resampled for the others.
    builds = {
        kind: partial(cases.build_block, args.growth, kind, DETECTION_SIZE)
        for kind in ("windowed", "global")
    }
    case = _case(
        args,
        device,
        name=f"vit-{args.growth}",
        build=builds["global"],
        part="alone",
        image_size=DETECTION_SIZE,
        batch_size=args.batch_sizes[0],
    )
    return lambda: [bench.grow(case, builds, args.image_sizes, args.repeats)]


def pretraining(args: Namespace, device: str) -> Measurement:
    # The learning rate depends on the batch size.
    overrides = [f"dataloader.train.total_batch_size={args.batch_size}", *args.opts]
    builds = [
        partial(cases.pretraining_spec, device, config, overrides, variation)
        for config in args.pretraining or CONFIGS
        for variation in cases.variations(config, args.prediction_ratios, args.decoder_depths)
    ]
    specs = [build() for build in builds]
    costs = [(spec.name, bench.pretraining_cost(spec)) for spec in specs]

    def measure() -> Iterator[bench.Section]:
        yield bench.pretraining_section(costs)
        if args.step:
            yield bench.time_steps(
                builds,
                batch_size=args.batch_size,
                precision=args.precision,
                repeats=args.repeats,
                device=torch.device(device),
            )

    return measure


def loading(args: Namespace, device: str) -> Measurement:
    images = find_images(image_set(args.data))

    def measure() -> Iterator[bench.Section]:
        yield crop_loading(args.data, images, CROP_SIZE, args.repeats)
        yield from detection_loading(args.data, args.image_sizes[0], args.repeats)

    return measure


def evaluation(args: Namespace, device: str) -> Measurement:
    images, detections = args.evaluation
    check_numbers(images, detections)
    return lambda: evaluation_times(images, detections, args.repeats)


def sharing(args: Namespace, device: str) -> Measurement:
    return lambda: [measure_sharing(args.sharing, args.opts, args.repeats)]


def host_waits(args: Namespace, device: str) -> Measurement:
    return lambda: [waits_section(args.host_waits, args.opts)]


def compare(parser: CommandParser) -> None:
    """Train a detector from several backbones, with several seeds, and compare the AP.

    Run it again with the same --output to continue a comparison that was stopped. Runs whose config
    or checkpoint has changed since are trained again.

    Example:
      crossmae-det compare --config-file demo/mask_rcnn.py --output output/compare \\
          --backbones pretrained=output/demo_pretrain/model_final.pth random=
    """
    parser.add_config("config of the detector")
    parser.add_argument(
        "--backbones",
        nargs="+",
        required=True,
        metavar="NAME=CHECKPOINT",
        help="initial weights, random if nothing follows the =; the others are compared with the"
        " last one",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs per backbone (default: 3)")
    parser.add_argument("--output", required=True, help="folder for the runs and comparison.json")
    args = parser.parse_args()
    backbones = [backbone.partition("=")[::2] for backbone in args.backbones]
    if args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
    names = [name for name, _ in backbones]
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name) or names.count(name) > 1:
            raise ValueError(
                f"--backbones: '{name}' names a folder of runs: use a unique name of letters,"
                " digits, '.', '_' and '-'"
            )
    if "evaluator" not in get_config(args.config_file, args.opts).dataloader:
        raise ValueError(f"{args.config_file} is not a detection config: it has no evaluator")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in range(args.seeds):
        for name, checkpoint in backbones:
            folder = Path(args.output, f"{name}_seed{seed}")
            options = [f"train.seed={seed}", f"train.output_dir={folder}"]
            options += [f"train.init_checkpoint={checkpoint}", "train.eval_period=0"]
            options = [*args.opts, *options]
            results = folder / "inference" / "results.json"
            same = is_run_of(folder, get_config(args.config_file, options))
            if not (same and results.exists()):
                print(f"{name}, seed {seed}: {'continuing' if same else 'training'} in {folder}")
                command = [sys.executable, "-m", "crossmae_det", "train"]
                command += ["--resume" if same else "--overwrite"]
                command += ["--config-file", args.config_file, *options]
                if code := subprocess.run(command).returncode:
                    sys.exit(code)
            runs[name].append(read_metrics(results))
    # What each backbone cost, then what a detector costs, which is the same from all of them.
    costs = [
        (f"pretraining of {name}", Path(checkpoint).parent)
        for name, checkpoint in backbones
        if checkpoint
    ]
    costs.append(("each detector", Path(args.output, f"{names[0]}_seed0")))
    training = {
        what: dict(zip(("iterations", "seconds"), time, strict=True))
        for what, folder in costs
        if (time := training_time(folder))
    }
    content = {"runs": runs, "summary": summarize(runs), "training": training}
    write_json(Path(args.output, "comparison.json"), content)
    print(
        f"AP with {args.config_file}, {args.seeds} seeds: mean ± standard deviation; differences"
        " seed by seed: mean and 95 % interval"
    )
    print(comparison_table(runs))
    for what, spent in training.items():
        print(f"{what}: {spent['iterations']:,} iterations in {spent['seconds'] / 60:.1f} minutes")


def zoo(parser: ArgumentParser) -> None:
    """List the shipped configs and the published checkpoints.

    Parameters and GFLOPs are those of the whole model at the image size of the config. The AP is
    published by others (see MODEL_ZOO.md), one value for each pretraining method.
    """
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    page = parser.add_argument_group("the page MODEL_ZOO.md, for developers")
    action = page.add_mutually_exclusive_group()
    action.add_argument("--write-page", action="store_true", help="write the page from the records")
    action.add_argument(
        "--check", action="store_true", help="exit with 1 if the page differs from the records"
    )
    action.add_argument(
        "--measure", action="store_true", help="recount all costs, then write the page"
    )
    page.add_argument("--data", metavar="FOLDER", type=Path, default=FOLDER, help="the records")
    page.add_argument("--page", metavar="FILE", type=Path, default=PAGE, help="MODEL_ZOO.md")
    args = parser.parse_args()
    if args.check:
        if not is_up_to_date(args.page, args.data):
            command = "crossmae-det zoo --write-page"
            print(f"{args.page} differs from {args.data}: run {command}", file=sys.stderr)
            sys.exit(1)
    elif args.measure or args.write_page:
        if args.measure:
            write_records("measured", updated(read_records("measured", args.data)), args.data)
        write_page(args.page, args.data)
    elif args.json:
        content = {"configs": config_rows(args.data), "checkpoints": checkpoints(args.data)}
        print(json.dumps(content, indent=2))
    else:
        rows = [row | {"AP": "\n".join(row["AP"])} for row in config_rows(args.data)]
        headers = {name: name for name in rows[0]} | {"AP": "published box / mask AP"}
        print(tabulate(rows, headers=headers, floatfmt=".1f", missingval="-"))
        names = ("name", "holds", "license", "url")
        files = [[row[name] for name in names] for row in checkpoints(args.data)]
        print("\nCheckpoints, for train.init_checkpoint:\n", tabulate(files, names), sep="\n")


def config_rows(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """One row per shipped config: M parameters and GFLOPs (None if not recorded), published AP.

    Args:
        folder: of the records.
    """
    costs = read_records("measured", folder)["costs"]
    known: dict[str, tuple[float, float]] = {}
    for row in (*costs["pretraining"], *costs["detection"]):
        if "decoder_flops" in row:
            parameters = row["encoder_parameters"] + row["decoder_parameters"]
            flops = row["encoder_flops"] + row["decoder_flops"]
        else:
            parameters, flops = sum(row["parameters"].values()), sum(row["flops"].values())
        if not row["overrides"]:
            known |= dict.fromkeys(row["configs"], (parameters / 1e6, flops / 1e9))
    precision: dict[str, list[str]] = {name: [] for name in list_configs()}
    for table in read_records("published", folder)["tables"]:
        for row in (row for row in table["rows"] if "box AP" in row):
            for config in row["configs"]:
                text = f"{row['pretraining']}: {row['box AP']} / {row['mask AP']}"
                precision[config].append(text)
    columns = ("config", "M parameters", "GFLOPs", "AP")
    rows = ((name, *known.get(name, (None, None)), values) for name, values in precision.items())
    return [dict(zip(columns, row, strict=True)) for row in rows]
