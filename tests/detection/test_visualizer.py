import colorsys

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances

from crossmae_det.detection.visualizer import (
    class_color,
    comparison_sheet,
    draw_ground_truth,
    draw_predictions,
)

SIZE = (500, 600)  # large enough not to be enlarged
GRAY = 90


@pytest.fixture
def metadata():
    return Metadata(name="test_drawing", thing_classes=["cat", "dog", "a$b$"])


def gray(size=SIZE):
    return np.full((*size, 3), GRAY, dtype=np.uint8)


def instances(boxes, classes, scores=None, size=SIZE, masks=False):
    result = Instances(size)
    result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    result.pred_classes = torch.tensor(classes, dtype=torch.int64)
    if scores is not None:
        result.scores = torch.tensor(scores)
    if masks:
        result.pred_masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(result.pred_masks, boxes, strict=True):
            mask[y0:y1, x0:x1] = True
    return result


def record(annotations, size=SIZE):
    return {
        "file_name": "some/where/7.jpg",
        "height": size[0],
        "width": size[1],
        "annotations": annotations,
    }


def annotation(box, category=0, **extra):
    return {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, **extra}


def bgr(index, metadata):
    return np.array(class_color(index, metadata)[::-1]) * 255


def text_pixels(drawn):
    """Labels of class 1 are black on yellow."""
    return (drawn.max(axis=2) < 60).sum()


def inside(drawn, x, y):
    return drawn[y - 3 : y + 3, x - 3 : x + 3].reshape(-1, 3).mean(axis=0)


def test_a_note_stands_for_no_objects(metadata):
    # Smooth, because older versions of matplotlib resample an image by a fraction of a pixel.
    image = np.tile(np.linspace(0, 250, SIZE[1])[None, :, None], (SIZE[0], 1, 3)).astype(np.uint8)
    box = [[9, 9, 90, 90]]
    drawings = [
        draw_predictions(image, instances([], [], []), metadata),
        draw_predictions(image, instances(box, [0], [0.31]), metadata),
        draw_predictions(image, instances(box, [0], [0.32]), metadata),
        draw_predictions(image, instances([], [], []), metadata, score_threshold=0.6),
        draw_predictions(image, instances([], []), metadata),
        draw_ground_truth(image, record([]), metadata),
    ]
    for drawn in drawings:
        np.testing.assert_allclose(drawn[40:], image[40:].astype(int), atol=2)
        assert (drawn[:40, :300] == 0).all(axis=2).sum() > 200  # the background of the note
    for index, drawn in enumerate(drawings):  # threshold and best score are part of it
        assert all((drawn != other).any() for other in drawings[:index])
    # The note fits a small image that is not enlarged.
    for size in ((8, 9), (400, 20), (20, 400)):
        found = instances([], [], [], size)
        assert draw_predictions(gray(size), found, metadata, scale=1).shape == (*size, 3)


def test_objects_of_one_class_have_shades_of_its_color(metadata):
    boxes = [[20, 40, 180, 200], [200, 40, 380, 200], [400, 40, 580, 200], [20, 260, 180, 420]]
    found = instances(boxes, [1] * 4, [0.9, 0.8, 0.7, 0.6], masks=True)
    drawn = draw_predictions(gray(), found, metadata)
    tints = [inside(drawn, x, y) for x, y in ((100, 120), (290, 120), (490, 120), (100, 340))]
    colors = (np.array(tints) - 0.55 * GRAY) / 0.45 / 255  # what was laid over the image, BGR
    np.testing.assert_allclose(255 * colors[0], bgr(1, metadata), atol=4)
    for index, color in enumerate(colors):
        assert all(np.abs(color - other).max() > 0.05 for other in colors[:index])
        hue = colorsys.rgb_to_hls(*color[::-1].clip(0, 1))[0]
        assert abs(hue - colorsys.rgb_to_hls(*class_color(1, metadata))[0]) < 0.03
    truth = [
        annotation(box, 1, segmentation=[[x0, y0, x1, y0, x1, y1, x0, y1]])
        for box in boxes
        for x0, y0, x1, y1 in [box]
    ]
    drawn = draw_ground_truth(gray(), record(truth), metadata)
    for (x, y), tint in zip(((100, 120), (290, 120), (490, 120)), tints, strict=False):
        np.testing.assert_allclose(inside(drawn, x, y), tint, atol=2)


def test_masks_are_tinted_with_the_color_of_the_class(metadata):
    found = instances([[50, 50, 250, 250], [300, 50, 550, 250]], [0, 1], [0.9, 0.8], masks=True)
    drawn = draw_predictions(gray(), found, metadata)
    assert drawn.shape == (*SIZE, 3)
    assert drawn.dtype == np.uint8
    for x, index in ((150, 0), (425, 1)):
        expected = 0.55 * GRAY + 0.45 * bgr(index, metadata)
        np.testing.assert_allclose(inside(drawn, x, 180), expected, atol=3)
    np.testing.assert_array_equal(inside(drawn, 275, 400), [GRAY] * 3)


def test_predictions_and_ground_truth_share_colors(metadata):
    truth = draw_ground_truth(
        gray(),
        record([annotation([50, 50, 250, 250], 1, segmentation=[[50, 50, 250, 50, 250, 250]])]),
        metadata,
    )
    found = draw_predictions(
        gray(), instances([[50, 50, 250, 250]], [1], [0.9], masks=True), metadata
    )
    np.testing.assert_allclose(inside(truth, 200, 150), inside(found, 200, 150), atol=1)


def test_polygons_and_every_kind_of_rle_fill_the_same_pixels(metadata):
    polygon = [100, 100, 300, 100, 300, 260, 100, 260]
    mask = mask_util.decode(mask_util.frPyObjects([polygon], *SIZE))[:, :, 0]
    compressed = mask_util.encode(np.asfortranarray(mask))
    as_text = {"size": compressed["size"], "counts": compressed["counts"].decode()}
    runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=1 - mask[0, 0], append=2)))
    counts = [0] * int(mask[0, 0]) + runs.tolist()
    uncompressed = {"size": list(SIZE), "counts": counts}
    drawings = [
        draw_ground_truth(
            gray(), record([annotation([99, 99, 301, 261], segmentation=s)]), metadata
        )
        for s in ([polygon], compressed, as_text, uncompressed)
    ]
    for drawn in drawings[1:]:
        np.testing.assert_array_equal(drawn, drawings[0])
    assert np.abs(inside(drawings[0], 200, 200) - GRAY).max() > 20


def test_boxes_only_draws_the_outline(metadata):
    drawn = draw_ground_truth(gray(), record([annotation([100, 100, 300, 260])]), metadata)
    np.testing.assert_array_equal(inside(drawn, 200, 200), [GRAY] * 3)
    np.testing.assert_allclose(drawn[259:261, 200], [bgr(0, metadata)] * 2, atol=20)
    mixed = record(
        [
            annotation([100, 100, 300, 260]),
            annotation([350, 100, 500, 260], 1, segmentation=[[350, 100, 500, 100, 500, 260]]),
        ]
    )
    assert np.abs(inside(draw_ground_truth(gray(), mixed, metadata), 480, 150) - GRAY).max() > 20


def test_crowds_have_a_dashed_box(metadata):
    def covered(crowd):
        drawn = draw_ground_truth(
            gray(), record([annotation([100, 100, 400, 400], iscrowd=crowd)]), metadata
        )
        return (np.abs(drawn[400, 110:390].astype(int) - GRAY).max(axis=1) > 20).mean()

    assert covered(0) == 1
    assert 0.4 < covered(1) < 0.9


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (2, 3), (16, 3300)])
def test_unusual_image_sizes(metadata, size):
    found = instances([[0, 0, size[1], size[0]]], [0], [0.9], size, masks=True)
    drawn = draw_predictions(gray(size), found, metadata, scale=1)
    assert drawn.shape == (*size, 3) and (drawn != GRAY).any()


def test_holes_stay_open(metadata):
    found = instances([[100, 100, 300, 300]], [0], [0.9], masks=True)
    found.pred_masks[0, 150:250, 150:250] = False
    drawn = draw_predictions(gray(), found, metadata)
    np.testing.assert_array_equal(inside(drawn, 200, 200), [GRAY] * 3)
    assert np.abs(inside(drawn, 120, 200) - GRAY).max() > 20


def test_threshold_is_inclusive_and_scores_are_optional(metadata):
    box = [[100, 100, 300, 300]]
    half = draw_predictions(gray(), instances(box, [0], [0.5]), metadata, score_threshold=0.5)
    assert (half != GRAY).any()
    unscored = draw_predictions(gray(), instances(box, [0]), metadata)
    assert (unscored != GRAY).any()
    # The score is part of the label.
    assert (unscored != half).any()


@pytest.mark.parametrize("box", [[0, 0, 40, 12], [560, 0, 600, 10], [570, 480, 600, 500]])
def test_labels_stay_within_the_image(metadata, box):
    """The text at any border is as long as in the middle."""
    at_border = draw_predictions(gray(), instances([box], [1], [0.99]), metadata)
    in_middle = draw_predictions(gray(), instances([[200, 200, 240, 212]], [1], [0.99]), metadata)
    assert text_pixels(in_middle) > 50
    assert text_pixels(at_border) > 0.9 * text_pixels(in_middle)


def test_a_label_wider_than_the_image_shrinks():
    """The last letter is visible: two labels that differ in nothing else give two drawings."""
    size = (100, 120)
    found = instances([[20, 30, 90, 80]], [0], size=size)
    first, second = (
        draw_predictions(
            gray(size), found, Metadata(name=last, thing_classes=["wide " * 5 + last]), scale=1
        )
        for last in "XO"
    )
    assert (first != second).any()


def test_labels_of_neighbors_do_not_cover_each_other(metadata):
    boxes = [[200, 200, 330, 330], [204, 202, 334, 332], [208, 204, 338, 334]]
    one = draw_predictions(gray(), instances(boxes[:1], [1], [0.99]), metadata)
    three = draw_predictions(gray(), instances(boxes, [1] * 3, [0.99] * 3), metadata)
    assert text_pixels(three) > 2.7 * text_pixels(one)


def test_small_images_are_enlarged_and_long_ones_bounded(metadata):
    none = {"boxes": [], "classes": [], "scores": []}
    assert draw_predictions(
        gray((128, 160)), instances(size=(128, 160), **none), metadata
    ).shape == (480, 600, 3)
    assert draw_ground_truth(gray((20, 400)), record([], (20, 400)), metadata).shape == (
        80,
        1600,
        3,
    )
    assert draw_predictions(
        gray((128, 160)), instances(size=(128, 160), **none), metadata, scale=1
    ).shape == (128, 160, 3)


def test_drawing_is_repeatable_and_leaves_its_input(metadata):
    image = gray()
    found = instances([[50, 50, 250, 250], [60, 60, 300, 300]], [0, 2], [0.9, 0.8], masks=True)
    first = draw_predictions(image, found, metadata)
    np.testing.assert_array_equal(first, draw_predictions(image, found, metadata))
    assert (image == GRAY).all()
    assert found.pred_masks[0].sum() == 200 * 200


def test_colors():
    own = Metadata(name="test_colors", thing_colors=[(255, 0, 51)])
    assert class_color(0, own) == (1.0, 0.0, 0.2)
    colors = np.array([class_color(i, own) for i in range(1, 13)])
    distances = np.abs(colors[:, None] - colors[None]).max(axis=2)
    assert distances[~np.eye(12, dtype=bool)].min() > 0.05
    assert class_color(70, Metadata(name="none")) == class_color(70, Metadata(name="other"))


def test_classes_without_names_are_numbered():
    drawn = draw_predictions(
        gray(), instances([[100, 100, 300, 300]], [5], [0.9]), Metadata(name="nameless")
    )
    assert (drawn != GRAY).any()


def test_sizes_must_match(metadata):
    with pytest.raises(ValueError, match="instances: .*20x10.*600x500"):
        draw_predictions(gray(), instances([], [], [], size=(10, 20)), metadata)
    with pytest.raises(ValueError, match="7.jpg: .*20x10"):
        draw_ground_truth(gray(), record([], (10, 20)), metadata)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_sheet_has_the_ground_truth_beside_the_predictions(metadata, tmp_path, count):
    size = (64, 96)
    truth = record([annotation([10, 10, 50, 50], 1)], size)  # without a mask
    found = instances([[10, 10, 50, 50]], [1], [0.9], size, masks=True)
    path = tmp_path / "sheets" / "sheet.png"
    comparison_sheet([(gray(size), truth, found)] * count, metadata, path)
    sheet = cv2.imread(str(path))
    tint = 0.55 * GRAY + 0.45 * bgr(1, metadata)
    tinted = (np.abs(sheet - tint).max(axis=2) < 3).any(axis=0)
    pairs_per_row = 1 if count < 4 else 2
    half = sheet.shape[1] // pairs_per_row // 2
    for pair in range(pairs_per_row):
        left = 2 * half * pair
        assert not tinted[left : left + half].any() and tinted[left + half : left + 2 * half].any()
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_sheet_mistakes(metadata, tmp_path):
    with pytest.raises(ValueError, match="sheet.png"):
        comparison_sheet([], metadata, tmp_path / "sheet.png")
    row = (gray((8, 8)), record([], (8, 8)), instances([], [], [], (8, 8)))
    with pytest.raises(ValueError, match="'.doc'"):
        comparison_sheet([row], metadata, tmp_path / "sheet.doc")
    assert list(tmp_path.iterdir()) == []
