"""COCO box and mask AP: the evaluator of every detection config."""

import contextlib
import io
import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
        self._analysis = analysis and has_hotcoco()
        if analysis and not self._analysis:
            logger.info("No analysis of the AP: hotcoco is not installed")
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
            prediction: dict[str, Any] = {"image_id": image_id}
            if "instances" in output:
                found = ImageDetections.from_instances(output["instances"])
                prediction["instances"] = found
                if self._output_dir and self._unknown_class([found]) is None:
                    prediction["json"] = found.to_json(image_id, self._truth.category_ids)
            if "proposals" in output:
                prediction["proposals"] = output["proposals"].to(self._cpu_device)
            if len(prediction) > 1:
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
        if (unknown := self._unknown_class(found.values())) is not None:
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
        has_masks = any(image.masks is not None for image in found.values())
        results, analysis = {}, {}
        for task in self._tasks_to_evaluate(has_masks):
            results[task], explanation = self._evaluate_task(task, found, image_ids)
            if explanation is not None:
                analysis[task] = explanation
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
        if self._analysis:
            logger.info("AP50 that each type of error costs (TIDE):\n%s", format_errors(analysis))
            more = {"analysis": analysis, "dataset_health": check_dataset(self._truth.file)}
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

    def _unknown_class(self, images: Iterable[ImageDetections]) -> int | None:
        """A predicted class that the dataset does not have."""
        count = len(self._truth.names)
        for image in images:
            if len(image) and not 0 <= image.classes.min() <= image.classes.max() < count:
                return int(image.classes.max())
        return None

    def _write_detections(self, path: str, predictions: Iterable[Mapping[str, Any]]) -> None:
        parts = [text for p in predictions if (text := p.get("json"))]
        with atomic_path(path) as temporary:
            temporary.write_text("[" + ", ".join(parts) + "]\n", encoding="utf-8")
        logger.info("Wrote the detections to %s", path)

    def _tasks_to_evaluate(self, has_masks: bool) -> tuple[str, ...]:
        annotated = self._truth.has_masks
        if self._tasks is None:
            return TASKS if has_masks and annotated else ("bbox",)
        if "segm" in self._tasks and not (has_masks and annotated):
            owner = "the model predicts" if annotated else f"'{self._dataset_name}' has"
            raise ValueError(f"tasks includes segm, but {owner} no masks: evaluate bbox only")
        return tuple(task for task in TASKS if task in self._tasks)

    def _evaluate_task(
        self, task: str, found: Mapping[Any, ImageDetections], image_ids: Sequence[Any]
    ) -> tuple[dict[str, float], dict[str, Any] | None]:
        # Numbers from 1: both backends treat a match with id 0 as none, one needs integer ids.
        numbers = {image_id: number for number, image_id in enumerate(image_ids, start=1)}
        chosen = [(numbers[id_], image) for id_, image in found.items() if id_ in numbers]
        detections = Detections.join(chosen, masks=task == "segm")
        truth = self._truth.dataset(numbers, task)
        evaluation = evaluate(self._backend, task, truth, detections, self._max_dets)
        results = summarize(evaluation, self._truth.names, self._max_dets)
        if not self._analysis or detections.has_nan():
            return results, None
        if self._backend == "pycocotools":
            truth = self._truth.dataset(numbers, task)
        return results, analyze(
            task, evaluation, truth, detections, image_ids=image_ids, max_dets=self._max_dets
        )
