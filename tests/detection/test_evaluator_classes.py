"""Ground truth in other spellings, with other ids or with classes of a dataset's own."""

import copy
import json

import pytest
from coco_json_files import example, write
from detections import assert_same, both_backends, instances, make_dataset, perturbed, run
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from crossmae_det.detection import COCOEvaluator, get_dataset_dicts

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
    """What an evaluator reads of the records: these datasets have no image files."""
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
    """Ids that are permuted, and another order of the classes in the model."""
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
        ({1: "class3", 2: "class7"}, ["'class9' (id 9)"]),
        ({**CLASSES, 4: "class5"}, ["'class5' (id 4)"]),
        ({1: "class3", 2: "class7", 3: "nine"}, ["'class9' (id 9)", "'nine' (id 3)"]),
    ],
)
def test_names_that_are_missing_or_new_are_named(register_json, classes, parts):
    name = register_json(make_dataset())
    with pytest.raises(ValueError) as error:
        COCOEvaluator(name, categories=classes)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_two_ids_may_share_a_class(tmp_path):
    """A dataset of one's own that takes classes 3 and 7 of the json for one and leaves out 9."""
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

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=str(path), thing_classes=["thing"], thing_dataset_id_to_contiguous_id=ids
    )
    try:
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
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_crowd_regions_can_be_objects_here_too(register_json):
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
    assert "'nine' (id 9)" in str(error.value) and "'ten' (id 2)" in str(error.value)


def test_sets_with_other_ids_train_together(tmp_path):
    specs = []
    for name, (nine, two) in (("a", (9, 2)), ("b", (1, 4))):
        (tmp_path / name).mkdir()
        content = example()
        for category in content["categories"]:
            category["id"] = {9: nine, 2: two}[category["id"]]
        for annotation in content["annotations"]:
            annotation["category_id"] = {9: nine, 2: two}[annotation["category_id"]]
        specs.append(write(tmp_path / name, content))
    first, second = (get_dataset_dicts(spec) for spec in specs)
    together = get_dataset_dicts(specs)
    assert together[:2] == first
    classes = [[a["category_id"] for a in record["annotations"]] for record in together]
    assert classes[:2] == classes[2:] == [[0, 1], [1]]
    assert [[a["category_id"] for a in record["annotations"]] for record in second] == [[1, 0], [0]]
