"""Ground truth of COCO evaluation: repaired values, ids, classes, incomplete datasets."""

import copy
import json
import logging
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from coco_json_files import example, write
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
from detectron2.data.datasets import load_coco_json

from crossmae_det.detection import COCOEvaluator, get_dataset_dicts, resolve_name
from crossmae_det.detection.ground_truth import GroundTruth

CLASSES = {1: "class9", 2: "class3", 3: "class7"}  # of the model, in its order


@pytest.fixture
def reference(register_json):
    name = register_json(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    return outputs, run(name, inputs, outputs)


def null_area(content):
    for annotation in content["annotations"]:
        annotation["area"] = None


def whole_floats(content):
    for image in content["images"]:
        image.update(height=float(image["height"]), width=float(image["width"]))


def null_crowd(content):
    for annotation in content["annotations"]:
        annotation["iscrowd"] = annotation["iscrowd"] or None


def two_vertices(content):
    for annotation in content["annotations"]:
        if isinstance(annotation["segmentation"], list):
            annotation["segmentation"].append([1, 1, 9, 9])


@both_backends
@pytest.mark.parametrize("change", [null_area, whole_floats, null_crowd, two_vertices])
def test_spellings_do_not_change_the_ap(register_json, reference, backend, change):
    outputs, expected = reference
    content = make_dataset()
    change(content)
    name = register_json(content, f"test_coco_evaluation_{change.__name__}")
    inputs = inputs_of(name)
    assert_same(run(name, inputs, outputs, backend=backend), expected)


def inputs_of(name):
    """The part of the records that an evaluator reads: these datasets have no image files."""
    with open(MetadataCatalog.get(name).json_file) as file:
        return [{"image_id": int(image["id"])} for image in json.load(file)["images"]]


def test_run_lengths_that_do_not_add_up_are_named(register_json):
    content = make_dataset()
    crowd = next(a for a in content["annotations"] if a["iscrowd"])
    crowd["segmentation"]["counts"] += "1"
    name = register_json(content)
    with pytest.raises(ValueError, match=f"annotation {crowd['id']} .* run lengths") as error:
        COCOEvaluator(name)
    assert "\n" not in str(error.value)


def test_categories_are_those_of_the_model_by_name(register_json, reference, tmp_path):
    """Permuted ids, and another order of the classes in the model."""
    outputs, expected = reference
    content = make_dataset()
    new = {3: 9, 7: 3, 9: 7}
    for category in content["categories"]:
        category["id"] = new[category["id"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = new[annotation["category_id"]]
    name = register_json(content, "test_coco_evaluation_permuted")
    outputs = copy.deepcopy(outputs)
    order = [["class9", "class3", "class7"].index(f"class{id_}") for id_ in (3, 7, 9)]
    for output in outputs:
        found = output["instances"]
        found.pred_classes = found.pred_classes.clone().apply_(lambda index: order[index])
    options = {"categories": CLASSES, "output_dir": str(tmp_path)}
    results = run(name, inputs_of(name), outputs, **options)
    assert_same(results, expected)
    assert list(results["bbox"])[-3:] == ["AP-class9", "AP-class3", "AP-class7"]
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    first = outputs[0]["instances"].pred_classes[0]
    assert written[0]["category_id"] == {0: 7, 1: 9, 2: 3}[int(first)]


@pytest.mark.parametrize(
    "classes, parts",
    [
        ({1: "class3", 2: "class7"}, ["adds 1 (class9)"]),
        ({**CLASSES, 4: "class5"}, ["lacks 1 (class5)"]),
        ({1: "class3", 2: "class7", 3: "nine"}, ["adds 1 (class9)", "lacks 1 (nine)"]),
    ],
)
def test_missing_and_unknown_classes_are_named(register_json, classes, parts):
    name = register_json(make_dataset())
    with pytest.raises(ValueError) as error:
        COCOEvaluator(name, categories=classes)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_two_ids_may_share_a_class(tmp_path, register):
    """A custom dataset that merges classes 3 and 7 of the json and leaves out 9."""
    content = make_dataset()
    content["annotations"][0]["category_id"] = 9
    path = tmp_path / "shared.json"
    path.write_text(json.dumps(content))
    name = "test_coco_evaluation_shared"
    ids = {3: 0, 7: 0}

    def load():
        records = load_coco_json(str(path), str(tmp_path))
        for record in records:
            kept = [a for a in record["annotations"] if a["category_id"] in ids]
            record["annotations"] = [{**a, "category_id": ids[a["category_id"]]} for a in kept]
        return records

    metadata = {"thing_classes": ["thing"], "thing_dataset_id_to_contiguous_id": ids}
    register(name, load, json_file=str(path), **metadata)
    records = load()
    outputs = []
    for record in records:
        objects = [a for a in record["annotations"] if not a["iscrowd"]]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in objects)]
        count = len(boxes)
        outputs.append({"instances": instances(boxes, [0.9] * count, [0] * count)})
    results = run(name, records, outputs)["bbox"]
    assert results["AP"] == results["AP-thing"] == pytest.approx(100)
    swapped = run(name, records, outputs, categories={5: "thing"})["bbox"]
    assert swapped["AP"] == pytest.approx(100)


def test_crowd_regions_can_be_objects(register_json):
    content = make_dataset()
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    name = register_json(content)
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    kept = run(name, inputs, outputs, crowd="keep")
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 0
    other = register_json(content, "test_coco_evaluation_objects")
    assert_same(kept, run(other, inputs, outputs))
    with pytest.raises(ValueError, match="crowd='yes'"):
        COCOEvaluator(name, crowd="yes")


def test_loader_and_evaluator_share_the_classes_of_the_model(tmp_path):
    content = example()
    spec = write(tmp_path, content)
    classes = {7: "two", 8: "nine"}
    swapped = {7: "nine", 8: "two"}
    for categories, expected in ((classes, [[0, 1], [1]]), (swapped, [[1, 0], [0]])):
        records = get_dataset_dicts(spec, categories=categories)
        found = [[a["category_id"] for a in record["annotations"]] for record in records]
        assert found == expected
        outputs = []
        for record in records:
            boxes = [[2, 2, 10, 10] for _ in record["annotations"]]
            labels = [a["category_id"] for a in record["annotations"]]
            made = instances(boxes, [0.9] * len(boxes), labels, size=(16, 24))
            outputs.append({"instances": made})
        results = run(spec, records, outputs, categories=categories)
        assert results["bbox"]["AP"] == pytest.approx(100)
    with pytest.raises(ValueError) as error:
        get_dataset_dicts(spec, categories={1: "two", 2: "ten"})
    assert "adds 1 (nine)" in str(error.value) and "lacks 1 (ten)" in str(error.value)


def test_encoded_masks_are_those_of_the_polygons(tmp_path):
    content = example()
    content["annotations"][0]["segmentation"].append([12.5, 3, 20, 4.2, 15, 14])
    truth = GroundTruth(resolve_name(write(tmp_path, content)))
    numbers = {7: 1, 3: 2, 5: 3}
    sizes = (16, 24)
    before = truth.dataset(numbers, "segm")["annotations"]
    truth.encode_masks()
    after = truth.dataset(numbers, "segm")["annotations"]
    assert len(before) == len(after) == 4
    for polygons, run_lengths in zip(before, after, strict=True):
        expected = polygons["segmentation"]
        if isinstance(expected, list):
            expected = mask_util.merge(mask_util.frPyObjects(expected, *sizes))
        decoded = mask_util.decode(run_lengths.pop("segmentation"))
        np.testing.assert_array_equal(decoded, mask_util.decode(expected))
        assert run_lengths == {k: v for k, v in polygons.items() if k != "segmentation"}
    assert all("segmentation" not in a for a in truth.dataset(numbers)["annotations"])
    assert isinstance(truth.file.annotations[0]["segmentation"], list)  # the file is shared


# Incomplete, late or invalid datasets


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
    with pytest.raises(ValueError, match=f"'{bare}' has no masks"):
        run(bare, inputs, outputs, tasks=["segm"])


@both_backends
def test_missing_values_of_annotations_do_not_change_the_ap(register_json, backend):
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


def test_dataset_written_when_it_is_first_asked_for(tmp_path, register):
    """The annotation file and the class names appear only with ``DatasetCatalog.get``."""
    name, path = "test_coco_evaluation_lazy", tmp_path / "lazy.json"

    def load():
        path.write_text(json.dumps(make_dataset()))
        return load_coco_json(str(path), str(tmp_path), name)

    register(name, load, json_file=str(path))
    evaluator = COCOEvaluator([name])
    assert path.is_file()
    inputs, outputs = perturbed(load_coco_json(str(path), str(tmp_path), name))
    evaluator.process(inputs, outputs)
    assert evaluator.evaluate()["bbox"]["AP-class3"] > 0


def test_dataset_without_a_json_file_is_converted(tmp_path, register):
    name = "test_coco_evaluation_dicts"
    record = {"file_name": "a.jpg", "image_id": 1, "height": HEIGHT, "width": WIDTH}
    annotation = {"bbox": [2, 2, 30, 40], "bbox_mode": 1, "category_id": 0}
    register(name, lambda: [{**record, "annotations": [annotation]}], thing_classes=["one"])
    with pytest.raises(ValueError, match=f"'{name}' .* output_dir"):
        COCOEvaluator(name)
    outputs = [{"instances": instances([[2, 2, 32, 42]], [0.9], [0])}]
    results = run(name, [record], outputs, output_dir=str(tmp_path))
    assert results["bbox"]["AP-one"] == pytest.approx(100)


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
    with pytest.raises(ValueError, match=path.name) as error:
        COCOEvaluator(name)
    assert "\n" not in str(error.value)


def test_missing_annotation_file(register_json):
    name = register_json(make_dataset())
    Path(MetadataCatalog.get(name).json_file).unlink()
    with pytest.raises(FileNotFoundError, match="test_coco_evaluation.json"):
        COCOEvaluator(name)
