"""Whether results on a GPU are right: the tests that need one, and the attention backends.

Legend: N images or windows, M heads, H x W grid of queries and keys, L = H * W, D channels.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

import crossmae_det
from crossmae_det.benchmark.measuring import PRECISIONS
from crossmae_det.layers.attention_backends import attend, relative_position

REPOSITORY = Path(crossmae_det.__file__).parents[1]
# Of the tests that need a GPU: see pyproject.toml.
MARKER = "cuda"
# Processes that run them: most of the time is compilation.
TEST_PROCESSES = 4


class TestRun:
    """Runs the tests that need a GPU, in a process of pytest.

    Args:
        repository: folder with ``tests``.
    """

    __test__ = False  # not a test itself

    def __init__(self, repository: Path = REPOSITORY):
        self.repository = repository

    def measure(self, index: int, baseline: int | None, seconds: float) -> dict[str, Any]:
        """Run them, for at most ``seconds``. There is one case, and no baseline.

        Returns:
            Numbers of tests by result ("passed", "failed", "skipped"), "seconds", and the names of
            those that failed, "failures".

        Raises:
            ValueError: there are no tests or there is no pytest, pytest could not run them, or they
                took too long.
        """
        files = self._files()
        if not files:
            raise ValueError("not run: the tests are not part of an installed package")
        if find_spec("pytest") is None:
            raise ValueError("not run: pytest is not installed")
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder, "results.xml")
            command = [sys.executable, "-m", "pytest", "-q", "-m", MARKER, f"--junitxml={results}"]
            processes = min(TEST_PROCESSES, os.cpu_count() or 1)
            if processes > 1 and find_spec("xdist"):
                command += ["-n", str(processes)]
            # In a session of its own, to end its children as well.
            process = subprocess.Popen(
                [*command, *map(str, files)],
                cwd=self.repository,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            try:
                output, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                raise ValueError(f"stopped after {seconds:.0f} s: time") from None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if not results.exists():
                lines = output.strip().splitlines() or ["no output"]
                raise ValueError(f"pytest ended with {process.returncode}: {lines[-1]}")
            return test_results(results)

    def _files(self) -> list[Path]:
        """The files that have such tests: the others need not be imported."""
        mark = f"mark.{MARKER}"
        files = sorted(self.repository.glob("tests/**/test_*.py"))
        return [file for file in files if mark in file.read_text(encoding="utf-8")]


def test_results(path: Path) -> dict[str, Any]:
    """The result of :meth:`TestRun.measure` from the file of ``pytest --junitxml``."""
    (suite,) = ElementTree.parse(path).getroot().iter("testsuite")
    number = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    return {
        "passed": number["tests"] - failed - number["skipped"],
        "failed": failed,
        "skipped": number["skipped"],
        "seconds": float(suite.get("time", 0)),
        "failures": [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ],
    }


test_results.__test__ = False  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ParityCase:
    """An attention backend in a type, on a grid.

    Attributes:
        backend: a name in :data:`crossmae_det.layers.attention_backends.BACKENDS`.
        precision: a key of ``PRECISIONS``.
        count: windows or images N.
        heads: M.
        channels: D.
        grid: (H, W).
    """

    backend: str
    precision: str
    count: int
    heads: int
    channels: int
    grid: tuple[int, int]

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Queries, keys and values (N, M, L, D) and the tables (2 H - 1, D) and (2 W - 1, D), in
        float64. The type of the case holds them without rounding."""
        generator = torch.Generator().manual_seed(0)
        height, width = self.grid
        tokens = (self.count, self.heads, height * width, self.channels)
        shapes: list[tuple[int, ...]] = [tokens] * 3
        shapes += [(2 * side - 1, self.channels) for side in self.grid]
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        values[3:] = [table * self.channels**-0.5 for table in values[3:]]
        dtype = PRECISIONS[self.precision]
        return [value.to(device, dtype).double() for value in values]


class ParityMeter:
    """Compares attention backends with the definition in float64.

    Args:
        cases: what to compare.
        device: where.
    """

    def __init__(self, cases: Sequence[ParityCase], device: str):
        self.cases = cases
        self.device = torch.device(device)

    def measure(self, index: int, baseline: int | None, seconds: float) -> dict[str, Any]:
        """Compare values and gradients of a case; it is computed under autocast, as in training.

        Returns:
            Relative errors: "output_mean" and "gradient_mean", the norm of the error over the norm
            of the reference, and "output_max" and "gradient_max", the largest error over the
            largest entry. Those of the gradients are the worst among queries, keys, values and
            tables.

        Raises:
            ValueError: the backend does not run on the device, or a result is not finite.
        """
        case = self.cases[index]
        inputs = case.inputs(self.device)
        dtype = PRECISIONS[case.precision]

        def backend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            # The tables are parameters: float32, and autocast as a part of the backend.
            q, k, v = (x.to(dtype) for x in (q, k, v))
            rel_pos = relative_position(q, rows.float(), columns.float(), case.grid)
            return attend(q, k, v, rel_pos, case.backend)

        def definition(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            return attend(q, k, v, relative_position(q, rows, columns, case.grid), "eager")

        expected = _with_gradients(definition, inputs)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            got = _with_gradients(backend, inputs)
        if not all(result.isfinite().all() for result in got):
            raise ValueError("the output or a gradient is not finite")
        errors = [relative_errors(a, b) for a, b in zip(got, expected, strict=True)]
        output, *gradients = errors
        means, largest = zip(*gradients, strict=True)
        return {
            "output_mean": output[0],
            "output_max": output[1],
            "gradient_mean": max(means),
            "gradient_max": max(largest),
        }


def _with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Value and gradients of a weighted sum, in float64."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [x.detach().double() for x in (y, *torch.autograd.grad((y * weight).sum(), leaves))]


def relative_errors(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """The norm of the error over that of ``expected``, and the largest error over the largest entry
    of ``expected``."""
    error = got - expected
    norms = error.norm() / expected.norm()
    return norms.item(), (error.abs().max() / expected.abs().max()).item()
