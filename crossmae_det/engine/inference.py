"""A trained detector on images and videos: pictures and COCO results."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import Metadata
from detectron2.data.transforms import AugInput
from detectron2.structures import Instances
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from crossmae_det.engine.precision import inference_autocast
from crossmae_det.engine.pretrained import load_pretrained
from crossmae_det.engine.setup import resolve_device
from crossmae_det.engine.trainer import amp_dtype
from crossmae_det.utils.errors import UndecodableImageError
from crossmae_det.utils.image_reading import convert_color
from crossmae_det.visualization.files import write_image
from crossmae_det.visualization.inference_io import (
    ImageSource,
    PredictionWriter,
    VideoWriter,
    iter_inputs,
    output_paths,
)
from crossmae_det.visualization.predictions import draw_predictions

logger = logging.getLogger(__name__)


class Predictor:
    """A detector in evaluation mode, with the resizing and the precision of its config's
    evaluation.

    Args:
        cfg: a detection config; ``train.init_checkpoint`` holds the whole detector.
        weights: "model", or "ema" for the averaged weights of the run.

    Raises:
        ValueError, OSError: there is no checkpoint, or it is not one of this model.
    """

    def __init__(self, cfg: DictConfig, weights: str = "model"):
        if OmegaConf.select(cfg, "dataloader.test.mapper") is None:
            raise ValueError(
                "the config is not one of a detector: it has no dataloader.test.mapper"
            )
        self.model = load_pretrained(cfg, weights)
        self.device = resolve_device(cfg.train.device)
        self.amp_dtype = amp_dtype(cfg.train, self.device)
        mapper = instantiate(cfg.dataloader.test.mapper)
        self.augmentations = mapper.augmentations
        self.image_format = mapper.image_format
        categories = cfg.dataloader.categories
        self.metadata = Metadata(
            thing_classes=list(categories.values()),
            thing_dataset_id_to_contiguous_id={key: i for i, key in enumerate(categories)},
        )

    @torch.no_grad()
    def __call__(self, image_bgr: np.ndarray) -> Instances:
        """Detect in one image.

        Args:
            image_bgr: (H, W, 3) uint8; the model gets it in its own format.

        Returns:
            Boxes, scores, classes and, where the model has them, masks, in pixels of the image, on
            the CPU.
        """
        image = convert_color(image_bgr, self.image_format)
        aug_input = AugInput(image)
        self.augmentations(aug_input)
        tensor = torch.from_numpy(np.array(aug_input.image.transpose(2, 0, 1), order="C"))
        height, width = image.shape[:2]
        with inference_autocast(self.model, self.amp_dtype):
            (output,) = self.model([{"image": tensor, "height": height, "width": width}])
        return output["instances"].to("cpu")


def predict_files(
    cfg: DictConfig,
    inputs: Sequence[str],
    output: str,
    score_threshold: float,
    weights: str = "model",
) -> list[Path]:
    """Run a detector over images, folders, globs and videos.

    Pictures and videos with the detections drawn in go to ``output`` under the inputs' names, and
    the detections themselves to ``predictions.json`` there, in COCO's result format. Files that
    cannot be decoded are skipped, and named in the log.

    Args:
        cfg, weights: see :class:`Predictor`.
        inputs: files, folders (searched at any depth) or patterns.
        output: a folder.
        score_threshold: detections below it are neither drawn nor written; in [0, 1].

    Returns:
        The files that were skipped.

    Raises:
        ValueError, OSError: an input does not exist, or the output cannot be written.
    """
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"the score threshold must lie in [0, 1], got {score_threshold}")
    sources = iter_inputs(inputs, output)
    targets = output_paths(sources, output)
    predictor = Predictor(cfg, weights)
    skipped = []
    with (
        PredictionWriter(output, predictor.metadata) as writer,
        tqdm(total=len(sources), unit="file") as progress,
    ):

        def detect_and_draw(image: np.ndarray, path: Path, frame: int | None = None) -> np.ndarray:
            instances = predictor(image)
            writer.add(instances[instances.scores >= score_threshold], path, frame)
            return draw_predictions(
                image,
                instances,
                predictor.metadata,
                score_threshold=score_threshold,
                # The frames of a video keep their size.
                scale=None if frame is None else 1.0,
            )

        for source, target in zip(sources, targets, strict=True):
            progress.set_description(str(source.name))
            try:
                if isinstance(source, ImageSource):
                    (image,) = source
                    write_image(target, detect_and_draw(image, source.path))
                else:
                    with VideoWriter(target, fps=source.fps, size=source.size) as video:
                        for number, image in enumerate(source):
                            progress.set_postfix(frame=f"{number + 1}/{source.num_frames or '?'}")
                            video.write(detect_and_draw(image, source.path, number))
                    progress.set_postfix()
            except UndecodableImageError as error:
                skipped.append(source.path)
                logger.warning("Skipped: %s", error)
            progress.update()
    done = len(sources) - len(skipped)
    logger.info("Pictures and predictions of %d files are in %s", done, output)
    if skipped:
        names = ", ".join(map(str, skipped[:10])) + (", ..." if len(skipped) > 10 else "")
        logger.error("%d of %d files cannot be decoded: %s", len(skipped), len(sources), names)
    return skipped
