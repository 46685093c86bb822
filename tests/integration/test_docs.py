"""Every command and every Python block of the README and the documentation runs, or says why not.

The blocks of a page run in their order, in one folder with small data under the names that the
pages use. An HTML comment directly before a block exempts it:

    <!-- needs: gpu, COCO -->    what the test machine lacks; the keys of its configs are checked
    <!-- run by: make test -->   what runs it instead
    <!-- fails -->               it ends with exit code 2 and prints the text block that follows

A Python block whose first line is ``# NAME.py`` is also written to that file.
"""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from crossmae_det.__main__ import main
from crossmae_det.detection import shapes
from crossmae_det.detection.yaml_config import default_config
from crossmae_det.model_zoo import get_config, get_config_file
from crossmae_det.model_zoo import list as list_configs
from crossmae_det.model_zoo.overrides import apply_overrides
from crossmae_det.modeling import ViT

REPO = Path(__file__).parents[2]
TOP_FOLDERS = ("tests", "tools", "configs", "docs", "crossmae_det")
PACKAGES = [init.parent.name for init in REPO.glob("crossmae_det/*/__init__.py")]
PAGES = ["README.md", "CONTRIBUTING.md", "MODEL_ZOO.md"]
PAGES += sorted(p.relative_to(REPO).as_posix() for p in REPO.glob("docs/**/*.md"))

BLOCK = re.compile(
    r"(?:^<!-- (?P<marker>[^\n]*) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
# Configs that have all lazy keys between them.
KEYS_OF = ["coco/mask_rcnn_crossmae_vit_b_100ep", "pretraining/crossmae_vit_b_800ep"]
CONFIG_NAME = re.compile(r"\b(?:coco|small_data|demo|pretraining(?=/\w*vit_))/\w+\.(?:py|yaml)\b")
# What may be absent where the tests run. "time": minutes of a machine with nothing else to do.
NEEDS = {"gpu", "network", "several machines", "Slurm", "time"}
NEEDS |= {"COCO", "ImageNet", "CIFAR-10"}
LANGUAGES = {"sh", "python", "text", "yaml", "json", "bibtex"}

# Added to the commands, behind the overrides of the page: small models, few iterations.
COMMON = [
    "train.visualizer=null",
    "train.report=null",
    "train.device=cpu",
    "train.amp.enabled=False",
    "train.max_iter=2",
    "train.eval_period=2",
]
COMMON += ["dataloader.train.num_workers=0", "dataloader.train.total_batch_size=2"]
VIT = {"embed_dim": 32, "depth": 4, "num_heads": 2}
TINY = {
    "pretraining": [
        *COMMON,
        *(f"model.encoder.{key}={value}" for key, value in VIT.items()),
        *["dataloader.image_size=64", "model.decoder_dim=32", "model.decoder_depth=2"],
        "model.decoder_num_heads=2",
    ],
    "detection": [
        *COMMON,
        *(f"model.backbone.net.{key}={value}" for key, value in VIT.items()),
        *["dataloader.image_size=64", "model.backbone.net.pretrain_img_size=64"],
        *["model.backbone.net.freeze_blocks=1", "model.backbone.out_channels=16"],
        "model.proposal_generator.post_nms_topk=[20,20]",
        "model.roi_heads.batch_size_per_image=16",
        "model.roi_heads.box_predictor.test_score_thresh=0.0",
        "model.roi_heads.mask_head.conv_dims=[16,16]",
        *["model.roi_heads.box_head.conv_dims=[16]", "model.roi_heads.box_head.fc_dims=[32]"],
    ],
    "yaml": [
        *["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", "False", "SOLVER.MAX_ITER", "2"],
        *["DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "INPUT.IMAGE_SIZE", "64"],
        *["MODEL.VIT.EMBED_DIM", "32", "MODEL.VIT.DEPTH", "4", "MODEL.VIT.NUM_HEADS", "2"],
        *["MODEL.VIT.PRETRAIN_IMG_SIZE", "64", "MODEL.PYRAMID.OUT_CHANNELS", "16"],
        *["MODEL.ROI_BOX_HEAD.CONV_DIM", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"],
        *["MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"],
        *["MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"],
    ],
}
# What a page sets holds, but for these.
SHORTENED = {"train.max_iter", "train.eval_period", "dataloader.train.total_batch_size"}
# In place of the built-in dataset and of COCO.
DATA = {
    "pretraining": {"dataloader.train.dataset.name": "photos"},
    "detection": {
        "dataloader.train.dataset.names": "train.json:images/train",
        "dataloader.test.dataset.names": "val.json:images/val",
    },
    "yaml": {},
}
# Options of other commands, likewise: what they begin with -> what is added.
ADDED = {
    ("benchmark", "--pretraining"): ["--pretraining", "demo/pretrain.py"],
}


class Block(NamedTuple):
    marker: str
    language: str
    text: str
    following: str  # the text block behind it, where it is the next one


def blocks_of(page):
    found = list(BLOCK.finditer((REPO / page).read_text(encoding="utf-8")))
    result = []
    for match, following in zip(found, [*found[1:], None], strict=False):
        output = following["text"] if following and following["language"] == "text" else ""
        result.append(Block(match["marker"] or "", match["language"], match["text"], output))
    return result


def commands(text):
    """The lines of a shell block as lists of words, continued lines in one, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def arguments_of(words):
    """The arguments of a call of ``crossmae-det``; None of other commands."""
    if words[0] == "crossmae-det":
        return words[1:]
    return words[3:] if words[:3] == ["python", "-m", "crossmae_det"] else None


def config_of(arguments):
    """The shipped config of a command and its kind: pretraining, detection or yaml."""
    if "--config-file" not in arguments:
        return None, None
    name = arguments[arguments.index("--config-file") + 1]
    if name not in list_configs() and Path(name).suffix != ".py":
        return None, None
    if name.endswith(".yaml"):
        return name, "yaml"
    return name, "pretraining" if "pretrain" in name else "detection"


def shortened(arguments):
    """The command of a page with what makes it take seconds."""
    for start, added in ADDED.items():
        if tuple(arguments[: len(start)]) == start:
            return [*arguments, *added]
    _, kind = config_of(arguments)
    if kind is None:
        return arguments
    given = {word.partition("=")[0] for word in arguments}
    data = [f"{key}={value}" for key, value in DATA[kind].items() if key not in given]
    held = given - SHORTENED if kind != "yaml" else set()
    tiny = [word for word in TINY[kind] if word.partition("=")[0] not in held]
    return [*arguments, *tiny, *data]


def write_yolo_labels(root, split):
    """The boxes of a COCO json as rows of YOLO's label files."""
    content = json.loads((root / f"{split}.json").read_text())
    index = {c["id"]: i for i, c in enumerate(content["categories"])}
    (root / "labels" / split).mkdir(parents=True)
    for image in content["images"]:
        rows = []
        for a in (a for a in content["annotations"] if a["image_id"] == image["id"]):
            x, y, w, h = (value / 64 for value in a["bbox"])
            rows.append(f"{index[a['category_id']]} {x + w / 2} {y + h / 2} {w} {h}\n")
        name = Path(image["file_name"]).with_suffix(".txt")
        (root / "labels" / split / name).write_text("".join(rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The files that the pages name: images, annotations, a video, weights."""
    root = tmp_path_factory.mktemp("pages")
    built = shapes.build(root, num_train=8, num_val=3, image_size=64)
    for split in ("train", "val"):
        shutil.copy(built / f"annotations/instances_{split}.json", root / f"{split}.json")
        shutil.copytree(built / split, root / "images" / split)
        for index, path in enumerate(sorted((built / split).iterdir())):
            folder = root / "labeled" / split / "ab"[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            for copy in range(3):  # k-NN wants 20
                shutil.copy(path, folder / f"{index}_{copy}.jpg")
        write_yolo_labels(root, split)
    classes = [c["name"] for c in json.loads((root / "train.json").read_text())["categories"]]
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {classes}\n")
    shutil.copy(root / "val.json", root / "more.json")
    shutil.copytree(root / "images/val", root / "images/more")
    shutil.rmtree(built)
    files = sorted((root / "images/train").iterdir())
    for folder in ("photos", "holiday", "clips", "held_out"):
        (root / folder).mkdir()
    for index, path in enumerate(files[:4], 1):
        shutil.copy(path, root / "photos" / f"{index}.jpg")
        shutil.copy(path, root / "held_out")
    shutil.copy(files[0], root / "street.jpg")
    shutil.copy(files[1], root / "holiday")
    video = cv2.VideoWriter(str(root / "clips/a.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (64, 64))
    for _ in range(2):
        video.write(np.zeros((64, 64, 3), np.uint8))
    video.release()
    torch.manual_seed(0)
    weights = ViT(img_size=64, patch_size=16, **VIT).state_dict()
    torch.save({"model": weights}, root / "mae_pretrain_vit_base.pth")
    torch.save({"model": {f"encoder.{k}": v for k, v in weights.items()}}, root / "backbone.pth")
    return root


def run_python(script, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *words])
    runpy.run_path(str(REPO / script), run_name="__main__")


def run_line(words, monkeypatch):
    """Run one command as a shell would, in this process where it is one of ours."""
    arguments = arguments_of(words)
    if words[0] == "export":
        name, _, value = words[1].partition("=")
        monkeypatch.setenv(name, value)
    elif arguments is not None:
        monkeypatch.setattr(sys, "argv", ["crossmae-det"])
        main(shortened(arguments))
    elif words[0] == "python" and words[1].startswith("tools/"):
        run_python(words[1], shortened(words[2:]), monkeypatch)
    else:
        subprocess.run(shlex.join(words), shell=True, check=True)


def exit_code(words, monkeypatch):
    try:
        run_line(words, monkeypatch)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def check_keys(words):
    """Read the config of a command that is not run, with its overrides."""
    name, kind = config_of(words)
    if name is None:
        return
    if kind == "yaml":
        rest = words[words.index(name) + 1 :]
        overrides = [w for pair in zip(rest[::2], rest[1::2], strict=False) for w in pair]
    else:
        overrides = [w for w in words if re.match(r"\+?[a-z_]+(\.\w+)+=", w)]
    get_config(name, overrides)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_blocks(page, data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(shutil.copytree(data, tmp_path / "page"))
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{page}: name the language of\n{block.text}"
        kind, _, names = block.marker.partition(": ")
        runs = block.language in ("sh", "python")
        if kind == "needs" and runs:
            assert set(names.split(", ")) <= NEEDS, f"{page}: {block.marker}"
        if kind in ("needs", "run by"):
            for words in commands(block.text) if block.language == "sh" else ():
                check_keys(words)
                if words[:2] == ["crossmae-det", "benchmark"]:  # the options, not the numbers
                    assert exit_code([*words, "--repeats", "0"], monkeypatch) == 2
                    assert "repeats" in capfd.readouterr().err.splitlines()[-1]
        elif block.language == "sh":
            for words in commands(block.text):
                code = exit_code(words, monkeypatch)
                output = capfd.readouterr()
                expected = 2 if kind == "fails" else 0
                assert code == expected, f"{page}: {shlex.join(words)}\n{output.err[-3000:]}"
                if kind == "fails":
                    assert block.following.strip() in output.err
        elif block.language == "python":
            if name := re.match(r"# (\w+\.py)\n", block.text):
                Path(name[1]).write_text(block.text, encoding="utf-8")
            exec(compile(block.text, page, "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides_from_the_test(page):
    outside = BLOCK.sub("", (REPO / page).read_text(encoding="utf-8"))
    assert "```" not in outside, "a block is indented or has no end"
    assert not re.search(r"^ {4,}(python|crossmae-det|make|pip|export|torchrun) ", outside, re.M)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    text = (REPO / page).read_text(encoding="utf-8")
    for name in CONFIG_NAME.findall(text):
        get_config_file(name)
    for path in re.findall(r"`(?:python )?(\w+/[\w/.-]*?(?:\.py|\.png|/)?)`", text):
        if path.split("/")[0] in {*TOP_FOLDERS, *PACKAGES}:
            places = [REPO / folder / path for folder in ("", "crossmae_det", "configs")]
            assert any(place.exists() for place in places), f"{page}: {path}"
    # The pages of the API exist on the built site only.
    for target in re.findall(r"\]\(([^)#\s]+)", text) if page != "docs/api/index.md" else ():
        exists = ((REPO / page).parent / target).exists()
        assert "://" in target or exists, f"{page}: {target}"


LAZY_KEY = re.compile(r"`((?:model|dataloader|optimizer|lr_multiplier|train)(?:\.\w+)+)[`=]")
YAML_KEY = re.compile(r"`((?:MODEL|INPUT|DATASETS|DATALOADER|SOLVER|TEST)(?:\.[A-Z_]+)+)[`= ]")


@pytest.mark.parametrize("page", PAGES)
def test_keys_exist(page):
    text = (REPO / page).read_text(encoding="utf-8")
    keys = {key for key in LAZY_KEY.findall(text) if not re.search(r"\.(py|json|sbatch)$", key)}
    configs = [get_config(f"{name}.py") for name in KEYS_OF] if keys else []
    for key in keys:
        if all(OmegaConf.select(c, key, default="?") == "?" for c in configs):
            errors = []
            for config in configs:
                try:  # also arguments that a config does not list
                    apply_overrides(config, [f"{key}=${{train.seed}}"])
                except ValueError as error:
                    errors.append(error)
            assert len(errors) < len(configs), f"{page}: {errors}"
    yaml = default_config()
    for key in YAML_KEY.findall(text):
        assert attrgetter(key)(yaml) is not Ellipsis  # raises for an unknown key


def test_the_architecture_enters_no_package_twice():
    text = (REPO / "docs/architecture.md").read_text(encoding="utf-8")
    walks = re.split(r"^## A .*image$", text.partition("## Contracts")[0], flags=re.M)[1:]
    assert len(walks) == 2
    for walk in walks:
        packages = [name for name, _ in groupby(re.findall(r"^\| `(\w+)/", walk, re.M))]
        assert len(packages) == len(set(packages)), packages


def test_contributing_states_the_import_rule_of_the_test():
    rule = runpy.run_path(str(REPO / "tests/test_imports.py"))
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    packages = (", ".join(names) for names in rule["ORDER"])
    order = " < ".join(f"{{{names}}}" if "," in names else names for names in packages)
    assert order in re.sub(r"\s+", " ", text)
    *names, last = (f"`{name}`" for name in rule["WITHOUT_DETECTRON2"])
    assert f"{', '.join(names)} and {last} import without detectron2" in text
