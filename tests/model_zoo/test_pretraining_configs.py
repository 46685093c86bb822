import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import OmegaConf
from PIL import Image

from crossmae_det.detection import shapes
from crossmae_det.engine.train import build_optimizer
from crossmae_det.engine.trainer import Trainer
from crossmae_det.model_zoo import get_config
from crossmae_det.model_zoo.resolvers import image_set
from crossmae_det.model_zoo.zoo import CHECKOUT_CONFIGS
from crossmae_det.modeling import SIZES
from crossmae_det.pretraining import MAE, CrossMAE, find_images

CONFIGS = sorted(
    p.relative_to(CHECKOUT_CONFIGS).as_posix() for p in CHECKOUT_CONFIGS.glob("pretraining/*.py")
)
DEMO = ["demo/pretrain.py", "demo/pretrain_cifar10.py", "demo/pretrain_cifar10_mae.py"]
LETTERS = {name[0]: name for name in ("small", "base", "large", "huge")}
B_800 = "pretraining/crossmae_vit_b_800ep.py"
IMAGENET = 1_281_167


@pytest.fixture(autouse=True)
def _no_imagenet(tmp_path, monkeypatch):
    """Use the published number of images, whatever the data folder of this machine holds."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "none"))


@pytest.fixture
def folder(tmp_path):
    """Ten small photographs of noise in two class folders."""
    rng = np.random.default_rng(0)
    for index in range(10):
        path = tmp_path / "images" / f"class_{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return tmp_path / "images"


def read(name):
    """What the name of a config says: (method, size, image size, ratio, epochs)."""
    parts = name.removeprefix("pretraining/").removesuffix(".py").split("_")
    ratio = 0.75 if parts[0] == "mae" or parts[-1] == "pred75" else 0.25
    (epochs,) = (int(part.removesuffix("ep")) for part in parts if part.endswith("ep"))
    return parts[0], LETTERS[parts[2]], 448 if "448" in parts else 224, ratio, epochs


def test_every_published_model_has_a_config():
    published = {("crossmae", size, 224, 0.25, 800) for size in LETTERS.values()}
    published |= {("crossmae", size, 224, 0.75, 800) for size in ("small", "base", "large")}
    published |= {("mae", size, 224, 0.75, 800) for size in ("small", "base", "large")}
    published |= {("crossmae", "base", 448, 0.25, epochs) for epochs in (400, 800)}
    # The weights that MAE's authors published are of twice as long a schedule.
    published |= {("mae", size, 224, 0.75, 1600) for size in ("base", "large", "huge")}
    assert sorted(map(read, CONFIGS)) == sorted(published)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_at_its_size_with_the_published_recipe(name):
    method, size_name, side, ratio, epochs = read(name)
    cfg = get_config(name)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    encoder, decoder, size = model.encoder, model.decoder, SIZES[size_name]
    assert type(model) is (MAE if method == "mae" else CrossMAE)
    assert (encoder.embed_dim, len(encoder.blocks)) == (size.embed_dim, size.depth)
    assert encoder.blocks[0].attn.num_heads == size.num_heads
    patch = 14 if size_name == "huge" else 16
    assert encoder.patch_size == (patch, patch)
    assert encoder.pos_grid == (side // patch, side // patch)
    small = size_name == "small"
    assert decoder.mask_token.shape[-1] == (256 if small else 512)
    assert len(decoder.blocks) == (8 if method == "mae" else 12)
    block = decoder.blocks[0]
    heads = block.attn.num_heads if method == "mae" else block.cross_attn.num_heads
    assert heads == (8 if small else 16)
    if method == "crossmae":
        assert decoder.feature_weights.shape == (12, size.depth + 1)
    assert (model.mask_ratio, model.prediction_ratio) == (0.75, ratio)
    assert model.norm_pix_loss

    # 800 epochs x 1,281,167 images / 4096 = 250,227.9
    iterations = {400: 125_114, 800: 250_228, 1600: 500_456}[epochs]
    assert cfg.train.max_iter == iterations == round(epochs * IMAGENET / 4096)
    # 40 epochs of warm-up; for 400 the paper has 20.
    assert cfg.lr_multiplier.warmup_length * epochs == (20 if epochs == 400 else 40)
    # 1.5e-4 x 4096 / 256 x prediction ratio / mask ratio
    assert cfg.optimizer.lr == pytest.approx({0.25: 8e-4, 0.75: 2.4e-3}[ratio])
    assert (list(cfg.optimizer.betas), cfg.optimizer.weight_decay) == ([0.9, 0.95], 0.05)
    train = cfg.dataloader.train
    assert (train.image_size, train.total_batch_size, train.flip) == (side, 4096, True)
    assert list(train.crop_scale) == [0.2, 1.0]
    assert train.dataset.name == "imagenet_train"


def test_the_schedule_is_a_warmup_of_40_epochs_and_half_a_cosine():
    schedule = instantiate(get_config(B_800).lr_multiplier)
    assert schedule(20 / 800) == pytest.approx(0.5, abs=1e-3)
    for epoch in (40, 100, 420, 700, 799.999):
        expected = 0.5 * (1 + math.cos(math.pi * (epoch - 40) / 760))
        assert schedule(epoch / 800) == pytest.approx(expected, abs=1e-6)


def test_values_follow_the_keys_they_depend_on(folder):
    def resolved(*overrides):
        cfg = get_config(B_800, overrides)
        OmegaConf.resolve(cfg)
        return cfg

    cfg = resolved("dataloader.train.total_batch_size=1024", "train.epochs=400")
    assert cfg.train.max_iter == round(400 * IMAGENET / 1024) == 500_456
    assert cfg.train.checkpointer.period == 500_456 // 20
    assert cfg.optimizer.lr == pytest.approx(2e-4)
    assert resolved("model.prediction_ratio=0.5").optimizer.lr == pytest.approx(1.6e-3)
    assert resolved("model.mask_ratio=0.5").optimizer.lr == pytest.approx(1.2e-3)
    assert resolved("optimizer.weight_decay=0.1").optimizer.params.weight_decay == 0.1

    cfg = resolved("dataloader.image_size=64", "model.encoder.size=tiny")
    assert cfg.dataloader.train.image_size == 64
    with torch.device("meta"):
        model = instantiate(cfg.model)
    assert model.encoder.pos_grid == (4, 4) and model.encoder.embed_dim == 192

    name = f"dataloader.train.dataset.name='{folder}'"
    cfg = resolved(name, "dataloader.train.total_batch_size=4")
    assert cfg.train.max_iter == 2000  # 800 epochs x 10 images / 4
    assert len(find_images(instantiate(cfg.dataloader.train.dataset))) == 10


def test_datasets_by_name(folder, tmp_path, monkeypatch, tiny_sets):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "imagenet").mkdir()
    folder.rename(tmp_path / "imagenet" / "train")
    assert len(find_images(image_set("imagenet_train"))) == 10
    # Where the images are, they are counted.
    cfg = get_config(B_800, ["dataloader.train.total_batch_size=10"])
    assert cfg.train.max_iter == 800
    assert image_set(tiny_sets[0]) == tiny_sets[0]
    assert len(find_images(tiny_sets[0])) == 8
    assert image_set("set/{0..3}.tar") == "set/{0..3}.tar"


def test_the_built_in_set_is_written_on_first_use(tmp_path):
    usual = Path(MetadataCatalog.get("shapes_train").image_root).parents[1]
    try:
        shapes.register(tmp_path, num_train=3, num_val=1, image_size=32)
        found = find_images(image_set("shapes_train"))
        assert [image.path[-10:] for image in found] == ["000001.jpg", "000002.jpg", "000003.jpg"]
        assert len(find_images(image_set("shapes_val"))) == 1
    finally:
        shapes.register(usual)


def test_a_registered_set_without_images_is_rejected(monkeypatch):
    monkeypatch.setitem(DatasetCatalog.data, "no_images", list)
    with pytest.raises(ValueError, match="'no_images'"):
        image_set("no_images")


def tiny(folder, *overrides, batch_size=4):
    return [
        f"dataloader.train.dataset.name='{folder}'",
        f"dataloader.train.total_batch_size={batch_size}",
        "dataloader.train.num_workers=0",
        "train.max_iter=4",
        "model.encoder.embed_dim=32",
        "model.encoder.depth=2",
        "model.encoder.num_heads=2",
        "model.decoder_dim=16",
        "model.decoder_depth=2",
        "model.decoder_num_heads=2",
        "optimizer.lr=0.01",
        *overrides,
    ]


def build(cfg):
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    trainer = Trainer(
        model,
        instantiate(cfg.dataloader.train),
        build_optimizer(cfg.optimizer, model),
        amp_dtype="bf16",
    )
    return trainer, model


@pytest.mark.parametrize("name", CONFIGS + DEMO)
def test_every_config_trains_two_iterations(name, folder):
    # All that the config sets, but a small width and depth.
    cfg = get_config(name, tiny(folder))
    OmegaConf.resolve(cfg)
    trainer, model = build(cfg)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.train(0, 2)
    loss = trainer.storage.latest()["total_loss"][0]
    assert 0.3 < loss < 3  # of normalized patches, a guess of 0 has 1
    changed = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    assert before.keys() - changed == {"encoder.pos_embed", "decoder.pos_embed"}


def test_a_resumed_run_is_bit_identical(folder):
    cfg = get_config(B_800, tiny(folder, "dataloader.image_size=32"))
    OmegaConf.resolve(cfg)

    whole, model = build(cfg)
    whole.train(0, 4)
    first, half_model = build(cfg)
    first.train(0, 2)
    second, resumed_model = build(cfg)
    resumed_model.load_state_dict(half_model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.train(2, 4)
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed_model.state_dict()[key]), key
    assert not torch.equal(
        model.encoder.blocks[0].mlp.fc1.weight, half_model.encoder.blocks[0].mlp.fc1.weight
    )
