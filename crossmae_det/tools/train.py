"""The commands train and evaluate."""

import argparse
from argparse import ArgumentParser, Namespace

from omegaconf import DictConfig

from crossmae_det.engine import argument_parser, run, run_distributed
from crossmae_det.model_zoo import get_config
from crossmae_det.model_zoo import list as list_configs

TRAINING_EXAMPLES = """Examples:
  crossmae-det train --config-file demo/mask_rcnn.py
  crossmae-det train --config-file coco/mask_rcnn_crossmae_vit_b_100ep.py --num-gpus 8 \\
      train.init_checkpoint=backbone.pth
  crossmae-det train --config-file coco/mask_rcnn_crossmae_vit_b_100ep.py \\
      dataloader.train.dataset.names=train.json:images
  crossmae-det train --config-file coco/mask_rcnn_crossmae_vit_b_100ep.yaml SOLVER.IMS_PER_BATCH 8

Shipped configs:
"""

EVALUATION_EXAMPLES = """Examples:
  crossmae-det evaluate --config-file output/mask_rcnn_crossmae_vit_b_100ep/config.yaml
  crossmae-det evaluate --config-file coco/mask_rcnn_crossmae_vit_b_100ep.py --num-gpus 8 \\
      train.init_checkpoint=detector.pth
"""


def train(parser: ArgumentParser) -> None:
    """Train the model of a lazy or yaml config: pretraining or detection.

    The run is written to train.output_dir, by default output/NAME_OF_CONFIG. --resume continues it.
    """
    examples = TRAINING_EXAMPLES.replace("crossmae-det train", parser.prog)
    examples += "\n".join(f"  {name}" for name in list_configs())
    _start(_training_parser(parser, examples).parse_intermixed_args())


def evaluate(parser: ArgumentParser) -> None:
    """Evaluate a trained detector: the same as train --eval-only.

    With the config.yaml of a run, the weights are its best checkpoint, or its last one; with other
    configs, set train.init_checkpoint=PATH. Results are written to train.output_dir/inference;
    the report.html of a run in that folder is updated.
    """
    parser = _training_parser(parser, EVALUATION_EXAMPLES)
    for action in parser._actions:
        if action.dest in ("eval_only", "resume", "overwrite"):
            action.help = argparse.SUPPRESS
    args = parser.parse_intermixed_args()
    args.eval_only = True
    _start(args)


def _training_parser(parser: ArgumentParser, examples: str) -> ArgumentParser:
    chosen = argument_parser(parser.description or "", examples)
    chosen.prog = parser.prog
    return chosen


def _read_config(args: Namespace) -> DictConfig:
    return get_config(args.config_file, args.opts, trained=args.eval_only)


def _start(args: Namespace) -> None:
    # An error in the config ends here, before any process starts.
    run_distributed(job, args, _read_config(args))


def job(args: Namespace) -> None:
    """What every process of ``train`` runs; importable, as processes are started by spawn."""
    # Every process reads the config file, which may register datasets.
    run(_read_config(args), args)
