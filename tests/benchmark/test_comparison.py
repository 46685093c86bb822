import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from crossmae_det.benchmark import (
    OneBlock,
    Report,
    Work,
    case_values,
    check_sizes,
    compare,
    comparison_section,
    earlier_section,
    find_earlier,
    flops_section,
    grow,
    growth_section,
    measuring,
    read_json,
)
from crossmae_det.benchmark.comparison import fitted_exponent, work_values
from crossmae_det.benchmark.measuring import OUT_OF_MEMORY, Outcome, measure
from crossmae_det.modeling import ViT


class Maps(nn.Module):
    """A convolution that maps images to one map; at the given size it does something else."""

    def __init__(self, width=4, trouble=None):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 4, stride=4)
        self.trouble = trouble

    def forward(self, images):
        if self.trouble == "memory" and images.device.type != "meta":
            raise MemoryError
        if self.trouble == "allocator" and images.device.type != "meta":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 TB")
        if self.trouble == "killed" and images.device.type != "meta":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "size":
            raise RuntimeError("only 7 x 7\nhere")
        if self.trouble == "bug" and images.device.type != "meta":
            raise RuntimeError("sizes do not match\nat all")
        return {"map": self.conv(images)}


class Heavy(Maps):
    def __init__(self):
        super().__init__()
        self.ballast = nn.Parameter(torch.ones(24 * 2**20))  # 96 MiB


def work(name="a", train=False, **options):
    return Work(name, partial(Maps, **options), "alone", 32, 2, train, "fp32", "cpu")


@pytest.mark.parametrize("train", [False, True])
def test_backbones_are_counted_and_measured_in_turns(train):
    ((first, second),) = compare([[work(train=train), work("b", train, width=8)]], repeats=2)
    assert (first.count.parameters, second.count.parameters) == (4 * 49, 8 * 49)
    # 8 x 8 positions, each a product of 48 and the channels.
    assert (first.count.flops, second.count.flops) == (2 * 64 * 48 * 4, 2 * 64 * 48 * 8)
    for case in (first, second):
        assert len(case.outcome.seconds) == 2 and min(case.outcome.seconds) > 0
        assert case.outcome.bytes > 0 and not case.outcome.failure
    assert first.time_ratio.median == first.memory_ratio == 1
    values = case_values(second)
    expected = [b / a for a, b in zip(first.outcome.seconds, second.outcome.seconds, strict=True)]
    assert values["time_ratio"]["low"] == min(expected)
    assert values["images_per_second"] == 2 / values["median_seconds"]


@pytest.mark.parametrize(
    ("trouble", "failure"),
    [
        ("memory", OUT_OF_MEMORY),
        ("allocator", OUT_OF_MEMORY),
        ("killed", OUT_OF_MEMORY),
        ("bug", "sizes do not match"),
    ],
)
def test_a_case_that_fails_is_a_row_that_says_so(trouble, failure):
    ((first, second),) = compare([[work(), work("b", trouble=trouble)]], repeats=1)
    assert second.outcome.failure == failure and not first.outcome.failure
    assert second.time_ratio is None and len(first.outcome.seconds) == 1
    rows = comparison_section([[first, second]]).rows
    assert failure in rows[1] and len(rows[0]) == len(rows[1])


def test_where_the_first_fails_the_others_have_no_ratio():
    ((first, second),) = compare([[work(trouble="memory"), work("b")]], repeats=1)
    assert first.outcome.failure and second.time_ratio is None and second.outcome.seconds
    assert comparison_section([[first, second]]).rows[1][-2:] == ["-", "-"]


def test_memory_is_that_of_the_case_alone():
    """The second case takes 80 MB more, the third, after it, does not."""
    outcomes = measure([work(), work(width=100_000), work()], 1, "")
    low, high, again = (outcome.bytes / 2**20 for outcome in outcomes)
    assert high - low > 40 and abs(again - low) < 20


def test_an_earlier_run_is_compared_case_by_case(tmp_path):
    groups = compare([[work(), work("b")]], repeats=1)
    section = comparison_section(groups)
    report = Report("command", {"CPU": "x"}, [section, flops_section(groups)])
    report.write_json(tmp_path / "a.json")
    report.write_csv(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines()[1].startswith("backbones,a,32,2,")
    earlier = read_json(tmp_path / "a.json")
    for case in earlier["backbones"]:
        case["median_seconds"] /= 2
    again = earlier_section(groups, earlier)
    assert [row[0] for row in again.rows] == ["a", "b"]
    assert [row["time"] for row in again.values] == pytest.approx([2, 2])
    earlier["backbones"] = earlier["backbones"][:1]
    assert len(earlier_section(groups, earlier).rows) == 1
    with pytest.raises(ValueError, match="no backbone in common"):
        earlier_section(groups, earlier | {"backbones": []})
    earlier["backbones"][0]["peak_bytes"] = 0
    assert earlier_section(groups, earlier).rows[0][-1] == "-"


@pytest.mark.parametrize("change", [{"part": "pyramid"}, {"compiled": True}, {"train": True}])
def test_other_work_is_not_compared(change):
    one = work()
    case = work_values(one) | {"failure": ""}
    assert find_earlier([one], {"backbones": [case]}) == {one: case}
    with pytest.raises(ValueError, match="no backbone in common"):
        find_earlier([one], {"backbones": [case | change]})


def test_a_size_that_a_model_does_not_take_is_refused_by_its_name():
    small = work("fixed", trouble="size")
    with pytest.raises(
        ValueError, match="'fixed' does not take images of 32 x 32 pixels: only 7 x 7$"
    ):
        compare([[small]], repeats=1)


def test_a_process_that_is_gone_is_a_failure():
    outcome = Outcome(work(), seconds=[1.0], references=[2.0])
    worker = measuring._Worker(outcome.work)
    worker._process.kill()
    worker.ask("bytes", outcome)
    assert outcome.failure == OUT_OF_MEMORY and not outcome.seconds and not outcome.references
    worker.stop()  # again


@pytest.mark.parametrize("text", ["no json", "[]", '{"version": 0}', "{}"])
def test_results_of_another_version_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json (was not written by|has results of version)"):
        read_json(tmp_path / "a.json")


def test_the_exponent_of_a_curve():
    assert fitted_exponent([(s, 3e-4 * s**2.5) for s in (2, 4, 8, 16)]) == pytest.approx(2.5)
    assert fitted_exponent([(2, 1.0), (4, None), (8, 64.0)]) == pytest.approx(3)
    assert fitted_exponent([(2, 1.0), (4, None)]) is None


def block(kind):
    window = 2 if kind == "windowed" else 0
    backbone = ViT(32, 8, 16, 1, 2, window_size=window, global_blocks=[])
    return OneBlock(backbone.blocks[0], 16, 8)


def test_memory_of_the_model_counts_or_does_not():
    works = [replace(work(), build=Heavy, count_model=counted) for counted in (True, False)]
    with_model, without = measure(works, 1, "memory")
    assert with_model.bytes - without.bytes > 0.9 * 96 * 2**20


def test_blocks_are_measured_over_sizes():
    builds = {kind: partial(block, kind) for kind in ("windowed", "global")}
    curves = grow(work(), builds, [32, 64], repeats=1)
    assert [curve.kind for curve in curves] == ["windowed", "global"]
    assert [p.image_size for p in curves[0].points] == [32, 64]
    assert all(point.seconds > 0 for curve in curves for point in curve.points)
    section = growth_section(curves, work())
    assert len(section.rows) == 4
    assert section.values["global"]["time_exponent"] == curves[1].time_exponent
    with pytest.raises(ValueError, match="at least two sizes"):
        grow(work(), builds, [32, 32], repeats=1)
    assert block("global")(torch.zeros(2, 3, 32, 64))["tokens"].shape == (2, 4 * 8, 16)


@pytest.mark.parametrize(
    ("sizes", "batches", "message"),
    [
        ([100], [1], "images of 100 pixels .* 96 say"),
        ([0], [1], "32 say"),
        ([64], [0], "at least 1"),
    ],
)
def test_sizes_that_no_backbone_takes(sizes, batches, message):
    with pytest.raises(ValueError, match=message):
        check_sizes(sizes, batches)


def test_processes_that_use_cuda_are_not_forked(monkeypatch):
    assert measuring.START_METHODS["cuda"] == "spawn"
    # It works here, too, where there may be no GPU.
    monkeypatch.setitem(measuring.START_METHODS, "cpu", "spawn")
    (outcome,) = measure([work()], 1, "")
    assert not outcome.failure and len(outcome.seconds) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_backbone_is_measured_on_cuda():
    (outcome,) = measure([replace(work(train=True), device="cuda")], 1, "")
    assert not outcome.failure and outcome.bytes > 0


def test_no_repeats():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        measure([work()], 0, "")
