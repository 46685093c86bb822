"""Mixed precision at inference: in evaluation, prediction and visualization."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.modeling.meta_arch import rcnn
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes
from torch import nn

from crossmae_det.detection import COCOEvaluator
from crossmae_det.detection.predictor import Predictor
from crossmae_det.detection.visualizer import PredictionVisualizer
from crossmae_det.engine.hooks import Visualization
from crossmae_det.engine.precision import inference_autocast
from crossmae_det.engine.train import evaluate
from crossmae_det.model_zoo import get_config
from crossmae_det.utils import save_checkpoint

BF16 = ["train.amp.enabled=True", "train.amp.dtype=bf16"]
MASK = "coco/mask_rcnn_crossmae_vit_b_100ep.py"


@pytest.fixture
def raw(monkeypatch):
    """The inputs of detectron2's post-processing: ``Instances``, height and width of each image."""
    seen = []
    postprocess = rcnn.detector_postprocess

    def record(instances, height, width):
        fields = {name: value.clone() for name, value in instances.get_fields().items()}
        seen.append((type(instances)(instances.image_size, **fields), height, width))
        return postprocess(instances, height, width)

    monkeypatch.setattr(rcnn, "detector_postprocess", record)
    return seen


def types(raw):
    for instances, *_ in raw:
        assert len(instances)
        for value in instances.get_fields().values():
            tensor = value.tensor if isinstance(value, Boxes) else value
            if tensor.is_floating_point():
                yield tensor.dtype


def tiny(name, overrides):
    """The config and a model with random weights whose masks and scores vary."""
    cfg = get_config(name, [*overrides, *BF16])
    cfg.train.visualizer = None
    torch.manual_seed(0)
    model = instantiate(cfg.model).eval()
    for module in model.roi_heads.modules():
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = 0.0
            module.test_topk_per_image = 20
    for parameter in model.roi_heads.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=2 / parameter[0].numel() ** 0.5)
    return cfg, model


def yaml_overrides(tiny_sets, tmp_path):
    train_set, val_set = tiny_sets
    return [
        *["DATASETS.TRAIN", f"('{train_set}',)", "DATASETS.TEST", f"('{val_set}',)"],
        *["INPUT.IMAGE_SIZE", "64", "MODEL.VIT.EMBED_DIM", "32", "MODEL.VIT.DEPTH", "4"],
        *["MODEL.VIT.NUM_HEADS", "2", "MODEL.ROI_BOX_HEAD.CONV_DIM", "16"],
        *["MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"],
        *["MODEL.RPN.POST_NMS_TOPK_TEST", "20", "DATALOADER.NUM_WORKERS", "0"],
        *["OUTPUT_DIR", f"{tmp_path}/output", "MODEL.DEVICE", "cpu"],
    ]


@pytest.mark.parametrize("kind", ["mask", "cascade", "faster", "yaml"])
def test_evaluation_in_bf16_postprocesses_float32(kind, tiny_overrides, tiny_sets, tmp_path, raw):
    name, overrides = MASK, list(tiny_overrides)
    if kind == "yaml":
        name = "coco/mask_rcnn_crossmae_vit_b_100ep.yaml"
        cfg = get_config(name, yaml_overrides(tiny_sets, tmp_path))
        cfg.train.amp.update(enabled=True, dtype="bf16")
        model = instantiate(cfg.model).eval()
    else:
        if kind == "cascade":
            name = "coco/cascade_mask_rcnn_crossmae_vit_b_100ep.py"
            overrides = [item.replace("box_head.", "box_heads.0.") for item in overrides]
        if kind == "faster":
            overrides.append("dataloader.train.mapper.use_instance_mask=False")
        cfg, model = tiny(name, overrides)
    keys = list(model.state_dict())
    in_backbone = set()
    model.backbone.net.blocks[0].mlp.fc1.register_forward_hook(
        lambda module, args, output: in_backbone.add(output.dtype)
    )
    results = evaluate(cfg, model)
    assert ("segm" in results) == (kind != "faster")
    assert set(types(raw)) == {torch.float32}
    assert in_backbone == {torch.bfloat16}  # which takes most of the time
    assert any(instances.has("pred_masks") for instances, *_ in raw) == (kind != "faster")
    assert list(model.state_dict()) == keys


def test_mask_ap_in_bf16_matches_float32_postprocessing(tiny_overrides, tiny_sets, tmp_path, raw):
    cfg, model = tiny(MASK, tiny_overrides)
    evaluate(cfg, model)
    json_file, _, folder = tiny_sets[1].partition(".json:")
    content = json.loads(Path(f"{json_file}.json").read_text())
    classes = [category["id"] for category in content["categories"]]
    # The ground truth is the model's own predictions, some of them shifted.
    content["annotations"] = []
    outputs = []
    records = DatasetCatalog.get(cfg.dataloader.test.dataset.names)
    for record, (instances, height, width) in zip(records, list(raw), strict=True):
        for name in ("scores", "pred_masks"):
            instances.set(name, instances.get(name).float())
        result = detector_postprocess(instances, height, width)
        outputs.append(({"image_id": record["image_id"]}, {"instances": result}))
        for number in range(0, len(result), 2):
            mask = result.pred_masks[number].roll(number % 3, 0).numpy().astype(np.uint8)
            if not mask.any():
                continue
            run_lengths = mask_util.encode(np.asfortranarray(mask))
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": record["image_id"],
                    "category_id": classes[int(result.pred_classes[number])],
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "bbox": mask_util.toBbox(run_lengths).tolist(),
                    "segmentation": run_lengths | {"counts": run_lengths["counts"].decode()},
                }
            )
    path = tmp_path / "predicted.json"
    path.write_text(json.dumps(content))
    cfg.dataloader.test.dataset.names = f"{path}:{folder}"
    measured = evaluate(cfg, model)["segm"]["AP"]
    evaluator = COCOEvaluator(f"{path}:{folder}", distributed=False)
    for image, output in outputs:
        evaluator.process([image], [output])
    expected = evaluator.evaluate()["segm"]["AP"]
    assert 10 < expected < 95
    assert measured == pytest.approx(expected, abs=0.02)


def test_predictor_and_visualizer_in_bf16_postprocess_float32(tiny_overrides, tmp_path, raw):
    cfg, model = tiny(MASK, tiny_overrides)
    evaluate(cfg, model)
    first = raw[0][0].scores
    raw.clear()
    checkpoint = tmp_path / "model.pth"
    save_checkpoint({"model": model.state_dict()}, checkpoint)
    cfg.train.init_checkpoint = str(checkpoint)
    (batch, *_) = instantiate(cfg.dataloader.test)
    predictor = Predictor(cfg)
    predictor.model.roi_heads.box_predictor.test_score_thresh = 0.0
    predictor.model.roi_heads.box_predictor.test_topk_per_image = 20
    image = batch[0]["image"].permute(1, 2, 0).numpy()
    predictor(np.ascontiguousarray(image[:, :, ::-1]))
    assert set(types(raw)) == {torch.float32}
    torch.testing.assert_close(raw[0][0].scores, first)  # as evaluated
    raw.clear()

    visualizer = PredictionVisualizer(
        str(tmp_path), [batch], cfg.dataloader.test.dataset.names, count=1, score_threshold=0.5
    )
    hook = Visualization(visualizer)
    hook.trainer = SimpleNamespace(
        model=model, iter=1, max_iter=1, amp_dtype="bf16", storage=None, settle=int
    )
    hook.after_train()
    assert set(types(raw)) == {torch.float32}
    torch.testing.assert_close(raw[0][0].scores, first)


def test_models_without_a_backbone_run_entirely_in_mixed_precision():
    model = nn.Linear(2, 2)
    with inference_autocast(model, "bf16"):
        assert model(torch.ones(1, 2)).dtype == torch.bfloat16
    with inference_autocast(model, None):
        assert model(torch.ones(1, 2)).dtype == torch.float32
    with pytest.raises(ValueError, match="int8"), inference_autocast(model, "int8"):
        pass
