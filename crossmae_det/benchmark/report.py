"""Results with what they were measured on: for the terminal, for a README and for programs."""

import csv
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from crossmae_det.checkpoint import atomic_path
from crossmae_det.visualization.files import write_json

# Of the JSON: another number where an older reader would misunderstand it.
JSON_VERSION = 2


@dataclass(frozen=True)
class Section:
    """One table of a report.

    Attributes:
        key: its name in the JSON.
        title: what was measured.
        headers: of the columns; the first column names the rows.
        rows: of as many texts as there are headers.
        notes: sentences below the table: units, and how it was measured.
        values: the same results with all their digits, for the JSON.
    """

    key: str
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    values: Any

    def table(self, style: str) -> str:
        """The table in one of tabulate's styles."""
        alignment = ["left", *["right"] * (len(self.headers) - 1)]
        # The numbers are text by now: tabulate must not format them anew.
        return tabulate(
            self.rows,
            headers=self.headers,
            tablefmt=style,
            colalign=alignment,
            disable_numparse=True,
        )


@dataclass(frozen=True)
class Report:
    """Tables, and what they were measured on.

    Attributes:
        command: the command line that makes it.
        environment: from :func:`environment`.
        sections: the tables.
    """

    command: str
    environment: Mapping[str, Any]
    sections: Sequence[Section]

    def __str__(self) -> str:
        """For the terminal."""
        parts = [
            "\n".join([section.title, "", section.table("simple"), "", *section.notes])
            for section in self.sections
        ]
        return "\n\n".join([*parts, f"{self.command}\n{self._machine()}"])

    def write_markdown(self, path: str | os.PathLike[str]) -> None:
        """Write the tables for a README.

        Raises:
            OSError: the file cannot be written.
        """
        parts = [
            f"**{section.title}**\n\n{section.table('pipe')}\n\n{' '.join(section.notes)}"
            for section in self.sections
        ]
        text = "\n\n".join([*parts, f"`{self.command}` on {self._machine()}.\n"])
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write the results with all their digits.

        Raises:
            OSError: the file cannot be written.
        """
        results = {section.key: section.values for section in self.sections}
        head = {"version": JSON_VERSION, "command": self.command}
        write_json(path, head | {"environment": dict(self.environment)} | results, indent=2)

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the tables, one below the other, each under the key of its section.

        Raises:
            OSError: the file cannot be written.
        """
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            for section in self.sections:
                writer.writerow(["section", *section.headers])
                writer.writerows([section.key, *row] for row in section.rows)

    def _machine(self) -> str:
        return ", ".join(f"{name}: {value}" for name, value in self.environment.items())


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :meth:`Report.write_json` wrote.

    Raises:
        ValueError: it is not that, or of another version.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        number = content.get("version")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} was not written by the benchmark: {error}") from error
    if number is None:
        raise ValueError(f"{path} was not written by the benchmark: it has no version")
    if number != JSON_VERSION:
        raise ValueError(
            f"{path} has results of version {number}, and this benchmark compares with version"
            f" {JSON_VERSION}: measure anew"
        )
    return content


def environment(device: torch.device) -> dict[str, str | int]:
    """What results depend on beside the code: CPU, cores, torch's threads, versions, device."""
    return {
        "CPU": f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("torchvision", "detectron2", "timm")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()
