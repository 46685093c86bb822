"""MODEL_ZOO.md, rendered from the records of the model zoo, and the costs of its configs."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jinja2
import torch
from tqdm import tqdm

from crossmae_det.benchmark.cases import config_spec, name_classes
from crossmae_det.benchmark.costs import PretrainingCost, detection_cost, pretraining_cost
from crossmae_det.model_zoo.records import FOLDER, read_records
from crossmae_det.model_zoo.zoo import get_config, list_configs
from crossmae_det.utils import atomic_path

PAGE = Path(__file__).parents[2] / "MODEL_ZOO.md"

TEMPLATE = "page.md.j2"

# Baselines for CrossMAE without a config of their own: (config, overrides).
BASELINES = (
    ("pretraining/mae_vit_b_800ep.py", ("dataloader.image_size=448",)),
    (
        "demo/pretrain_cifar10_mae.py",
        ("dataloader.image_size=96", "model.encoder.patch_size=8"),
    ),
)

MACHINE = "counted from the shapes of tensors, with torch {}"


def render(folder: Path = FOLDER) -> str:
    """Render the page.

    Args:
        folder: of the records and of the template.

    Returns:
        Markdown.

    Raises:
        FileNotFoundError, ValueError: a file is missing or invalid.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["alignment"] = _alignment
    environment.filters["millions"] = lambda count: f"{count / 1e6:.1f}"
    environment.filters["billions"] = _billions
    published, measured, checkpoints = (
        read_records(name, folder) for name in ("published", "measured", "checkpoints")
    )
    rows = measured["costs"]["pretraining"]
    names = [field.name for field in fields(PretrainingCost)]
    costs = [PretrainingCost(**{name: row[name] for name in names}) for row in rows]
    for row, cost in zip(rows, costs, strict=True):
        row |= {"cost": cost, "ratios": cost.ratios(costs)}
    try:
        template = environment.get_template(TEMPLATE)
        return template.render(published=published, measured=measured, checkpoints=checkpoints)
    except jinja2.TemplateNotFound as error:
        raise FileNotFoundError(f"{folder / TEMPLATE} does not exist") from error
    except jinja2.TemplateError as error:
        raise ValueError(f"{folder / TEMPLATE}: {error}") from error


def _alignment(column: Iterable[Any]) -> str:
    """The alignment of a column of a Markdown table: numbers, with or without a spread, right."""
    numeric = (
        value is None or re.fullmatch(r"[+-]?[\d.]+( ± [\d.]+)?", str(value)) for value in column
    )
    return "---:" if all(numeric) else "---"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}" if count < 1e11 else f"{count / 1e9:.0f}"


def write_page(path: Path = PAGE, folder: Path = FOLDER) -> None:
    """:func:`render` the page into a file, atomically.

    Raises:
        ValueError, OSError: as from :func:`render`, or the page cannot be written.
    """
    text = render(folder)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_up_to_date(path: Path = PAGE, folder: Path = FOLDER) -> bool:
    """Whether the page exists and is what :func:`render` gives.

    Raises:
        ValueError, OSError: as from :func:`render`, or the page cannot be read.
    """
    return path.exists() and path.read_text(encoding="utf-8") == render(folder)


def measure(config: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Count one shipped config.

    Args:
        config: its name.
        overrides: as in :func:`get_config`.

    Returns:
        The fields of a :class:`PretrainingCost` or a :class:`DetectionCost`.
    """
    cfg = get_config(config, overrides)
    spec = config_spec(cfg, config)
    if "encoder" in cfg.model:
        return asdict(pretraining_cost(spec))
    name_classes(cfg)
    return asdict(detection_cost(config, spec.build_on_meta(), spec.image_size))


def measure_all() -> dict[str, list[dict[str, Any]]]:
    """Count every shipped config, and the MAEs of :data:`BASELINES`.

    Returns:
        "pretraining" and "detection", each a list by ascending cost, with the demos at the end.
        An entry has the "configs" of the same cost, "overrides", and the fields of
        :func:`measure`.
    """
    names = sorted(list_configs(), key=_natural)
    chosen: list[tuple[str, Sequence[str]]] = [(name, ()) for name in names]
    rows: dict[str, list[dict[str, Any]]] = {"pretraining": [], "detection": []}
    for config, overrides in tqdm([*chosen, *BASELINES], desc="configs"):
        cost = {"overrides": [*overrides], **measure(config, overrides)}
        group = rows["pretraining" if "decoder_flops" in cost else "detection"]
        for row in group:
            if cost.items() <= row.items():
                row["configs"].append(config)
                break
        else:
            group.append({"configs": [config], **cost})
    return {group: sorted(found, key=_order) for group, found in rows.items()}


def updated(records: Mapping[str, Any]) -> dict[str, Any]:
    """The records of "measured" with all costs counted again.

    Args:
        records: from :func:`crossmae_det.model_zoo.records.read_records`.

    Returns:
        New records, which differ in the costs and in the version of torch that counted them.
    """
    costs = {"origin": records["costs"]["origin"], **measure_all()}
    machine = records["origins"][costs["origin"][0]]["machine"]
    text = MACHINE.format(torch.__version__.partition("+")[0])
    return {**records, "machines": {**records["machines"], machine: text}, "costs": costs}


def _natural(name: str) -> list[str | int]:
    """A key that sorts 25 before 100."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _order(row: dict[str, Any]) -> tuple:
    config = row["configs"][0]
    kind = ("demo/" in config, "cascade" in config)
    if "decoder_flops" in row:
        return (*kind, row["encoder_flops"], row["method"] != "MAE", row["decoder_flops"])
    return (*kind, sum(row["flops"].values()))
