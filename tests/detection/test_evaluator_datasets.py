"""Datasets that lack something, come late or are none."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from detections import (
    HEIGHT,
    WIDTH,
    assert_same,
    both_backends,
    instances,
    make_dataset,
    perturbed,
    run,
)
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json

from crossmae_det.detection import COCOEvaluator


@both_backends
def test_no_ground_truth_at_all_is_nan(register_json, backend):
    content = make_dataset()
    content["annotations"] = []
    name = register_json(content)
    inputs = DatasetCatalog.get(name)
    outputs = [{"instances": instances([[0, 0, 9, 9]], [0.5], [0])} for _ in inputs]
    results = run(name, inputs, outputs, backend=backend)
    assert set(results) == {"bbox"}
    assert np.isnan(list(results["bbox"].values())).all()


def test_boxes_only_where_model_or_dataset_have_no_masks(register_json):
    name = register_json(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name), masks=False)
    assert set(run(name, inputs, outputs)) == {"bbox"}
    content = make_dataset()
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    bare = register_json(content, "test_coco_evaluation_boxes")
    inputs, outputs = perturbed(DatasetCatalog.get(bare), masks=True)
    assert set(run(bare, inputs, outputs)) == {"bbox"}
    with pytest.raises(ValueError, match="has no masks; ask for bbox only"):
        run(bare, inputs, outputs, tasks=["segm"])


@both_backends
def test_tolerates_what_users_annotations_lack(register_json, backend):
    """Annotation ids from 0, image ids that are text, no area, no iscrowd."""
    complete = make_dataset()
    complete["annotations"] = [a for a in complete["annotations"] if not a["iscrowd"]]
    name = register_json(complete)
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    expected = run(name, inputs, outputs, backend=backend)

    sparse = json.loads(json.dumps(complete))
    for image in sparse["images"]:
        image["id"] = f"image {image['id']}"
    for number, annotation in enumerate(sparse["annotations"]):
        annotation.update(id=number, image_id=f"image {annotation['image_id']}")
        del annotation["area"], annotation["iscrowd"]
    name = register_json(sparse, "test_coco_evaluation_sparse")
    inputs = [{**record, "image_id": f"image {record['image_id']}"} for record in inputs]
    assert_same(run(name, inputs, outputs, backend=backend), expected)


def test_annotations_without_mask_are_left_out_of_mask_ap(register_json, caplog):
    content = make_dataset()
    reduced = {**content, "annotations": content["annotations"][1:]}
    name = register_json(reduced)
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    expected = run(name, inputs, outputs)["segm"]
    content["annotations"][0]["segmentation"] = []
    name = register_json(content, "test_coco_evaluation_mixed")
    with caplog.at_level(logging.WARNING):
        assert_same({"segm": run(name, inputs, outputs)["segm"]}, {"segm": expected})
    assert "leaves out 1 annotations" in caplog.text


def test_dataset_written_when_it_is_first_asked_for(tmp_path):
    """The annotation file and the class names appear only with ``DatasetCatalog.get``."""
    name, path = "test_coco_evaluation_lazy", tmp_path / "lazy.json"

    def load():
        path.write_text(json.dumps(make_dataset()))
        return load_coco_json(str(path), str(tmp_path), name)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(json_file=str(path))
    try:
        evaluator = COCOEvaluator([name])
        assert path.is_file()
        inputs, outputs = perturbed(load_coco_json(str(path), str(tmp_path), name))
        evaluator.process(inputs, outputs)
        assert evaluator.evaluate()["bbox"]["AP-class3"] > 0
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_dataset_without_a_json_file_is_converted(tmp_path):
    name = "test_coco_evaluation_dicts"
    record = {"file_name": "a.jpg", "image_id": 1, "height": HEIGHT, "width": WIDTH}
    annotation = {"bbox": [2, 2, 30, 40], "bbox_mode": 1, "category_id": 0}
    DatasetCatalog.register(name, lambda: [{**record, "annotations": [annotation]}])
    MetadataCatalog.get(name).set(thing_classes=["one"])
    try:
        outputs = [{"instances": instances([[2, 2, 32, 42]], [0.9], [0])}]
        results = run(name, [record], outputs, output_dir=str(tmp_path))
        assert results["bbox"]["AP-one"] == pytest.approx(100)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_no_annotations_to_evaluate_against(register_json, tmp_path):
    content = make_dataset()
    name = register_json(content)
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    del content["annotations"]
    name = register_json(content, "test_coco_evaluation_unlabeled")
    assert run(name, inputs, outputs, output_dir=str(tmp_path)) == {}
    assert (tmp_path / "coco_instances_results.json").is_file()


def test_users_mistakes_are_named(register_json, tmp_path):
    name = register_json(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    strange = [{"instances": instances([[0, 0, 5, 5]], [0.5], [3])}]
    with pytest.raises(ValueError, match="predicts class 3, but .* has 3 classes"):
        run(name, inputs[:1], strange)
    with pytest.raises(ValueError, match="image id 99 is not in .*json"):
        run(name, [{"image_id": 99}], outputs[:1])
    with pytest.raises(ValueError, match="must be one dataset"):
        COCOEvaluator([name, name])
    with pytest.raises(ValueError, match="tasks may be bbox and segm, not keypoints"):
        COCOEvaluator(name, tasks=["keypoints"])
    with pytest.raises(ValueError, match="'nowhere' is not registered"):
        COCOEvaluator("nowhere")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"images": [', '{"images": [], "annotations": 1}']
)
def test_file_that_is_not_coco(register_json, tmp_path, content):
    name = register_json(make_dataset())
    DatasetCatalog.get(name)
    path = Path(MetadataCatalog.get(name).json_file)
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path.name} cannot be used for COCO") as error:
        COCOEvaluator(name)
    assert "\n" not in str(error.value)


def test_missing_annotation_file(register_json):
    name = register_json(make_dataset())
    Path(MetadataCatalog.get(name).json_file).unlink()
    with pytest.raises(FileNotFoundError, match="test_coco_evaluation.json does not exist"):
        COCOEvaluator(name)
