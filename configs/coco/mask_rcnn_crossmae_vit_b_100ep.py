"""ViTDet Mask R-CNN, ViT-B, 100 epochs. The other configs in this folder are diffs of this one."""

from detectron2.config import LazyCall as L

from crossmae_det.detection.visualizer import PredictionVisualizer

from ..common.coco_lsj import dataloader
from ..common.models.mask_rcnn_vit import model
from ..common.optim import lr_multiplier, optimizer
from ..common.train import train

train.visualizer = L(PredictionVisualizer)(
    output_dir="${train.output_dir}",
    data_loader="${dataloader.test}",
    dataset_name="${dataloader.test.dataset.names}",
    count=8,
    score_threshold=0.5,
    categories="${dataloader.categories}",
)
