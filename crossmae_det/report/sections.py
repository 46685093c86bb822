"""The page about one run: its headline and its sections, from the files of the run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from crossmae_det.engine.launch import EMA_FOLDER
from crossmae_det.report import images
from crossmae_det.report.blocks import (
    DASH,
    Block,
    Cell,
    Charts,
    Code,
    Comparisons,
    Note,
    Sheet,
    Table,
    Tile,
    count,
    decimal,
    duration,
    finite,
)
from crossmae_det.report.charts import Chart, Line, line_chart, number
from crossmae_det.report.config_diff import differences
from crossmae_det.report.run_files import EVALUATED, RUNNING, Run, last_finite

TASKS = {"segm": "Mask", "bbox": "Box"}  # in order of importance
SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR@100")
LONG_CONFIG = 400_000  # characters; a longer one is not in the page

PREDICTIONS = "predictions.png"


def task_title(task: str) -> str:
    """ "bbox" as "Box", "ema segm" as "EMA mask", others as they are."""
    name = task.removeprefix("ema ")
    title = TASKS.get(name, name)
    return title if name == task else f"EMA {title.lower() if name in TASKS else title}"


def results_by_task(run: Run) -> dict[str, dict[str, Any]]:
    """Task -> metric -> value of the last evaluation: masks, boxes, others, then averaged weights.

    They are from ``results.json``; without it, from the metrics.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, content in run.results.items():
        results = content.get("results")
        for task, values in results.items() if isinstance(results, dict) else ():
            if isinstance(values, dict):
                found[f"{key} {task}".strip()] = values
    if not found:
        for name in run.metrics:
            task, _, metric = name.rpartition("/")
            if metric in SUMMARY and task:
                found.setdefault(task.replace("/", " "), {})[metric] = run.last(name)
    order = list(TASKS)
    return dict(
        sorted(
            found.items(),
            key=lambda item: (
                item[0].startswith("ema "),
                order.index(t) if (t := item[0].removeprefix("ema ")) in order else len(order),
            ),
        )
    )


def analyses(run: Run) -> dict[str, dict[str, Any]]:
    """Task -> the analysis of its detections in ``results.json``; empty without any."""
    found = run.results.get("", {}).get("analysis")
    if not isinstance(found, dict):
        return {}
    return {task: found[task] for task in (*TASKS, *(found.keys() - TASKS.keys())) if task in found}


def tiles(run: Run) -> list[Tile]:
    """The numbers of the headline."""
    found = []
    results = results_by_task(run)
    for task, values in results.items():
        if task.startswith("ema ") or finite(values.get("AP")) is None:
            continue
        # Spaces within a part do not break.
        parts = [
            f"{name}\N{NO-BREAK SPACE}{decimal(values[name], 1)}"
            for name in SUMMARY[1:3]
            if name in values
        ]
        averaged = finite(results.get(f"ema {task}", {}).get("AP"))
        if averaged is not None:
            parts.append(f"EMA\N{NO-BREAK SPACE}{decimal(averaged, 1)}")
        found.append(Tile(f"{task_title(task)} AP", decimal(values["AP"], 1), ", ".join(parts)))
    loss, validation = run.last("total_loss"), run.last("val/total_loss")
    psnr = run.last("reconstruction_psnr")
    if loss is not None:
        detail = "" if validation is None else f"validation {number(validation)}"
        if psnr is not None:
            detail = f"{detail}, PSNR {psnr:.1f} dB".removeprefix(", ")
        found.append(Tile("Loss", number(loss), detail))
    elif validation is not None:
        found.append(Tile("Validation loss", number(validation)))
    if run.metrics:
        of = f"of {run.max_iter:,}" if run.max_iter else ""
        found.append(Tile("Iterations", f"{run.iterations:,}", of))
    if run.seconds is not None:
        left = run.last("eta_seconds") if run.status.state == RUNNING else None
        detail = "" if left is None else f"about {duration(left)} left"
        found.append(Tile("Time", duration(run.seconds), detail))
    if (rate := images_per_second(run)) and (last := last_finite(rate)) is not None:
        found.append(Tile("Images per second", number(last), _batch(run)))
    if (memory := run.last("max_memory_gib")) is not None:
        of = "of the process" if str(_device(run)).startswith("cpu") else "of the GPU"
        found.append(Tile("Peak memory", f"{memory:.1f} GiB", of))
    return found


def _device(run: Run) -> Any:
    found = run.start.get("environment")
    return found.get("device", "") if isinstance(found, dict) else ""


def _batch(run: Run) -> str:
    return f"batch of {run.batch_size}" if run.batch_size else ""


def images_per_second(run: Run) -> Mapping[int, float]:
    """Iteration -> images per second; of runs that did not log it, from time and batch size."""
    if "images_per_second" in run.metrics:
        return run.metrics["images_per_second"]
    if run.batch_size is None:
        return {}
    return {i: run.batch_size / t for i, t in run.metrics.get("time", {}).items() if t > 0}


def history(run: Run) -> list[Chart]:
    """AP by iteration, a chart for each task; none of a run that was evaluated once."""
    charts = []
    tasks = sorted(
        {name.rpartition("/")[0] for name in run.metrics if name.endswith("/AP")},
        key=lambda task: (task.startswith("ema/"), task != "segm", task),
    )
    for task in tasks:
        if task.startswith("ema/") and task.removeprefix("ema/") in tasks:
            continue
        lines = [
            Line(name, run.metrics[f"{task}/{name}"], color=color)
            for color, name in enumerate(("AP", "AP50", "AP75"))
            if f"{task}/{name}" in run.metrics
        ]
        if averaged := run.metrics.get(f"ema/{task}/AP"):
            lines.append(Line("AP of EMA", averaged, color=0, dashed=True))
        title = f"{task_title(task.replace('/', ' '))} AP"
        chart = line_chart(title, lines, zero=True, x_max=run.max_iter)
        if chart is not None and any(len(line.points) > 1 for line in lines):
            charts.append(chart)
    return charts


def accuracy(run: Run) -> list[Block]:
    """AP of the last evaluation, and its history."""
    results = results_by_task(run)
    blocks: list[Block] = []
    columns = [name for name in SUMMARY if any(name in values for values in results.values())]
    other = [
        name
        for values in results.values()
        for name in values
        if name not in columns and not name.startswith("AP-") and finite(values[name]) is not None
    ]
    columns += list(dict.fromkeys(other))
    if columns:
        rows = [
            [task_title(task), *(decimal(values.get(name)) for name in columns)]
            for task, values in results.items()
        ]
        blocks.append(Table(["", *columns], rows, note=_evaluated(run)))
    if charts := history(run):
        blocks.append(Charts(charts))
    return blocks


def _evaluated(run: Run) -> str:
    context = run.results.get("", {}).get("context")
    if not isinstance(context, dict):
        return ""
    parts = ["In percent"]
    if "images" in context and "dataset" in context:
        parts.append(f"on {count(context['images'])} images of {_dataset(context['dataset'])}")
    if finite(context.get("iteration")) is not None:
        parts.append(f"after iteration {count(context['iteration'])}")
    elif context.get("checkpoint"):
        parts.append(f"with the weights of {context['checkpoint']}")
    if context.get("backend"):
        parts.append(f"by {context['backend']}")
    return ", ".join(parts) + "."


def _dataset(spec: Any) -> str:
    """The name of a dataset without folders: ``val.json`` of ``data/val.json:data/images``."""
    first, _, rest = str(spec).partition(":")
    if not rest:
        return str(spec)
    return Path(first).name if first.endswith(".json") else f"{first}:{Path(rest).name}"


def training(run: Run) -> list[Block]:
    """Losses, learning rates, speed and memory by iteration."""
    metrics = run.metrics

    def chart(title: str, lines: Sequence[Line], **options: Any) -> Chart | None:
        return line_chart(title, lines, x_max=run.max_iter, **options)

    def named(names: Sequence[str], title: str = "", noisy: bool = False) -> list[Line]:
        return [Line(title or name, metrics[name], noisy) for name in names if name in metrics]

    parts = sorted(name for name in metrics if name.startswith("loss_"))
    rates = sorted(name for name in metrics if name.startswith("lr/"))
    accuracies = sorted(name for name in metrics if name.endswith("accuracy"))
    total = [Line("training", metrics["total_loss"], noisy=True)] if "total_loss" in metrics else []
    if "val/total_loss" in metrics:
        total.append(Line("validation", metrics["val/total_loss"]))
    # The highest and the lowest: the layers in between follow from the decay.
    rates.sort(key=lambda name: -max(metrics[name].values()))
    layers = [rates[0], rates[-1]] if len(rates) > 2 else rates
    learning = [Line(name.removeprefix("lr/"), metrics[name]) for name in layers] or named(["lr"])
    speed = [Line("training", images_per_second(run))]
    found = [
        chart("Total loss", total, log=True),
        chart(
            "Losses",
            [Line(n.removeprefix("loss_"), metrics[n], noisy=True) for n in parts],
            log=True,
        )
        if len(parts) > 1
        else None,
        chart("Learning rate", learning, zero=True),
        chart("Reconstruction PSNR (dB)", named(["reconstruction_psnr"], "mean")),
        chart("Accuracy of the heads", named(accuracies, noisy=True)),
        chart("Norm of the gradient", named(["grad_norm"], "whole model", noisy=True), log=True),
        chart("Throughput (images per second)", speed, zero=True),
        chart(
            "Time of an iteration (s)",
            [
                Line(title, metrics[name], noisy=True)
                for name, title in (("time", "whole"), ("data_time", "waiting for data"))
                if name in metrics
            ],
            zero=True,
        ),
        chart("Peak memory (GiB)", named(["max_memory_gib"], "first process"), zero=True),
    ]
    charts = [one for one in found if one is not None]
    return [Charts(charts)] if charts else []


def examples(run: Run, with_images: bool) -> list[Block]:
    """The worst and the best images; without them, what the run has drawn."""
    found = analyses(run)
    sheets = run.folder / PREDICTIONS
    drawn: list[Block] = []
    scored = next((a["images"] for a in found.values() if a.get("images")), None)
    if not with_images:
        reason = "Images are drawn when the run has ended." if run.results or scored else ""
    elif scored:
        threshold = _threshold(run, found)
        worst, best = images.choose(scored)
        try:
            compared = images.compare_with_truth(run, [*worst, *best], threshold)
        except (ValueError, OSError) as error:
            reason = f"The worst and the best images are not drawn: {' '.join(str(error).split())}"
        else:
            note = (
                f"By F1 of the detections with a score of at least {threshold:g}."
                " Ground truth on the left, predictions on the right."
            )
            for title, chosen, text in (("Worst", worst, note), ("Best", best, "")):
                found_images = [
                    compared[i["image_id"]] for i in chosen if i["image_id"] in compared
                ]
                if found_images:
                    drawn.append(Comparisons(f"{title} images", found_images, text))
            return drawn
    elif run.results:
        reason = (
            "The worst and the best images are not known: results.json has no numbers for single"
            " images."
        )
    else:
        reason = ""
    if reason:
        drawn.append(Note(reason))
    if with_images and sheets.is_file():
        text = "ground truth beside predictions on the first images of the test set"
        drawn.append(Sheet("Predictions beside the ground truth", images.sheet(sheets, text)))
    return drawn


def _threshold(run: Run, found: Mapping[str, Mapping[str, Any]]) -> float:
    """The score from which detections count in the numbers of single images."""
    for analysis in found.values():
        matrix = analysis.get("confusion_matrix") or {}
        if (value := finite(matrix.get("score_threshold"))) is not None:
            return value
    value = finite(run.option("train.visualizer.score_threshold"))
    return 0.5 if value is None else value


def reconstructions(run: Run, with_images: bool) -> list[Block]:
    """What a pretraining run reconstructs, the last sheet first."""
    if not any((run.folder / "reconstructions").glob("*.png")):
        return []
    if not with_images:
        return [Note("Images are drawn when the run has ended.")]
    return [
        Sheet(f"After {iteration:,} iterations", sheet, folded=index > 0)
        for index, (iteration, sheet) in enumerate(images.reconstructions(run.folder))
    ]


def configuration(run: Run) -> list[Block]:
    """What differs from the recipe, and the whole config."""
    blocks: list[Block] = []
    recipe = str(run.start.get("config_file") or "")
    if run.config and run.recipe:
        rows = differences([run.recipe, run.config])
        name = recipe or "the recipe"
        if rows:
            table = [[key, *values] for key, values in rows]
            blocks.append(
                Table(["key", "recipe", "this run"], table, f"Changes to {name}", text_columns=3)
            )
        else:
            blocks.append(Note(f"The config is that of {name}, without changes."))
    elif run.config:
        overrides = run.start.get("overrides")
        shown = f" Overrides of {recipe}: {' '.join(map(str, overrides))}" if overrides else ""
        blocks.append(
            Note(f"The differences from a recipe are not known: the run has no recipe.yaml.{shown}")
        )
    if run.config:
        text = yaml.safe_dump(run.config, allow_unicode=True, sort_keys=False, width=100)
        if len(text) <= LONG_CONFIG:
            blocks.append(Code("config.yaml", text, folded=True))
    return blocks


def data(run: Run) -> list[Block]:
    """The datasets of the config, and the health of the test set."""
    blocks: list[Block] = []
    recorded = run.option("dataloader.recorded")
    rows = []
    for name, info in recorded.items() if isinstance(recorded, dict) else ():
        classes = info.get("categories")
        masks = info.get("has_masks")
        rows.append(
            [
                str(name),
                count(info.get("num_images")),
                count(info.get("num_annotated")),
                count(len(classes)) if isinstance(classes, dict) else DASH,
                DASH if masks is None else "yes" if masks else "no",
            ]
        )
    if rows:
        blocks.append(Table(["dataset", "images", "annotated", "classes", "masks"], rows))
    health = run.results.get("", {}).get("dataset_health")
    if isinstance(health, dict):
        blocks += _health(health)
    return blocks


def _health(health: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    empty = health.get("images_without_annotations")
    summary = (
        f"{count(health.get('images'))} images, {count(health.get('annotations'))} annotations"
    )
    if empty:
        summary += f", {count(empty)} images without annotations"
    checks = health.get("checks") or []
    if not checks:
        blocks.append(Note(f"Test set: {summary}. The checks found nothing."))
    else:
        tones = {"error": "bad", "warning": "warn"}
        rows: list[list[Cell | str]] = [
            [
                Cell(str(check.get("severity", "")), tone=tones.get(check.get("severity"), "")),
                str(check.get("what", "")),
                ", ".join(map(str, list(check.get("examples") or ())[:5])),
                count(check.get("count")),
            ]
            for check in checks
        ]
        columns = ["severity", "what", "examples (ids)", "number"]
        blocks.append(Table(columns, rows, f"Test set: {summary}", text_columns=3))
    classes = health.get("classes") or {}
    if classes:
        most = max(max(classes.values()), 1)
        rows_of_classes: list[list[Cell | str]] = [
            [str(name), Cell(count(value), value, bar=value / most)]
            for name, value in sorted(classes.items(), key=lambda item: -item[1])
        ]
        blocks.append(Table(["class", "annotations"], rows_of_classes, sortable=True))
    return blocks


def environment(run: Run) -> list[Block]:
    """Command, seed, versions and devices of each start."""
    starts = [start for start in run.record.get("starts", ()) if isinstance(start, dict)]
    if not starts:
        return [Note("The run has no run.json: its command and environment are not known.")]
    blocks: list[Block] = []
    if run.start.get("command"):
        blocks.append(Code("Command", str(run.start["command"])))
    rows = [
        ["config file", str(run.start.get("config_file") or DASH)],
        ["seed", str(run.start.get("seed", DASH))],
        ["precision", str(run.start.get("precision", DASH))],
        ["processes", str(run.start.get("processes", DASH))],
    ]
    found = run.start.get("environment")
    rows += [[str(k), str(v)] for k, v in found.items()] if isinstance(found, dict) else []
    blocks.append(Table(["", ""], rows, text_columns=2))
    if len(starts) > 1:
        resumed = [
            [
                str(start.get("time", "")),
                str(start.get("command", "")),
                count(start.get("iteration")),
            ]
            for start in starts
        ]
        columns = ["started", "command", "from iteration"]
        blocks.append(Table(columns, resumed, "Starts of this run", text_columns=2))
    return blocks


def subtitle(run: Run) -> str:
    """Config, dataset and date in one line."""
    parts = []
    if run.start.get("config_file"):
        parts.append(str(run.start["config_file"]))
    context = run.results.get("", {}).get("context")
    if isinstance(context, dict) and "dataset" in context:
        parts.append(_dataset(context["dataset"]))
    if isinstance(run.start.get("time"), str):
        parts.append(run.start["time"].replace("T", " ").removesuffix("+00:00") + " UTC")
    elif run.status.state == EVALUATED:
        parts.append(f"results of {EMA_FOLDER if '' not in run.results else 'inference'}")
    return " · ".join(parts)
