"""Processes that call the methods of an object on request; a failure is one line."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

OUT_OF_MEMORY = "out of memory"
TIMED_OUT = "stopped: time"

# Part of torch's message when a CPU has no memory left.
CPU_ALLOCATOR = "can't allocate memory"

# Part of the messages after which a process cannot use its GPU any more.
CUDA_ERROR = "CUDA error"

# A process that uses CUDA must not be forked, not even from one that has only looked for a GPU.
START_METHODS = {"cpu": "forkserver", "cuda": "spawn"}


class WorkerError(Exception):
    """A request failed; the message is the reason in one line.

    Attributes:
        lost: whether the process has ended, so that its object no longer exists.
    """

    def __init__(self, reason: str, lost: bool = False):
        super().__init__(reason)
        self.lost = lost


class Worker:
    """A process that builds an object at the first request, and calls its methods.

    Args:
        build: returns the object; picklable.
        device: "cpu" or "cuda": what the process uses.
        preload: names of modules that are imported once for all processes, where that is possible.
    """

    def __init__(self, build: Callable[[], Any], device: str, preload: Sequence[str] = ()):
        # Not forked from this process, whose threads and memory the child would inherit.
        method = START_METHODS[device]
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":  # imports once for all
            context.set_forkserver_preload([__name__, *preload])
        self._connection, remote = context.Pipe()
        self.process = context.Process(target=_serve, args=(remote, build), daemon=True)
        self.process.start()
        remote.close()

    def ask(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        """Call a method of the object and return its result.

        Args:
            method: its name.
            *arguments: its arguments; picklable.
            timeout: seconds after which the process is killed; None waits without limit.

        Raises:
            WorkerError: the method or the construction failed, the process ended, or it took longer
                than ``timeout``.
        """
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(timeout):
                self.process.kill()
                self.stop()
                raise WorkerError(TIMED_OUT, lost=True)
            succeeded, answer = self._connection.recv()
        except (EOFError, OSError):
            self.process.join()
            # Linux kills a process when memory runs out.
            killed = self.process.exitcode == -signal.SIGKILL
            reason = OUT_OF_MEMORY if killed else f"ended with {self.process.exitcode}"
            raise WorkerError(reason, lost=True) from None
        if not succeeded:
            lost = CUDA_ERROR in answer
            if lost:
                self.stop()
            raise WorkerError(answer, lost)
        return answer

    def stop(self) -> None:
        """End the process; it is killed if it is still busy after ten seconds."""
        self._connection.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()


def _serve(connection: Connection, build: Callable[[], Any]) -> None:
    target: Any = None
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            method, arguments = connection.recv()
            try:
                target = build() if target is None else target
                answer = True, getattr(target, method)(*arguments)
            except Exception as error:  # reported as a row beside the results of the others
                answer = False, failure_reason(error)
            connection.send(answer)


def failure_reason(error: Exception) -> str:
    """An exception in one line: :data:`OUT_OF_MEMORY`, or the first line of its message."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or CPU_ALLOCATOR in text:
        return OUT_OF_MEMORY
    first, *rest = text.splitlines()
    # The compiler: "backend='inductor' raised:", and then the reason.
    return f"{first} {rest[0]}" if rest and first.endswith("raised:") else first
