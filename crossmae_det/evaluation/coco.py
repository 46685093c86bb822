"""The evaluator of every detection config: COCO box and mask AP."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm

from crossmae_det.data.coco_records import check_crowd
from crossmae_det.data.coco_values import Repairs, id_order, identifier
from crossmae_det.evaluation.backends import accumulate, metrics, resolve_backend
from crossmae_det.evaluation.ground_truth import GroundTruth
from crossmae_det.evaluation.results import format_per_class, format_table, write_results
from crossmae_det.visualization.files import write_json

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")
DETECTIONS_FILE = "coco_instances_results.json"
RESULTS_FILE = "results.json"


class COCOEvaluator(Detectron2COCOEvaluator):
    """AP of boxes and, where both the data set and the model have them, of masks.

    Differences from detectron2's evaluator, which it replaces in every config:

    - ``faster-coco-eval`` or ``pycocotools``, equal to 1e-6;
    - only the images that were processed count: the AP of a subset is the AP of that subset;
    - a model without detections scores 0, as in COCO's own evaluation, and not NaN. NaN remains for
      what has no ground truth (a class, a size);
    - the ground truth is the clean form of the json that training reads too, see
      `crossmae_det.data.coco_json.load`; annotation ids may start at 0 (COCO's evaluation takes a
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
            categories: id -> name in the order of the model's classes; the categories of the data
                set are mapped to them by name. None: those of the data set.
            crowd: "ignore" is COCO's rule, that a detection in a crowd region (``iscrowd: 1``)
                counts as nothing; "keep" makes crowd regions objects like any other, as in
                `crossmae_det.data.get_dataset_dicts`.

        Raises:
            ValueError: an argument is out of range, the backend is not installed, the data set is
                not registered, its annotation file is not in COCO format, or its categories are not
                those of the model.
            FileNotFoundError: the data set's annotation file does not exist.
        """
        if not isinstance(dataset_name, str):
            if len(dataset_name) != 1:
                raise ValueError(f"dataset_name must be one data set, not {list(dataset_name)}")
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
            the first, when nothing was processed, and when the data set has no annotations (the
            detections are written all the same).

        Raises:
            ValueError: an image is not in the annotation file, or a predicted class is not in the
                data set.
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
                f"data set that the loader reads"
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
        """All detections in COCO's result format, with the category ids of the data set."""
        category_ids = self._truth.category_ids
        detections = []
        for prediction in by_image.values():
            for detection in prediction.get("instances", ()):
                index = detection["category_id"]
                if not 0 <= index < len(category_ids):
                    raise ValueError(
                        f"the model predicts class {index}, but '{self._dataset_name}' has "
                        f"{len(category_ids)} classes; give the model as many as the data set"
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
