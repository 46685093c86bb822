"""The metrics of a run as JSON lines that any reader takes."""

import json
import os
from typing import IO

from detectron2.utils.events import JSONWriter


class MetricsWriter(JSONWriter):
    """detectron2's ``JSONWriter`` with null where a number is not finite, as JSON knows no NaN.

    The file is made when there is something to write, so that a run that fails before its first
    iteration leaves none.

    Args:
        json_file: is appended to.
        window_size: of the median that smooths scalars, in iterations.
    """

    def __init__(self, json_file: str, window_size: int = 20):
        # Not the one of JSONWriter, which opens the file.
        self._file_handle = _FiniteLines(json_file)
        self._window_size = window_size
        self._last_write = -1


class _FiniteLines:
    """What JSONWriter needs of a file; each line is mended on its way."""

    def __init__(self, path: str):
        self.path = path
        self._file: IO[str] | None = None

    @property
    def file(self) -> IO[str]:
        if self._file is None:
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        return self._file

    def write(self, line: str) -> None:
        # Called for NaN and infinities only.
        content = json.loads(line, parse_constant=lambda name: None)
        self.file.write(json.dumps(content, sort_keys=True) + "\n")

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def fileno(self) -> int:
        raise AttributeError("flush() has brought everything to the disk")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
