import json
import math

from detectron2.utils.events import EventStorage, JSONWriter

from crossmae_det.engine.hooks import MetricsWriter
from crossmae_det.utils.plots import read_metrics


def write(writer, series):
    for iteration, scalars in enumerate(series):
        with EventStorage(iteration) as storage:
            storage.put_scalars(smoothing_hint=False, **scalars)
            writer.write()
    writer.close()


def test_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "metrics.json"
    series = [{"AP": math.nan, "total_loss": 1.5}, {"AP": -math.inf, "total_loss": math.inf}]
    write(MetricsWriter(str(path)), series)

    def fail(name):
        raise AssertionError(f"{name} is not JSON")

    lines = [json.loads(line, parse_constant=fail) for line in path.read_text().splitlines()]
    assert lines == [
        {"AP": None, "iteration": 0, "total_loss": 1.5},
        {"AP": None, "iteration": 1, "total_loss": None},
    ]
    read = read_metrics(path)
    assert read["total_loss"][0] == 1.5 and math.isnan(read["total_loss"][1])


def test_finite_metrics_are_those_of_detectron2(tmp_path):
    series = [{"a": 0.1 + 0.2, "b": 3}, {"a": 1e-30}, {}]
    for name, kind in (("ours", MetricsWriter), ("detectron2", JSONWriter)):
        write(kind(str(tmp_path / name)), series)
    assert (tmp_path / "ours").read_text() == (tmp_path / "detectron2").read_text()


def test_a_run_without_metrics_leaves_no_file(tmp_path):
    write(MetricsWriter(str(tmp_path / "metrics.json")), [])
    assert not list(tmp_path.iterdir())
