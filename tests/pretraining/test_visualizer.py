import cv2
import numpy as np
import pytest
from matplotlib.axes import Axes

from crossmae_det.pretraining.visualizer import draw_decoder_attention, draw_feature_usage


@pytest.fixture
def texts(monkeypatch):
    """What is written into the cells of the maps."""
    written = []
    original = Axes.text

    def text(self, x, y, s, **options):
        written.append((x, y, s))
        return original(self, x, y, s, **options)

    monkeypatch.setattr(Axes, "text", text)
    return written


def picture(path):
    """A picture that was drawn, after a look at its edges: nothing may be cut off there."""
    image = cv2.imread(str(path))
    edge = np.concatenate([image[[0, -1]].reshape(-1, 3), image[:, [0, -1]].reshape(-1, 3)])
    assert (edge == 255).all()
    assert (image < 128).any()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return image


def near(image, bgr):
    return (np.abs(image.astype(int) - bgr).max(axis=2) < 10).sum()


@pytest.mark.parametrize("depth", [1, 8, 12])
def test_attention(tmp_path, depth):
    mass = np.random.default_rng(0).dirichlet([3, 2, 1], size=depth)
    path = tmp_path / "new" / "attention.png"
    draw_decoder_attention(mass, mass * 25 / [6, 18, 1], path)
    image = picture(path)
    assert image.shape == (540, 1400, 3)
    # On the right, the areas of the bars are as the masses: blue, orange, gray.
    right = image[:, 700:]
    areas = [near(right, bgr) for bgr in ([180, 119, 31], [14, 127, 255], [127, 127, 127])]
    np.testing.assert_allclose(np.array(areas) / sum(areas), mass.mean(0), atol=0.03)


def test_attention_that_is_uniform_or_far_from_it(tmp_path):
    for number, row in enumerate([[6 / 25, 18 / 25, 1 / 25], [1e-6, 1e-3, 1 - 1e-3 - 1e-6]]):
        mass = np.array([row])
        path = tmp_path / str(number) / "attention.png"
        draw_decoder_attention(mass, mass * 25 / [6, 18, 1], path)
        picture(path)


@pytest.mark.parametrize(("depth", "count"), [(1, 1), (4, 7), (12, 33)])
def test_features(tmp_path, texts, depth, count):
    weights = np.random.default_rng(0).normal(size=(depth, count))
    weights[0, 0] = -0.001
    contribution = np.abs(weights) / np.abs(weights).sum(1, keepdims=True)
    path = tmp_path / "new" / "features.png"
    names = ["input", *(f"block {index}" for index in range(count - 1))]
    draw_feature_usage(weights, contribution, names, path)
    image = picture(path)
    assert image.shape[1] >= 52 * count
    cells = [(column, row) for row in range(depth) for column in range(count)]
    expected = [(*cell, f"{weights[cell[::-1]]:.2f}".replace("-0.00", "0.00")) for cell in cells]
    expected += [(*cell, f"{100 * contribution[cell[::-1]]:.0f}") for cell in cells]
    assert texts == expected


def test_signs_have_colors_of_their_own(tmp_path):
    path = tmp_path / "new" / "features.png"
    draw_feature_usage(np.array([[0.5, -0.5]]), np.array([[0.5, 0.5]]), ["input", "block 0"], path)
    above = picture(path)
    above = above[: len(above) // 2]
    third = above.shape[1] // 3
    left, right = above[:, :third], above[:, -third:]
    red, blue = [31, 0, 103], [97, 48, 5]
    assert near(left, red) > 1000 and not near(left, blue)
    assert near(right, blue) > 1000 and not near(right, red)
