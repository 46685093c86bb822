import json
import math

import cv2
import numpy as np
import pytest
from matplotlib.axes import Axes

from crossmae_det.utils.plots import _smooth, plot_metrics, read_metrics


def write(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


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


@pytest.mark.parametrize("content", ["", "\n", '{"iter', "[1]\n", '{"iteration": 3}\n'])
def test_a_file_without_metrics(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="metrics.json: no metrics in it") as error:
        plot_metrics(path, tmp_path / "curves.png")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "curves.png").exists()


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json: cannot read the metrics of a run"):
        plot_metrics(tmp_path / "nowhere.json", tmp_path / "curves.png")


def test_metrics_without_anything_to_draw(tmp_path):
    path = write(tmp_path / "m.json", [{"iteration": 0, "time": 1.0}])
    with pytest.raises(ValueError, match="m.json: no total_loss"):
        plot_metrics(path, tmp_path / "curves.png")


def run(length=60, **extra):
    records = []
    for i in range(0, length * 20, 20):
        losses = {"loss_cls": math.exp(-i / 400), "loss_mask": 0.5}
        records.append({"iteration": i, "total_loss": sum(losses.values()), **losses, "lr": 1e-4})
    records[-1].update(extra)
    return records


@pytest.mark.parametrize(
    ("records", "height"),
    [
        (run(**{"bbox/AP": 20.0, "segm/AP50": 30.0, "segm/AP": math.nan}), 920),
        (run(), 920),
        ([{"iteration": 0, "total_loss": 3.0, "loss_reconstruction": 3.0, "lr": 1.0}], 460),
        ([{"iteration": i, "total_loss": math.nan} for i in range(3)], 460),
        ([{"iteration": 5, "bbox/AP": 3.0}], 460),
        ([{"iteration": i, **{f"loss_{k}": k - i for k in range(20)}} for i in range(5)], 460),
    ],
)
def test_pictures(tmp_path, records, height):
    path = tmp_path / "out" / "curves.png"
    plot_metrics(write(tmp_path / "metrics.json", records), path)
    picture = cv2.imread(str(path))
    assert picture.shape == (height, 1400, 3)
    assert (picture < 128).any()
    # Nothing is cut off at the edges.
    edge = np.concatenate([picture[[0, -1]].reshape(-1, 3), picture[:, [0, -1]].reshape(-1, 3)])
    assert (edge == 255).all()
    assert [p.name for p in path.parent.iterdir()] == ["curves.png"]


def test_non_finite_losses_are_marked(tmp_path):
    def reds(records):
        plot_metrics(write(tmp_path / "metrics.json", records), tmp_path / "curves.png")
        blue, green, red = np.moveaxis(cv2.imread(str(tmp_path / "curves.png")).astype(int), 2, 0)
        return ((red > 200) & (green < 80) & (blue < 110)).sum()

    records = run()
    assert reds(records) == 0
    records[10]["total_loss"] = math.inf
    assert reds(records) > 10


def test_smoothing_is_a_centred_mean_over_finite_values():
    values = np.random.default_rng(0).normal(size=200)
    values[[0, 50, 51]] = np.nan
    smooth = _smooth(values)
    for i in range(200):
        reach = min(4, i, 199 - i)  # 2 % of 200 on either side
        window = values[i - reach : i + reach + 1]
        expected = np.nan if np.isnan(values[i]) else np.nanmean(window)
        np.testing.assert_allclose(smooth[i], expected)
    np.testing.assert_allclose(_smooth(np.arange(50.0)), np.arange(50.0))


def test_the_loss_of_a_validation_set_is_drawn_beside_that_of_the_training(tmp_path, monkeypatch):
    drawn = {}
    original = Axes.plot

    def plot(self, x, y, *style, label="", **options):
        drawn[label.partition(",")[0]] = list(y)
        return original(self, x, y, *style, label=label, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    records = [{"iteration": i, "total_loss": 5.0 - i / 20} for i in range(0, 100, 10)]
    values = {19: 5.0, 39: 4.0, 59: 6.0}
    records += [{"iteration": i, "val/total_loss": value} for i, value in values.items()]
    for lines in (records, records[-3:]):
        path = write(tmp_path / "metrics.json", lines)
        plot_metrics(path, tmp_path / "curves.png")
        # As they are: there are too few of them to smooth.
        assert drawn.pop("val/total_loss") == [5.0, 4.0, 6.0]
    assert "total_loss" in drawn
