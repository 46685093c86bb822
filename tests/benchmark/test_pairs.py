"""Cases against a baseline in one process. Nothing here depends on how long anything took."""

from dataclasses import dataclass, field

import pytest
import torch

from crossmae_det.benchmark import Spread
from crossmae_det.benchmark.measuring import Case
from crossmae_det.benchmark.pairs import FEWEST_ROUNDS, WARM_UP, PairMeter


@dataclass(frozen=True, kw_only=True)
class Logged(Case):
    """Notes in a list when it is built and called; fails where ``error`` is given."""

    log: list = field(default_factory=list)
    error: Exception | None = None

    def prepare(self):
        self.log.append(f"build {self.name}")
        if self.error:
            raise self.error
        return lambda: self.log.append(self.name)

    def count_flops(self):
        return 30


def meter(*names, reference=None, error=None):
    log = []
    settings = {"build": int, "batch_size": 2, "precision": "fp32", "device": "cpu", "log": log}
    cases = [
        Logged(name=name, error=error if name == "bad" else None, **settings) for name in names
    ]
    return PairMeter(cases, reference), log


def test_a_case_alone_has_no_ratios():
    pair, log = meter("a")
    record = pair.measure(0, None, 0)
    assert log[:2] == ["build a", "a"] and set(log[1:]) == {"a"} and len(log) > WARM_UP
    assert len(record["seconds"]) == FEWEST_ROUNDS and record["failure"] == ""
    assert record["milliseconds"] == Spread.of([1e3 * each for each in record["seconds"]])
    assert not {"time_ratio", "speed_ratio", "memory_ratio", "efficiency"} & record.keys()
    assert record["peak_bytes"] is None  # on a CPU


def test_the_baseline_is_built_once_and_measured_in_the_same_rounds():
    pair, log = meter("a", "b", "c")
    pair.measure(0, None, 0)
    second = pair.measure(1, 0, 0)
    third = pair.measure(2, 0, 0)
    assert [line for line in log if line.startswith("build")] == ["build a", "build b", "build c"]
    changes = [a for a, b in zip(log, [*log[1:], ""], strict=True) if a != b]
    # Each is warmed up, then they take turns.
    assert changes[:1] == ["build a"]
    assert changes[1:] == ["a", "build b", *["b", "a"] * FEWEST_ROUNDS, "b", "build c"] + [
        *["c", "a"] * FEWEST_ROUNDS,
        "c",
    ]
    for record in (second, third):
        assert len(record["seconds"]) == FEWEST_ROUNDS
        time, speed = record["time_ratio"], record["speed_ratio"]
        assert speed.low == pytest.approx(1 / time.high)
        assert speed.high == pytest.approx(1 / time.low)


def test_another_baseline_replaces_the_first():
    pair, log = meter("a", "b", "c")
    pair.measure(0, None, 0)
    pair.measure(
        2, 1, 0
    )  # also where it was not measured alone, as in a process that was restarted
    builds = [line for line in log if line.startswith("build")]
    assert builds == ["build a", "build b", "build c"]


def test_a_failure_leaves_the_baseline():
    pair, log = meter("a", "bad", "c", error=MemoryError())
    pair.measure(0, None, 0)
    with pytest.raises(MemoryError):
        pair.measure(1, 0, 0)
    assert pair.measure(2, 0, 0)["time_ratio"].low > 0
    assert log.count("build a") == 1


class Multiplies(Logged):
    def prepare(self):
        x = torch.ones(64, 64)
        return lambda: (x @ x) @ x


def test_a_profile_lists_the_kernels():
    case = Multiplies(name="a", build=int, batch_size=1, precision="fp32", device="cpu")
    record = PairMeter([case], profiled=True).measure(0, None, 0)
    counts = {kernel["name"]: kernel["count"] for kernel in record["kernels"]}
    assert counts["aten::mm"] == 2 and record["kernel_count"] >= 2
    times = [kernel["milliseconds"] for kernel in record["kernels"]]
    assert times == sorted(times, reverse=True) and 0 < sum(times) <= record["busy_milliseconds"]
    assert record["busy"] == record["busy_milliseconds"] / record["milliseconds"].median


def test_efficiency_is_relative_to_the_reference():
    rates = iter([1.0, *[10.0, 30.0] * 2 * FEWEST_ROUNDS])  # the first one warms up
    pair, _ = meter("a", "b", reference=lambda: lambda: next(rates))
    pair.measure(0, None, 0)
    record = pair.measure(1, 0, 0)
    assert record["rates"] == [20.0] * FEWEST_ROUNDS and record["flops"] == 30
    efficiency = Spread.of([30 / 20 / seconds for seconds in record["seconds"]])
    assert record["efficiency"] == efficiency
    assert next(rates, None) is None  # only around the case, not around its baseline
