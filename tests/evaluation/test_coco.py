import contextlib
import io
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json, register_coco_instances
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from crossmae_det.evaluation import COCOEvaluator, backends

HEIGHT, WIDTH = 96, 120
CATEGORY_IDS = (3, 7, 9)  # 9 never has ground truth
COCO_FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "coco"
SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl")
both_backends = pytest.mark.parametrize("backend", ["faster-coco-eval", "pycocotools"])


def rectangle(x, y, w, h):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[y : y + h, x : x + w] = 1
    return mask


def rle(mask):
    encoded = mask_util.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def make_dataset(seed=0, num_images=8):
    """Polygons, a crowd as RLE on every third image, and no object at all on the last image."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for image_id in range(10, 10 + num_images):
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "height": HEIGHT})
        images[-1]["width"] = WIDTH
        for number in range(0 if image_id == 9 + num_images else 5):
            w, h = (int(v) for v in rng.integers(8, 60, 2))
            x, y = int(rng.integers(0, WIDTH - w)), int(rng.integers(0, HEIGHT - h))
            crowd = int(number == 4 and image_id % 3 == 0)
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(CATEGORY_IDS[rng.integers(0, 2)]),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": crowd,
                    "segmentation": rle(rectangle(x, y, w, h)) if crowd else [polygon],
                }
            )
    categories = [{"id": i, "name": f"class{i}"} for i in CATEGORY_IDS]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def register(tmp_path):
    names = []

    def add(content, name="test_coco_evaluation"):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        register_coco_instances(name, {}, str(path), str(tmp_path))
        names.append(name)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def instances(boxes, scores, classes, masks=None, size=(HEIGHT, WIDTH)):
    result = Instances(size)
    result.pred_boxes = Boxes(torch.as_tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4))
    result.scores = torch.as_tensor(np.array(scores), dtype=torch.float32)
    result.pred_classes = torch.as_tensor(np.array(classes), dtype=torch.int64)
    if masks is not None:
        result.pred_masks = torch.as_tensor(np.array(masks, dtype=bool)).reshape(-1, *size)
    return result


def perturbed(dicts, seed=0, masks=True, shift=5):
    """(inputs, outputs): two detections around most objects, and some anywhere."""
    rng = np.random.default_rng(seed)
    num_scores = sum(3 * len(d["annotations"]) + 5 for d in dicts)
    scores = list(rng.permutation(np.linspace(0.01, 0.99, num_scores)))
    outputs = []
    for record in dicts:
        height, width = record["height"], record["width"]
        boxes, classes, bitmaps = [], [], []
        targets = [(a["bbox"], a["category_id"]) for a in record["annotations"] for _ in range(2)]
        targets = [t for t in targets if rng.random() < 0.8]
        targets += [([rng.uniform(0, width), rng.uniform(0, height), 20, 30], 0)] * 3
        for (x, y, w, h), category in targets:
            x, y, w, h = np.array([x, y, w, h]) + rng.uniform(-shift, shift, 4)
            x0, y0 = np.clip([x, y], 0, [width - 2, height - 2])
            x1, y1 = np.clip([x0 + max(w, 2), y0 + max(h, 2)], 2, [width, height])
            boxes.append([x0, y0, x1, y1])
            classes.append(category)
            bitmap = np.zeros((height, width), dtype=bool)
            bitmap[round(y0) : round(y1), round(x0) : round(x1)] = True
            bitmaps.append(bitmap)
        taken = [scores.pop() for _ in boxes]
        outputs.append(
            {
                "instances": instances(
                    boxes, taken, classes, bitmaps if masks else None, (height, width)
                )
            }
        )
    return dicts, outputs


def run(name, inputs, outputs, **options):
    evaluator = COCOEvaluator(name, **options)
    evaluator.reset()
    evaluator.process(inputs, outputs)
    return evaluator.evaluate()


def direct_stats(json_file, results_file, task, image_ids):
    """COCO's evaluation as its authors use it."""
    detections = json.loads(Path(results_file).read_text())
    if task == "segm":
        detections = [{k: v for k, v in d.items() if k != "bbox"} for d in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(json_file)
        evaluation = COCOeval(truth, truth.loadRes(detections), task)
        evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats * 100


def assert_same(first, second, tolerance=1e-6):
    assert first.keys() == second.keys()
    for task, values in first.items():
        assert values.keys() == second[task].keys()
        for key, value in values.items():
            assert value == pytest.approx(second[task][key], abs=tolerance, nan_ok=True), key


@both_backends
def test_equals_pycocotools_used_directly(register, tmp_path, backend):
    name = register(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    results = run(name, inputs, outputs, output_dir=str(tmp_path), backend=backend)
    assert set(results) == {"bbox", "segm"}
    for task, values in results.items():
        stats = direct_stats(
            MetadataCatalog.get(name).json_file,
            tmp_path / "coco_instances_results.json",
            task,
            [record["image_id"] for record in inputs],
        )
        expected = [*stats[:6], stats[8]]
        measured = [values[key] for key in (*SUMMARY, "AR@100")]
        np.testing.assert_allclose(measured, np.where(np.array(expected) < 0, np.nan, expected))
        assert 5 < values["AP"] < 95


def test_backends_agree_on_random_detections(register):
    for seed in range(3):
        name = register(make_dataset(seed), f"test_coco_evaluation_{seed}")
        inputs, outputs = perturbed(DatasetCatalog.get(name), seed)
        fast = run(name, inputs, outputs, backend="faster-coco-eval")
        assert_same(fast, run(name, inputs, outputs, backend="pycocotools"))
        assert fast["segm"]["AP-class3"] > 0


def test_backends_agree_on_real_annotations(register):
    json_file = COCO_FOLDER / "annotations" / "instances_val2017.json"
    if not json_file.is_file():
        pytest.skip(f"{json_file} is not here")
    content = json.loads(json_file.read_text())
    content["images"] = content["images"][:25]
    wanted = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in wanted]
    name = register(content, "test_coco_evaluation_real")
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    fast = run(name, inputs, outputs, backend="faster-coco-eval")
    assert_same(fast, run(name, inputs, outputs, backend="pycocotools"))
    assert 10 < fast["bbox"]["AP"] < 90


@both_backends
def test_a_subset_counts_only_its_own_images(register, tmp_path, backend):
    name = register(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    subset = run(name, inputs[:3], outputs[:3], output_dir=str(tmp_path), backend=backend)
    stats = direct_stats(
        MetadataCatalog.get(name).json_file,
        tmp_path / "coco_instances_results.json",
        "bbox",
        [record["image_id"] for record in inputs[:3]],
    )
    assert subset["bbox"]["AP"] == pytest.approx(stats[0])
    assert subset["bbox"]["AP"] != pytest.approx(run(name, inputs, outputs)["bbox"]["AP"])


@both_backends
def test_asked_images_without_detections_lower_the_score(register, backend):
    name = register(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    evaluator = COCOEvaluator(name, backend=backend)
    evaluator.process(inputs[:3], outputs[:3])
    some = evaluator.evaluate()["bbox"]["AR@100"]
    assert evaluator.evaluate([r["image_id"] for r in inputs])["bbox"]["AR@100"] < some
    assert evaluator.evaluate()["bbox"]["AR@100"] == some


@both_backends
def test_the_size_of_a_mask_is_its_own_and_not_that_of_its_box(register, backend):
    """A false positive of 800 pixels in a box of 1600 counts among the small masks (below 1024)."""
    content = make_dataset()
    content["images"] = content["images"][:1]
    truth = {"id": 1, "image_id": 10, "category_id": 3, "bbox": [5, 5, 40, 40], "area": 800}
    truth |= {"iscrowd": 0, "segmentation": [[5, 5, 45, 5, 5, 45]]}
    content["annotations"] = [truth]
    name = register(content)
    triangle = mask_util.decode(mask_util.frPyObjects(truth["segmentation"], HEIGHT, WIDTH))[..., 0]
    found = instances(
        [[5, 5, 45, 45], [65, 45, 105, 85]],
        [0.5, 0.9],
        [0, 0],
        [triangle, np.roll(triangle, (40, 60), (0, 1))],
    )
    results = run(name, DatasetCatalog.get(name), [{"instances": found}], backend=backend)
    assert results["segm"]["APs"] == pytest.approx(50)
    assert results["segm"]["AP"] == pytest.approx(50)
    assert np.isnan(results["segm"]["APm"])


@both_backends
def test_no_detection_at_all_scores_zero(register, tmp_path, backend):
    name = register(make_dataset())
    inputs = DatasetCatalog.get(name)
    outputs = [{"instances": instances([], [], [], masks=[])} for _ in inputs]
    results = run(name, inputs, outputs, output_dir=str(tmp_path), backend=backend)
    for task in ("bbox", "segm"):
        assert results[task]["AP"] == 0
        assert results[task]["AP-class3"] == 0
        assert np.isnan(results[task]["AP-class9"])
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []


@both_backends
def test_no_ground_truth_at_all_is_nan(register, backend):
    content = make_dataset()
    content["annotations"] = []
    name = register(content)
    inputs = DatasetCatalog.get(name)
    outputs = [{"instances": instances([[0, 0, 9, 9]], [0.5], [0])} for _ in inputs]
    results = run(name, inputs, outputs, backend=backend)
    assert set(results) == {"bbox"}
    assert np.isnan(list(results["bbox"].values())).all()


def test_perfect_detections_score_100(register):
    name = register(make_dataset())
    inputs = DatasetCatalog.get(name)
    outputs = []
    for record in inputs:
        objects = [a for a in record["annotations"] if not a["iscrowd"]]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in objects)]
        masks = [rectangle(*a["bbox"]) for a in objects]
        classes = [a["category_id"] for a in objects]
        outputs.append({"instances": instances(corners, [0.9] * len(objects), classes, masks)})
    results = run(name, inputs, outputs)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)


def test_boxes_only_where_model_or_data_set_have_no_masks(register):
    name = register(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name), masks=False)
    assert set(run(name, inputs, outputs)) == {"bbox"}
    content = make_dataset()
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    bare = register(content, "test_coco_evaluation_boxes")
    inputs, outputs = perturbed(DatasetCatalog.get(bare), masks=True)
    assert set(run(bare, inputs, outputs)) == {"bbox"}
    with pytest.raises(ValueError, match="has no masks; ask for bbox only"):
        run(bare, inputs, outputs, tasks=["segm"])


@both_backends
def test_tolerates_what_users_annotations_lack(register, backend):
    """Annotation ids from 0, image ids that are text, no area, no iscrowd."""
    complete = make_dataset()
    complete["annotations"] = [a for a in complete["annotations"] if not a["iscrowd"]]
    name = register(complete)
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    expected = run(name, inputs, outputs, backend=backend)

    sparse = json.loads(json.dumps(complete))
    for image in sparse["images"]:
        image["id"] = f"image {image['id']}"
    for number, annotation in enumerate(sparse["annotations"]):
        annotation.update(id=number, image_id=f"image {annotation['image_id']}")
        del annotation["area"], annotation["iscrowd"]
    name = register(sparse, "test_coco_evaluation_sparse")
    inputs = [{**record, "image_id": f"image {record['image_id']}"} for record in inputs]
    assert_same(run(name, inputs, outputs, backend=backend), expected)


def test_annotations_without_mask_are_left_out_of_mask_ap(register, caplog):
    content = make_dataset()
    reduced = {**content, "annotations": content["annotations"][1:]}
    name = register(reduced)
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    expected = run(name, inputs, outputs)["segm"]
    content["annotations"][0]["segmentation"] = []
    name = register(content, "test_coco_evaluation_mixed")
    with caplog.at_level(logging.WARNING):
        assert_same({"segm": run(name, inputs, outputs)["segm"]}, {"segm": expected})
    assert "leaves out 1 annotations" in caplog.text


def test_writes_only_plain_coco_results(register, tmp_path):
    name = register(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    folder = tmp_path / "inference"
    run(name, inputs, outputs, output_dir=str(folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "coco_instances_results.json",
        "results.json",
    ]
    detections = json.loads((folder / "coco_instances_results.json").read_text())
    assert len(detections) == sum(len(output["instances"]) for output in outputs)
    assert {d["category_id"] for d in detections} <= set(CATEGORY_IDS)
    first = outputs[0]["instances"]
    x0, y0, x1, y1 = first.pred_boxes.tensor[0].tolist()
    np.testing.assert_allclose(detections[0]["bbox"], [x0, y0, x1 - x0, y1 - y0], rtol=1e-5)
    np.testing.assert_array_equal(
        mask_util.decode(detections[0]["segmentation"]).astype(bool), first.pred_masks[0].numpy()
    )


def test_repeated_images_and_repeated_evaluation_change_nothing(register):
    name = register(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    expected = run(name, inputs, outputs)
    evaluator = COCOEvaluator(name)
    evaluator.process(inputs, outputs)
    evaluator.process(inputs[:2], outputs[:2])
    assert_same(evaluator.evaluate(), expected)
    assert_same(evaluator.evaluate(), expected)
    evaluator.reset()
    assert evaluator.evaluate() == {}


def test_gathers_the_detections_of_all_processes(register, monkeypatch):
    name = register(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    expected = run(name, inputs, outputs)
    other = COCOEvaluator(name)
    other.process(inputs[4:], outputs[4:])
    monkeypatch.setattr(comm, "gather", lambda own, dst: [own, other._predictions])
    assert_same(run(name, inputs[:4], outputs[:4]), expected)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert run(name, inputs[:4], outputs[:4]) == {}


@both_backends
def test_limit_on_detections(register, backend):
    name = register(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    limited = run(name, inputs, outputs, max_dets_per_image=1, backend=backend)["bbox"]
    best = []
    for output in outputs:
        found = output["instances"]
        keep = [
            int(torch.where(found.pred_classes == c, found.scores, -1.0).argmax())
            for c in found.pred_classes.unique()
        ]
        best.append({"instances": found[torch.tensor(keep)]})
    expected = run(name, inputs, best, backend="pycocotools")["bbox"]
    assert limited["AP"] == pytest.approx(expected["AP"])
    assert limited["AR@1"] == pytest.approx(expected["AR@100"])
    with pytest.raises(ValueError, match="max_dets_per_image must be a positive integer, not 0"):
        COCOEvaluator(name, max_dets_per_image=0)


def test_bfloat16_scores(register):
    name = register(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    expected = run(name, inputs, outputs)
    for output in outputs:
        output["instances"].scores = output["instances"].scores.bfloat16()
    assert run(name, inputs, outputs)["bbox"]["AP50"] == pytest.approx(
        expected["bbox"]["AP50"], 0.2
    )


def test_data_set_written_when_it_is_first_asked_for(tmp_path):
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


def test_data_set_without_a_json_file_is_converted(tmp_path):
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


def test_no_annotations_to_evaluate_against(register, tmp_path):
    content = make_dataset()
    name = register(content)
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    del content["annotations"]
    name = register(content, "test_coco_evaluation_unlabelled")
    assert run(name, inputs, outputs, output_dir=str(tmp_path)) == {}
    assert (tmp_path / "coco_instances_results.json").is_file()


def test_auto_prefers_the_fast_backend_and_says_so_once(register, caplog, monkeypatch):
    name = register(make_dataset())
    backends._announce.cache_clear()
    with caplog.at_level(logging.INFO):
        assert COCOEvaluator(name)._backend == "faster-coco-eval"
        COCOEvaluator(name)
    assert caplog.text.count("COCO evaluation uses faster-coco-eval") == 1
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with caplog.at_level(logging.INFO):
        assert COCOEvaluator(name)._backend == "pycocotools"
    assert caplog.text.count("COCO evaluation uses pycocotools") == 1
    with pytest.raises(ValueError, match="pip install faster-coco-eval"):
        COCOEvaluator(name, backend="faster-coco-eval")
    with pytest.raises(ValueError, match="backend 'fast' is unknown"):
        COCOEvaluator(name, backend="fast")


def test_prints_nothing_and_logs_the_tables(register, caplog, capsys):
    name = register(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    capsys.readouterr()
    with caplog.at_level(logging.INFO):
        for backend in ("faster-coco-eval", "pycocotools"):
            run(name, inputs, outputs, backend=backend)
    assert capsys.readouterr().out == ""
    assert "on 8 of the 8 images" in caplog.text
    assert "| category" in caplog.text
    assert "class9" in caplog.text


def test_users_mistakes_are_named(register, tmp_path):
    name = register(make_dataset())
    inputs, outputs = perturbed(DatasetCatalog.get(name))
    strange = [{"instances": instances([[0, 0, 5, 5]], [0.5], [3])}]
    with pytest.raises(ValueError, match="predicts class 3, but .* has 3 classes"):
        run(name, inputs[:1], strange)
    with pytest.raises(ValueError, match="image id 99 is not in .*json"):
        run(name, [{"image_id": 99}], outputs[:1])
    with pytest.raises(ValueError, match="must be one data set"):
        COCOEvaluator([name, name])
    with pytest.raises(ValueError, match="tasks may be bbox and segm, not keypoints"):
        COCOEvaluator(name, tasks=["keypoints"])
    with pytest.raises(ValueError, match="'nowhere' is not registered"):
        COCOEvaluator("nowhere")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"images": [', '{"images": [], "annotations": 1}']
)
def test_file_that_is_not_coco(register, tmp_path, content):
    name = register(make_dataset())
    DatasetCatalog.get(name)
    path = Path(MetadataCatalog.get(name).json_file)
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path.name} cannot be used for COCO") as error:
        COCOEvaluator(name)
    assert "\n" not in str(error.value)


def test_missing_annotation_file(register):
    name = register(make_dataset())
    Path(MetadataCatalog.get(name).json_file).unlink()
    with pytest.raises(FileNotFoundError, match="test_coco_evaluation.json does not exist"):
        COCOEvaluator(name)
