"""What inference reads and writes: images and videos in, videos and COCO results out.

A trained detector on images and videos: pictures and COCO results.
"""

from __future__ import annotations

import glob
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import Metadata
from detectron2.data.transforms import AugInput
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from crossmae_det.detection.visualizer import draw_predictions
from crossmae_det.engine.launch import resolve_device
from crossmae_det.engine.train import load_pretrained
from crossmae_det.engine.trainer import amp_dtype, inference_autocast
from crossmae_det.utils import atomic_path
from crossmae_det.utils.files import write_image, write_json
from crossmae_det.utils.image_files import IMAGE_SUFFIXES, is_image_file, walk_images
from crossmae_det.utils.image_reading import UndecodableImageError, convert_color, read_image

logger = logging.getLogger(__name__)


VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")

MEDIA_SUFFIXES = IMAGE_SUFFIXES + VIDEO_SUFFIXES

# Of the images that are read, those that OpenCV writes in color; others become PNG.
DRAWN_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

DEFAULT_FPS = 25.0

PREDICTIONS_FILE = "predictions.json"

IMAGES_FILE = "images.json"


@dataclass(frozen=True)
class ImageSource:
    """One image file. Iterating yields its one picture, (H, W, 3) uint8 BGR, upright.

    Attributes:
        path: the file.
        name: its path relative to the folder that the user named.
    """

    path: Path
    name: Path
    is_video: bool = field(default=False, init=False)

    def __iter__(self) -> Iterator[np.ndarray]:
        yield read_image(self.path, "BGR")


@dataclass(frozen=True)
class VideoSource:
    """One video file. Iterating yields its frames, (H, W, 3) uint8 BGR, upright.

    The file is opened when a property is asked for, or a frame: an UndecodableImageError says that
    it cannot be decoded, or has no frame.

    Attributes:
        path: the file.
        name: its path relative to the folder that the user named.
        fps: frames per second, 25 where the file does not say.
        size: (width, height) of every frame.
        num_frames: as the file states it, which need not be what can be decoded; None if it does
            not.
    """

    path: Path
    name: Path
    is_video: bool = field(default=True, init=False)

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
        capture = cv2.VideoCapture(str(self.path))
        try:
            decoded, frame = capture.read()
            if not decoded:
                raise UndecodableImageError(
                    f"{self.path}: cannot be read as a video; convert it to mp4", str(self.path)
                )
            fps = capture.get(cv2.CAP_PROP_FPS)
            count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        finally:
            capture.release()
        height, width = frame.shape[:2]
        return (
            fps if math.isfinite(fps) and fps > 0 else DEFAULT_FPS,
            (width, height),
            int(count) if math.isfinite(count) and count > 0 else None,
        )

    def __iter__(self) -> Iterator[np.ndarray]:
        capture = cv2.VideoCapture(str(self.path))
        number = 0
        try:
            while True:
                decoded, frame = capture.read()
                if not decoded:
                    break
                number += 1
                yield frame
        finally:
            capture.release()
        if self.num_frames is not None and number < self.num_frames:
            logger.warning("%s: only %d of %d frames decoded", self.path, number, self.num_frames)


def iter_inputs(
    paths: Sequence[str], output: str | os.PathLike[str] | None = None
) -> list[ImageSource | VideoSource]:
    """Finds the images and videos that the user named.

    Args:
        paths: files, folders (the images and videos in them, at any depth) and glob patterns
            (``**`` goes into subfolders). A named file is a video by its suffix and an image
            otherwise; from folders and patterns, files of other suffixes are left out.
        output: a folder whose files are left out of folders and patterns: what is drawn into a
            subfolder of the input is not an input.

    Returns:
        Every file once, in the order of ``paths``, those of a folder or pattern sorted by name.
        They are decoded only when they are iterated over.

    Raises:
        FileNotFoundError: a path matches nothing, or a folder holds no image or video.
        ValueError: ``paths`` is empty.
    """
    if not paths:
        raise ValueError("no input: name at least one image, video, folder or pattern")
    outside = None if output is None else Path(output).resolve()
    found: dict[Path, ImageSource | VideoSource] = {}
    for entry in paths:
        if not str(entry):
            raise ValueError("an input is empty: name an image, video, folder or pattern")
        path = Path(entry).expanduser()
        if path.is_file():
            folder, names = path.parent, [path.name]
        elif path.is_dir():
            folder, names = path, list(walk_images(str(path), MEDIA_SUFFIXES))
            what = "there is no image or video in this folder"
        elif glob.has_magic(entry):
            folder, names = _matches(path)
            what = "no image or video matches this pattern"
        else:
            raise FileNotFoundError(f"{entry}: no such file or folder")
        if not path.is_file():
            names = [name for name in names if outside not in (folder / name).resolve().parents]
        if not names:
            raise FileNotFoundError(f"{entry}: {what}")
        for name in names:
            file = folder / name
            source = VideoSource if file.suffix.lower() in VIDEO_SUFFIXES else ImageSource
            found.setdefault(file.resolve(), source(file, Path(name)))
    return list(found.values())


def output_paths(
    sources: Sequence[ImageSource | VideoSource], folder: str | os.PathLike[str]
) -> list[Path]:
    """Where the picture or video drawn for each source goes.

    Args:
        sources: from ``iter_inputs``.
        folder: the output folder.

    Returns:
        A path for each source: its name, in the subfolder that it has in the input; ``.mp4`` for
        videos, ``.png`` for images of any other suffix than ``DRAWN_SUFFIXES``. A name that is
        taken gets a number (``a.jpg``, ``a_2.jpg``).

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
        # Case does not distinguish files everywhere.
        while str(name).lower() in taken:
            number += 1
            name = source.name.with_name(f"{source.name.stem}_{number}{suffix}")
        taken.add(str(name).lower())
        target = Path(folder) / name
        if target.resolve() in inputs:
            raise ValueError(f"{target}: the output would replace an input; choose another folder")
        targets.append(target)
    return targets


class VideoWriter:
    """Writes an mp4 (codec mp4v) under a temporary name and renames it when it is complete.

    A context manager: when its block raises, nothing is left behind.
    """

    def __init__(self, path: str | os.PathLike[str], *, fps: float, size: tuple[int, int]):
        """
        Args:
            path: the file to write, ``.mp4``.
            fps: frames per second, as ``VideoSource.fps``.
            size: (width, height) of the frames, as ``VideoSource.size``. The codec wants even
                numbers: the last column or row of an odd size is not written.
        """
        self._path = Path(path)
        self._fps = fps
        self._size = size
        self._stack = ExitStack()
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self) -> VideoWriter:
        """
        Raises:
            OSError: the file cannot be written, or this OpenCV cannot encode mp4.
        """
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self._path))
            code = cv2.VideoWriter.fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(temporary), code, self._fps, self._size)
            stack.callback(writer.release)
            if not writer.isOpened():
                raise OSError(f"{self._path}: OpenCV cannot write this video (mp4v)")
            self._writer = writer
            self._stack = stack.pop_all()
        return self

    def write(self, frame_bgr: np.ndarray) -> None:
        """Appends a frame.

        Args:
            frame_bgr: (height, width, 3) uint8, BGR, of the size of the video.

        Raises:
            ValueError: the frame is of another size; OpenCV would drop it silently.
        """
        assert self._writer is not None, "use VideoWriter in a with statement"
        height, width = frame_bgr.shape[:2]
        if (width, height) != self._size:
            raise ValueError(
                f"{self._path}: a frame of {width}x{height} pixels in a video of "
                f"{self._size[0]}x{self._size[1]}"
            )
        self._writer.write(frame_bgr)

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer = None
        # Releases the writer, then renames the file, or removes it after an exception.
        self._stack.__exit__(exception_type, exception, traceback)


class PredictionWriter:
    """Collects predictions and writes them as two COCO files, atomically.

    ``predictions.json`` is a list in COCO's result format: image_id, category_id (that of the
    dataset), bbox (x, y, width, height in pixels), score, and segmentation (RLE) where there are
    masks. ``images.json`` says which file, and which frame of a video, an image_id stands for; it
    has the shape of an annotation file without annotations, so that
    ``COCO("images.json").loadRes("predictions.json")`` works.

    A context manager: the files are written at its end, after an exception too, so that what was
    predicted until then is kept.
    """

    def __init__(self, folder: str | os.PathLike[str], metadata: Any):
        """
        Args:
            folder: where the two files go.
            metadata: detectron2's metadata of the dataset that the model was trained on, for
                ``thing_dataset_id_to_contiguous_id`` and ``thing_classes``; without the first,
                category ids are class indices.
        """
        self._folder = Path(folder)
        mapping = metadata.get("thing_dataset_id_to_contiguous_id") or {}
        self._category_ids = {index: category_id for category_id, index in mapping.items()}
        self._class_names = list(metadata.get("thing_classes") or ())
        self._predictions: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []
        self._classes = {*range(len(self._class_names)), *self._category_ids}

    def add(
        self, instances: Instances, file_name: str | os.PathLike[str], frame: int | None = None
    ) -> int:
        """Takes the predictions of one image.

        Args:
            instances: with ``pred_boxes``, ``scores``, ``pred_classes`` and perhaps ``pred_masks``,
                in pixels of the image, on any device.
            file_name: the image or video.
            frame: number of the frame in a video, from 0.

        Returns:
            The image_id: images are numbered from 1 in the order in which they come.

        Raises:
            ValueError: a predicted class is not one of the dataset.
        """
        image_id = len(self._images) + 1
        height, width = instances.image_size
        image = {"id": image_id, "file_name": str(file_name), "height": height, "width": width}
        predictions = instances_to_coco_json(instances.to("cpu"), image_id)
        classes = [prediction["category_id"] for prediction in predictions]
        for prediction in predictions:
            prediction["category_id"] = self._category_id(prediction["category_id"])
        self._images.append(image if frame is None else {**image, "frame": frame})
        self._predictions += predictions
        self._classes.update(classes)
        return image_id

    def write(self) -> None:
        """Writes both files with everything that was added so far.

        Raises:
            OSError: the folder cannot be written.
        """
        categories = [
            {"id": self._category_id(index), "name": self._class_name(index)}
            for index in sorted(self._classes)
        ]
        content = {"images": self._images, "annotations": [], "categories": categories}
        write_json(self._folder / IMAGES_FILE, content)
        write_json(self._folder / PREDICTIONS_FILE, self._predictions)

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.write()

    def _category_id(self, index: int) -> int:
        if not self._category_ids:
            return index
        if index not in self._category_ids:
            raise ValueError(
                f"the model predicts class {index}, but its dataset has {len(self._category_ids)} "
                f"classes; name the dataset that it was trained on"
            )
        return self._category_ids[index]

    def _class_name(self, index: int) -> str:
        return self._class_names[index] if index < len(self._class_names) else f"class {index}"


def _matches(pattern: Path) -> tuple[Path, list[str]]:
    """The part of a pattern before its first wildcard, and the visible files relative to it."""
    plain = list(takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    folder = Path(*plain)
    found = glob.iglob(str(pattern), recursive=True)
    return folder, sorted(
        os.path.relpath(name, folder)
        for name in found
        if is_image_file(name, MEDIA_SUFFIXES) and os.path.isfile(name)
    )


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
