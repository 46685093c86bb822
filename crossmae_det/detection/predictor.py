"""A trained detector on images and videos: finding inputs, predicting, writing the results."""

import glob
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from crossmae_det.detection.mapper import AugInput
from crossmae_det.detection.visualizer import draw_predictions
from crossmae_det.engine.launch import resolve_device
from crossmae_det.engine.precision import amp_dtype, inference_autocast
from crossmae_det.engine.train import load_pretrained
from crossmae_det.utils import atomic_path
from crossmae_det.utils.files import write_image, write_json
from crossmae_det.utils.image_files import IMAGE_SUFFIXES, is_image_file, walk_images
from crossmae_det.utils.image_reading import UndecodableImageError, convert_color, read_image

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
MEDIA_SUFFIXES = IMAGE_SUFFIXES + VIDEO_SUFFIXES

# Images that OpenCV writes in color keep their format; others become PNG.
DRAWN_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

DEFAULT_FPS = 25.0

PREDICTIONS_FILE = "predictions.json"
IMAGES_FILE = "images.json"


class Predictor:
    """A detector in evaluation mode, with the resizing and the precision of its evaluation.

    Args:
        cfg: a detection config; ``train.init_checkpoint`` holds the whole detector.
        weights: "model", or "ema" for the averaged weights of the run.

    Raises:
        ValueError, OSError: there is no checkpoint, or it does not fit the model.
    """

    def __init__(self, cfg: DictConfig, weights: str = "model"):
        if OmegaConf.select(cfg, "dataloader.test.mapper") is None:
            raise ValueError("dataloader.test.mapper is missing: use a detection config")
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
        """Detect objects in one image.

        Args:
            image_bgr: (H, W, 3) uint8; it is converted to the format of the model.

        Returns:
            Boxes, scores, classes and, if the model has them, masks, in pixels of the image, on the
            CPU.
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
    """Run a detector on images, folders, patterns and videos.

    Images and videos with the detections drawn in are written to ``output`` under the names of the
    inputs, and the detections to ``predictions.json`` in COCO's result format. Undecodable files
    are skipped and logged.

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
                scale=None if frame is None else 1,  # frames keep their size
            )

        for source, target in zip(sources, targets, strict=True):
            progress.set_description(str(source.name))
            try:
                if not source.is_video:
                    (image,) = source
                    write_image(target, detect_and_draw(image, source.path))
                else:
                    with video_writer(target, fps=source.fps, size=source.size) as write_frame:
                        for number, image in enumerate(source):
                            progress.set_postfix(frame=f"{number + 1}/{source.num_frames or '?'}")
                            write_frame(detect_and_draw(image, source.path, number))
                    progress.set_postfix()
            except UndecodableImageError as error:
                skipped.append(source.path)
                logger.warning("Skipped: %s", error)
            progress.update()
    logger.info("Results of %d files are in %s", len(sources) - len(skipped), output)
    if skipped:
        names = ", ".join(map(str, skipped[:10])) + (", ..." if len(skipped) > 10 else "")
        logger.error("%d of %d files cannot be decoded: %s", len(skipped), len(sources), names)
    return skipped


@dataclass(frozen=True)
class Source:
    """An image or a video. Iterating decodes its frames, (H, W, 3) uint8 BGR, upright.

    A video is opened when a property or a frame is needed; UndecodableImageError says that it
    cannot be decoded or has no frame.

    Attributes:
        path: the file.
        name: its path relative to the folder that the user named.
        is_video: by the suffix; an image has one frame and none of the properties below.
        fps: frames per second, 25 if the file does not say.
        size: (width, height) of every frame.
        num_frames: as stated by the file, which need not be what can be decoded; None if it is not
            stated.
    """

    path: Path
    name: Path

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES

    @property
    def fps(self) -> float:
        return self._properties[0]

    @property
    def size(self) -> tuple[int, int]:
        return self._properties[1]

    @property
    def num_frames(self) -> int | None:
        return self._properties[2]

    @cached_property
    def _properties(self) -> tuple[float, tuple[int, int], int | None]:
        with self._open() as capture:
            decoded, frame = capture.read()
            fps = capture.get(cv2.CAP_PROP_FPS)
            count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        if not decoded:
            raise UndecodableImageError(
                f"{self.path}: cannot be read as a video: convert it to mp4", str(self.path)
            )
        height, width = frame.shape[:2]
        return (
            fps if math.isfinite(fps) and fps > 0 else DEFAULT_FPS,
            (width, height),
            int(count) if math.isfinite(count) and count > 0 else None,
        )

    @contextmanager
    def _open(self) -> Iterator[cv2.VideoCapture]:
        capture = cv2.VideoCapture(str(self.path))
        try:
            yield capture
        finally:
            capture.release()

    def __iter__(self) -> Iterator[np.ndarray]:
        if not self.is_video:
            yield read_image(self.path, "BGR")
            return
        number = 0
        with self._open() as capture:
            while (result := capture.read())[0]:
                number += 1
                yield result[1]
        if self.num_frames is not None and number < self.num_frames:
            logger.warning("%s: only %d of %d frames decoded", self.path, number, self.num_frames)


def iter_inputs(paths: Sequence[str], output: str | os.PathLike[str] | None = None) -> list[Source]:
    """Find the images and videos that the user named.

    Args:
        paths: files, folders (searched at any depth) and glob patterns (``**`` matches subfolders).
            A named file is a video by its suffix and an image otherwise; files of other suffixes in
            folders and patterns are left out.
        output: a folder whose files are left out of folders and patterns, so that results in a
            subfolder of the input do not become inputs.

    Returns:
        Every file once, in the order of ``paths``, those of a folder or pattern sorted by name.

    Raises:
        FileNotFoundError: a path matches nothing, or a folder holds no image or video.
        ValueError: ``paths`` is empty.
    """
    if not paths or not all(map(str, paths)):
        raise ValueError("no input, or an empty one: name an image, video, folder or pattern")
    excluded = None if output is None else Path(output).resolve()
    found: dict[Path, Source] = {}
    for entry in paths:
        path = Path(entry).expanduser()
        folder = path
        if path.is_file():
            folder, names = path.parent, [path.name]
        elif path.is_dir():
            names = list(walk_images(str(path), MEDIA_SUFFIXES))
        elif glob.has_magic(entry):
            folder, names = _matches(path)
        else:
            raise FileNotFoundError(f"{entry}: no such file or folder")
        if not path.is_file():
            names = [name for name in names if excluded not in (folder / name).resolve().parents]
        if not names:
            raise FileNotFoundError(f"{entry}: no image or video found")
        for name in names:
            found.setdefault((folder / name).resolve(), Source(folder / name, Path(name)))
    return list(found.values())


def _matches(pattern: Path) -> tuple[Path, list[str]]:
    """The part of a pattern before its first wildcard, and the visible files relative to it."""
    folder = Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    found = glob.iglob(str(pattern), recursive=True)
    return folder, sorted(
        os.path.relpath(name, folder)
        for name in found
        if is_image_file(name, MEDIA_SUFFIXES) and os.path.isfile(name)
    )


def output_paths(sources: Sequence[Source], folder: str | os.PathLike[str]) -> list[Path]:
    """Where the result of each source is written.

    Args:
        sources: from :func:`iter_inputs`.
        folder: the output folder.

    Returns:
        A path for each source: its name, in the subfolder that it has in the input; ``.mp4`` for
        videos, ``.png`` for images without a suffix in ``DRAWN_SUFFIXES``. Equal names are numbered
        (``a.jpg``, ``a_2.jpg``).

    Raises:
        ValueError: a path is one of the inputs, which would be overwritten.
    """
    inputs = {source.path.resolve() for source in sources}
    taken: set[str] = set()
    targets = []
    for source in sources:
        suffix = source.name.suffix
        if source.is_video:
            suffix = ".mp4"
        elif suffix.lower() not in DRAWN_SUFFIXES:
            suffix = ".png"
        name, number = source.name.with_suffix(suffix), 1
        while str(name).lower() in taken:  # file systems may ignore case
            number += 1
            name = source.name.with_name(f"{source.name.stem}_{number}{suffix}")
        taken.add(str(name).lower())
        target = Path(folder) / name
        if target.resolve() in inputs:
            raise ValueError(f"{target}: the output would replace an input: choose another folder")
        targets.append(target)
    return targets


@contextmanager
def video_writer(
    path: str | os.PathLike[str], *, fps: float, size: tuple[int, int]
) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an mp4 (codec mp4v) atomically: an error in the block leaves nothing behind.

    Args:
        path: the file to write, ``.mp4``.
        fps: frames per second.
        size: (width, height) of the frames. The codec drops the last column or row of an odd size.

    Yields:
        A function that appends a frame, (height, width, 3) uint8 BGR. It raises ValueError if the
        frame has another size, which OpenCV would drop silently.

    Raises:
        OSError: the file cannot be written, or this OpenCV cannot encode mp4.
    """
    with atomic_path(path) as temporary:
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)

        def write(frame_bgr: np.ndarray) -> None:
            height, width = frame_bgr.shape[:2]
            if (width, height) != size:
                raise ValueError(
                    f"{path}: a frame has {width}x{height} pixels, the video {size[0]}x{size[1]}"
                )
            writer.write(frame_bgr)

        try:
            if not writer.isOpened():
                raise OSError(f"{path}: OpenCV cannot write this video (mp4v)")
            yield write
        finally:
            writer.release()


class PredictionWriter:
    """Collects predictions and writes them as two COCO files, atomically.

    ``predictions.json`` is a list in COCO's result format: image_id, category_id of the dataset,
    bbox (x, y, width, height in pixels), score, and segmentation (RLE) if there are masks.
    ``images.json`` maps each image_id to its file and, for a video, the frame; it is an annotation
    file without annotations, so ``COCO("images.json").loadRes("predictions.json")`` works.

    A context manager: the files are written at its end, also after an exception.

    Args:
        folder: where the two files go.
        metadata: detectron2's metadata of the dataset that the model was trained on, for
            ``thing_dataset_id_to_contiguous_id`` and ``thing_classes``; without the first,
            category ids are class indices.
    """

    def __init__(self, folder: str | os.PathLike[str], metadata: Any):
        self._folder = Path(folder)
        mapping = metadata.get("thing_dataset_id_to_contiguous_id") or {}
        self._category_ids = {index: category_id for category_id, index in mapping.items()}
        self._names = dict(enumerate(metadata.get("thing_classes") or ()))
        self._classes = {*self._names, *self._category_ids}
        self._predictions: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []

    def add(
        self, instances: Instances, file_name: str | os.PathLike[str], frame: int | None = None
    ) -> int:
        """Add the predictions of one image.

        Args:
            instances: with ``pred_boxes``, ``scores``, ``pred_classes`` and optionally
                ``pred_masks``, in pixels of the image, on any device.
            file_name: the image or video.
            frame: number of the frame in a video, from 0.

        Returns:
            The image_id: images are numbered from 1 in the order in which they are added.

        Raises:
            ValueError: a predicted class is not one of the dataset.
        """
        image_id = len(self._images) + 1
        predictions = instances_to_coco_json(instances.to("cpu"), image_id)
        classes = {prediction["category_id"] for prediction in predictions}
        for prediction in predictions:
            prediction["category_id"] = self._category_id(prediction["category_id"])
        height, width = instances.image_size
        image = {"id": image_id, "file_name": str(file_name), "height": height, "width": width}
        self._images.append(image if frame is None else {**image, "frame": frame})
        self._predictions += predictions
        self._classes |= classes
        return image_id

    def _category_id(self, index: int) -> int:
        if self._category_ids and index not in self._category_ids:
            raise ValueError(
                f"the model predicts class {index}, but its dataset has {len(self._category_ids)}"
                " classes: name the dataset that it was trained on"
            )
        return self._category_ids.get(index, index)

    def __enter__(self) -> "PredictionWriter":
        return self

    def __exit__(self, *_exception: object) -> None:
        categories = [
            {"id": self._category_id(index), "name": self._names.get(index, f"class {index}")}
            for index in sorted(self._classes)
        ]
        content = {"images": self._images, "annotations": [], "categories": categories}
        write_json(self._folder / IMAGES_FILE, content)
        write_json(self._folder / PREDICTIONS_FILE, self._predictions)
