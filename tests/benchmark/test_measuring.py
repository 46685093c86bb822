"""Measuring in processes of their own. Nothing here depends on how long anything took."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from crossmae_det.benchmark import workers
from crossmae_det.benchmark.measuring import (
    Case,
    Measurement,
    Spread,
    interleaved,
    measure,
    ratios,
)
from crossmae_det.benchmark.workers import OUT_OF_MEMORY


def raise_(error):
    raise error


def kill_self():
    """As Linux does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class Allocation(Case):
    """Builds a tensor; each call of the prepared function calls ``run`` and clones the tensor."""

    run: Callable[[], object] = int

    def prepare(self):
        model = self.build()

        def run():
            self.run()
            return model.clone()

        return run


def case(name="case", mebibytes=1, run=int, **options):
    build = partial(torch.ones, mebibytes * 2**18)
    settings = {"batch_size": 2, "precision": "fp32", "device": "cpu"}
    return Allocation(name=name, build=build, run=run, **settings | options)


def test_measurements_are_interleaved_and_the_first_round_is_dropped():
    taken = []

    def measure(name):
        taken.append(name)
        return f"{name}{len(taken)}"

    results = interleaved([lambda: measure("a"), lambda: measure("b")], 2, "letters")
    assert taken == ["a", "b"] * 3
    assert results == [["a3", "a5"], ["b4", "b6"]]


@pytest.mark.parametrize("repeats", [0, -1])
def test_repeats_must_be_positive(repeats):
    with pytest.raises(ValueError, match=f"at least 1, got {repeats}"):
        interleaved([lambda: 1], repeats, "")
    with pytest.raises(ValueError, match=f"at least 1, got {repeats}"):
        measure([case()], repeats, "")


def test_spread_and_ratios():
    assert Spread.of([4.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=4.0)
    assert f"{Spread(2.0, 1.0, 4.0)}" == "2.000 (1.000 to 4.000)"
    assert f"{Spread(2.0, 1.0, 4.0):.1f}" == "2.0 (1.0 to 4.0)"
    # Round by round: a machine that is three times as slow in one leaves the ratio as it is.
    assert ratios([2.0, 6.0], [4.0, 12.0]) == Spread(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("run", "failure"),
    [
        (partial(raise_, MemoryError()), OUT_OF_MEMORY),
        (
            partial(raise_, RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 TB")),
            OUT_OF_MEMORY,
        ),
        (kill_self, OUT_OF_MEMORY),
        (partial(os._exit, 3), "ended with 3"),
        (partial(raise_, RuntimeError("sizes do not match\nat all")), "sizes do not match"),
    ],
)
def test_a_failure_is_recorded_and_does_not_stop_the_others(run, failure):
    first, second = measure([case(), case(run=run)], 2, "", reference=lambda: 3.0)
    assert second == Measurement(second.case, failure=failure)
    assert first.failure == "" and len(first.seconds) == 2 and min(first.seconds) > 0
    assert first.references == [3.0, 3.0]
    assert first.record(second).keys() == first.record().keys()


def test_peak_memory_is_that_of_the_case_alone():
    """The second case takes 128 MiB more; the third, after it, does not."""
    measured = measure([case(), case(mebibytes=65), case()], 1, "")
    low, high, again = (measurement.peak_bytes / 2**20 for measurement in measured)
    assert high - low > 100 and abs(again - low) < 20


def test_memory_with_and_without_the_model():
    cases = [case(mebibytes=96, count_model=counted) for counted in (True, False)]
    with_model, without = measure(cases, 1, "memory")
    assert with_model.peak_bytes - without.peak_bytes > 0.9 * 96 * 2**20


def test_a_record_has_ratios_to_the_first_case():
    first, second = Measurement(case()), Measurement(case())
    first.seconds, first.peak_bytes = [1.0, 2.0, 4.0], 10
    second.seconds, second.peak_bytes = [3.0, 4.0, 2.0], 5
    record = second.record(first)
    assert record["time_ratio"] == Spread(2.0, 0.5, 3.0) and record["memory_ratio"] == 0.5
    assert (record["median_seconds"], record["images_per_second"]) == (3, 2 / 3)
    assert record["p90_seconds"] == pytest.approx(3.8)
    first.peak_bytes = 0
    assert second.record(first)["memory_ratio"] is None


def test_processes_that_use_cuda_are_not_forked(monkeypatch):
    assert workers.START_METHODS["cuda"] == "spawn"
    # spawn works without a GPU as well.
    monkeypatch.setitem(workers.START_METHODS, "cpu", "spawn")
    (measurement,) = measure([case()], 1, "")
    assert not measurement.failure and len(measurement.seconds) == 1
