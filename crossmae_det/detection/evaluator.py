"""Evaluation results as a table for people and as JSON for programs.

COCO's evaluation by faster-coco-eval or by pycocotools.

Dimensions of the arrays that COCO's evaluation accumulates: T IoU thresholds (0.50 to 0.95),
R recall thresholds, K categories, A areas (all, small, medium, large).

The evaluator of every detection config: COCO box and mask AP.
"""

from __future__ import annotations

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
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from tabulate import tabulate

from crossmae_det.detection.coco_annotations import Repairs, id_order, identifier
from crossmae_det.detection.coco_records import check_crowd
from crossmae_det.detection.ground_truth import GroundTruth
from crossmae_det.utils.files import write_json

PER_CLASS_PREFIX = "AP-"


def write_results(
    path: str | os.PathLike[str], results: Mapping[str, Any], *, context: Mapping[str, Any]
) -> None:
    """Writes ``{"results": ..., "context": ...}`` as JSON, atomically and with full precision.

    Args:
        path: the file to write.
        results: metrics, nested to any depth, e.g. ``{"bbox": {"AP": 51.2}}``. NaN and infinite
            values become null.
        context: what the numbers were measured on: config file, checkpoint, iteration, dataset,
            number of images, date, versions. Values that JSON does not know (paths, dates) are
            written as their text.

    Raises:
        OSError: ``path`` cannot be written.
    """
    write_json(
        path, {"results": _plain(results), "context": _plain(context)}, indent=2, default=str
    )


def format_table(results: Mapping[str, Any]) -> str:
    """The summary metrics as one table: a row for every task, a column for every metric.

    Args:
        results: metrics, nested to any depth; a row is every mapping that holds numbers, named by
            its keys from the outside in (``bbox``, or ``ema bbox``). Per-class metrics
            (``AP-<name>``) are left out.

    Returns:
        A table in Markdown, two decimals, ``-`` for what could not be computed; "no results" when
        there is no number.
    """
    rows = [(name, metrics) for name, metrics in _rows(results, ()) if metrics]
    if not rows:
        return "no results"
    columns = list(dict.fromkeys(key for _, metrics in rows for key in metrics))
    cells = [
        [name, *(_cell(metrics.get(key, math.nan)) for key in columns)] for name, metrics in rows
    ]
    return _markdown(cells, ["", *columns])


def format_per_class(results: Mapping[str, Mapping[str, float]], *, blocks: int = 3) -> str:
    """AP of every class, the tasks side by side.

    Args:
        results: ``{task: {"AP-<name>": value, ...}}``; the order is that of the first task.
        blocks: how many classes share a line at most.

    Returns:
        A table in Markdown, ``-`` for a class without ground truth; empty when there is no
        per-class metric.
    """
    tasks = list(results)
    all_keys = (key for metrics in results.values() for key in metrics)
    keys = list(dict.fromkeys(key for key in all_keys if key.startswith(PER_CLASS_PREFIX)))
    if not keys:
        return ""
    blocks = max(1, min(blocks, math.ceil(len(keys) / 8)))
    height = math.ceil(len(keys) / blocks)
    lines: list[list[str]] = [[] for _ in range(height)]
    for index, key in enumerate(keys):
        name = key.removeprefix(PER_CLASS_PREFIX)
        lines[index % height] += [
            name,
            *(_cell(results[task].get(key, math.nan)) for task in tasks),
        ]
    used = math.ceil(len(keys) / height)
    width = used * (1 + len(tasks))
    cells = [line + [""] * (width - len(line)) for line in lines]
    headers = ["category", *(f"{task} AP" for task in tasks)] * used
    return _markdown(cells, headers, period=1 + len(tasks))


def _rows(
    node: Mapping[str, Any], names: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, float]]]:
    metrics = {
        key: float(value)
        for key, value in node.items()
        if isinstance(value, int | float | np.number) and not key.startswith(PER_CLASS_PREFIX)
    }
    yield " ".join(names), metrics
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _rows(value, (*names, str(key)))


def _markdown(cells: list[list[str]], headers: list[str], period: int | None = None) -> str:
    period = period or len(headers)
    alignment = ["left" if column % period == 0 else "right" for column in range(len(headers))]
    # The numbers are text by now: tabulate must neither parse nor reformat them.
    return tabulate(
        cells, headers=headers, tablefmt="pipe", colalign=alignment, disable_numparse=True
    )


def _cell(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def _plain(value: Any) -> Any:
    """``value`` with numpy numbers as Python's, mappings as dicts, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


logger = logging.getLogger(__name__)


BACKENDS = ("auto", "faster-coco-eval", "pycocotools")


def resolve_backend(backend: str) -> str:
    """The backend that ``backend`` stands for; the choice is logged once.

    Args:
        backend: one of ``BACKENDS``.

    Returns:
        "faster-coco-eval" or "pycocotools".

    Raises:
        ValueError: the name is unknown, or the backend is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"COCO evaluation backend '{backend}' is unknown; it may be {', '.join(BACKENDS)}"
        )
    chosen = "pycocotools"
    if backend != "pycocotools":
        try:
            _classes("faster-coco-eval")
            chosen = "faster-coco-eval"
        except ImportError as error:
            if backend != "auto":
                raise ValueError(
                    f"COCO evaluation backend '{backend}' is not installed ({error}); "
                    f"pip install faster-coco-eval, or use backend='pycocotools'"
                ) from error
    _announce(chosen)
    return chosen


def accumulate(
    backend: str,
    task: str,
    ground_truth: dict[str, Any],
    detections: list[dict[str, Any]],
    max_dets: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Runs COCO's evaluation. Both arguments that hold annotations are written into.

    Args:
        backend: a backend as ``resolve_backend`` returns it.
        task: "bbox" or "segm".
        ground_truth: the content of a COCO annotation file: "images", "annotations", "categories".
        detections: in COCO's result format, for images of ``ground_truth``; may be empty.
        max_dets: how many detections of an image and category count.

    Returns:
        The precision (T, R, K, A) and the recall (T, K, A) in [0, 1], -1 where there is no ground
        truth; the categories by ascending id.
    """
    coco_class, evaluation_class = _classes(backend)
    # pycocotools prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_class()
        truth.dataset = ground_truth
        truth.createIndex()
        if detections:
            found = truth.loadRes(detections)
        else:
            # pycocotools cannot load an empty list.
            found = coco_class()
            found.dataset = {**ground_truth, "annotations": []}
            found.createIndex()
        evaluation = evaluation_class(truth, found, task)
        evaluation.params.maxDets = [max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
    assert list(evaluation.params.areaRngLbl) == ["all", "small", "medium", "large"]
    # The last dimension is the limit on detections, of which there is one.
    precision = np.asarray(evaluation.eval["precision"])[..., 0]
    recall = np.asarray(evaluation.eval["recall"])[..., 0]
    return precision, recall


def metrics(
    precision: np.ndarray, recall: np.ndarray, class_names: Sequence[str], max_dets: int
) -> dict[str, float]:
    """COCO's metrics in percent, NaN where there is no ground truth.

    Args:
        precision: (T, R, K, A) as from ``accumulate``.
        recall: (T, K, A) as from ``accumulate``.
        class_names: K distinct names.
        max_dets: the limit that ``accumulate`` was given, for the name of the recall.

    Returns:
        "AP", "AP50", "AP75", "APs", "APm", "APl", "AR@<max_dets>" and an "AP-<name>" per class.
    """
    results = {
        "AP": _percent(precision[:, :, :, 0]),
        "AP50": _percent(precision[0, :, :, 0]),
        "AP75": _percent(precision[5, :, :, 0]),
        "APs": _percent(precision[:, :, :, 1]),
        "APm": _percent(precision[:, :, :, 2]),
        "APl": _percent(precision[:, :, :, 3]),
        f"AR@{max_dets}": _percent(recall[:, :, 0]),
    }
    for index, name in enumerate(class_names):
        results[PER_CLASS_PREFIX + name] = _percent(precision[:, :, index, 0])
    return results


@functools.cache
def _announce(backend: str) -> None:
    logger.info("COCO evaluation uses %s.", backend)


def _classes(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if backend == "faster-coco-eval":
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, functools.partial(COCOeval_faster, print_function=logger.debug)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def _percent(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean() * 100) if valid.size else float("nan")


TASKS = ("bbox", "segm")

DETECTIONS_FILE = "coco_instances_results.json"

RESULTS_FILE = "results.json"


class COCOEvaluator(Detectron2COCOEvaluator):
    """AP of boxes and, where both the dataset and the model have them, of masks.

    Differences from detectron2's evaluator, which it replaces in every config:

    - ``faster-coco-eval`` or ``pycocotools``, equal to 1e-6;
    - only the images that were processed count: the AP of a subset is the AP of that subset;
    - a model without detections scores 0, as in COCO's own evaluation, and not NaN. NaN remains for
      what has no ground truth (a class, a size);
    - the ground truth is the clean form of the json that training reads too, see
      `coco_json.load`; annotation ids may start at 0 (COCO's evaluation takes a
      match with id 0 for none);
    - classes are matched by name, whatever their ids;
    - what is written of instances is ``coco_instances_results.json`` and ``results.json``,
      atomically.
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
        """
        Args:
            dataset_name: a name registered in ``DatasetCatalog`` or ``JSON:IMAGE_FOLDER``, or a
                list of one.
            tasks: some of "bbox" and "segm". None: boxes, and masks where there are any.
            distributed: gather the detections of all processes in the first one, which alone
                evaluates.
            output_dir: where the detections and the results are written. None: nowhere.
            backend: "faster-coco-eval", "pycocotools", or "auto" for the first of them that is
                installed.
            max_dets_per_image: so many detections of an image and class count, those of the highest
                scores.
            context: goes into the results file beside the numbers: the iteration, the checkpoint.
            categories: id -> name in the order of the model's classes; the categories of the
                 dataset are mapped to them by name. None: those of the dataset.
            crowd: "ignore" is COCO's rule, that a detection in a crowd region (``iscrowd: 1``)
                counts as nothing; "keep" makes crowd regions objects like any other, as in
                `crossmae_det.detection.get_dataset_dicts`.

        Raises:
            ValueError: an argument is out of range, the backend is not installed, the dataset is
                not registered, its annotation file is not in COCO format, or its categories are not
                those of the model.
            FileNotFoundError: the dataset's annotation file does not exist.
        """
        if not isinstance(dataset_name, str):
            if len(dataset_name) != 1:
                raise ValueError(f"dataset_name must be one dataset, not {list(dataset_name)}")
            (dataset_name,) = dataset_name
        if not isinstance(max_dets_per_image, int) or max_dets_per_image < 1:
            raise ValueError(
                f"max_dets_per_image must be a positive integer, not {max_dets_per_image!r}"
            )
        if unknown := set(tasks or ()) - set(TASKS):
            raise ValueError(f"tasks may be bbox and segm, not {', '.join(sorted(unknown))}")
        check_crowd(crowd)
        self._backend = resolve_backend(backend)
        self._max_dets = max_dets_per_image
        self._dataset_name = dataset_name
        self._context = dict(context or {})
        self._output_dir = None if output_dir is None else str(output_dir)
        converted = None
        if self._output_dir is not None:
            converted = os.path.join(self._output_dir, f"{dataset_name}_coco_format.json")
        self._truth = GroundTruth(
            dataset_name, categories=categories, crowd=crowd, converted=converted
        )
        # What detectron2's evaluator of proposals reads; its constructor reads the json anew.
        self._tasks = tuple(tasks) if tasks else None
        self._distributed = distributed
        self._cpu_device = torch.device("cpu")
        self._do_evaluation = self._truth.has_annotations
        self._logger = logger
        self._predictions: list[dict[str, Any]] = []

    def process(
        self, inputs: Iterable[Mapping[str, Any]], outputs: Iterable[Mapping[str, Any]]
    ) -> None:
        """Takes the detections of a batch.

        Args:
            inputs: one dict for an image, with "image_id".
            outputs: one dict for an image, with "instances": ``pred_boxes`` in pixels of the
                original image, ``scores`` in [0, 1], ``pred_classes`` from 0, and perhaps
                ``pred_masks`` (D, H, W) bool.
        """
        for image, output in zip(inputs, outputs, strict=True):
            image_id = identifier(image["image_id"], Repairs(), ("image", None))
            prediction: dict[str, Any] = {"image_id": image_id}
            if "instances" in output:
                instances = output["instances"].to(self._cpu_device)
                prediction["instances"] = instances_to_coco_json(instances, image_id)
                prediction["has_masks"] = instances.has("pred_masks")
            if "proposals" in output:
                prediction["proposals"] = output["proposals"].to(self._cpu_device)
            if len(prediction) > 1:
                self._predictions.append(prediction)

    def evaluate(self, img_ids: Iterable[Any] | None = None) -> dict[str, dict[str, float]]:
        """Computes the metrics over the images that were processed.

        Args:
            img_ids: evaluate these images instead. One of them that was not processed counts as one
                without detections.

        Returns:
            In percent, NaN where there is no ground truth: ``{"bbox": {"AP", "AP50", "AP75", "APs",
            "APm", "APl", "AR@100", "AP-<class>", ...}, "segm": {...}}``. Empty in every process but
            the first, when nothing was processed, and when the dataset has no annotations (the
            detections are written all the same).

        Raises:
            ValueError: an image is not in the annotation file, or a predicted class is not in the
                dataset.
        """
        predictions = self._predictions
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(predictions, dst=0)
            if not comm.is_main_process():
                return {}
            predictions = list(itertools.chain(*gathered))
        # Samplers that give every process the same number of images repeat some of them.
        by_image = {prediction["image_id"]: prediction for prediction in predictions}
        if not by_image:
            logger.warning(
                "Nothing to evaluate on '%s': no image was processed", self._dataset_name
            )
            return {}

        self._results: dict[str, dict[str, float]] = {}
        if any("proposals" in prediction for prediction in by_image.values()):
            if self._output_dir:  # detectron2 writes the proposals there
                os.makedirs(self._output_dir, exist_ok=True)
            self._coco_api = self._truth.coco_api()
            self._eval_box_proposals(list(by_image.values()))
        if any("instances" in prediction for prediction in by_image.values()):
            self._evaluate_instances(by_image, by_image if img_ids is None else img_ids)
        return {task: dict(values) for task, values in self._results.items()}

    def _evaluate_instances(
        self, by_image: Mapping[Any, Mapping[str, Any]], img_ids: Iterable[Any]
    ) -> None:
        image_ids = sorted(set(img_ids), key=id_order)
        known = self._truth.image_ids
        if missing := [image_id for image_id in {*image_ids, *by_image} if image_id not in known]:
            raise ValueError(
                f"image id {missing[0]!r} is not in {self._truth.file.path}; evaluate on the "
                f"dataset that the loader reads"
            )
        detections = self._detections(by_image)
        if self._output_dir:
            path = os.path.join(self._output_dir, DETECTIONS_FILE)
            write_json(path, detections)
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
        logger.info("COCO AP of every class:\n%s", format_per_class(results))
        if self._output_dir:
            context = {
                **self._context,
                "dataset": self._dataset_name,
                "images": len(image_ids),
                "backend": self._backend,
                "max_dets_per_image": self._max_dets,
            }
            path = os.path.join(self._output_dir, RESULTS_FILE)
            write_results(path, results, context=context)
            logger.info("Results are in %s", path)

    def _detections(self, by_image: Mapping[Any, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """All detections in COCO's result format, with the category ids of the dataset."""
        category_ids = self._truth.category_ids
        detections = []
        for prediction in by_image.values():
            for detection in prediction.get("instances", ()):
                index = detection["category_id"]
                if not 0 <= index < len(category_ids):
                    raise ValueError(
                        f"the model predicts class {index}, but '{self._dataset_name}' has "
                        f"{len(category_ids)} classes; give the model as many as the dataset"
                    )
                detections.append({**detection, "category_id": category_ids[index]})
        return detections

    def _tasks_to_evaluate(self, has_masks: bool) -> tuple[str, ...]:
        annotated = self._truth.has_masks
        if self._tasks is None:
            return TASKS if has_masks and annotated else ("bbox",)
        if "segm" in self._tasks and not (has_masks and annotated):
            side = "the model predicts" if annotated else f"'{self._dataset_name}' has"
            raise ValueError(f"tasks asks for segm, but {side} no masks; ask for bbox only")
        return tuple(task for task in TASKS if task in self._tasks)

    def _evaluate_task(
        self, task: str, detections: Sequence[Mapping[str, Any]], image_ids: Sequence[Any]
    ) -> dict[str, float]:
        ground_truth, numbers = self._truth.dataset(image_ids, task)
        classes = {id_: index for index, id_ in enumerate(self._truth.category_ids)}
        # The size of a mask is its own area: with a box beside it, COCO would take the box's.
        key = "bbox" if task == "bbox" else "segmentation"
        found = [
            {
                "image_id": numbers[detection["image_id"]],
                "category_id": classes[detection["category_id"]] + 1,
                "score": detection["score"],
                key: detection[key],
            }
            for detection in detections
            if detection["image_id"] in numbers
        ]
        precision, recall = accumulate(self._backend, task, ground_truth, found, self._max_dets)
        return metrics(precision, recall, self._truth.names, self._max_dets)
