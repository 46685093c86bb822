import contextlib
import io
import json
import logging

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from shorthand import one_line

from crossmae_det.detection.predictor import (
    PredictionWriter,
    Source,
    iter_inputs,
    output_paths,
    video_writer,
)
from crossmae_det.utils.image_reading import UndecodableImageError


def color_image(height=20, width=30, level=100):
    return np.full((height, width, 3), (level, 50, 200), dtype=np.uint8)


def write_video(path, frames=5, size=(64, 48), fps=12.5):
    with video_writer(path, fps=fps, size=size) as write:
        for number in range(frames):
            write(color_image(size[1], size[0], 40 * number))
    return path


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "in"
    (root / "deeper").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deeper/c.png", ".hidden.png"):
        data = cv2.imencode(".png", color_image())[1]
        (root / name).write_bytes(data.tobytes())
    (root / "notes.txt").write_text("not an image")
    write_video(root / "clip.mp4")
    return root


def names(sources):
    return [source.path.name for source in sources]


def test_files_folders_and_patterns(folder):
    assert names(iter_inputs([str(folder)])) == ["a.JPG", "b.png", "clip.mp4", "c.png"]
    assert names(iter_inputs([str(folder / "*.png")])) == ["b.png"]
    assert names(iter_inputs([str(folder / "**" / "*.png")])) == ["b.png", "c.png"]
    both = iter_inputs([str(folder / "b.png"), str(folder), str(folder / "deeper")])
    assert names(both) == ["b.png", "a.JPG", "clip.mp4", "c.png"]
    assert [source.is_video for source in both[1:3]] == [False, True]


def test_a_link_back_does_not_make_a_folder_endless(folder):
    (folder / "deeper" / "up").symlink_to(folder)
    assert names(iter_inputs([str(folder)])) == ["a.JPG", "b.png", "clip.mp4", "c.png"]


def test_results_do_not_become_inputs(folder):
    drawn = folder / "drawn" / "deeper"
    drawn.mkdir(parents=True)
    (drawn / "c.png").write_bytes((folder / "b.png").read_bytes())
    expected = ["a.JPG", "b.png", "clip.mp4", "c.png"]
    assert names(iter_inputs([str(folder)], folder / "drawn")) == expected
    pattern = str(folder / "**" / "*.png")
    assert names(iter_inputs([pattern], folder / "drawn")) == ["b.png", "c.png"]
    assert names(iter_inputs([str(drawn / "c.png")], folder / "drawn")) == ["c.png"]  # named


def test_file_names_may_look_like_patterns(folder):
    odd = folder / "odd[1].png"
    odd.write_bytes((folder / "b.png").read_bytes())
    assert names(iter_inputs([str(odd)])) == ["odd[1].png"]


def test_inputs_that_match_nothing(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for entry in (empty, folder / "*.bmp", folder / "x.png"):
        with pytest.raises(FileNotFoundError) as error:
            iter_inputs([str(folder), str(entry)])
        assert one_line(error).startswith(f"{entry}: ")
    for nothing in ([], [""]):
        with pytest.raises(ValueError, match="no input"):
            iter_inputs(nothing)


def test_images_and_videos_are_decoded_when_they_are_used(tmp_path):
    path = tmp_path / "image.png"
    assert cv2.imwrite(str(path), color_image())
    np.testing.assert_array_equal(*iter_inputs([str(path)])[0], color_image())
    for name in ("bad.png", "bad.mp4"):
        (tmp_path / name).write_bytes(b"hello")
        (source,) = iter_inputs([str(tmp_path / name)])
        with pytest.raises(UndecodableImageError) as error:
            list(source) if name == "bad.png" else source.size
        assert one_line(error).startswith(f"{tmp_path / name}: ")


def test_video_properties_and_frames(tmp_path):
    (source,) = iter_inputs([str(write_video(tmp_path / "clip.mp4"))])
    assert source.is_video
    assert (source.fps, source.size, source.num_frames) == (12.5, (64, 48), 5)
    frames = list(source)
    assert len(frames) == 5
    for number, frame in enumerate(frames):
        assert frame.shape == (48, 64, 3)
        assert abs(frame[..., 0].mean() - 40 * number) < 8  # the codec is lossy
    assert len(list(source)) == 5  # from the start again


def test_a_video_that_ends_early_is_reported(tmp_path, caplog, monkeypatch):
    (source,) = iter_inputs([str(write_video(tmp_path / "a.mp4"))])
    monkeypatch.setattr(Source, "num_frames", 9)
    with caplog.at_level(logging.WARNING):
        assert len(list(source)) == 5
    assert "a.mp4" in caplog.text and "5 of 9" in caplog.text


def test_a_video_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "out" / "a.mp4"
    with video_writer(path, fps=10, size=(64, 48)) as write:
        write(color_image(48, 64))
        assert not path.exists()
    before = path.read_bytes()
    with (
        pytest.raises(ValueError, match="a.mp4: .*30x20.*64x48"),
        video_writer(path, fps=10, size=(64, 48)) as write,
    ):
        write(color_image())
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_video_that_cannot_be_encoded(tmp_path):
    with (
        pytest.raises(OSError, match="a.xyz: "),
        video_writer(tmp_path / "a.xyz", fps=10, size=(64, 48)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_output_names_are_distinct_and_never_an_input(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "A.jpg").write_bytes((folder / "a.JPG").read_bytes())
    (other / "odd.xyz").write_bytes((folder / "a.JPG").read_bytes())
    (folder / "deeper" / "b.png").write_bytes((folder / "b.png").read_bytes())
    paths = [str(folder), str(other / "A.jpg"), str(other / "odd.xyz")]
    sources = iter_inputs(paths)
    targets = output_paths(sources, tmp_path / "out")
    assert [str(target.relative_to(tmp_path / "out")) for target in targets] == [
        *("a.JPG", "b.png", "clip.mp4", "deeper/b.png", "deeper/c.png"),
        *("A_2.jpg", "odd.png"),
    ]
    (first, second) = iter_inputs([str(folder / "**" / "b.png")])
    assert output_paths([second], tmp_path / "out") == [tmp_path / "out" / "deeper" / "b.png"]
    with pytest.raises(ValueError, match="replace an input"):
        output_paths(sources, folder)


def predicted(classes, masks=True):
    result = Instances((20, 30))
    count = len(classes)
    result.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 11.0, 7.0]]).repeat(count, 1))
    result.scores = torch.linspace(0.9, 0.5, count)
    result.pred_classes = torch.tensor(classes, dtype=torch.int64)
    if masks:
        result.pred_masks = torch.zeros(count, 20, 30, dtype=torch.bool)
        result.pred_masks[:, 2:7, 1:11] = True
    return result


@pytest.fixture
def metadata():
    mapping = {3: 0, 8: 1}
    return Metadata(
        name="test_io", thing_classes=["cat", "dog"], thing_dataset_id_to_contiguous_id=mapping
    )


def test_predictions_load_as_coco_results(tmp_path, metadata):
    with PredictionWriter(tmp_path / "out", metadata) as writer:
        assert writer.add(predicted([0, 1]), "a.jpg") == 1
        assert writer.add(predicted([]), "b.jpg") == 2
        assert writer.add(predicted([1]), "clip.mp4", frame=0) == 3
        assert writer.add(predicted([1]), "clip.mp4", frame=1) == 4
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [r["image_id"] for r in results] == [1, 1, 3, 4]
    assert [r["category_id"] for r in results] == [3, 8, 8, 8]
    assert results[0]["bbox"] == [1, 2, 10, 5]
    assert results[0]["score"] == pytest.approx(0.9)
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert mask_util.area(results[0]["segmentation"]) == 50

    images = json.loads((tmp_path / "out" / "images.json").read_text())
    size = {"height": 20, "width": 30}
    assert images["images"] == [
        {"id": 1, "file_name": "a.jpg", **size},
        {"id": 2, "file_name": "b.jpg", **size},
        {"id": 3, "file_name": "clip.mp4", **size, "frame": 0},
        {"id": 4, "file_name": "clip.mp4", **size, "frame": 1},
    ]
    assert images["categories"] == [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "out" / "images.json"))
        loaded = truth.loadRes(str(tmp_path / "out" / "predictions.json"))
    assert len(loaded.getAnnIds(imgIds=[1])) == 2


def test_predictions_without_masks_or_names(tmp_path):
    with PredictionWriter(tmp_path, Metadata(name="nothing")) as writer:
        writer.add(predicted([7], masks=False), "a.jpg")
    (result,) = json.loads((tmp_path / "predictions.json").read_text())
    assert result["category_id"] == 7
    assert "segmentation" not in result
    images = json.loads((tmp_path / "images.json").read_text())
    assert images["categories"] == [{"id": 7, "name": "class 7"}]


def test_predictions_are_kept_after_an_error(tmp_path, metadata):
    with (
        pytest.raises(ValueError, match="class 2,"),
        PredictionWriter(tmp_path, metadata) as writer,
    ):
        writer.add(predicted([0]), "a.jpg")
        writer.add(predicted([2]), "b.jpg")
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == 1
    images = json.loads((tmp_path / "images.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["a.jpg"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images.json", "predictions.json"]
