import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances


@pytest.fixture
def register():
    """Register a dataset in detectron2 for one test; ``register.coco`` takes JSON:FOLDER."""
    names = []

    def register(name, loader, **metadata):
        names.append(name)
        DatasetCatalog.register(name, loader)
        MetadataCatalog.get(name).set(**metadata)
        return name

    def register_coco(name, spec):
        names.append(name)
        register_coco_instances(name, {}, *spec.split(":"))
        return name

    register.coco = register_coco
    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def register_json(register, tmp_path):
    """Write the content of a COCO json and register it in detectron2, for one test."""

    def add(content, name="test_coco_evaluation"):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return register.coco(name, f"{path}:{tmp_path}")

    return add
