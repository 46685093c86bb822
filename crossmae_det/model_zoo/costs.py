"""What every shipped config costs: parameters and FLOPs, counted from shapes."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import DictConfig
from tqdm import tqdm

from crossmae_det.benchmark import Candidate, detection_cost, pretraining_cost
from crossmae_det.engine import keep_freed_memory
from crossmae_det.engine.job import build_optimizer
from crossmae_det.model_zoo.zoo import get_config, list_configs

# MAEs that no config is of, so that CrossMAE has one to compare with: (config, overrides).
BASELINES = (
    ("pretraining/mae_vit_b_800ep.py", ("dataloader.image_size=448",)),
    (
        "demo/pretrain_cifar10_mae.py",
        ("dataloader.image_size=128", "model.encoder.patch_size=8"),
    ),
)
MACHINE = "counted from the shapes of tensors, by torch {}"


def read_candidate(
    config_file: str, overrides: Sequence[str] = (), variation: Sequence[str] = ()
) -> Candidate:
    """A config as a candidate of the benchmark, by the name of its file.

    Args:
        config_file: as in :func:`get_config`.
        overrides: as in :func:`get_config`.
        variation: more of them, of the model, which the name tells.

    Raises:
        FileNotFoundError, ValueError: as from :func:`get_config`.
    """
    candidate = _candidate(get_config(config_file, [*overrides, *variation]), config_file)
    told = (override.removeprefix("model.") for override in variation)
    return replace(candidate, name=" ".join([candidate.name, *told]))


def training_candidate(device: str, *config: Any) -> Candidate:
    """As :func:`read_candidate`; this process then keeps the memory that tensors free, as one that
    trains does.

    Args:
        device: where it computes.
        config: what :func:`read_candidate` takes.
    """
    keep_freed_memory(torch.device(device))
    return read_candidate(*config)


def variations(
    config_file: str, ratios: Sequence[float], depths: Sequence[int]
) -> list[tuple[str, ...]]:
    """What :func:`read_candidate` takes for CrossMAE with every ratio and every depth; of an MAE,
    nothing, as it predicts everything and is what they are compared with.

    Args:
        config_file: of a pretraining model.
        ratios: prediction ratios; empty for that of the config.
        depths: numbers of decoder blocks; empty for that of the config.
    """
    by_key = (("prediction_ratio", ratios), ("decoder_depth", depths))
    axes = [[f"model.{key}={value}" for value in values] for key, values in by_key if values]
    if axes and "prediction_ratio" not in get_config(config_file).model:
        return [()]
    return list(itertools.product(*axes))


def measure(config: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Count one shipped config.

    Args:
        config: its name.
        overrides: as in :func:`get_config`.

    Returns:
        The side of the image, and the fields of
        :class:`crossmae_det.benchmark.PretrainingCost` or of
        :class:`crossmae_det.benchmark.DetectionCost` but for the name.
    """
    cfg = get_config(config, overrides)
    if is_pretraining(cfg):
        cost = {"image_size": cfg.dataloader.image_size}
        cost |= asdict(pretraining_cost(_candidate(cfg, config)))
    else:
        name_classes(cfg)
        cost = asdict(detection_cost(_candidate(cfg, config)))
    del cost["name"]
    return cost


def is_pretraining(cfg: DictConfig) -> bool:
    """Whether a config is of a pretraining model; else it is of a detector."""
    return "encoder" in cfg.model


def measure_all() -> dict[str, list[dict[str, Any]]]:
    """Count every shipped config, and the MAEs of :data:`BASELINES`.

    Returns:
        "pretraining" and "detection", each a list from the cheapest to the dearest, with the demos
        at the end: "configs" that cost the same, "overrides", and what :func:`measure` gives.
    """
    names = sorted(list_configs(), key=_natural)
    chosen: list[tuple[str, Sequence[str]]] = [(name, ()) for name in names]
    rows: dict[str, list[dict[str, Any]]] = {"pretraining": [], "detection": []}
    for config, overrides in tqdm([*chosen, *BASELINES], desc="configs"):
        cost = measure(config, overrides)
        group = rows["pretraining" if "decoder_flops" in cost else "detection"]
        same = (
            row for row in group if row["overrides"] == [*overrides] and cost.items() <= row.items()
        )
        row = next(same, None)
        if row is None:
            group.append({"configs": [config], "overrides": [*overrides], **cost})
        else:
            row["configs"].append(config)
    return {group: sorted(found, key=_order) for group, found in rows.items()}


def updated(records: Mapping[str, Any]) -> dict[str, Any]:
    """The records of "measured" with the costs counted anew.

    Args:
        records: as :func:`crossmae_det.model_zoo.records.read_records` reads them.

    Returns:
        New records; all but the costs and what counted them is as it was.
    """
    costs = {"origin": records["costs"]["origin"], **measure_all()}
    machine = records["origins"][costs["origin"][0]]["machine"]
    text = MACHINE.format(torch.__version__.partition("+")[0])
    return {**records, "machines": {**records["machines"], machine: text}, "costs": costs}


def _candidate(cfg: DictConfig, config_file: str) -> Candidate:
    return Candidate(
        name=Path(config_file).stem,
        build=partial(instantiate, cfg.model),
        optimizer=partial(build_optimizer, cfg.optimizer),
        image_size=cfg.dataloader.image_size,
    )


def name_classes(cfg: DictConfig) -> None:
    """Take the classes that the data set is registered with, if it is: nothing is read, nor
    drawn. The config of a run names them itself."""
    names = cfg.dataloader.train.dataset.names
    name = names if isinstance(names, str) else names[0]
    if name in DatasetCatalog.list():
        classes = MetadataCatalog.get(name).thing_classes
        cfg.dataloader.categories = dict(enumerate(classes, 1))
    cfg.dataloader.train.mapper.use_instance_mask = True


def _natural(name: str) -> list[str | int]:
    """A key that sorts 25 before 100."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _order(row: dict[str, Any]) -> tuple:
    config = row["configs"][0]
    kind = ("demo/" in config, "cascade" in config)
    if "decoder_flops" in row:
        return (*kind, row["encoder_flops"], row["method"] != "MAE", row["decoder_flops"])
    return (*kind, sum(row["flops"].values()))
