import pytest

from crossmae_det.benchmark.studies import comparison_table, read_metrics, summarize
from crossmae_det.detection.evaluator import write_results

RUNS = {
    "pretrained": [{"box AP": 30.0, "mask AP": 20.0}, {"box AP": 34.0, "mask AP": 21.0}],
    "random": [{"box AP": 20.0, "mask AP": 15.0}, {"box AP": 21.0, "mask AP": 17.0}],
}


def test_means_spreads_and_leads():
    summary = summarize(RUNS)
    assert summary["pretrained"]["box AP"] == 32
    assert summary["pretrained"]["box AP std"] == pytest.approx(8**0.5)
    # The seeds are compared in pairs: 10 and 13.
    assert summary["pretrained"]["box AP lead"] == 11.5
    assert summary["pretrained"]["box AP lead std"] == pytest.approx(4.5**0.5)
    assert summary["random"]["mask AP lead"] == 0
    one = summarize({name: runs[:1] for name, runs in RUNS.items()})
    assert one["pretrained"]["box AP std"] == 0 and one["pretrained"]["mask AP lead"] == 5


def test_runs_of_other_metrics_cannot_be_compared():
    with pytest.raises(ValueError, match="the runs have different metrics"):
        summarize({"boxes": [{"box AP": 1.0}], "masks": [{"box AP": 1.0, "mask AP": 1.0}]})


def test_the_table_has_a_row_for_each_start_and_its_lead():
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in comparison_table(RUNS).splitlines()
    ]
    assert cells[0] == ["", "box AP", "mask AP"]
    assert cells[2:] == [
        ["pretrained", "32.0 ± 2.8", "20.5 ± 0.7"],
        ["random", "20.5 ± 0.7", "16.0 ± 1.4"],
        ["pretrained - random", "+11.5 ± 2.1", "+4.5 ± 0.7"],
    ]


def test_metrics_come_from_a_results_file(tmp_path):
    path = tmp_path / "results.json"
    results = {"bbox": {"AP": 1.5, "AP50": 3.0, "APl": float("nan")}}
    write_results(path, results, context={})
    assert read_metrics(path) == {"box AP": 1.5, "box AP50": 3.0}
    write_results(path, {"other": {"AP": 1.0}}, context={})
    with pytest.raises(ValueError, match="results.json has none of box AP, box AP50, mask AP"):
        read_metrics(path)
