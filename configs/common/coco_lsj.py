"""COCO with large-scale jitter (https://arxiv.org/abs/2012.07177), as ViTDet trains.

Set ``image_size``, ``train.total_batch_size`` and the two ``dataset.names``: each a name registered
in detectron2, ``annotations.json:image_folder``, or a dataset in another layout, such as
``yolo:data.yaml``.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from omegaconf import OmegaConf

from crossmae_det.detection import (
    COCOEvaluator,
    DetectionMapper,
    ResizeToFit,
    TrainLoader,
    get_dataset_dicts,
)
from crossmae_det.model_zoo import resolvers

dataloader = OmegaConf.create(flags={"allow_objects": True})

# A side in pixels, or [height, width]: large-scale jitter crops to it, test images are fitted into
# it, and the model pads to it and sizes its position tables by it.
dataloader.image_size = 1024

# Derived from the datasets. A run saves it in its config as `recorded`, for use without them.
dataloader.dataset_info = "${dataset.info:${.train.dataset},${.test.dataset}}"
dataloader.recorded = {}

# Category id -> name, from the training set's json; the number of classes follows.
dataloader.categories = "${dataset.categories:${.train.dataset.names},${.test.dataset.names}}"

# Keys of the model that must be that number, where the model has them.
dataloader.num_classes_keys = ["model.roi_heads.num_classes", "model.num_classes"]

dataloader.train = L(TrainLoader)(
    dataset=L(get_dataset_dicts)(
        names="coco_2017_train",
        categories="${dataloader.categories}",
        filter_empty=True,
        crowd="ignore",  # or keep: train on annotations with iscrowd: 1 as on any other
        skip_undecodable="${..skip_undecodable}",
    ),
    mapper=L(DetectionMapper)(
        is_train=True,
        augmentations=[
            L(T.RandomFlip)(horizontal=True),
            L(T.ResizeScale)(
                min_scale=0.1,
                max_scale=2.0,
                target_height="${crossmae.height:${dataloader.image_size}}",
                target_width="${crossmae.width:${dataloader.image_size}}",
            ),
            # No padding here: the model pads, after the normalization.
            L(T.FixedSizeCrop)(
                crop_size=[
                    "${crossmae.height:${dataloader.image_size}}",
                    "${crossmae.width:${dataloader.image_size}}",
                ],
                pad=False,
            ),
        ],
        image_format="${oc.select:model.input_format,RGB}",
        use_instance_mask=(
            "${dataset.has_masks:${dataloader.train.dataset.names},"
            "${oc.select:model.roi_heads.mask_head,''},${dataloader.train.dataset.crowd}}"
        ),
        recompute_boxes="${.use_instance_mask}",  # a crop cuts masks, and so their boxes
        min_size="${oc.select:model.backbone.net.patch_size,1}",  # smaller images are an error
    ),
    total_batch_size=64,
    num_workers=4,
    seed="${train.seed}",
    # An image that cannot be decoded ends training with an error that names it. True: such images
    # are skipped, counted and logged.
    skip_undecodable=False,
)

dataloader.test = L(build_detection_test_loader)(
    # Default: COCO's own for COCO and for other training sets with its classes, else none (null),
    # which trains without evaluation.
    dataset=L(get_dataset_dicts)(
        names="${dataset.default_val:${dataloader.train.dataset.names},coco_2017_val}",
        categories="${dataloader.categories}",  # matched by name: ids may differ
        filter_empty=False,
        crowd="ignore",  # COCO's rule for crowd regions; or keep, as in training
    ),
    mapper=L(DetectionMapper)(
        is_train=False,
        augmentations=[L(ResizeToFit)(max_size="${dataloader.image_size}")],
        image_format="${...train.mapper.image_format}",
        min_size="${...train.mapper.min_size}",
    ),
    num_workers="${..train.num_workers}",
)

# The test set with its ground truth, for train.validation_loss; one image at a time, so that the
# loss does not depend on the number of processes.
dataloader.validation = L(build_detection_test_loader)(
    dataset=L(get_dataset_dicts)(
        names="${dataloader.test.dataset.names}",
        categories="${dataloader.categories}",
        filter_empty=True,
        max_images="${oc.select:dataloader.test.dataset.max_images,null}",
        crowd="${dataloader.test.dataset.crowd}",
    ),
    mapper=L(DetectionMapper)(
        is_train=True,
        augmentations="${dataloader.test.mapper.augmentations}",
        image_format="${dataloader.train.mapper.image_format}",
        use_instance_mask="${dataloader.train.mapper.use_instance_mask}",
        min_size="${dataloader.train.mapper.min_size}",
    ),
    num_workers="${dataloader.train.num_workers}",
)

dataloader.evaluator = L(COCOEvaluator)(
    dataset_name="${..test.dataset.names}",
    categories="${dataloader.categories}",
    crowd="${..test.dataset.crowd}",
    context={},
)
