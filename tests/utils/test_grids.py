import cv2
import pytest
import torch

from crossmae_det.utils.plots import image_grid


def test_pictures_stand_in_rows_and_columns(tmp_path):
    red, blue = torch.zeros(2, 2, 3, 6, 9, dtype=torch.uint8)
    red[:, 0] = 255
    blue[:, 2] = torch.tensor([255, 128])[:, None, None]
    path = tmp_path / "new" / "grid.png"
    image_grid({"red": red, "blue $1": blue}, ["first", "$second"], path)
    picture = cv2.imread(str(path))
    height, width = picture.shape[:2]
    assert 500 < width < 540 and height > 300
    for y, x, color in [
        (0.3, 0.25, (0, 0, 255)),
        (0.3, 0.75, (255, 0, 0)),
        (0.75, 0.25, (0, 0, 255)),
        (0.75, 0.75, (128, 0, 0)),
    ]:
        assert tuple(picture[int(y * height), int(x * width)]) == color
    # Text is written: neither all paper nor all picture at the left edge.
    assert len(set(picture[:, : width // 3].reshape(-1, 3).sum(1).tolist())) > 3


def test_a_grid_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        image_grid({"a": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}, ["a"], tmp_path / "file/a")
