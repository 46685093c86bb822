"""Comparisons of tiny models. Nothing here depends on how long anything took."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from crossmae_det.benchmark import BackboneCase, Report, Spread, compare, grow, read_json
from crossmae_det.benchmark.cases import OneBlock
from crossmae_det.benchmark.comparison import (
    check_earlier,
    check_sizes,
    comparison_sections,
    comparison_table,
    earlier_section,
    fitted_exponent,
    read_metrics,
    summarize,
    training_time,
)
from crossmae_det.benchmark.measuring import measure
from crossmae_det.benchmark.workers import OUT_OF_MEMORY
from crossmae_det.detection import write_results
from crossmae_det.modeling import ViT

RUNS = {
    "pretrained": [{"box AP": 30.0, "mask AP": 20.0}, {"box AP": 34.0, "mask AP": 21.0}],
    "random": [{"box AP": 20.0, "mask AP": 15.0}, {"box AP": 21.0, "mask AP": 17.0}],
}


class Maps(nn.Module):
    """A convolution that maps images to one map, or fails."""

    def __init__(self, width=4, error=None, on_meta=False):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 4, stride=4)
        self.error, self.on_meta = error, on_meta

    def forward(self, images):
        if self.error and (self.on_meta or images.device.type != "meta"):
            raise self.error
        return {"map": self.conv(images)}


def case(name="a", train=False, **options):
    return BackboneCase(
        name=name,
        build=partial(Maps, **options),
        part="alone",
        image_size=32,
        batch_size=2,
        train=train,
        precision="fp32",
        device="cpu",
    )


@pytest.mark.parametrize("train", [False, True])
def test_backbones_are_counted_and_measured(train):
    first, second = compare([[case(train=train), case("b", train, width=8)]], repeats=2)
    assert (first["parameters"], second["parameters"]) == (4 * 49, 8 * 49)
    # 8 x 8 positions, each a product of 48 and the channels.
    assert (first["flops"], second["flops"]) == (2 * 64 * 48 * 4, 2 * 64 * 48 * 8)
    for record in (first, second):
        assert len(record["seconds"]) == 2 and min(record["seconds"]) > 0
        assert record["peak_bytes"] > 0 and not record["failure"]
    assert first["time_ratio"] == Spread(1, 1, 1) and first["memory_ratio"] == 1
    expected = [b / a for a, b in zip(first["seconds"], second["seconds"], strict=True)]
    assert second["time_ratio"].low == min(expected)
    assert second["images_per_second"] == 2 / second["median_seconds"]


def test_out_of_memory_is_reported_as_a_row():
    records = compare([[case(), case("b", error=MemoryError())]], repeats=1)
    section, _ = comparison_sections(records)
    assert OUT_OF_MEMORY in section.rows[1] and OUT_OF_MEMORY not in section.rows[0]
    assert len(section.rows[0]) == len(section.rows[1]) == len(section.headers)


def test_no_ratio_without_the_first_case():
    records = compare([[case(error=MemoryError()), case("b")]], repeats=1)
    assert records[0]["failure"] and records[1]["seconds"]
    assert comparison_sections(records)[0].rows[1][-2:] == ["-", "-"]


def test_flops_by_part_are_listed_once_per_size():
    common = case().settings() | {"failure": "failed", "parameters": 5}
    small = common | {"flops": 3e9, "flops_by_part": {"backbone": 2e9, "pyramid": 1e9}}
    large = common | {"image_size": 64, "flops": 4e9, "flops_by_part": {"backbone": 4e9}}
    _, flops = comparison_sections([small, small | {"batch_size": 4}, large])
    assert flops.headers == ["backbone", "pixels", "backbone", "pyramid", "total"]
    assert flops.rows == [["a", "32", "2.0", "1.0", "3.0"], ["a", "64", "4.0", "-", "4.0"]]


def test_an_earlier_run_is_compared_case_by_case(tmp_path):
    records = compare([[case(), case("b")]], repeats=1)
    report = Report("command", {"CPU": "x"}, comparison_sections(records))
    report.write_json(tmp_path / "a.json")
    report.write_csv(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines()[1].startswith("backbones,a,32,2,")
    earlier = read_json(tmp_path / "a.json")
    for record in earlier["backbones"]:
        record["median_seconds"] /= 2
    *_, section = comparison_sections(records, earlier)
    assert [row[0] for row in section.rows] == ["a", "b"]
    assert [record["time"] for record in section.records] == pytest.approx([2, 2])
    del earlier["backbones"][1]
    earlier["backbones"][0]["peak_bytes"] = 0
    (row,) = earlier_section(records, earlier).rows
    assert row[-1] == "-"


@pytest.mark.parametrize(
    "change",
    [{"part": "pyramid"}, {"compiled": True}, {"train": True}, {"failure": "out of memory"}],
)
def test_different_cases_are_not_compared(change):
    record = case().settings() | {"failure": ""}
    check_earlier([case(), case("b")], {"backbones": [record]})
    with pytest.raises(ValueError, match="no backbone in common"):
        check_earlier([case()], {"backbones": [record | change]})


def test_an_unsupported_image_size_is_an_error_that_names_the_model():
    fixed = case("fixed", error=RuntimeError("only 7 x 7\nhere"), on_meta=True)
    with pytest.raises(ValueError, match="'fixed' .* 32 x 32 pixels: only 7 x 7$"):
        compare([[fixed]], repeats=1)


@pytest.mark.parametrize(
    ("sizes", "batches", "message"),
    [([100], [1], "100 .* 96"), ([0], [1], "0 .* 32"), ([64], [0], "at least 1, got 0")],
)
def test_invalid_sizes_are_rejected(sizes, batches, message):
    with pytest.raises(ValueError, match=message):
        check_sizes(sizes, batches)


@pytest.mark.cuda
def test_a_backbone_is_measured_on_cuda():
    (measurement,) = measure([replace(case(train=True), device="cuda")], 1, "")
    assert not measurement.failure and measurement.peak_bytes > 0


def block(kind):
    window = 2 if kind == "windowed" else 0
    backbone = ViT(32, 8, 16, 1, 2, window_size=window, global_blocks=[])
    return OneBlock(backbone.blocks[0], 16, 8)


def test_blocks_are_measured_over_sizes():
    builds = {kind: partial(block, kind) for kind in ("windowed", "global")}
    section = grow(case(), builds, [32, 64], repeats=1)
    assert list(section.values) == ["windowed", "global"]
    for curve in section.values.values():
        assert [point["image_size"] for point in curve["points"]] == [32, 64]
        assert all(point["median_seconds"] > 0 for point in curve["points"])
        assert curve["time_exponent"] == fitted_exponent(curve["points"], "median_seconds")
    assert len(section.rows) == 4
    with pytest.raises(ValueError, match="at least two image sizes"):
        grow(case(), builds, [32, 32], repeats=1)
    assert block("global")(torch.zeros(2, 3, 32, 64))["tokens"].shape == (2, 4 * 8, 16)


def test_a_failed_block_is_left_out_of_the_curve():
    section = grow(case(), {"global": partial(Maps, error=MemoryError())}, [32, 64], repeats=1)
    assert section.values["global"]["time_exponent"] is None
    assert section.rows[0] == ["global block", "32", OUT_OF_MEMORY, "-"]


def test_the_exponent_of_a_curve():
    def exponent(*points):
        return fitted_exponent([{"image_size": size, "x": value} for size, value in points], "x")

    assert exponent(*((s, 3e-4 * s**2.5) for s in (2, 4, 8, 16))) == pytest.approx(2.5)
    assert exponent((2, 1.0), (4, None), (8, 64.0)) == pytest.approx(3)
    assert exponent((2, 1.0), (4, None)) is None


def test_means_spreads_and_leads():
    summary = summarize(RUNS)
    assert summary["pretrained"]["box AP"] == 32
    assert summary["pretrained"]["box AP std"] == pytest.approx(8**0.5)
    # The seeds are compared in pairs: 10 and 13.
    assert summary["pretrained"]["box AP lead"] == 11.5
    assert summary["pretrained"]["box AP lead std"] == pytest.approx(4.5**0.5)
    assert summary["random"]["mask AP lead"] == 0
    # Student's t with one degree of freedom, 12.706, times 2.12 / sqrt(2).
    assert summary["pretrained"]["box AP lead margin"] == pytest.approx(19.06, abs=0.01)
    one = summarize({name: runs[:1] for name, runs in RUNS.items()})
    assert one["pretrained"]["box AP std"] == 0 and one["pretrained"]["mask AP lead"] == 5
    assert "mask AP lead margin" not in one["pretrained"]


def test_runs_with_different_metrics_cannot_be_compared():
    with pytest.raises(ValueError, match="different metrics"):
        summarize({"boxes": [{"box AP": 1.0}], "masks": [{"box AP": 1.0, "mask AP": 1.0}]})


def test_the_table_has_rows_for_means_and_leads():
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in comparison_table(RUNS).splitlines()
    ]
    assert cells[0] == ["", "box AP", "mask AP"]
    assert cells[2:] == [
        ["pretrained", "32.0 ± 2.8", "20.5 ± 0.7"],
        ["random", "20.5 ± 0.7", "16.0 ± 1.4"],
        ["pretrained - random", "+11.5 (-7.6 to +30.6)", "+4.5 (-1.9 to +10.9)"],
    ]


def test_the_time_of_a_run_is_read_from_its_metrics(tmp_path):
    assert training_time(tmp_path) is None
    lines = [(9, 2.0), (19, 0.5), (29, 9.0), (19, 0.5), (29, 0.25)]  # resumed after iteration 10
    text = "".join(f'{{"iteration": {i}, "time": {t}}}\n' for i, t in lines)
    (tmp_path / "metrics.json").write_text(text + '{"iteration": 29, "bbox/AP": 50.0}\n')
    assert training_time(tmp_path) == (30, pytest.approx(20 + 5 + 2.5))


def test_metrics_are_read_from_a_results_file(tmp_path):
    path = tmp_path / "results.json"
    results = {"bbox": {"AP": 1.5, "AP50": 3.0, "APl": float("nan")}}
    write_results(path, results, context={})
    assert read_metrics(path) == {"box AP": 1.5, "box AP50": 3.0}
    write_results(path, {"other": {"AP": 1.0}}, context={})
    with pytest.raises(ValueError, match="results.json .* box AP"):
        read_metrics(path)
