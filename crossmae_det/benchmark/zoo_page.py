"""What every shipped config costs: parameters and FLOPs, counted from shapes.

MODEL_ZOO.md: the words of ``data/page.md`` around tables that are made from the records.
"""

import itertools
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import DictConfig
from tabulate import tabulate
from tqdm import tqdm

from crossmae_det.benchmark.costs import (
    Candidate,
    PretrainingCost,
    baseline_of,
    detection_cost,
    pretraining_cost,
)
from crossmae_det.engine import keep_freed_memory
from crossmae_det.engine.train import build_optimizer
from crossmae_det.model_zoo.records import FOLDER, read_records
from crossmae_det.model_zoo.zoo import get_config, list_configs
from crossmae_det.utils import atomic_path

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
    """Take the classes that the dataset is registered with, if it is: nothing is read, nor
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


PAGE = Path(__file__).parents[2] / "MODEL_ZOO.md"

WORDS = "page.md"


# Of a detector's FLOPs, in the order of the image's way through it.
PARTS = (
    "patch_embedding",
    "windowed_blocks",
    "global_blocks",
    "pyramid",
    "rpn",
    "box_heads",
    "mask_head",
)


Row = Mapping[str, Any]


def render(folder: Path = FOLDER) -> str:
    """The page.

    Args:
        folder: of the records and of the page's words.

    Returns:
        Markdown.

    Raises:
        FileNotFoundError, ValueError: a file is not there, or is not what it should be.
    """
    published, measured, checkpoints = (
        read_records(name, folder) for name in ("published", "measured", "checkpoints")
    )
    words = Template((folder / WORDS).read_text(encoding="utf-8"))
    links = Links()
    try:
        tables = _tables(published, measured, checkpoints, links)
        return words.substitute(tables, links=str(links))
    except KeyError as error:
        raise ValueError(f"{folder}: the page needs {error}, which is not there") from error


def write_page(path: Path = PAGE, folder: Path = FOLDER) -> None:
    """Write the page, whole or not at all.

    Args:
        path: the page.
        folder: as in :func:`render`.

    Raises:
        ValueError, OSError: as from :func:`render`, or the page cannot be written.
    """
    text = render(folder)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_up_to_date(path: Path = PAGE, folder: Path = FOLDER) -> bool:
    """Whether the page is what the records give; a page that is not there is not.

    Args:
        path: the page.
        folder: as in :func:`render`.

    Raises:
        ValueError, OSError: as from :func:`render`, or the page cannot be read.
    """
    return path.exists() and path.read_text(encoding="utf-8") == render(folder)


def _tables(
    published: Mapping[str, Any],
    measured: Mapping[str, Any],
    checkpoints: Mapping[str, Any],
    links: "Links",
) -> dict[str, str]:
    """What is put into the words, by name; the links of all of it are added to ``links``."""
    example = checkpoints["pretraining"][1]
    return {
        "published": _results(published, "source", links),
        "measured": _results(measured, "run", links),
        "runs": _runs(measured),
        "url": example["url"],
        "config": example["config"],
        "pretraining_files": _files(
            checkpoints,
            "pretraining",
            ("config", "holds", "predicted", "epochs", "pixels", "size", "license"),
            links,
        ),
        "pretraining_notes": _notes(checkpoints["pretraining"]),
        "fine_tuned_files": _files(checkpoints, "fine_tuned", ("holds", "top-1", "license"), links),
        "detection_files": _files(
            checkpoints, "detection", ("same architecture", "holds", "epochs", "license"), links
        ),
        "pretraining_costs": _pretraining_costs(measured, links),
        "detection_costs": _detection_costs(measured, links),
    }


class Links:
    """Links of Markdown by label. Their targets stand at the end of the page, not in the tables."""

    def __init__(self) -> None:
        self.targets: dict[str, str] = {}

    def add(self, label: str, target: str) -> str:
        """The link; ``label`` is what is to be read.

        Raises:
            ValueError: another link has that label.
        """
        if self.targets.setdefault(label, target) != target:
            raise ValueError(f"two links are called '{label}': {self.targets[label]} and {target}")
        return f"[{label}]"

    def config(self, name: str) -> str:
        """The link of a config by the name of its file; a yaml file keeps its suffix."""
        return self.add(Path(name).name.removesuffix(".py"), f"configs/{name}")

    def configs(self, names: Iterable[str]) -> str:
        """Links of several configs, one below the other; a dash for none."""
        return "<br>".join(map(self.config, names)) or "-"

    def file(self, url: str) -> str:
        """The link of a file of weights."""
        label = f"file {1 + sum(known.startswith('file ') for known in self.targets)}"
        self.targets[label] = url
        return f"[file][{label}]"

    def __str__(self) -> str:
        return "\n".join(f"[{label}]: {self.targets[label]}" for label in self.targets)


def _table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    texts = [["-" if value is None else str(value) for value in row] for row in rows]
    alignment = ["right" if _is_numeric(column) else "left" for column in zip(*texts, strict=True)]
    # The numbers are text by now: tabulate must not format them anew.
    return tabulate(texts, headers, tablefmt="pipe", colalign=alignment, disable_numparse=True)


def _is_numeric(column: Iterable[str]) -> bool:
    return all(text == "-" or re.fullmatch(r"[+-]?[\d.]+( ± [\d.]+)?", text) for text in column)


def _results(records: Mapping[str, Any], header: str, links: Links) -> str:
    """Tables of results, each under its title and its notes."""
    parts = []
    for table in records["tables"]:
        columns = table["columns"]
        rows = [
            [
                *(_cell(column, row[column], links) for column in columns),
                _sources(records, row, links),
            ]
            for row in table["rows"]
        ]
        notes = textwrap.fill(" ".join(table["notes"]), 120, break_on_hyphens=False)
        parts += [f"### {table['title']}", notes, _table([*columns, header], rows)]
    return "\n\n".join(parts)


def _cell(column: str, value: Any, links: Links) -> Any:
    if column == "configs":
        return links.configs(value)
    if column in ("config", "same architecture"):
        return links.configs([value] if value else [])
    return value


def _sources(records: Mapping[str, Any], row: Row, links: Links) -> str:
    """Links to where a row comes from, or the names of the runs that gave it."""
    origins = {name: records["origins"][name] for name in row["origin"]}
    return "<br>".join(
        links.add(origin["text"], origin["url"]) if "url" in origin else name
        for name, origin in origins.items()
    )


def _runs(records: Mapping[str, Any]) -> str:
    """The command and the machine of each run, then what the machines are."""
    runs = []
    for name, run in records["origins"].items():
        how = f", {run['how']}" if "how" in run else ""
        runs.append(f"* {name}: `{run['command']}` on {run['machine']}{how}")
    machines = (f"* {name}: {text}" for name, text in records["machines"].items())
    return "\n".join([*runs, *machines])


def _files(records: Mapping[str, Any], group: str, columns: Sequence[str], links: Links) -> str:
    """A table of checkpoints."""
    rows = []
    for row in records[group]:
        cells = [_cell(column, row[column], links) for column in columns]
        file, sources = links.file(row["url"]), _sources(records, row, links)
        rows.append([row["name"], *cells, file, sources])
    return _table(["weights", *columns, "file", "source"], rows)


def _notes(rows: Iterable[Row]) -> str:
    return "\n".join(f"* {row['name']}: {row['note']}" for row in rows if "note" in row)


def _costed(row: Row, links: Links) -> str:
    """The configs of a row of costs, and what was overridden."""
    return "<br>".join([links.configs(row["configs"]), *(f"`{o}`" for o in row["overrides"])])


def _pretraining_costs(measured: Mapping[str, Any], links: Links) -> str:
    costs = measured["costs"]
    fields = PretrainingCost.__dataclass_fields__.keys() - {"name"}
    counted = [
        PretrainingCost(name="", **{field: row[field] for field in fields})
        for row in costs["pretraining"]
    ]
    rows = []
    for row, cost in zip(costs["pretraining"], counted, strict=True):
        mae = baseline_of(cost, counted)
        rows.append(
            [
                *(_costed(row, links), row["image_size"]),
                *(cost.prediction_ratio, cost.decoder_depth),
                *(_millions(cost.encoder_parameters), _millions(cost.decoder_parameters)),
                _billions(cost.decoder_flops),
                mae and f"{cost.decoder_flops / mae.decoder_flops:.2f}",
                _billions(cost.total_flops),
                mae and f"{cost.total_flops / mae.total_flops:.2f}",
                _sources(measured, costs, links),
            ]
        )
    headers = [
        *("config", "pixels", "predicted", "decoder blocks"),
        *("encoder M params", "decoder M params"),
        *("decoder GFLOPs", "x MAE", "total GFLOPs", "x MAE", "run"),
    ]
    return _table(headers, rows)


def _detection_costs(measured: Mapping[str, Any], links: Links) -> str:
    costs = measured["costs"]
    rows = []
    for row in costs["detection"]:
        parameters, flops = row["parameters"], row["flops"]
        heads = sum(parameters[part] for part in ("rpn", "box_heads", "mask_head"))
        rows.append(
            [
                *(_costed(row, links), row["image_size"]),
                f"{row['proposals']}, {row['detections']}",
                *(_millions(number) for number in (parameters["backbone"], parameters["pyramid"])),
                *(_millions(heads), *(_billions(flops[part]) for part in PARTS)),
                *(_billions(sum(flops.values())), _sources(measured, costs, links)),
            ]
        )
    headers = [
        *("config", "pixels", "boxes", "backbone M params", "pyramid M params", "heads M params"),
        *(f"{part.replace('_', ' ')} GFLOPs" for part in PARTS),
        *("total GFLOPs", "run"),
    ]
    return _table(headers, rows)


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}" if count < 1e11 else f"{count / 1e9:.0f}"
