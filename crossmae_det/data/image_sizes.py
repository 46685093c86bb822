"""Whether the image files of a data set have the annotated sizes."""

import logging
import random
import time
from collections.abc import Sequence
from typing import Any

from crossmae_det.utils.errors import UndecodableImageError
from crossmae_det.utils.image_reading import image_size

logger = logging.getLogger(__name__)

# The headers of some thousand images on a slow disk, and of all in most data sets.
HEADER_SECONDS = 10.0

_checked: set[tuple[Any, ...]] = set()


def check_headers(
    records: Sequence[dict[str, Any]],
    source: str,
    *,
    skip_undecodable: bool | None = None,
    key: tuple[Any, ...] = (),
    seconds: float | None = None,
) -> None:
    """Compare the annotated sizes with the headers of the image files, before anything trains.

    As many as can be read in ``seconds``, in a fixed random order. What passed is not read again
    in the life of the process.

    Args:
        records: in detectron2's format, with ``file_name``, ``height`` and ``width``.
        source: the annotations, for messages.
        skip_undecodable: warn of images that training will skip, rather than raise. None: it cannot
            skip them.
        key: identifies the records, for as long as their files stay as they are.
        seconds: None for `HEADER_SECONDS`.

    Raises:
        UndecodableImageError: an image cannot be read, or has another size; one line.
    """
    if key and key in _checked:
        return
    seconds = HEADER_SECONDS if seconds is None else seconds
    start = time.monotonic()
    order = list(range(len(records)))
    random.Random(0).shuffle(order)
    problems: list[str] = []
    read = 0
    for index in order:
        if time.monotonic() - start > seconds:
            break
        read += 1
        problem = _header_problem(records[index], source)
        if problem is None:
            continue
        problems.append(problem)
        if not skip_undecodable:
            advice = "correct it, replace the file or take it out of the data set"
            if skip_undecodable is not None:
                advice += ", or pass dataloader.train.skip_undecodable=True to skip such images"
            raise UndecodableImageError(f"{problem}; {advice}", records[index]["file_name"])
    if problems:
        logger.warning(
            "%s: %d of %d checked images will be skipped in training (first: %s)",
            source,
            len(problems),
            read,
            problems[0],
        )
    logger.info(
        "%s: the headers of %d of %d images were read in %.1f s, sizes agree",
        source,
        read - len(problems),
        len(records),
        time.monotonic() - start,
    )
    if key:
        _checked.add(key)


def _header_problem(record: dict[str, Any], source: str) -> str | None:
    try:
        height, width = image_size(record["file_name"])
    except UndecodableImageError as error:
        return str(error)
    annotated = record.get("width", width), record.get("height", height)
    if (width, height) == annotated:
        return None
    turned = " (an image that was turned?)" if (height, width) == annotated else ""
    return (
        f"{record['file_name']}: the image is {width}x{height} pixels, but {source} says "
        f"{annotated[0]}x{annotated[1]}{turned}"
    )
