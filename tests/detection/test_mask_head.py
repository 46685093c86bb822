"""Objects with a box only, among others with masks: from the dataset dict to the loss."""

import copy

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, BoxMode, PolygonMasks
from detectron2.utils.events import EventStorage
from PIL import Image

from crossmae_det.detection import DetectionMapper, PartiallySupervisedMaskHead
from crossmae_det.model_zoo import get_config

HEIGHT, WIDTH = 24, 32
TRIANGLE = [[4.0, 4.0, 20.0, 4.0, 4.0, 16.0]]
MASKED = {"bbox": [4, 4, 16, 12], "segmentation": TRIANGLE}
BARE = {"bbox": [10.5, 3.25, 12, 15]}


@pytest.fixture
def record(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return {"file_name": str(tmp_path / "image.png"), "height": HEIGHT, "width": WIDTH}


def map_objects(record, objects, augmentations=(), **options):
    mapper = DetectionMapper(
        True,
        augmentations=list(augmentations),
        image_format="RGB",
        use_instance_mask=True,
        recompute_boxes=True,
        **options,
    )
    annotations = [
        {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, **copy.deepcopy(o)} for o in objects
    ]
    return mapper({**record, "image_id": 1, "annotations": annotations})["instances"]


@pytest.mark.parametrize("run_lengths", [False, True])
def test_objects_without_a_mask_keep_their_boxes(record, run_lengths):
    masked = MASKED
    if run_lengths:
        mask = mask_util.merge(mask_util.frPyObjects(TRIANGLE, HEIGHT, WIDTH))
        masked = {**MASKED, "segmentation": mask}
    sliver = {"bbox": [2.0, 2.0, 0.3, 5.0]}  # covers no pixel center
    instances = map_objects(record, [BARE, masked, sliver])
    assert isinstance(instances.gt_masks, BitMasks if run_lengths else PolygonMasks)
    assert instances.gt_has_mask.tolist() == [False, True, False]
    boxes = instances.gt_boxes.tensor
    torch.testing.assert_close(boxes[0], torch.tensor([10.5, 3.25, 22.5, 18.25]))
    torch.testing.assert_close(boxes[2], torch.tensor([2.0, 2.0, 2.3, 7.0]))


def test_a_crop_clips_or_drops_the_box(record):
    crop = T.CropTransform(12, 0, 8, 24, WIDTH, HEIGHT)
    instances = map_objects(record, [MASKED, BARE, {"bbox": [0, 0, 5, 5]}], [crop])
    assert instances.gt_has_mask.tolist() == [True, False]
    torch.testing.assert_close(instances.gt_boxes.tensor[1], torch.tensor([0, 3.25, 8, 18.25]))


def test_gt_has_mask_is_set_only_for_a_mixture(record):
    assert not map_objects(record, [MASKED, MASKED]).has("gt_has_mask")
    bare = map_objects(record, [BARE])
    assert len(bare) == 1 and not bare.has("gt_has_mask") and not bare.has("gt_masks")


def head(kind):
    torch.manual_seed(0)
    return kind(ShapeSpec(channels=4, height=14, width=14), num_classes=2, conv_dims=[4, 4])


def proposals(instances):
    instances = copy.deepcopy(instances)
    instances.proposal_boxes = Boxes(instances.gt_boxes.tensor + 0.5)
    return instances


def test_mask_loss_is_that_of_the_objects_with_masks(record):
    mixed = proposals(map_objects(record, [BARE, MASKED, BARE]))
    bare = proposals(map_objects(record, [BARE]))
    whole = proposals(map_objects(record, [MASKED]))
    features = torch.randn(5, 4, 14, 14, generator=torch.Generator().manual_seed(1))
    ours, reference = head(PartiallySupervisedMaskHead), head(MaskRCNNConvUpsampleHead)
    with EventStorage():
        loss = ours(features, [mixed, bare, whole])["loss_mask"]
        expected = reference(features[[1, 4]], [mixed[[1]], whole])["loss_mask"]
        loss.backward()
        expected.backward()
        nothing = ours(features[:1], [bare])["loss_mask"]
        nothing.backward()  # every parameter has a gradient, as a distributed run needs it
    torch.testing.assert_close(loss, expected)
    assert nothing == 0
    for (name, p), (other, q) in zip(
        ours.named_parameters(), reference.named_parameters(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("config", ["mask_rcnn", "cascade_mask_rcnn"])
def test_detectors_train_on_a_mixture(tiny_overrides, record, config):
    cfg = get_config(f"coco/{config}_crossmae_vit_b_100ep.py", _for_cascade(tiny_overrides, config))
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    assert isinstance(model.roi_heads.mask_head, PartiallySupervisedMaskHead)
    instances = map_objects(record, [BARE, MASKED])
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    batch = [{"image": image, "height": HEIGHT, "width": WIDTH, "instances": instances}]
    with EventStorage():
        losses = model(batch)
    assert losses["loss_mask"] > 0 and all(torch.isfinite(loss) for loss in losses.values())


def _for_cascade(overrides, config):
    if config == "mask_rcnn":
        return overrides
    return [o.replace("roi_heads.box_head.", "roi_heads.box_heads.0.") for o in overrides]
