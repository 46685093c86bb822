"""Cases measured against a baseline in one process: interleaved, for as long as there is time.

:mod:`crossmae_det.benchmark.measuring` gives each case a process of its own and keeps all of them
alive. Here a process holds two models at a time, the baseline and the case that is compared with
it, so that a GPU need not have room for all of them, and many cases take little time.
"""

import gc
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer

from crossmae_det.benchmark.measuring import Case, Measurement, Spread, ratios

# Calls before the first that counts: they compile, allocate and choose algorithms.
WARM_UP = 3
# A measurement repeats the case for this long, so that the GPU is waited for once, not per call.
BURST_SECONDS = 0.25
MOST_CALLS = 50
# Rounds: as many as there is time for, within these limits.
FEWEST_ROUNDS = 3
MOST_ROUNDS = 20

# Of a profile: the kernels that take most of the time, and the characters of their names.
KERNELS = 12
KERNEL_NAME = 80


class RunningCase:
    """A case that is built and warmed up, in the process that measures it.

    Args:
        case: what to measure.

    Attributes:
        peak_bytes: peak memory of CUDA's allocator, of this case alone: other models in the process
            are not counted. 0 on a CPU, where models of one process cannot be told apart.
    """

    def __init__(self, case: Case):
        self._cuda = case.device == "cuda"
        self._clock = timer if self._cuda else time.perf_counter  # torch's waits for the GPU
        before = self._allocated()
        self._run = case.prepare()
        # What it keeps between calls: weights, inputs, and later the state of the optimizer.
        self._own = self._allocated() - before
        self.peak_bytes = 0
        for _ in range(WARM_UP):
            self._time(1)
        self._calls = max(1, min(MOST_CALLS, int(BURST_SECONDS / self._time(1))))

    def seconds(self) -> float:
        """Time of one call, the mean of a burst."""
        return self._time(self._calls) / self._calls

    def kernels(self) -> dict[str, Any]:
        """Profile one call.

        Returns:
            "busy_milliseconds", the time that the device spends in kernels (a CPU in operators);
            "kernel_count"; and "kernels", the longest ones: name, milliseconds and count. Empty
            where the profiler has no access to the GPU.
        """
        # Its log is a line or more per profile; read when the first one starts.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._cuda
        with profile(activities=activities) as profiler:
            self._time(1)
        kind = DeviceType.CUDA if self._cuda else DeviceType.CPU
        time_of = "self_device_time_total" if self._cuda else "self_cpu_time_total"
        rows = [
            {
                "name": e.key[:KERNEL_NAME],
                "milliseconds": getattr(e, time_of) / 1e3,
                "count": e.count,
            }
            for e in profiler.key_averages()
            if e.device_type == kind
        ]
        if not rows:  # the profiler has no access to the GPU
            return {}
        rows.sort(key=lambda row: -row["milliseconds"])
        return {
            "busy_milliseconds": sum(row["milliseconds"] for row in rows),
            "kernel_count": sum(row["count"] for row in rows),
            "kernels": rows[:KERNELS],
        }

    def _time(self, calls: int) -> float:
        before = self._allocated()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        start = self._clock()
        for _ in range(calls):
            self._run()
        seconds = self._clock() - start
        if self._cuda:
            peak = torch.cuda.max_memory_allocated() - before + self._own
            self.peak_bytes = max(self.peak_bytes, peak)
            self._own += self._allocated() - before
        return seconds

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._cuda else 0


class PairMeter:
    """Measures cases, each in rounds of baseline and case.

    The baseline stays in memory until another one is needed.

    Args:
        cases: what to measure, all on one device.
        reference: makes what measures the speed of the machine (FLOP/s), before and after each
            measurement of a case; None for none.
        profiled: whether each case is profiled as well, after its rounds.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        reference: Callable[[], Callable[[], float]] | None = None,
        profiled: bool = False,
    ):
        self.cases = cases
        self.device = torch.device(cases[0].device)
        self._profiled = profiled
        self._baseline: tuple[int, RunningCase] | None = None
        self._reference = reference() if reference else None
        if self._reference:
            self._reference()  # chooses algorithms

    def measure(self, index: int, baseline: int | None, seconds: float) -> dict[str, Any]:
        """Measure a case.

        Args:
            index: of the case.
            baseline: index of the case that it is compared with; None measures it alone, and keeps
                it in memory as a baseline of others.
            seconds: how long to go on, after the warm-up.

        Returns:
            The record of :meth:`.Measurement.record`, without a baseline with no ratios; also
            "milliseconds" and "speed_ratio" (the inverse of "time_ratio") with their spread,
            "efficiency", the time of the FLOPs at the reference's rate over the time of the case,
            the result of :meth:`RunningCase.kernels`, and "busy", the share of the time that the
            device spends in kernels: where it is low, the device waits for Python.
        """
        case = self.cases[index]
        if self._baseline is None or self._baseline[0] != baseline:
            self._release()
            kept = index if baseline is None else baseline
            self._baseline = (kept, RunningCase(self.cases[kept]))
        runs = [self._baseline[1]]
        try:
            if baseline is not None:
                runs.append(RunningCase(case))
            taken, rates = self._rounds(runs, seconds)
            flops = case.count_flops() if rates else 0
            profiled = runs[-1].kernels() if self._profiled else {}
            measured = Measurement(case, taken[-1], rates, runs[-1].peak_bytes)
            first = None
            if baseline is not None:
                other = self.cases[baseline]
                first = Measurement(other, taken[0], peak_bytes=runs[0].peak_bytes)
        finally:
            del runs
            self._collect()
        record = measured.record(first)
        record["peak_bytes"] = record["peak_bytes"] or None
        record["milliseconds"] = Spread.of([1e3 * each for each in taken[-1]])
        record |= profiled
        if profiled:
            record["busy"] = profiled["busy_milliseconds"] / record["milliseconds"].median
        if first:
            record["speed_ratio"] = ratios(first.seconds, measured.seconds)
        if flops:
            rounds = zip(taken[-1], rates, strict=True)
            record |= {"flops": flops, "rates": rates}
            record["efficiency"] = Spread.of([flops / rate / each for each, rate in rounds])
        return record

    def _rounds(
        self, runs: Sequence[RunningCase], seconds: float
    ) -> tuple[list[list[float]], list[float]]:
        """Seconds of each of ``runs`` by round, and the rates around the last of them."""
        taken: list[list[float]] = [[] for _ in runs]
        rates: list[float] = []
        end = time.monotonic() + seconds
        while len(taken[0]) < FEWEST_ROUNDS or (
            time.monotonic() < end and len(taken[0]) < MOST_ROUNDS
        ):
            for run, times in zip(runs, taken, strict=True):
                before = self._reference() if self._reference and run is runs[-1] else 0.0
                times.append(run.seconds())
                if before and self._reference:
                    rates.append((before + self._reference()) / 2)
        return taken, rates

    def _release(self) -> None:
        """Free the baseline, and what the compiler keeps."""
        self._baseline = None
        torch._dynamo.reset()
        self._collect()

    def _collect(self) -> None:
        gc.collect()  # a compiled model is part of reference cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
