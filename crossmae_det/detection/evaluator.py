"""COCO box and mask AP: the evaluator of every detection config, its backends and its reports."""

import contextlib
import functools
import io
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from pycocotools.coco import COCO
from tabulate import tabulate

from crossmae_det.detection.coco_annotations import ValueReader, id_order
from crossmae_det.detection.coco_records import check_crowd
from crossmae_det.detection.ground_truth import GroundTruth
from crossmae_det.utils.files import write_json

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")
BACKENDS = ("auto", "faster-coco-eval", "pycocotools")
PER_CLASS_PREFIX = "AP-"
DETECTIONS_FILE = "coco_instances_results.json"
RESULTS_FILE = "results.json"


class COCOEvaluator(Detectron2COCOEvaluator):
    """AP of boxes and, where both the dataset and the model have them, of masks.

    Differences from detectron2's evaluator, which it replaces in every config:

    - The backend is ``faster-coco-eval`` or ``pycocotools``; they agree to 1e-6.
    - Only the images that were processed count: the AP of a subset is the AP of that subset.
    - A model without detections scores 0, as in COCO's own evaluation, not NaN. NaN means that a
      class or a size has no ground truth.
    - The ground truth is the clean form of the json, as in training, see `coco_json.load`.
      Annotation ids may start at 0 (COCO's evaluation treats a match with id 0 as no match).
    - Classes are matched by name, whatever their ids.
    - It writes ``coco_instances_results.json`` and ``results.json``, atomically, and for proposals
      detectron2's ``box_proposals.pkl``.

    Args:
        dataset_name: a name registered in ``DatasetCatalog`` or ``JSON:IMAGE_FOLDER``; may be a
            list with one of them.
        tasks: some of "bbox" and "segm". None: boxes, and masks where there are any.
        distributed: gather the detections of all processes in the first one, which alone evaluates.
        output_dir: folder for the detections and the results. None writes nothing.
        backend: "faster-coco-eval", "pycocotools", or "auto" for the first that is installed.
        max_dets_per_image: number of detections per image and class that count, by score.
        context: written to the results file beside the numbers: the iteration, the checkpoint.
        categories: id -> name in the order of the model's classes; the categories of the dataset
            are matched to them by name. None takes those of the dataset.
        crowd: "ignore" is COCO's rule: a detection in a crowd region (``iscrowd: 1``) is not
            counted. "keep" makes crowd regions ordinary objects, as in `get_dataset_dicts`.

    Raises:
        ValueError: an argument is out of range, the backend is not installed, the dataset is not
            registered, its json is not in COCO format, or its categories are not ``categories``.
        FileNotFoundError: the json does not exist.
    """

    def __init__(
        self,
        dataset_name: str | Sequence[str],
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        backend: str = "auto",
        max_dets_per_image: int = 100,
        context: Mapping[str, Any] | None = None,
        categories: Mapping[int, str] | None = None,
        crowd: str = "ignore",
    ):
        names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
        if len(names) != 1:
            raise ValueError(f"dataset_name must be one dataset, not {names}")
        if not isinstance(max_dets_per_image, int) or max_dets_per_image < 1:
            raise ValueError(
                f"max_dets_per_image must be a positive integer, not {max_dets_per_image!r}"
            )
        if unknown := set(tasks or ()) - set(TASKS):
            raise ValueError(f"tasks may be bbox and segm, not {', '.join(sorted(unknown))}")
        check_crowd(crowd)
        self._dataset_name = names[0]
        self._backend = resolve_backend(backend)
        self._max_dets = max_dets_per_image
        self._context = dict(context or {})
        # detectron2's constructor would read the json again; these are the attributes it sets.
        self._tasks = tuple(tasks) if tasks else None
        self._distributed = distributed
        self._output_dir = None if output_dir is None else str(output_dir)
        self._cpu_device = torch.device("cpu")
        self._logger = logger
        self._truth = GroundTruth(
            self._dataset_name,
            categories=categories,
            crowd=crowd,
            converted=self._path(f"{self._dataset_name}_coco_format.json"),
        )
        self._do_evaluation = self._truth.has_annotations
        self.reset()

    def process(
        self, inputs: Iterable[Mapping[str, Any]], outputs: Iterable[Mapping[str, Any]]
    ) -> None:
        """Add the detections of a batch.

        Args:
            inputs: a dict for each image, with "image_id".
            outputs: a dict for each image, with "instances": ``pred_boxes`` in pixels of the
                original image, ``scores`` in [0, 1], ``pred_classes`` from 0, and optionally
                ``pred_masks`` (D, H, W) bool.
        """
        for image, output in zip(inputs, outputs, strict=True):
            image_id = ValueReader().identifier(image["image_id"])
            super().process([{"image_id": image_id}], [output])
            if "instances" in output:
                self._predictions[-1]["has_masks"] = output["instances"].has("pred_masks")

    def evaluate(self, img_ids: Iterable[Any] | None = None) -> dict[str, dict[str, float]]:
        """Compute the metrics over the images that were processed.

        Args:
            img_ids: evaluate these images instead. Those that were not processed count as images
                without detections.

        Returns:
            In percent, NaN where there is no ground truth: ``{"bbox": {"AP", "AP50", "AP75", "APs",
            "APm", "APl", "AR@100", "AP-<class>", ...}, "segm": {...}}``. Empty in every process but
            the first, if nothing was processed, and if the dataset has no annotations (detections
            are written in any case).

        Raises:
            ValueError: an image is not in the json, or a predicted class is not in the dataset.
        """
        predictions = self._predictions
        if self._distributed:
            comm.synchronize()
            predictions = list(itertools.chain(*comm.gather(predictions, dst=0)))
            if not comm.is_main_process():
                return {}
        # Samplers that give every process the same number of images repeat some of them.
        by_image = {prediction["image_id"]: prediction for prediction in predictions}
        if not by_image:
            logger.warning("Nothing to evaluate on '%s': no images processed", self._dataset_name)
            return {}
        if self._output_dir:
            os.makedirs(self._output_dir, exist_ok=True)
        self._results: dict[str, dict[str, float]] = {}
        if any("proposals" in prediction for prediction in by_image.values()):
            self._evaluate_proposals(list(by_image.values()))
        if any("instances" in prediction for prediction in by_image.values()):
            self._evaluate_instances(by_image, by_image if img_ids is None else img_ids)
        return {task: dict(values) for task, values in self._results.items()}

    def _path(self, name: str) -> str | None:
        return None if self._output_dir is None else os.path.join(self._output_dir, name)

    def _evaluate_proposals(self, predictions: list[dict[str, Any]]) -> None:
        self._coco_api = COCO()
        self._coco_api.dataset = self._truth.dataset({id_: id_ for id_ in self._truth.image_ids})
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco_api.createIndex()
        self._eval_box_proposals(predictions)

    def _evaluate_instances(
        self, by_image: Mapping[Any, Mapping[str, Any]], img_ids: Iterable[Any]
    ) -> None:
        image_ids = sorted(set(img_ids), key=id_order)
        known = set(self._truth.image_ids)
        if missing := {*image_ids, *by_image} - known:
            raise ValueError(
                f"image id {next(iter(missing))!r} is not in {self._truth.file.info.path}: "
                "evaluate on the dataset that the loader reads"
            )
        detections = [d for p in by_image.values() for d in p.get("instances", ())]
        ids = self._truth.category_ids
        if unknown := {d["category_id"] for d in detections} - set(range(len(ids))):
            raise ValueError(
                f"the model predicts class {max(unknown)}, but '{self._dataset_name}' has "
                f"{len(ids)} classes: build the model with as many classes as the dataset"
            )
        if path := self._path(DETECTIONS_FILE):
            write_json(path, [{**d, "category_id": ids[d["category_id"]]} for d in detections])
            logger.info("Wrote %d detections to %s", len(detections), path)
        if not self._do_evaluation:
            logger.info("'%s' has no annotations to evaluate against", self._dataset_name)
            return
        has_masks = any(prediction.get("has_masks") for prediction in by_image.values())
        results = {
            task: self._evaluate_task(task, detections, image_ids)
            for task in self._tasks_to_evaluate(has_masks)
        }
        self._results.update(results)
        logger.info(
            "COCO AP on %d of the %d images of '%s':\n%s",
            len(image_ids),
            len(known),
            self._dataset_name,
            format_table(results),
        )
        logger.info("COCO AP per class:\n%s", format_per_class(results))
        if path := self._path(RESULTS_FILE):
            context = {
                **self._context,
                "dataset": self._dataset_name,
                "images": len(image_ids),
                "backend": self._backend,
                "max_dets_per_image": self._max_dets,
            }
            write_results(path, results, context=context)
            logger.info("Wrote the results to %s", path)

    def _tasks_to_evaluate(self, has_masks: bool) -> tuple[str, ...]:
        annotated = self._truth.has_masks
        if self._tasks is None:
            return TASKS if has_masks and annotated else ("bbox",)
        if "segm" in self._tasks and not (has_masks and annotated):
            owner = "the model predicts" if annotated else f"'{self._dataset_name}' has"
            raise ValueError(f"tasks includes segm, but {owner} no masks: evaluate bbox only")
        return tuple(task for task in TASKS if task in self._tasks)

    def _evaluate_task(
        self, task: str, detections: Sequence[Mapping[str, Any]], image_ids: Sequence[Any]
    ) -> dict[str, float]:
        # Numbers from 1: both backends treat a match with id 0 as none, one needs integer ids.
        numbers = {image_id: number for number, image_id in enumerate(image_ids, start=1)}
        # The size of a mask is its own area: if a box is present, COCO uses that of the box.
        key = "bbox" if task == "bbox" else "segmentation"
        found = [
            {
                "image_id": numbers[detection["image_id"]],
                "category_id": detection["category_id"] + 1,
                "score": detection["score"],
                key: detection[key],
            }
            for detection in detections
            if detection["image_id"] in numbers
        ]
        truth = self._truth.dataset(numbers, task)
        return compute_metrics(self._backend, task, truth, found, self._max_dets)


# Backends


def resolve_backend(backend: str) -> str:
    """The backend that ``backend`` stands for; the choice is logged once.

    Args:
        backend: one of ``BACKENDS``; "auto" is faster-coco-eval where it is installed.

    Returns:
        "faster-coco-eval" or "pycocotools".

    Raises:
        ValueError: the name is unknown, or the backend is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    chosen = "pycocotools"
    if backend != "pycocotools":
        try:
            _classes("faster-coco-eval")
            chosen = "faster-coco-eval"
        except ImportError as error:
            if backend != "auto":
                raise ValueError(
                    f"backend {backend!r} is not installed ({error}): pip install faster-coco-eval,"
                    " or use backend='pycocotools'"
                ) from error
    log_first_n(logging.INFO, f"COCO evaluation uses {chosen}", key="message")
    return chosen


def _classes(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if backend == "faster-coco-eval":
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, functools.partial(COCOeval_faster, print_function=logger.debug)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def compute_metrics(
    backend: str,
    task: str,
    ground_truth: dict[str, Any],
    detections: list[dict[str, Any]],
    max_dets: int,
) -> dict[str, float]:
    """Run COCO's evaluation. It modifies ``ground_truth`` and ``detections``.

    Args:
        backend: as `resolve_backend` returns it.
        task: "bbox" or "segm".
        ground_truth: the content of a COCO json: "images", "annotations", and "categories" with
            distinct names by ascending id.
        detections: in COCO's result format, for images of ``ground_truth``; may be empty.
        max_dets: number of detections per image and category that count.

    Returns:
        In percent, NaN where there is no ground truth: "AP", "AP50", "AP75", "APs", "APm", "APl",
        "AR@<max_dets>" and an "AP-<name>" for each category.
    """
    coco_class, evaluation_class = _classes(backend)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth, found = coco_class(), coco_class()
        truth.dataset = ground_truth
        truth.createIndex()
        if detections:
            found = truth.loadRes(detections)
        else:  # loadRes of pycocotools fails on an empty list
            found.dataset = {**ground_truth, "annotations": []}
            found.createIndex()
        evaluation = evaluation_class(truth, found, task)
        evaluation.params.maxDets = [max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
    assert list(evaluation.params.areaRngLbl) == ["all", "small", "medium", "large"]
    # T IoU thresholds (0.50 to 0.95), R recall thresholds, K categories, A areas, one max_dets.
    precision = np.asarray(evaluation.eval["precision"])[..., 0]  # (T, R, K, A), -1 without truth
    recall = np.asarray(evaluation.eval["recall"])[..., 0]  # (T, K, A)
    values = {
        "AP": precision[:, :, :, 0],
        "AP50": precision[0, :, :, 0],
        "AP75": precision[5, :, :, 0],
        "APs": precision[:, :, :, 1],
        "APm": precision[:, :, :, 2],
        "APl": precision[:, :, :, 3],
        f"AR@{max_dets}": recall[:, :, 0],
    }
    for index, category in enumerate(ground_truth["categories"]):
        values[PER_CLASS_PREFIX + category["name"]] = precision[:, :, index, 0]
    return {
        name: float(value[value > -1].mean() * 100) if (value > -1).any() else math.nan
        for name, value in values.items()
    }


# Reports


def write_results(
    path: str | os.PathLike[str], results: Mapping[str, Any], *, context: Mapping[str, Any]
) -> None:
    """Write ``{"results": ..., "context": ...}`` as JSON, atomically and with full precision.

    Args:
        path: the file to write.
        results: metrics, nested to any depth, e.g. ``{"bbox": {"AP": 51.2}}``. NaN and infinite
            values become null.
        context: what the numbers were measured on: config file, checkpoint, iteration, dataset,
            number of images, date, versions. Values without a JSON type (paths, dates) are written
            as text.

    Raises:
        OSError: ``path`` cannot be written.
    """
    content = {"results": results, "context": context}
    write_json(path, _json_values(content), indent=2, default=str)


def _json_values(value: Any) -> Any:
    """``value`` with numpy numbers as Python's, mappings as dicts, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): _json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_table(results: Mapping[str, Any]) -> str:
    """The summary metrics as a Markdown table: a row for each task, a column for each metric.

    Args:
        results: ``{task: {metric: value}}``, nested to any depth: ``{"ema": {"bbox": ...}}`` is the
            row ``ema bbox``. Per-class metrics are left out.

    Returns:
        Numbers with two decimals, ``-`` for NaN and missing ones; "no results" without any metric.
    """
    found = list(_summary_rows(results))
    if not found:
        return "no results"
    columns = dict.fromkeys(itertools.chain(*(values for _, values in found)))
    rows = [[title, *(_cell(values.get(key)) for key in columns)] for title, values in found]
    return _markdown(rows, ["", *columns])


def _summary_rows(
    results: Mapping[str, Any], title: str = ""
) -> Iterator[tuple[str, dict[str, float | None]]]:
    inner = {key: value for key, value in results.items() if isinstance(value, Mapping)}
    values = {k: v for k, v in results.items() if k not in inner and not _is_class(k)}
    if values:
        yield title, values
    for key, value in inner.items():
        yield from _summary_rows(value, f"{title} {key}".lstrip())


def format_per_class(results: Mapping[str, Mapping[str, float]], *, blocks: int = 3) -> str:
    """AP of every class as a Markdown table, the tasks side by side.

    Args:
        results: ``{task: {"AP-<name>": value, ...}}``; the order is that of the first task.
        blocks: number of classes per line.

    Returns:
        Numbers with two decimals, ``-`` for a class without ground truth; empty without classes.
    """
    rows: list[list[str]] = []
    for index, key in enumerate(
        dict.fromkeys(filter(_is_class, itertools.chain(*results.values())))
    ):
        if index % blocks == 0:
            rows.append([])
        rows[-1] += [key.removeprefix(PER_CLASS_PREFIX)]
        rows[-1] += [_cell(values.get(key)) for values in results.values()]
    titles = ["category", *(f"{task} AP" for task in results)]
    return _markdown(rows, titles, repeat=len(rows[0]) // len(titles)) if rows else ""


def _is_class(metric: str) -> bool:
    return metric.startswith(PER_CLASS_PREFIX)


def _cell(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _markdown(rows: list[list[str]], titles: list[str], repeat: int = 1) -> str:
    alignment = ["left"] + ["right"] * (len(titles) - 1)
    # The numbers are formatted already: tabulate must not parse them again.
    return tabulate(
        rows,
        headers=titles * repeat,
        tablefmt="pipe",
        colalign=alignment * repeat,
        disable_numparse=True,
    )
