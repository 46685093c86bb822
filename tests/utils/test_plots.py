"""Grids of images, and the metrics of a run as series and as curves."""

import json
import math

import cv2
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from crossmae_det.utils.plots import image_grid, plot_metrics, read_metrics


def test_a_grid_shows_every_image(tmp_path):
    red, blue = torch.zeros(2, 2, 3, 6, 9, dtype=torch.uint8)
    red[:, 0] = 255
    blue[:, 2] = torch.tensor([255, 128])[:, None, None]
    path = tmp_path / "new" / "grid.png"
    image_grid({"red": red, "blue $1": blue}, ["first", "$second"], path)
    colors = set(map(tuple, cv2.imread(str(path)).reshape(-1, 3).tolist()))
    assert {(0, 0, 255), (255, 0, 0), (128, 0, 0)} < colors


def test_a_grid_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        image_grid({"a": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}, ["a"], tmp_path / "file/a")


def write(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


@pytest.fixture
def drawn(monkeypatch):
    """Label -> (x, y) of every line that is plotted."""
    lines = {}
    original = Axes.plot

    def plot(self, x, y, *style, label="", **options):
        lines[label.partition(",")[0].partition(" (")[0]] = list(x), list(y)
        return original(self, x, y, *style, label=label, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    return lines


def test_a_resumed_run_counts_from_where_it_resumed(tmp_path):
    first = [{"iteration": i, "total_loss": 1.0 + i, "lr": 0.1} for i in range(0, 100, 20)]
    # Resumed at 40, with another logging period.
    second = [{"iteration": i, "total_loss": 0.5} for i in range(40, 80, 10)]
    series = read_metrics(write(tmp_path / "metrics.json", first + second))
    assert series["total_loss"] == {0: 1.0, 20: 21.0, 40: 0.5, 50: 0.5, 60: 0.5, 70: 0.5}
    assert list(series["lr"]) == [0, 20, 40, 60, 80]


def test_an_evaluation_logged_late_drops_nothing(tmp_path):
    """One call of the writer may log iteration 100 before 99, with other names."""
    records = [{"iteration": 100, "total_loss": 1.0}, {"iteration": 99, "bbox/AP": 5.0}]
    assert read_metrics(write(tmp_path / "m.json", records)) == {
        "total_loss": {100: 1.0},
        "bbox/AP": {99: 5.0},
    }


def test_lines_cut_short_are_skipped(tmp_path, caplog):
    path = write(tmp_path / "m.json", [{"iteration": 1, "lr": 0.1}], '{"iteration": 2, "l')
    assert read_metrics(path) == {"lr": {1: 0.1}}
    assert "skipped 1 unreadable" in caplog.text
    # The resumed run goes on in the middle of the line.
    with path.open("a") as file:
        file.write('{"iteration": 2, "lr": 0.2}\n{"iteration": 3, "lr": 0.3}\n')
    assert read_metrics(path) == {"lr": {1: 0.1, 3: 0.3}}


@pytest.mark.parametrize(
    "content",
    ["", "\n", '{"iter', "[1]\n", '{"iteration": 3}\n', '{"iteration": Infinity, "lr": 1}'],
)
def test_a_file_without_metrics(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="metrics.json: ") as error:
        plot_metrics(path, tmp_path / "curves.png")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "curves.png").exists()


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json: "):
        plot_metrics(tmp_path / "nowhere.json", tmp_path / "curves.png")


def test_metrics_without_anything_to_draw(tmp_path):
    path = write(tmp_path / "m.json", [{"iteration": 0, "time": 1.0}])
    with pytest.raises(ValueError, match="m.json: "):
        plot_metrics(path, tmp_path / "curves.png")


def run(length=60, **extra):
    records = []
    for i in range(0, length * 20, 20):
        losses = {"loss_cls": math.exp(-i / 400), "loss_mask": 0.5}
        records.append({"iteration": i, "total_loss": sum(losses.values()), **losses, "lr": 1e-4})
    records[-1].update(extra)
    return records


@pytest.mark.parametrize(
    "records",
    [
        run(**{"bbox/AP": 20.0, "segm/AP50": 30.0, "segm/AP": math.nan}),
        run(),
        [{"iteration": 0, "total_loss": 3.0, "loss_reconstruction": 3.0, "lr": 1.0}],
        [{"iteration": i, "total_loss": math.nan} for i in range(3)],
        [{"iteration": 5, "bbox/AP": 3.0}],
        [{"iteration": i, **{f"loss_{k}": k - i for k in range(20)}} for i in range(5)],
    ],
)
def test_every_series_is_plotted(tmp_path, records, drawn):
    path = tmp_path / "out" / "curves.png"
    plot_metrics(write(tmp_path / "metrics.json", records), path)
    assert cv2.imread(str(path)) is not None
    assert [p.name for p in path.parent.iterdir()] == ["curves.png"]
    names = {name.replace("/", " ") for record in records for name in record} - {"iteration"}
    if "loss_reconstruction" in names:  # the same curve as the total loss
        names.remove("loss_reconstruction")
    if all(math.isnan(record.get("total_loss", 0)) for record in records):
        names = {"not finite"}
    assert names <= drawn.keys()


def test_non_finite_losses_are_marked(tmp_path, drawn):
    records = run()
    plot_metrics(write(tmp_path / "metrics.json", records), tmp_path / "curves.png")
    assert "not finite" not in drawn
    records[10]["total_loss"] = math.inf
    plot_metrics(write(tmp_path / "metrics.json", records), tmp_path / "curves.png")
    assert drawn["not finite"][0] == [records[10]["iteration"]]


def test_losses_are_a_centered_mean_over_finite_values(tmp_path, drawn):
    values = np.random.default_rng(0).normal(size=200)
    values[[0, 50, 51]] = np.nan
    for losses in (values, np.arange(50.0)):
        records = [{"iteration": i, "total_loss": value} for i, value in enumerate(losses)]
        plot_metrics(write(tmp_path / "metrics.json", records), tmp_path / "curves.png")
        smooth = drawn["total_loss"][1]
        for i, value in enumerate(losses):
            reach = min(len(losses) // 50, i, len(losses) - 1 - i)  # 2 % on either side
            window = losses[i - reach : i + reach + 1]
            expected = np.nan if np.isnan(value) else np.nanmean(window)
            np.testing.assert_allclose(smooth[i], expected, atol=1e-12)


def test_a_validation_loss_is_plotted_as_it_is(tmp_path, drawn):
    records = [{"iteration": i, "total_loss": 5.0 - i / 20} for i in range(0, 100, 10)]
    values = {19: 5.0, 39: 4.0, 59: 6.0}
    records += [{"iteration": i, "val/total_loss": value} for i, value in values.items()]
    for lines in (records, records[-3:]):
        path = write(tmp_path / "metrics.json", lines)
        plot_metrics(path, tmp_path / "curves.png")
        assert drawn.pop("val/total_loss") == (list(values), list(values.values()))
    assert "total_loss" in drawn
