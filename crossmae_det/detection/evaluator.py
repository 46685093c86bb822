"""COCO box and mask AP: the evaluator of every detection config."""

import contextlib
import io
import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.utils import comm
from pycocotools.coco import COCO

from crossmae_det.detection.coco_annotations import ValueReader, id_order
from crossmae_det.detection.coco_backends import evaluate, has_hotcoco, resolve_backend, summarize
from crossmae_det.detection.coco_records import check_crowd
from crossmae_det.detection.dataset_health import check_dataset
from crossmae_det.detection.detections import Detections, ImageDetections
from crossmae_det.detection.error_analysis import analyze
from crossmae_det.detection.evaluation_results import (
    format_errors,
    format_per_class,
    format_table,
    write_results,
)
from crossmae_det.detection.ground_truth import GroundTruth
from crossmae_det.utils.files import atomic_path

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")
DETECTIONS_FILE = "coco_instances_results.json"
RESULTS_FILE = "results.json"


class COCOEvaluator(Detectron2COCOEvaluator):
    """AP of boxes and, where both the dataset and the model have them, of masks.

    Differences from detectron2's evaluator, which it replaces in every config:

    - The backend is ``hotcoco`` or ``pycocotools``; their numbers are equal, hotcoco's take
      a fraction of the time.
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
        backend: "hotcoco", "pycocotools", or "auto" for the first that is installed.
        max_dets_per_image: number of detections per image and class that count, by score.
        context: written to the results file beside the numbers: the iteration, the checkpoint.
        categories: id -> name in the order of the model's classes; the categories of the dataset
            are matched to them by name. None takes those of the dataset.
        crowd: "ignore" is COCO's rule: a detection in a crowd region (``iscrowd: 1``) is not
            counted. "keep" makes crowd regions ordinary objects, as in `get_dataset_dicts`.
        analysis: explain the AP in the results file (`error_analysis.analyze`) and check the
            dataset (`dataset_health.check_dataset`). It needs hotcoco, with either backend.

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
        analysis: bool = True,
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
        self._health = None
        if analysis and not has_hotcoco():
            logger.info("No analysis of the AP: hotcoco is not installed")
        elif analysis and self._do_evaluation and (not distributed or comm.is_main_process()):
            self._health = check_dataset(self._truth.file)
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
            found, proposals = output.get("instances"), output.get("proposals")
            if found is None and proposals is None:
                continue
            image_id = ValueReader().identifier(image["image_id"])
            self.add(image_id, None if found is None else ImageDetections.from_instances(found))
            if proposals is not None:
                self._predictions[-1]["proposals"] = proposals.to(self._cpu_device)

    def add(self, image_id: int | str | None, detections: ImageDetections | None) -> None:
        """Add the detections of an image; None if it has been processed for its proposals."""
        prediction: dict[str, Any] = {"image_id": image_id}
        if detections is not None:
            prediction["instances"] = detections
            if detections.masks is not None and self._do_evaluation:
                self._truth.encode_masks()
            if self._output_dir and self._unknown_class(detections.classes) is None:
                prediction["json"] = detections.to_json(image_id, self._truth.category_ids)
        self._predictions.append(prediction)

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
        found = {id_: p["instances"] for id_, p in by_image.items() if "instances" in p}
        # Numbers from 1: both backends treat a match with id 0 as none, one needs integer ids.
        # Images that are not evaluated have higher ones.
        numbers = {id_: number for number, id_ in enumerate([*image_ids, *found], start=1)}
        numbers |= {id_: number for number, id_ in enumerate(image_ids, start=1)}
        detections = Detections.join((numbers[id_], image) for id_, image in found.items())
        if (unknown := self._unknown_class(detections.classes)) is not None:
            raise ValueError(
                f"the model predicts class {unknown}, but '{self._dataset_name}' has "
                f"{len(self._truth.names)} classes: build the model with as many classes as the "
                "dataset"
            )
        if path := self._path(DETECTIONS_FILE):
            self._write_detections(path, by_image.values())
        if not self._do_evaluation:
            logger.info("'%s' has no annotations to evaluate against", self._dataset_name)
            return
        if len(image_ids) < len(set(numbers.values())):
            detections = detections.select(detections.images <= len(image_ids))
        has_masks = any(image.masks is not None for image in found.values())
        tasks = {
            task: _Task(self._truth, task, detections, image_ids, self._max_dets)
            for task in self._tasks_to_evaluate(has_masks)
        }
        results = {name: task.evaluate(self._backend) for name, task in tasks.items()}
        self._results.update(results)
        logger.info(
            "COCO AP on %d of the %d images of '%s':\n%s",
            len(image_ids),
            len(known),
            self._dataset_name,
            format_table(results),
        )
        logger.info("COCO AP per class:\n%s", format_per_class(results))
        more = {}
        if self._health is not None and not detections.has_nan():
            analysis = {name: task.analyze() for name, task in tasks.items()}
            logger.info("AP50 that each type of error costs (TIDE):\n%s", format_errors(analysis))
            more = {"analysis": analysis, "dataset_health": self._health}
        if path := self._path(RESULTS_FILE):
            context = {
                **self._context,
                "dataset": self._dataset_name,
                "images": len(image_ids),
                "backend": self._backend,
                "max_dets_per_image": self._max_dets,
            }
            write_results(path, results, context=context, **more)
            logger.info("Wrote the results to %s", path)

    def _unknown_class(self, classes: np.ndarray) -> int | None:
        """A predicted class that the dataset does not have."""
        unknown = classes[(classes < 0) | (classes >= len(self._truth.names))]
        return int(unknown.max()) if len(unknown) else None

    def _write_detections(self, path: str, predictions: Iterable[Mapping[str, Any]]) -> None:
        parts = [text for p in predictions if (text := p.get("json"))]
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"[" + b", ".join(parts) + b"]\n")
        logger.info("Wrote the detections to %s", path)

    def _tasks_to_evaluate(self, has_masks: bool) -> tuple[str, ...]:
        annotated = self._truth.has_masks
        if self._tasks is None:
            return TASKS if has_masks and annotated else ("bbox",)
        if "segm" in self._tasks and not (has_masks and annotated):
            owner = "the model predicts" if annotated else f"'{self._dataset_name}' has"
            raise ValueError(f"tasks includes segm, but {owner} no masks: evaluate bbox only")
        return tuple(task for task in TASKS if task in self._tasks)


class _Task:
    """The evaluation of boxes or of masks.

    Args:
        truth: the dataset.
        task: "bbox" or "segm".
        detections: of the images to evaluate.
        image_ids: ids of these images, in the order of their numbers.
        max_dets: number of detections per image and class that count.
    """

    def __init__(
        self,
        truth: GroundTruth,
        task: str,
        detections: Detections,
        image_ids: Sequence[Any],
        max_dets: int,
    ):
        if task == "segm" and len(detections) and detections.masks is None:
            raise ValueError("some images have detections without masks: evaluate bbox only")
        self._truth = truth
        self._task = task
        self._detections = detections if task == "segm" else detections.without_masks()
        self._image_ids = image_ids
        self._max_dets = max_dets
        self._annotations = self._dataset()

    def _dataset(self) -> dict[str, Any]:
        numbers = {image_id: number for number, image_id in enumerate(self._image_ids, start=1)}
        return self._truth.dataset(numbers, self._task)

    def evaluate(self, backend: str) -> dict[str, float]:
        settings = (self._task, self._annotations, self._detections, self._max_dets)
        self._evaluation = evaluate(backend, *settings)
        return summarize(self._evaluation, self._truth.names, self._max_dets)

    def analyze(self) -> dict[str, Any]:
        if self._evaluation.hotcoco is None:  # pycocotools has changed them
            self._annotations = self._dataset()
        return analyze(
            self._task,
            self._evaluation,
            self._annotations,
            self._detections,
            image_ids=self._image_ids,
            max_dets=self._max_dets,
        )
