"""Run a lazy config: train a model, evaluate one, or load a trained one.

A config has five keys: ``model``, ``dataloader`` (``train``; ``test`` and ``evaluator`` for a task
that is evaluated), ``optimizer``, ``lr_multiplier`` and ``train``. ``configs/common`` documents
what each holds.
"""

import logging
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, TensorboardXWriter
from omegaconf import DictConfig, ListConfig
from torch import nn

from crossmae_det.checkpoint import load, read_checkpoint
from crossmae_det.engine.checkpointing import Checkpointer, PeriodicCheckpointer, settings
from crossmae_det.engine.config import (
    FILE,
    TEST_NAMES,
    build,
    build_model,
    check_ranges,
    save,
    use_trained_categories,
)
from crossmae_det.engine.fsdp import check_config, shard
from crossmae_det.engine.hooks import (
    METRICS,
    Evaluation,
    LayerLearningRates,
    LearningRateSchedule,
    MetricCurves,
    MetricsWriter,
    ModelEMA,
    ResourceUse,
    Visualization,
)
from crossmae_det.engine.launch import (
    EMA_FOLDER,
    REPORT,
    keep_freed_memory,
    resolve_device,
    setup,
)
from crossmae_det.engine.loggers import LoggedRun, build_loggers
from crossmae_det.engine.precision import amp_dtype, inference_autocast
from crossmae_det.engine.run_record import ReportUpdates, recorded, write_report
from crossmae_det.engine.trainer import NonFiniteError, Trainer
from crossmae_det.engine.validation import BestCheckpointer, EarlyStopping, ValidationLoss
from crossmae_det.utils.files import write_json

logger = logging.getLogger(__name__)

# Optimizers that are fused on a GPU by default.
FUSED = (torch.optim.Adam, torch.optim.AdamW)


def run(cfg: DictConfig, args: Namespace) -> dict[str, Any]:
    """Run the job of a config in this process, one of ``comm.get_world_size()``.

    Args:
        cfg: the five keys, overrides applied.
        args: ``eval_only`` and ``resume`` of detectron2's argument parser, and optionally
            ``prefix``, ``allow_missing`` and ``allow_unexpected``: see
            :func:`crossmae_det.checkpoint.load`.

    Returns:
        The results of the last evaluation; empty without one, and in all processes but the first.

    Raises:
        ValueError, OSError: a user error; the message is one line.
        NonFiniteError: a loss or the gradient was not finite.
    """
    content: dict[str, Any] = {}
    if args.eval_only:
        if not cfg.train.init_checkpoint:
            raise ValueError("--eval-only needs weights: add train.init_checkpoint=PATH")
        content = read_checkpoint(cfg.train.init_checkpoint)
        cfg = cfg.copy()
        use_trained_categories(cfg, content)
    original, cfg = cfg, setup(cfg, args)
    if args.eval_only and "evaluator" not in cfg.dataloader:
        raise ValueError(f"--eval-only: no dataset to evaluate on: set {TEST_NAMES}")
    device = resolve_device(cfg.train.device)
    keep_freed_memory(device)
    model = build_model(cfg).to(device)
    names = ("prefix", "allow_missing", "allow_unexpected")
    allowed: dict[str, Any] = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if not args.eval_only:
        source = {
            "config_file": getattr(args, "config_file", ""),
            "overrides": list(getattr(args, "opts", None) or ()),
        }
        return train(
            cfg, model, resume=args.resume, allowed=allowed, original=original, source=source
        )
    checkpoint = cfg.train.init_checkpoint
    logger.info("Evaluating the weights of %s", checkpoint)
    logger.info(load(model, checkpoint, content=content, whole=True, **allowed))
    results = evaluate(cfg, model, checkpoint=checkpoint)
    if cfg.train.ema.enabled:
        load(model, checkpoint, content=content, whole=True, weights="ema", **allowed)
        if averaged := evaluate(cfg, model, name=EMA_FOLDER, checkpoint=checkpoint):
            results["ema"] = averaged
    if cfg.train.get("report") and comm.is_main_process():
        # Of the run in this folder, whose results these are now.
        write_report(instantiate(cfg.train.report), cfg.train.output_dir, final=True)
    return results


def load_pretrained(cfg: DictConfig, weights: str = "model") -> nn.Module:
    """Build the model of a config and load its weights, for tools that use a trained model.

    Args:
        cfg: ``train.init_checkpoint`` points to a checkpoint of the whole model, ``train.device``
            is the model's device. ``dataloader.categories`` is set to the classes of the weights.
        weights: "model", or "ema" for the averaged weights of the run.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError, OSError: no checkpoint is set, or it does not hold this whole model.
    """
    checkpoint = cfg.train.init_checkpoint
    if not checkpoint:
        raise ValueError("the model needs weights: add train.init_checkpoint=PATH")
    check_ranges(cfg, training=False)
    device = resolve_device(cfg.train.device)
    content = read_checkpoint(checkpoint)
    use_trained_categories(cfg, content)
    model = build_model(cfg).eval()
    logger.info("Weights: %s", checkpoint)
    logger.info(load(model, checkpoint, content=content, whole=True, weights=weights))
    return model.to(device)


def evaluate(
    cfg: DictConfig, model: nn.Module, *, name: str = "inference", **context: Any
) -> dict[str, Any]:
    """Evaluate a model on the test set, in the precision of
    :func:`~crossmae_det.engine.precision.inference_autocast`.

    Args:
        cfg: the config.
        model: its model.
        name: subfolder of the run's folder for the evaluator's files.
        **context: added to the results file.

    Returns:
        Nested dict of metrics; empty in all processes but the first.
    """
    evaluator_cfg = cfg.dataloader.evaluator
    evaluator_cfg.output_dir = os.path.join(cfg.train.output_dir, name)
    if "context" in evaluator_cfg:
        evaluator_cfg.context = context
    # The loader first: it registers the dataset that the evaluator looks up.
    data_loader = instantiate(cfg.dataloader.test)
    evaluator = instantiate(evaluator_cfg)
    device = next(model.parameters()).device
    with inference_autocast(model, amp_dtype(cfg.train, device)):
        return inference_on_dataset(model, data_loader, evaluator)


def build_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a config over the parameters of ``model``.

    On a GPU it is fused where it can be, and the config has neither ``fused`` nor ``foreach``: see
    :func:`~crossmae_det.engine.trainer.skips_on_device`.
    """
    cfg.params.model = model
    optimizer = build(cfg, "optimizer")
    unset = cfg.get("fused") is None and cfg.get("foreach") is None
    if next(model.parameters()).is_cuda and type(optimizer) in FUSED and unset:
        cfg.fused = True
        optimizer = build(cfg, "optimizer")
    for group in optimizer.param_groups:
        for name, value in group.items():
            if isinstance(value, ListConfig):  # a checkpoint holds plain values only
                group[name] = tuple(value)
    return optimizer


def train(
    cfg: DictConfig,
    model: nn.Module,
    *,
    resume: bool,
    allowed: Mapping[str, Any],
    original: DictConfig,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """Train the model of a resolved config and evaluate it along the way; see :func:`run`.

    Args:
        cfg: the config, resolved.
        model: its model, on its device.
        resume: continue the run in the folder, if there is one.
        allowed: options of :func:`crossmae_det.checkpoint.load` for ``train.init_checkpoint``.
        original: the config with its references, which is saved in the folder.
        source: "config_file" and "overrides" that the config is from, for the record of the run.
    """
    options = cfg.train
    main = comm.is_main_process()
    device = next(model.parameters()).device
    precision = amp_dtype(options, device)
    # Taken before objects are put into the config; "auto" is replaced by this machine's precision.
    run_settings = settings(cfg) | {"precision": precision or "float32"}
    logger.info("Precision: %s", precision or "float32")
    parallel = _parallel(cfg, model)
    optimizer = build_optimizer(cfg.optimizer, model)
    trainer = Trainer(
        parallel,
        instantiate(cfg.dataloader.train),
        optimizer,
        seed=options.seed,
        amp_dtype=precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        clip_norm=options.clip_grad.max_norm if options.clip_grad.enabled else None,
        log_period=options.log_period,
    )
    ema = ModelEMA(model, options.ema.decay) if options.ema.enabled else None
    checkpointer = Checkpointer(
        model,
        options.output_dir,
        save_to_disk=main,
        run_settings=run_settings,
        trainer=trainer,
        **({} if ema is None else {"ema": ema.averaged}),
    )
    # In every process, since the model may be sharded; only one process writes and deletes.
    periodic = PeriodicCheckpointer(
        checkpointer,
        options.checkpointer.period,
        max_to_keep=options.checkpointer.max_to_keep if main else None,
    )
    schedule = LRMultiplier(optimizer, build(cfg.lr_multiplier, "lr_multiplier"), options.max_iter)
    report = instantiate(options.report) if options.get("report") else None
    loggers = build_loggers(options, run_settings)
    results: dict[str, Any] = {}

    def evaluate_now() -> dict[str, Any]:
        results.clear()
        results.update(evaluate(cfg, model, iteration=trainer.iter))
        if ema is not None and (
            averaged := evaluate(cfg, ema.model, name=EMA_FOLDER, iteration=trainer.iter)
        ):
            results["ema"] = averaged
        return results

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            ResourceUse(options.log_period),
            ema,
            LayerLearningRates(),
            LearningRateSchedule(scheduler=schedule),
            periodic,
            *_evaluation_hooks(cfg, checkpointer, precision, evaluate_now),
            # Before the writers, which write its drawings.
            Visualization(instantiate(options.visualizer)) if options.visualizer else None,
            LoggedRun(loggers) if main and loggers else None,
            hooks.PeriodicWriter(
                [
                    CommonMetricPrinter(options.max_iter),
                    MetricsWriter(os.path.join(options.output_dir, METRICS)),
                    *loggers,
                    TensorboardXWriter(options.output_dir),  # the last one: it removes the images
                ],
                period=options.log_period,
            )
            if main
            else None,
            MetricCurves(options.output_dir),
            ReportUpdates(report, options.output_dir, options.eval_period) if report else None,
        ]
    )
    start_iter = 0
    if resume and checkpointer.has_run():
        resume_run(checkpointer, trainer, ema, options.max_iter)
        periodic.resume()
        start_iter = trainer.iter + 1
    else:
        if resume:
            logger.info("%s: no checkpoint to resume from: new run", options.output_dir)
        if options.init_checkpoint:
            loaded = load(model, options.init_checkpoint, **allowed)
            logger.info(loaded)
            if main:
                write_json(os.path.join(options.output_dir, REPORT), loaded.to_dict(), indent=2)
    if main and start_iter < options.max_iter:  # a complete run keeps the config of its training
        save(original, cfg, os.path.join(options.output_dir, FILE))
    start = {
        "iteration": start_iter,
        "max_iter": options.max_iter,
        "batch_size": trainer.batch_size,
        "seed": options.seed,
        "precision": precision or "float32",
        **source,
    }
    with recorded(options.output_dir, report, device, start):
        try:
            trainer.train(start_iter, options.max_iter)
        except NonFiniteError as error:
            # That iteration's update was skipped: these are the weights before it.
            trainer.iter -= 1
            name = "model_before_nonfinite"
            checkpointer.save(name, tag=False, iteration=trainer.iter)
            raise NonFiniteError(
                f"{error}; the state before it is in {os.path.join(options.output_dir, name)}.pth"
            ) from error
    return results


def _parallel(cfg: DictConfig, model: nn.Module) -> nn.Module:
    """Compile the model as the config says, and wrap it for the processes of the job."""
    options = cfg.train
    if options.fsdp.enabled:
        check_config(cfg)
    if options.compile.enabled:
        try:
            part = model.get_submodule(options.compile.module)
        except AttributeError as error:
            raise ValueError(f"train.compile.module={options.compile.module}: {error}") from error
        # In place: the names of the parameters, and so the checkpoints, stay as they are.
        part.compile(backend=options.compile.backend)
    if options.fsdp.enabled:
        return shard(model)
    ddp = dict(options.ddp)
    if next(model.parameters()).device.type == "cpu":
        ddp["device_ids"] = None
    return create_ddp_model(model, **ddp)


def _evaluation_hooks(
    cfg: DictConfig,
    checkpointer: Checkpointer,
    precision: str | None,
    evaluate_now: Callable[[], dict[str, Any]],
) -> list[HookBase | None]:
    """The hooks that measure the model during training, then those that act on the metrics.

    Raises:
        ValueError: early stopping is enabled, but nothing is measured.
    """
    options = cfg.train
    period = options.eval_period
    evaluated, validated = "evaluator" in cfg.dataloader, options.validation_loss.enabled
    stopping = dict(options.early_stopping)
    if stopping.pop("enabled") and not (evaluated or validated):
        raise ValueError(
            "train.early_stopping has no metric: set train.validation_loss.enabled=True"
        )
    return [
        Evaluation(period, evaluate_now) if evaluated else None,
        ValidationLoss(instantiate(cfg.dataloader.validation), period, precision, options.seed)
        if validated
        else None,
        BestCheckpointer(
            checkpointer,
            **options.best_checkpoint,
            period=period if evaluated or validated else None,
        ),
        EarlyStopping(checkpointer, **stopping, period=period)
        if options.early_stopping.enabled
        else None,
    ]


def resume_run(
    checkpointer: Checkpointer, trainer: Trainer, ema: ModelEMA | None, max_iter: int
) -> None:
    """Resume the run in the folder, and log the settings that differ from its checkpoint.

    Raises:
        FileNotFoundError, ValueError: see :meth:`Checkpointer.resume`; or the run is already longer
            than ``max_iter``.
    """
    resumed = checkpointer.resume(optional=["ema"])
    done = trainer.iter + 1
    if done > max_iter:
        batch = f" of {trainer.batch_size} images" if trainer.batch_size else ""
        raise ValueError(
            f"cannot resume {resumed.path}: it has {done} iterations{batch}, and the config ends"
            f" after {max_iter}: raise train.epochs or train.max_iter, or use --eval-only"
        )
    if ema is not None and "ema" in resumed.missing:
        ema.restart()
        logger.warning("The checkpoint has no EMA: the average starts from the current weights")
    if not resumed.has_settings:
        logger.warning("%s records no settings to compare with the config", resumed.path)
    if resumed.changes:
        state = "applied from now on" if done < max_iter else "not applied, the run is complete"
        lines = "\n".join(f"  {change}" for change in resumed.changes)
        logger.warning("Settings that differ from the checkpoint (%s):\n%s", state, lines)
    if any(change.key.endswith("train.total_batch_size") for change in resumed.changes):
        images = done * trainer.batch_size + trainer.image_offset if trainer.batch_size else 0
        logger.warning("The %d images seen are %d iterations at the new batch size", images, done)
    if done == max_iter:
        logger.info("The run is complete, with %d iterations", done)
