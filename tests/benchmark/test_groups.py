"""Groups of measurements under a time budget. Nothing here depends on how long anything took."""

import os
import time
from functools import partial

import pytest

from crossmae_det.benchmark import Spread
from crossmae_det.benchmark.groups import (
    INTERRUPTED,
    MISSED,
    NOT_RUN,
    REACHED,
    Entry,
    Group,
    Target,
    run_groups,
    target_section,
)
from crossmae_det.benchmark.report import Column
from crossmae_det.benchmark.workers import OUT_OF_MEMORY, TIMED_OUT

PLENTY = 600.0


class Meter:
    """Returns the index, the baseline and the calls of this object, or does what ``trouble`` says
    for an index."""

    def __init__(self, trouble):
        self.trouble = trouble
        self.calls = 0

    def measure(self, index, baseline, seconds):
        self.calls += 1
        what = self.trouble.get(index)
        if what == "memory":
            raise MemoryError
        if what == "exit":
            os._exit(3)
        if what == "sleep":
            time.sleep(PLENTY)
        return {"index": index, "baseline": baseline, "calls": self.calls, "limit": seconds}


def group(key="g", baselines=(None, 0, 0), trouble=None, share=1.0, targets=(), **options):
    return Group(
        key=key,
        title=key.upper(),
        entries=[
            Entry({"name": f"case{index}", "mode": "ab"[index % 2]}, baseline, targets)
            for index, baseline in enumerate(baselines)
        ],
        build=partial(Meter, trouble or {}),
        seconds=1.0,
        share=share,
        columns=[Column("name", "name"), Column("index", "index"), Column("base", "baseline")],
        preload=[__name__],
        **options,
    )


def run(*groups, seconds=PLENTY, log=None):
    lines = []
    results = run_groups(groups, "cpu", seconds, lines.append if log is None else log)
    return results, lines


def test_cases_of_a_group_run_in_one_process():
    (result,), lines = run(group())
    records = [result.records[index] for index in range(3)]
    assert [record["baseline"] for record in records] == [None, 0, 0]
    assert [record["calls"] for record in records] == [1, 2, 3]
    assert records[1]["name"] == "case1" and records[1]["failure"] == ""
    assert records[1]["limit"] == 1.0
    assert result.section().rows[2] == ["case2", "2", "0"]
    assert len(lines) == 3 and "g: case1 b: index: 1, base: 0" in lines[1]


def test_a_failure_is_a_row_and_the_others_go_on():
    (result,), _ = run(group(baselines=(None, None, 1, 0), trouble={1: "memory"}))
    assert result.records[1]["failure"] == OUT_OF_MEMORY
    assert result.section().rows[1] == ["case1", OUT_OF_MEMORY, "-"]
    # There is nothing to compare the third with.
    assert [result.records[index]["baseline"] for index in (2, 3)] == [None, 0]
    assert result.records[3]["calls"] == 4


def test_a_process_that_ends_is_replaced():
    (result,), _ = run(group(trouble={1: "exit"}))
    assert result.records[1]["failure"] == "ended with 3"
    assert (result.records[2]["calls"], result.records[2]["baseline"]) == (1, 0)


def test_without_time_nothing_is_started_and_every_case_has_a_row():
    results, lines = run(group("a"), group("b"), seconds=0)
    assert lines == []
    for result in results:
        assert [record["failure"] for record in result.records.values()] == [NOT_RUN] * 3
        assert [row[:2] for row in result.section().rows][0] == ["case0", NOT_RUN]


def test_what_a_group_has_no_time_for_follows_after_the_others():
    results, lines = run(group("first", share=0), group("second"))
    keys = [line.partition("] ")[2].partition(":")[0] for line in lines]
    assert keys == ["second"] * 3 + ["first"] * 3
    for result in results:
        assert [record["failure"] for record in result.records.values()] == [""] * 3


def test_a_case_that_takes_too_long_is_stopped():
    (result,), _ = run(group(trouble={0: "sleep"}), seconds=4)
    assert result.records[0]["failure"].startswith(TIMED_OUT)
    assert [result.records[index]["failure"] for index in (1, 2)] == [NOT_RUN] * 2


def test_the_results_survive_ctrl_c():
    def log(line):
        if "case1" in line:
            raise KeyboardInterrupt

    results, _ = run(group("a"), group("b"), log=log)
    failures = [record["failure"] for result in results for record in result.records.values()]
    assert failures == ["", "", *[INTERRUPTED] * 4]


def test_rows_are_put_together_by_a_label():
    (result,), _ = run(group(sort_by="mode"))
    assert [row[0] for row in result.section().rows] == ["case0", "case2", "case1"]


@pytest.mark.parametrize(
    ("value", "at_least", "expected"),
    [
        (Spread(2.5, 1.0, 3.0), True, ("2.50 (1.00 to 3.00)", REACHED)),
        (Spread(2.4, 2.0, 3.0), True, ("2.40 (2.00 to 3.00)", MISSED)),
        (2.5, False, ("2.50", REACHED)),
        (2.6, False, ("2.60", MISSED)),
        (None, True, ("-", "not measured")),
    ],
)
def test_targets(value, at_least, expected):
    target = Target("speed", "ratio", 2.5, at_least)
    assert target.verdict({"ratio": value}) == expected
    assert str(target) == ("at least 2.5" if at_least else "at most 2.5")


def test_the_table_of_targets():
    target = Target("cases", "index", 1)
    results, _ = run(group(targets=(target,), trouble={2: "memory"}), group("other"))
    section = target_section(results)
    assert [row[-1] for row in section.rows] == [
        MISSED,
        REACHED,
        f"not measured: {OUT_OF_MEMORY}",
    ]
    assert section.rows[1] == ["G", "case1 b", "cases", "at least 1", "1.00", REACHED]
    assert target_section(results[1:]) is None
