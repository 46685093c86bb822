"""What every job needs beside detectron2's hooks: one hook, one job."""

import itertools
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.data import Metadata, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, LRScheduler
from detectron2.evaluation import inference_context
from detectron2.utils import comm
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.utils import make_grid

from crossmae_det.checkpoint import read_checkpoint
from crossmae_det.data import get_dataset_dicts
from crossmae_det.engine.checkpointing import Checkpointer
from crossmae_det.engine.early_stopping import sign_of
from crossmae_det.engine.precision import inference_autocast
from crossmae_det.utils.image_reading import read_image
from crossmae_det.visualization.curves import plot_metrics
from crossmae_det.visualization.grids import picture_grid
from crossmae_det.visualization.predictions import comparison_sheet

logger = logging.getLogger(__name__)

# Ends of names of parameter groups.
OWN_DECAY = re.compile(r"_(no_decay|decay_[\d.e+-]+)$")


class ModelEMA(HookBase):
    """Exponential moving average of the weights, kept beside them.

    It is saved in the checkpoints under "ema" and continues from there; where a resumed run had
    none, it starts from the weights of the checkpoint.

    Args:
        model: the model without its DistributedDataParallel wrapper.
        decay: weight of the average's past at every iteration, in [0, 1).

    Raises:
        ValueError: ``decay`` out of range.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"train.ema.decay must lie in [0, 1), got {decay}")
        self.source = model
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.averaged.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The model with the averaged weights."""
        return self.averaged.module

    def restart(self) -> None:
        """Take the model's present weights, and average from the next iteration on."""
        self.model.load_state_dict(self.source.state_dict())
        self.averaged.n_averaged.zero_()

    def after_step(self) -> None:
        self.averaged.update_parameters(self.source)


class LayerLearningRates(HookBase):
    """Log the learning rate of every parameter group: a table at the start, a curve for each.

    Groups are named by their ``name``. Those with a weight decay of their own ("_no_decay",
    "_decay_VALUE") share the rate of their layer and have no curve of their own.
    """

    def before_train(self) -> None:
        rows = [
            (
                group.get("name", index),
                sum(parameter.numel() for parameter in group["params"]),
                group.get("initial_lr", group["lr"]),
                group["weight_decay"],
            )
            for index, group in enumerate(self.trainer.optimizer.param_groups)
        ]
        headers = ["group", "parameters", "base learning rate", "weight decay"]
        logger.info("Parameter groups\n%s", tabulate(rows, headers=headers))

    def before_step(self) -> None:
        for index, group in enumerate(self.trainer.optimizer.param_groups):
            name = str(group.get("name", index))
            if not OWN_DECAY.search(name):
                self.trainer.storage.put_scalar(f"lr/{name}", group["lr"], smoothing_hint=False)


class LearningRateSchedule(LRScheduler):
    """detectron2's hook for a schedule that follows from the config and the iteration alone.

    Nothing of it is saved: a resumed run has the rates that its own config gives at the iteration.
    """

    def before_train(self) -> None:
        super().before_train()
        self.scheduler.last_epoch = self.trainer.start_iter
        rates = self.scheduler.get_lr()
        for group, rate in zip(self.trainer.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        return {}


class Evaluation(EvalHook):
    """detectron2's evaluation hook, with metrics that every process knows.

    It does not evaluate after a run that failed in its last iteration, nor the same weights twice:
    a run may end where it was just evaluated.
    """

    def __init__(self, eval_period: int, eval_function: Callable[[], dict[str, Any]]):
        # In all processes alike: what follows from a metric may need all of them.
        super().__init__(eval_period, lambda: comm.all_gather(eval_function())[0])
        self.evaluated_iter = -1

    def _do_eval(self) -> None:
        super()._do_eval()
        self.evaluated_iter = self.trainer.iter

    def after_train(self) -> None:
        evaluated = self.evaluated_iter + 1 == self.trainer.iter
        if self.trainer.iter >= self.trainer.max_iter and not evaluated:
            super().after_train()


class BestCheckpointer(HookBase):
    """Keep the checkpoint with the best metric as ``model_best``.

    Register it after the evaluation, in every process. Unlike detectron2's, it does not become the
    checkpoint that ``--resume`` continues from, and a resumed run remembers the best value of the
    run so far.

    Args:
        checkpointer: saves the model.
        metrics: names such as "segm/AP" or "val/total_loss"; the first one that is measured is
            used.
        mode: "auto", "min" or "max": see :func:`crossmae_det.engine.early_stopping.sign_of`.

    Raises:
        ValueError: an unknown mode.
    """

    NAME = "model_best"

    def __init__(self, checkpointer: Checkpointer, metrics: Sequence[str], mode: str = "auto"):
        self.checkpointer = checkpointer
        self.metrics = metrics
        self.mode = mode
        sign_of("", mode)  # an unknown mode is rejected now, not at the first evaluation
        self.best_score = -math.inf
        self.judged_iter = -1

    def before_train(self) -> None:
        path = os.path.join(self.checkpointer.save_dir, f"{self.NAME}.pth")
        if self.trainer.start_iter > 0:
            # The folder of the first process counts: on other machines there may be none.
            known = comm.is_main_process() and os.path.exists(path)
            self.best_score = comm.all_gather(self._score_of(path) if known else -math.inf)[0]

    def after_step(self) -> None:
        self._judge()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._judge()

    def _judge(self) -> None:
        latest = self.trainer.storage.latest()
        name = next((metric for metric in self.metrics if metric in latest), None)
        if name is None:
            return
        value, iteration = latest[name]
        score = sign_of(name, self.mode) * value
        if iteration <= self.judged_iter or not score > self.best_score:
            return
        self.judged_iter = iteration
        self.best_score = float(score)
        value = float(value)  # plain, so that the file can be read safely
        logger.info("%s = %.3f is the best so far", name, value)
        self.checkpointer.save(
            self.NAME, tag=False, iteration=iteration, best_metric=value, metric_name=name
        )

    def _score_of(self, path: str) -> float:
        """What the checkpoint is judged by; of another metric than that of this run, the least."""
        content = read_checkpoint(path)
        name = str(content.get("metric_name"))
        if name not in self.metrics:
            return -math.inf
        return sign_of(name, self.mode) * float(content["best_metric"])


class MetricCurves(HookBase):
    """Draw the run's metrics as ``curves.png`` after the last iteration.

    Args:
        output_dir: the run's folder, which has the metrics.json of detectron2's JSONWriter.
    """

    def __init__(self, output_dir: str):
        self.output_dir = output_dir

    def after_train(self) -> None:
        metrics = os.path.join(self.output_dir, "metrics.json")
        if comm.is_main_process() and self.trainer.iter >= self.trainer.max_iter:
            path = os.path.join(self.output_dir, "curves.png")
            plot_metrics(metrics, path)
            logger.info("Curves of the metrics are in %s", path)


class PredictionPictures(HookBase):
    """Draw predictions beside the ground truth as ``predictions.png`` after the last iteration.

    Args:
        output_dir: the run's folder.
        data_loader: detectron2's test loader.
        dataset_name: the registered name of its data set, or ``JSON:IMAGE_FOLDER``.
        count: number of images: the first ones with annotations.
        score_threshold: predictions below it are not drawn; in [0, 1].
        categories: id -> name in the order of the model's classes; None: those of the data set.
    """

    def __init__(
        self,
        output_dir: str,
        data_loader: DataLoader,
        dataset_name: str,
        count: int,
        score_threshold: float,
        categories: Mapping[int, str] | None = None,
    ):
        self.path = os.path.join(output_dir, "predictions.png")
        self.categories = categories
        self.data_loader = data_loader
        self.dataset_name = dataset_name
        self.count = count
        self.score_threshold = score_threshold

    def after_train(self) -> None:
        if not comm.is_main_process() or self.trainer.iter < self.trainer.max_iter:
            return
        loaded = get_dataset_dicts(
            self.dataset_name,
            categories=self.categories,
            filter_empty=False,
            invalid_annotations="skip",
        )
        records = {record["image_id"]: record for record in loaded}
        samples = itertools.chain.from_iterable(self.data_loader)
        annotated = (sample for sample in samples if records[sample["image_id"]]["annotations"])
        model = unwrap(self.trainer.model)
        rows = []
        precision = inference_autocast(model, self.trainer.amp_dtype)
        with inference_context(model), torch.no_grad(), precision:
            for sample in itertools.islice(annotated, self.count):
                instances = model([sample])[0]["instances"].to("cpu")
                image = read_image(sample["file_name"], "BGR")
                rows.append((image, records[sample["image_id"]], instances))
        if not rows:
            logger.warning("No image of '%s' has annotations to draw", self.dataset_name)
            return
        metadata = MetadataCatalog.get(self.dataset_name)
        if self.categories and list(self.categories.values()) != metadata.get("thing_classes"):
            metadata = Metadata(thing_classes=list(self.categories.values()))
        comparison_sheet(rows, metadata, self.path, score_threshold=self.score_threshold)
        logger.info("Predictions beside the ground truth are in %s", self.path)


class ReconstructionPictures(HookBase):
    """Draw what a pretraining model makes of fixed images under a fixed masking, every so often.

    The pictures are ``reconstructions/ITERATION.png`` in the run's folder, and
    "reconstructions" in TensorBoard, a row for each image: original, masked, prediction, prediction
    with the visible patches pasted in.

    Args:
        output_dir: the run's folder.
        images: (N, 3, height, width) uint8 in RGB.
        period: in iterations; the last iteration is drawn in any case.
        seed: decides the masking.
    """

    NAME = "reconstructions"

    def __init__(self, output_dir: str, images: Tensor, period: int, seed: int = 0):
        self.folder = os.path.join(output_dir, self.NAME)
        self.images = images
        self.period = period
        self.seed = seed

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        if iteration == self.trainer.max_iter or (self.period and iteration % self.period == 0):
            self._draw(iteration)

    def _draw(self, iteration: int) -> None:
        # Any model with MaskedAutoencoder's two methods.
        model: Any = unwrap(self.trainer.model)
        noise = model.fixed_noise(self.images, self.seed)
        with inference_context(model), self.trainer.autocast():
            # Every process takes part: the model's parts may be spread over them.
            panels = model.reconstruct(self.images, noise)
        if not comm.is_main_process():
            return
        captions = [f"PSNR {value:.1f} dB" for value in panels.psnr.tolist()]
        path = os.path.join(self.folder, f"{iteration:07d}.png")
        picture_grid(panels.columns, captions, path)
        rows = torch.stack([*panels.columns.values()], dim=1).flatten(0, 1).cpu()
        grid = make_grid(rows, nrow=len(panels.columns), pad_value=255)
        self.trainer.storage.put_image(self.NAME, grid)
        self.trainer.storage.put_scalar("reconstruction_psnr", panels.psnr.mean().item())
        logger.info("Reconstructions after %d iterations are in %s", iteration, path)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a DistributedDataParallel wrapper, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model
