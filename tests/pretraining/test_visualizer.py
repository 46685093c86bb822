import cv2
import numpy as np
import pytest
from matplotlib.axes import Axes

from crossmae_det.pretraining.visualizer import draw_decoder_attention, draw_feature_usage


def drawn(path):
    """An image that was written, and nothing else beside it."""
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    image = cv2.imread(str(path))
    assert image.std() > 10
    return image


def calls(monkeypatch, name):
    """The positional arguments of each call of a method of Axes."""
    arguments = []
    method = getattr(Axes, name)

    def recorded(self, *args, **options):
        arguments.append(args)
        return method(self, *args, **options)

    monkeypatch.setattr(Axes, name, recorded)
    return arguments


UNIFORM, EXTREME = [[6 / 25, 18 / 25, 1 / 25]], [[1e-6, 1e-3, 1 - 1e-3 - 1e-6]]
RANDOM = np.random.default_rng(0).dirichlet([3, 2, 1], size=8)


@pytest.mark.parametrize("mass", [UNIFORM, EXTREME, RANDOM], ids=["uniform", "extreme", "random"])
def test_attention(tmp_path, monkeypatch, mass):
    curves, bars = calls(monkeypatch, "plot"), calls(monkeypatch, "bar")
    mass = np.array(mass)
    relative = mass * 25 / [6, 18, 1]
    draw_decoder_attention(mass, relative, tmp_path / "new" / "attention.png")
    drawn(tmp_path / "new" / "attention.png")
    np.testing.assert_array_equal(np.stack([curve for (curve,) in curves], axis=1), relative)
    np.testing.assert_array_equal(np.stack([heights for _, heights in bars], axis=1), mass)


@pytest.mark.parametrize(("depth", "count"), [(1, 1), (4, 13)])
def test_features(tmp_path, monkeypatch, depth, count):
    texts = calls(monkeypatch, "text")
    weights = np.random.default_rng(0).normal(size=(depth, count))
    weights[0, 0] = -0.001
    contribution = np.abs(weights) / np.abs(weights).sum(1, keepdims=True)
    names = ["input", *(f"block {index}" for index in range(count - 1))]
    draw_feature_usage(weights, contribution, names, tmp_path / "new" / "features.png")
    drawn(tmp_path / "new" / "features.png")
    cells = [(column, row) for row in range(depth) for column in range(count)]
    expected = [(*cell, f"{weights[cell[::-1]]:.2f}".replace("-0.00", "0.00")) for cell in cells]
    expected += [(*cell, f"{100 * contribution[cell[::-1]]:.0f}") for cell in cells]
    assert texts == expected
