import logging
from pathlib import Path

import pytest
import torch
from detectron2.utils.logger import _cached_log_stream, setup_logger

from crossmae_det.detection import shapes

# Their assertions show what was compared, like those of tests.
pytest.register_assert_rewrite("detections", "shorthand")

REPO = Path(__file__).parents[1]


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _fresh_loggers():
    """Remove the log files and streams that a run in this process has set up."""
    yield
    setup_logger.cache_clear()
    _cached_log_stream.cache_clear()
    for name in ("crossmae_det", "detectron2", "fvcore"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True


@pytest.fixture(scope="session")
def repo():
    return REPO


def shared(name, what):
    """An optional folder beside the repository; the test is skipped without it."""
    folder = REPO.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"{what} are not here: {folder} is missing")
    return folder


@pytest.fixture(scope="session")
def shared_data():
    """The folder with real COCO images, for the tests that use them."""
    return shared("data", "the real images")


@pytest.fixture(scope="session")
def fixtures():
    """The folder with reference tensors of the published models."""
    return shared("fixtures", "the reference tensors")


@pytest.fixture(scope="session")
def tiny_sets(tmp_path_factory):
    """A training and a validation set of a few shapes, each as ``json:folder``."""
    root = shapes.build(tmp_path_factory.mktemp("data"), num_train=8, num_val=3, image_size=64)
    return [
        f"{root}/annotations/instances_{split}.json:{root}/{split}" for split in ("train", "val")
    ]


@pytest.fixture
def tiny_overrides(tiny_sets, tmp_path):
    """Overrides that make any of the COCO configs small enough to train in a test."""
    train_set, val_set = tiny_sets
    return [
        f"dataloader.train.dataset.names='{train_set}'",
        f"dataloader.test.dataset.names='{val_set}'",
        "dataloader.image_size=64",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "model.backbone.net.embed_dim=32",
        "model.backbone.net.depth=4",
        "model.backbone.net.num_heads=2",
        "model.backbone.net.pretrain_img_size=64",
        "model.backbone.out_channels=16",
        "model.proposal_generator.post_nms_topk=[20,20]",
        "model.roi_heads.batch_size_per_image=16",
        "model.roi_heads.mask_head.conv_dims=[16,16]",
        "model.roi_heads.box_head.conv_dims=[16]",
        "model.roi_heads.box_head.fc_dims=[32]",
        "train.amp.enabled=False",
        "train.device=cpu",
        "train.report=null",
        f"train.output_dir={tmp_path}/output",
    ]
