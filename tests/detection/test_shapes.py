"""The built-in dataset: reproducible, exact, loadable, never half-written."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from crossmae_det.detection import shapes

SMALL = {"num_train": 24, "num_val": 6, "image_size": 64, "seed": 3}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return shapes.build(tmp_path_factory.mktemp("datasets"), **SMALL)


@pytest.fixture
def catalog():
    """Restore detectron2's entries for the shapes after the test."""
    names = ("shapes_train", "shapes_val")
    saved = [(c, n, c[n]) for c in (DatasetCatalog, MetadataCatalog) for n in names if n in c]
    yield
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
    for entries, name, value in saved:
        entries[name] = value


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def visible(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.suffix != ".lock"]


def annotations(folder: Path, split: str) -> dict:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def test_same_bytes_every_time(built, tmp_path):
    again = shapes.build(tmp_path, **SMALL)
    assert files(again) == files(built)
    assert again.name == built.name == shapes.folder("any", **SMALL).name


def test_an_image_does_not_depend_on_how_many_there_are(built, tmp_path):
    fewer = shapes.build(tmp_path, **{**SMALL, "num_train": 4, "num_val": 2})
    for name in ("train/000004.jpg", "val/000002.jpg"):
        assert (fewer / name).read_bytes() == (built / name).read_bytes()


def test_seed_split_and_number_each_change_the_image():
    images = [
        shapes.render("train", 1, seed=0).image,
        shapes.render("val", 1, seed=0).image,
        shapes.render("train", 2, seed=0).image,
        shapes.render("train", 1, seed=1).image,
    ]
    for first, second in combinations(images, 2):
        assert np.mean(first != second) > 0.5


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_boxes_and_areas_are_exact(built, split):
    content = annotations(built, split)
    assert len(content["images"]) == SMALL[f"num_{split}"]
    assert sorted(a["id"] for a in content["annotations"]) == list(
        range(1, len(content["annotations"]) + 1)
    )
    for record in content["images"]:
        with Image.open(built / split / record["file_name"]) as image:
            assert image.mode == "RGB"
            assert image.size == (record["width"], record["height"]) == (64, 64)
        objects = [a for a in content["annotations"] if a["image_id"] == record["id"]]
        assert 1 <= len(objects) <= 3
        scene = shapes.render(split, record["id"], image_size=64, seed=3)
        covered = np.zeros((64, 64), int)
        for k, annotation in enumerate(objects, start=1):
            mask = mask_util.decode(annotation["segmentation"]).astype(bool)
            np.testing.assert_array_equal(mask, scene.owners == k)
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert (x, x + width) == (columns.min(), columns.max() + 1)
            assert (y, y + height) == (rows.min(), rows.max() + 1)
            assert annotation["area"] == mask.sum() >= 20
            assert annotation["iscrowd"] == 0
            assert annotation["category_id"] == scene.categories[k - 1] + 1
            covered += mask
        assert covered.max() == 1


def test_the_mask_is_where_the_shape_is_drawn(monkeypatch):
    """With flat paint and without shadow, light and noise, the pixels give the mask."""
    red, gray = np.array([1, 0, 0], np.float32), np.array([0.5] * 3, np.float32)

    def flat(*_, away_from=None, **__):
        return (gray, gray) if away_from is None else (red, red)

    monkeypatch.setattr(shapes, "_color_pair", flat)
    monkeypatch.setattr(shapes, "_shadow", lambda alpha, *_: np.zeros_like(alpha))
    monkeypatch.setattr(shapes, "_expose", lambda _, canvas: canvas)
    for number in range(1, 9):
        scene = shapes.render("train", number)
        redness = scene.image[..., 0] - scene.image[..., 1]
        # Two edges in one pixel can add up to more than half without either having half of it.
        differ = (redness >= 0.5) != (scene.owners > 0)
        assert differ.mean() < 0.002


@pytest.mark.parametrize("name", shapes.CLASSES)
def test_outlines_have_the_area_and_the_hole_they_should(name):
    rng = np.random.default_rng(0)
    outline = shapes._place(rng, shapes._outline(name, rng), 40.0, 128)
    outline = [part - outline[0].mean(axis=0) + 64 for part in outline]
    coverage = shapes._coverage(outline, (0, 0, 128, 128))
    assert coverage.sum() == pytest.approx(40.0**2, rel=0.03)
    assert (coverage[64, 64] == 0) == (name == "ring")


def test_coverage_is_centered_on_the_outline():
    outline = [np.array([(14, 5), (18, 5), (18, 13), (14, 13)], float)]
    coverage = shapes._coverage(outline, (10, 2, 30, 20))
    np.testing.assert_array_equal(coverage[3:11, 4:8], 1)
    assert coverage.sum() == pytest.approx(32, rel=0.1)
    rows, columns = np.indices(coverage.shape) + 0.5
    assert (coverage * columns).sum() / coverage.sum() + 10 == pytest.approx(16, abs=0.15)
    assert (coverage * rows).sum() / coverage.sum() + 2 == pytest.approx(9, abs=0.15)


def test_every_class_and_every_number_of_objects_occurs():
    drawn = [shapes.render("train", number, image_size=64) for number in range(1, 61)]
    counts = np.bincount([c for scene in drawn for c in scene.categories], minlength=6)
    assert counts.min() > counts.sum() / 12
    assert {len(scene.categories) for scene in drawn} == {1, 2, 3}


def test_shapes_hide_each_other_and_stay_in_sight():
    hidden = 0
    for number in range(1, 31):
        scene = shapes.render("train", number)
        objects = np.bincount(scene.owners.ravel())[1:]
        assert len(objects) == len(scene.categories)
        assert objects.min() >= 0.75 * (0.3 * 128) ** 2
        touching = scene.owners[:, 1:][scene.owners[:, :-1] != scene.owners[:, 1:]]
        left = scene.owners[:, :-1][scene.owners[:, :-1] != scene.owners[:, 1:]]
        hidden += bool(np.any((touching > 0) & (left > 0)))
    assert hidden > 5


def test_smallest_size():
    scene = shapes.render("train", 1, image_size=32)
    assert scene.image.shape == (32, 32, 3)
    assert scene.categories


def test_pycocotools_and_detectron2_read_it(built):
    json_file = built / "annotations" / "instances_val.json"
    coco = COCO(str(json_file))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(shapes.CLASSES)
    for annotation in coco.loadAnns(coco.getAnnIds()):
        assert coco.annToMask(annotation).sum() == annotation["area"]
    records = load_coco_json(str(json_file), str(built / "val"))
    assert len(records) == SMALL["num_val"]
    assert all(Path(record["file_name"]).is_file() for record in records)
    assert sum(len(record["annotations"]) for record in records) == len(coco.anns)


def test_an_existing_dataset_is_not_written_again(built, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    monkeypatch.setattr(shapes, "render", None)
    assert shapes.build(built.parent, **SMALL) == built
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


def test_variants_lie_side_by_side(tmp_path):
    parameters = {"num_train": 2, "num_val": 1, "image_size": 32}
    folders = {
        shapes.build(tmp_path, **{**parameters, **change})
        for change in ({}, {"num_train": 1}, {"num_val": 2}, {"image_size": 40}, {"seed": 1})
    }
    assert len(folders) == 5
    assert sorted(visible(tmp_path)) == sorted(folder.name for folder in folders)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
    render = shapes.render

    def fail_at_three(split, number, **options):
        if split == "val" and number == 3:
            raise error("interrupted")
        return render(split, number, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "render", fail_at_three)
        with pytest.raises(error, match="interrupted"):
            shapes.build(tmp_path, **SMALL)
    assert visible(tmp_path) == []


def test_a_killed_build_is_cleared_away_by_the_next(built, tmp_path):
    rest = tmp_path / f".{built.name}.partial"
    (rest / "train").mkdir(parents=True)
    (rest / "train" / "000001.jpg").write_bytes(b"half")
    assert files(shapes.build(tmp_path, **SMALL)) == files(built)
    assert visible(tmp_path) == [built.name]


def test_concurrent_builds_write_once(built, tmp_path, monkeypatch):
    build_once, runs = shapes._build, []

    def counted(target, variant):
        runs.append(target)
        build_once(target, variant)

    monkeypatch.setattr(shapes, "_build", counted)
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(shapes.build, tmp_path, **SMALL) for _ in range(3)]
        folders = {job.result() for job in jobs}
    assert folders == {tmp_path / built.name} == set(runs)
    assert len(runs) == 1
    assert files(tmp_path / built.name) == files(built)


def test_registered_data_is_built_when_first_asked_for(catalog, tmp_path):
    names = shapes.register(tmp_path, **SMALL)
    assert names == ("shapes_train", "shapes_val")
    assert visible(tmp_path) == []
    metadata = MetadataCatalog.get("shapes_val")
    assert metadata.evaluator_type == "coco"
    assert metadata.thing_classes == list(shapes.CLASSES)
    assert metadata.thing_dataset_id_to_contiguous_id == {i + 1: i for i in range(6)}

    records = DatasetCatalog.get("shapes_val")
    assert len(records) == SMALL["num_val"]
    assert {a["category_id"] for r in records for a in r["annotations"]} <= set(range(6))
    assert Path(metadata.json_file).is_file()
    assert Path(records[0]["file_name"]).parent == Path(metadata.image_root)
    assert len(DatasetCatalog.get("shapes_train")) == SMALL["num_train"]


def test_registering_again_replaces(catalog, tmp_path):
    shapes.register(tmp_path, **SMALL)
    shapes.register(tmp_path, **SMALL)
    shapes.register(tmp_path, **{**SMALL, "num_val": 1})
    assert len(DatasetCatalog.get("shapes_val")) == 1
    assert "_24_1_" in MetadataCatalog.get("shapes_val").json_file


def test_another_dataset_of_the_name_is_not_replaced(catalog, tmp_path):
    shapes.register(tmp_path, **SMALL)
    DatasetCatalog.remove("shapes_val")
    DatasetCatalog.register("shapes_val", list)
    with pytest.raises(ValueError, match="shapes_val"):
        shapes.register(tmp_path, **SMALL)
    assert DatasetCatalog.get("shapes_val") == []


def test_default_root_is_that_of_detectron2(monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/somewhere")
    assert shapes.folder().parent == Path("/somewhere")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert shapes.folder().parent == Path("datasets")


@pytest.mark.parametrize(
    "change",
    [{"num_train": 0}, {"num_val": 0}, {"image_size": 31}, {"seed": -1}, {"image_size": 64.5}],
)
def test_parameters_out_of_range(tmp_path, change):
    (name,) = change
    with pytest.raises(ValueError, match=f"^shapes: {name} must be [^\n]*$"):
        shapes.build(tmp_path, **{**SMALL, **change})
    assert list(tmp_path.iterdir()) == []


def test_unknown_parameter(tmp_path):
    with pytest.raises(ValueError, match="'size'.* num_train"):
        shapes.register(tmp_path, size=3)


def test_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=f"^{root}/shapes_v2_[^\n]* DETECTRON2_DATASETS [^\n]*$"):
            shapes.build(root, **SMALL)


def test_a_folder_of_an_earlier_version_of_the_package_is_used(built, monkeypatch):
    """The description names the module that wrote it, which has moved."""
    file = built / "shapes.json"
    text = file.read_text()
    monkeypatch.setattr(shapes, "render", None)
    file.write_text(text.replace("crossmae_det.detection.shapes", "crossmae_det.data.shapes"))
    assert file.read_text() != text
    assert shapes.build(built.parent, **SMALL) == built
    file.write_text(text)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"version": 0}'])
def test_a_folder_of_the_name_with_other_content(tmp_path, content):
    target = shapes.folder(tmp_path, **SMALL)
    target.mkdir()
    if content is not None:
        (target / "shapes.json").write_text(content)
    before = files(tmp_path)
    with pytest.raises(OSError, match=f"^{target}: [^\n]*$"):
        shapes.build(tmp_path, **SMALL)
    assert files(tmp_path) == before
