"""What the benchmark of a GPU measures, and its report. Nothing is measured here."""

import json
import pickle

import pytest
import torch

from crossmae_det.benchmark import Spread
from crossmae_det.benchmark.cases import check_name
from crossmae_det.benchmark.gpu_report import gpu_report, plots, write_report
from crossmae_det.benchmark.gpu_suite import FULL, SMALL, full_scale, gemm_rate, plan
from crossmae_det.benchmark.groups import MISSED, REACHED, GroupResult, run_groups

RECORD = {
    "failure": "",
    "milliseconds": Spread(30.0, 29.0, 33.0),
    "images_per_second": 66.0,
    "peak_bytes": 2**30,
}


def named(groups):
    return {group.key: group for group in groups}


def names(group):
    return [entry.name for entry in group.entries]


@pytest.fixture(scope="module")
def full():
    return named(plan(FULL, "cuda"))


def test_the_groups_of_a_gpu(full):
    backbones = [f"backbones-{size}" for size in ("base", "large")]
    pretraining = [f"pretraining-{size}" for size in "bl"]
    assert set(full) == {"parity", "detector", "tests", *backbones, *pretraining}
    assert set(named(plan(SMALL, "cpu"))) == {
        *("parity", "backbones-tiny", "detector", "pretraining-s")
    }
    backends = {entry.labels["backend"] for entry in full["parity"].entries}
    assert backends == {"eager", "sdpa", "folded", "flex"}
    for size in ("base", "large"):
        ours = [f"vit-{size}{at}" for at in ("", "@flex", "@sdpa", "@eager")]
        expected = {
            f"{name}{compiled} {mode}"
            for name in (f"detectron2-vit-{size}", *ours)
            for compiled in ("", " compiled")
            for mode in ("step", "forward")
        }
        cases = names(full[f"backbones-{size}"])
        assert set(cases) == expected and len(cases) == len(expected)
    for key in pretraining:
        methods = ("MAE", "CrossMAE 0.25", "CrossMAE 0.75")
        assert names(full[key]) == [f"{m}{c}" for c in ("", " compiled") for m in methods]


@pytest.mark.parametrize(("scale", "device"), [(FULL, "cuda"), (SMALL, "cpu")])
def test_cases_go_to_their_processes_and_stand_behind_their_baselines(scale, device):
    for group in plan(scale, device):
        build = pickle.loads(pickle.dumps(group.build))
        for index, entry in enumerate(group.entries):
            assert entry.baseline is None or entry.baseline < index
            assert len(names(group)) == len(set(names(group)))
        if hasattr(build, "args") and hasattr(build.args[0][0], "count_flops"):
            cases = build.args[0]
            assert len(cases) == len(group.entries)
            for case, entry in zip(cases, group.entries, strict=True):
                assert entry.labels["case"].split(" compiled")[0] == case.name
                assert case.compiled == ("compiled" in entry.name)
                assert case.device == device and case.precision == "bf16"
                if entry.baseline is not None:  # like with like
                    first = cases[entry.baseline]
                    assert getattr(first, "train", None) == getattr(case, "train", None)
                    assert first.batch_size == case.batch_size
                if group.key.startswith("backbones"):
                    check_name(case.name)


def test_the_targets(full):
    def limits(key, name):
        return {
            (t.key, t.limit, t.at_least)
            for entry in full[key].entries
            if entry.name == name
            for t in entry.targets
        }

    step = {("speed_ratio", 2.5, True), ("memory_ratio", 0.4, False)}
    for size in ("base", "large"):
        for name in (f"vit-{size} step", f"vit-{size} compiled step"):
            assert limits(f"backbones-{size}", name) == step
        assert not limits(f"backbones-{size}", f"vit-{size} forward")
    assert limits("detector", "vit-base step") == {("speed_ratio", 1.6, True)}
    efficiency = ("efficiency", 0.5, True)
    assert limits("pretraining-b", "CrossMAE 0.25") == {("time_ratio", 0.68, False)}
    assert limits("pretraining-l", "CrossMAE 0.25 compiled") == {
        ("time_ratio", 0.88, False),
        efficiency,
    }
    assert limits("pretraining-b", "MAE compiled") == {efficiency}
    assert not any(entry.targets for group in plan(SMALL, "cpu") for entry in group.entries)


def test_batches_follow_the_memory_of_the_gpu():
    assert full_scale(139) == full_scale(79) == FULL
    half, quarter = full_scale(39), full_scale(15)
    assert half.batch_sizes == {"base": 2, "large": 1} and half.pretraining == {"b": 128, "l": 64}
    assert quarter.batch_sizes == {"base": 1, "large": 1} and quarter.detector_batch_size == 1
    assert full_scale(4) == full_scale(15)


def test_the_reference_has_the_shapes_of_the_models():
    (group,) = (group for group in plan(SMALL, "cpu") if group.key == "pretraining-s")
    builds = [case.build for case in group.build.args[0][:2]]
    rate = gemm_rate(builds, 4, "bf16", "cpu")
    assert rate.shapes and {shape.rows % 4 for shape in rate.shapes} == {0} and rate() > 0


def results_of(group, **values):
    result = GroupResult(group)
    for index, entry in enumerate(group.entries):
        result.records[index] = {**entry.labels, **RECORD, **values}
    result.records[len(group.entries) - 1] = {**group.entries[-1].labels, "failure": "no triton"}
    return result


def test_the_report_compares_with_the_targets(full, tmp_path):
    ratios = {"time_ratio": Spread(0.7, 0.6, 0.8), "efficiency": Spread(0.55, 0.5, 0.6)}
    pretraining = results_of(full["pretraining-b"], **ratios, flops=10**12)
    (parity,) = run_groups([full["parity"]], "cuda", 0)  # no time: nothing is started
    results = [parity, pretraining]
    report = gpu_report(results, "crossmae-det benchmark-gpu", torch.device("cpu"))
    files = write_report(report, results, tmp_path / "new")
    assert {file.name for file in files} == {path.name for path in (tmp_path / "new").iterdir()}

    content = json.loads(files[0].read_text())
    verdicts = {(t["case"], t["what"]): t["verdict"] for t in content["targets"]}
    assert verdicts["CrossMAE 0.25", "time x MAE"] == MISSED
    assert verdicts["MAE compiled", "rate x bf16 GEMMs"] == REACHED
    assert verdicts["CrossMAE 0.75 compiled", "rate x bf16 GEMMs"] == "not measured: no triton"
    assert len(content["pretraining-b"]) == 6 and content["environment"]["date"]
    assert {record["failure"] for record in content["parity"]} == {"not run: time"}

    markdown = files[1].read_text()
    assert "![Pretraining step: ViT-B, batch of 256, bf16](pretraining-b.png)" in markdown
    for text in ("not run: time", "no triton", "`crossmae-det benchmark-gpu`", torch.__version__):
        assert text in markdown
    assert [*plots(results)] == ["pretraining-b"]
