"""Processes that call the methods of an object."""

import os
import time

import pytest
import torch

from crossmae_det.benchmark.workers import (
    CUDA_ERROR,
    OUT_OF_MEMORY,
    TIMED_OUT,
    Worker,
    WorkerError,
    failure_reason,
)


class Target:
    """Counts its calls; it cannot be built where ``error`` is given."""

    def __init__(self, error=None):
        if error:
            raise error
        self.calls = 0

    def count(self, step):
        self.calls += step
        return self.calls

    def fail(self, message):
        raise RuntimeError(message)

    def sleep(self):
        time.sleep(600)

    def exit(self, code):
        os._exit(code)


def broken():
    return Target(ValueError("no target\nat all"))


@pytest.fixture
def worker():
    worker = Worker(Target, "cpu", [__name__])
    yield worker
    worker.stop()


def failure(worker, *request, **options):
    with pytest.raises(WorkerError) as caught:
        worker.ask(*request, **options)
    return str(caught.value), caught.value.lost


def test_the_object_lives_between_requests(worker):
    assert worker.ask("count", 2) == 2
    assert failure(worker, "fail", "sizes do not match\nat all") == ("sizes do not match", False)
    assert worker.ask("count", 3, timeout=60) == 5


def test_a_request_that_takes_too_long_ends_the_process(worker):
    assert worker.ask("count", 1) == 1
    assert failure(worker, "sleep", timeout=0.1) == (TIMED_OUT, True)
    worker.process.join(timeout=60)
    assert not worker.process.is_alive()


def test_a_process_that_ends_is_a_failure(worker):
    assert failure(worker, "exit", 3) == ("ended with 3", True)


def test_a_gpu_that_cannot_be_used_any_more_ends_the_process(worker):
    message, lost = failure(worker, "fail", f"{CUDA_ERROR}: an illegal memory access")
    assert lost and message.startswith(CUDA_ERROR)


def test_an_object_that_cannot_be_built_is_a_failure():
    worker = Worker(broken, "cpu", [__name__])
    assert failure(worker, "count", 1) == ("no target", False)
    worker.stop()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 TB"), OUT_OF_MEMORY),
        (ValueError("first\nsecond"), "first"),
        (ValueError(), "ValueError"),
        (
            RuntimeError("backend='inductor' raised:\nTritonMissing: no triton\n\nmore"),
            "backend='inductor' raised: TritonMissing: no triton",
        ),
    ],
)
def test_failures_are_one_line(error, reason):
    assert failure_reason(error) == reason
