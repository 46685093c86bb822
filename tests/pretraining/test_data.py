"""Sets of images, crops and the loader of pretraining."""

import io
import json
import logging
import math
import random
import tarfile

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from webdataset import TarWriter

from crossmae_det.pretraining import build_pretraining_loader, data, images
from crossmae_det.pretraining.data import RandomCrops, load_images, random_crop, resize
from crossmae_det.pretraining.images import ShardedImages, StoredImage, find_images
from crossmae_det.sampling import UndecodableImageError

COUNT = 7


def photo(height, width, seed=0, finest=128):
    """(height, width, 3) uint8: smooth, with detail at several scales, as photographs have it."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for cells in (cells for cells in (4, 16, 64, 128) if cells <= finest):
        noise = rng.uniform(-1, 1, (cells, cells, 3)) * 2 / math.sqrt(cells)
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return (127.5 + 100 * np.clip(image, -1.25, 1.25)).astype(np.uint8)


def encode(pixels, file_format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def shade(index):
    """Image ``index`` of a set is all of one shade, by which a crop of it is known."""
    return 30 * index


@pytest.fixture
def folder(tmp_path):
    """COUNT images in one folder, 0.png to 6.png."""
    path = tmp_path / "flat"
    path.mkdir()
    for index in range(COUNT):
        (path / f"{index}.png").write_bytes(encode(np.full((9, 12, 3), shade(index), np.uint8)))
    return path


def write_shard(path, names):
    with TarWriter(str(path)) as shard:
        for name in names:
            pixels = np.full((9, 12, 3), shade(int(name)), np.uint8)
            shard.write({"__key__": name, "png": encode(pixels), "cls": int(name)})


@pytest.fixture
def shards(tmp_path):
    """The same images in three tar shards: 0 1, 2 3 4 and 5 6."""
    path = tmp_path / "shards"
    path.mkdir()
    for number, names in enumerate(("01", "234", "56")):
        write_shard(path / f"set-{number}.tar", names)
    return path


def loader(dataset, **options):
    options = {"image_size": 16, "total_batch_size": 4, "num_workers": 0} | options
    return build_pretraining_loader(str(dataset), **options)


def take(iterable, count):
    iterator = iter(iterable)
    return [next(iterator) for _ in range(count)]


def shown(batches):
    """Indices of the images that crops of one shade are from."""
    return [int(crop.float().mean()) // 30 for batch in batches for crop in batch]


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# Sets of images


def names(dataset, root):
    return [str(image).removeprefix(f"{root}/") for image in find_images(str(dataset))]


def test_a_folder_is_searched_at_any_depth(tmp_path):
    files = ["b.JPEG", "a.png", "train/cat/2.webp", "train/cat/1.jpg", "train/dog/deep/1.tiff"]
    others = [".hidden.png", "._a.png", ".git/c.png", "readme.txt", "train/cat/labels.json"]
    for name in files + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert names(tmp_path, tmp_path) == [
        "a.png",
        "b.JPEG",
        "train/cat/1.jpg",
        "train/cat/2.webp",
        "train/dog/deep/1.tiff",
    ]


def test_a_list_is_relative_to_its_own_folder(tmp_path, folder, monkeypatch):
    monkeypatch.chdir("/")
    listed = tmp_path / "listed.txt"
    listed.write_text(f"flat/3.png\n\n  flat/1.png \n{folder}/6.png\n")
    assert names(listed, folder) == ["3.png", "1.png", "6.png"]


def test_the_images_of_a_coco_json(tmp_path, folder):
    path = tmp_path / "with:colon.json"
    entries = [{"id": 9, "file_name": "4.png"}, {"id": 1, "file_name": "0.png"}]
    path.write_text(json.dumps({"images": entries}))
    assert names(f"{path}:{folder}", folder) == ["4.png", "0.png"]


@pytest.mark.parametrize(
    "pattern", ["set-{0..2}.tar", "set-*.tar", "set-{0,1}.tar::{root}/set-2.tar"]
)
def test_tar_shards_by_pattern(shards, pattern):
    dataset = f"{shards}/{pattern.replace('{root}', str(shards))}"
    assert names(dataset, shards) == [
        *("set-0.tar/0.png", "set-0.tar/1.png"),
        *("set-1.tar/2.png", "set-1.tar/3.png", "set-1.tar/4.png"),
        *("set-2.tar/5.png", "set-2.tar/6.png"),
    ]
    for index, image in enumerate(find_images(dataset)):
        assert image.read() == encode(np.full((9, 12, 3), shade(index), np.uint8))


def test_only_images_are_taken_from_a_shard(tmp_path):
    with TarWriter(str(tmp_path / "a.tar")) as shard:
        shard.write({"__key__": "n1.5/x", "JPG": b"1", "txt": b"a", "seg.png": b"b", "json": b"{}"})
        shard.write({"__key__": "x" * 90 + "/" + "y" * 90, "jpeg": b"22"})
    found = list(find_images(f"{tmp_path}/a.tar"))
    assert [(image.member, image.read()) for image in found] == [
        ("n1.5/x.JPG", b"1"),
        ("x" * 90 + "/" + "y" * 90 + ".jpeg", b"22"),
    ]


def test_an_epoch_of_shards_reads_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "SHARDS_AT_A_TIME", 2)
    for number in range(5):
        write_shard(tmp_path / f"{number}.tar", "0123"[: number + 1] if number else "0")
    dataset = find_images(f"{tmp_path}/*.tar")
    assert isinstance(dataset, ShardedImages)
    orders = [dataset.permutation(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert orders[0].tolist() != orders[2].tolist()
    for order in orders:
        assert sorted(order) == list(range(len(dataset)))
        read = [dataset[index].path for index in order]
        groups, rest = [], read
        while rest:  # as many images as two shards have come from those two
            first = list(dict.fromkeys(rest))[:2]
            size = sum(read.count(shard) for shard in first)
            groups.append(set(rest[:size]))
            rest = rest[size:]
        assert [len(group) for group in groups] == [2, 2, 1]
    mixed = [[dataset[index].path for index in order] for order in orders]
    assert any(paths != sorted(paths, key=paths.index) for paths in mixed)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("nowhere", None, FileNotFoundError, "nowhere: no such folder or list"),
        ("empty", "", ValueError, "empty: there is no image"),
        ("empty.txt", "", ValueError, "empty.txt: there is no image"),
        ("wrong.txt", "a/b.jpg", FileNotFoundError, "a/b.jpg: no such image, though .*wrong.txt"),
        ("binary.txt", b"\xff\xfe", ValueError, "binary.txt: not a list of images"),
        ("a.json", "{}", ValueError, r"add the image folder, as in .*a.json:FOLDER"),
        ("a.json:.", "{}", ValueError, "a.json: not a COCO json"),
        ("a.json:.", '{"images": [{"file_name": "0.jpg"}]}', FileNotFoundError, "0.jpg: no such"),
        ("a.json:none", "{}", FileNotFoundError, "none: no such image folder"),
        ("b.json:.", None, FileNotFoundError, "b.json"),
        ("{0..1}.tar", None, FileNotFoundError, "0.tar: no such tar shard"),
        ("a.tar", "no tar", ValueError, "a.tar: not a whole, uncompressed tar file"),
    ],
)
def test_a_set_that_is_none_is_named_in_one_line(tmp_path, name, content, error, message):
    path = tmp_path / name.partition(":")[0]
    if name == "empty":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    dataset = str(path)
    if ":" in name:
        dataset += f":{tmp_path / name.partition(':')[2]}"
    with pytest.raises(error, match=message) as raised:
        find_images(dataset)
    assert "\n" not in str(raised.value)


def test_a_compressed_or_cut_shard_is_refused(tmp_path, shards):
    whole = (shards / "set-1.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1500])
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as shard:
        shard.add(shards / "set-0.tar", "0.jpg")
    for name in ("cut.tar", "gz.tar"):
        with pytest.raises(ValueError, match=f"{name}: not a whole, uncompressed tar file"):
            find_images(str(tmp_path / name))


# Crops


def test_crops_are_drawn_as_torchvision_draws_them():
    height, width, scale, count = 300, 480, (0.2, 1.0), 3000
    torch.manual_seed(0)
    expected = [
        RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), [3 / 4, 4 / 3])
        for _ in range(count)
    ]
    drawn = [random_crop(height, width, scale, random.Random(seed)) for seed in range(count)]
    for boxes in (np.array(drawn), np.array(expected)):
        top, left, crop_h, crop_w = boxes.T
        assert top.min() == left.min() == 0
        assert (top + crop_h).max() == height and (left + crop_w).max() <= width
    # The mean of 3000 crops: within 2 % of the image's side.
    np.testing.assert_allclose(np.mean(drawn, 0), np.mean(expected, 0), atol=0.02 * height)
    np.testing.assert_allclose(np.std(drawn, 0), np.std(expected, 0), atol=0.02 * height)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (1, 50, (0, 24, 1, 1))],
)
def test_a_long_thin_image_gives_its_centre(height, width, box):
    assert random_crop(height, width, (0.9, 1.0), random.Random(0)) == box


@pytest.mark.parametrize("size", [(60, 80), (144, 150), (190, 130), (250, 200), (640, 800)])
def test_resizing_is_close_to_pillow(size):
    pixels = photo(*size)
    expected = np.asarray(Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC))
    result = resize(pixels, 128, 128)
    assert result.shape == expected.shape
    error = np.mean((result.astype(float) - expected) ** 2)
    assert 10 * math.log10(255**2 / error) > 44


def box_of(entropy, height, width, scale=(0.2, 1.0)):
    return random_crop(height, width, scale, random.Random(" ".join(map(str, entropy))))


@pytest.mark.parametrize(
    ("image_size", "reduction"), [(96, 1), (64, 2), (32, 4), (16, 8), ((32, 64), 2)]
)
def test_a_crop_is_what_pillow_makes_of_the_same_box(tmp_path, monkeypatch, image_size, reduction):
    pixels = photo(210, 260, finest=4)  # the box is rounded to pixels that were decoded
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode(pixels, "JPEG", quality=95, subsampling=0))
    asked = []
    decode = data.decode
    monkeypatch.setattr(data, "decode", lambda *args: asked.append(args[1]) or decode(*args))
    crops = RandomCrops(image_size, scale=(0.5, 0.6), flip=False)
    top, left, crop_h, crop_w = box_of([3, 1], 210, 260, (0.5, 0.6))
    crop = crops(StoredImage(str(path)), [3, 1])
    assert (crop.dtype, tuple(crop.shape)) == (torch.uint8, (3, crops.height, crops.width))
    assert crop.is_contiguous()
    assert asked == [reduction]
    part = Image.open(path).crop((left, top, left + crop_w, top + crop_h))
    expected = np.asarray(part.resize((crops.width, crops.height), Image.Resampling.BICUBIC))
    error = np.mean((crop.permute(1, 2, 0).numpy().astype(float) - expected) ** 2)
    assert 10 * math.log10(255**2 / error) > 30
    other = np.roll(expected, 2, axis=1)
    assert error < 0.5 * np.mean((other.astype(float) - expected) ** 2)


def test_half_of_the_crops_are_flipped(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    path = tmp_path / "half.png"
    path.write_bytes(encode(pixels))
    for flip, expected in ((True, range(30, 71)), (False, range(0, 1))):
        crops = RandomCrops(8, (1.0, 1.0), flip)
        made = [crops(StoredImage(str(path)), [number]) for number in range(100)]
        assert sum(crop[0, 0, 0].item() > 128 for crop in made) in expected


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("L", "PNG")]
    + [("RGB", "WEBP"), ("RGB", "BMP"), ("RGB", "TIFF"), ("1", "PNG"), ("RGB", "MPO")],
)
def test_any_format_and_mode_comes_as_rgb(tmp_path, mode, file_format):
    pixels = np.full((20, 30, 3), (200, 80, 20), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    path = tmp_path / "image"
    image.save(path, file_format)
    crop = RandomCrops(8)(StoredImage(str(path)), [0])
    expected = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0)
    np.testing.assert_allclose(crop.float().mean((1, 2)), expected, atol=3)


def test_an_image_smaller_than_the_crop_is_enlarged(tmp_path):
    path = tmp_path / "small.png"
    path.write_bytes(encode(photo(5, 3)))
    assert RandomCrops((48, 32))(StoredImage(str(path)), [0]).shape == (3, 48, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_scale": (0.2, 1.5)}, "crop_scale"),
        ({"total_batch_size": 0}, "total_batch_size=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_arguments_out_of_range_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        loader(folder, **options)


# The loader


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_every_epoch_shows_every_image_once(folder, shards, kind):
    dataset = folder if kind == "files" else f"{shards}/*.tar"
    run = loader(dataset, total_batch_size=3, seed=4)
    batches = take(run, 7)
    assert all(batch.dtype == torch.uint8 and batch.shape == (3, 3, 16, 16) for batch in batches)
    order = shown(batches)
    epochs = [order[start : start + COUNT] for start in range(0, 3 * COUNT, COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert shown(take(loader(dataset, total_batch_size=3, seed=5), 7)) != order


@pytest.fixture
def photos(tmp_path):
    """Five images, so large that every crop is another."""
    path = tmp_path / "photos"
    path.mkdir()
    for index in range(5):
        (path / f"{index}.jpg").write_bytes(encode(photo(80, 100, index), "JPEG"))
    return path


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_sees_the_same_batches(photos, num_workers):
    expected = torch.stack(take(loader(photos, seed=1), 5))
    assert len(expected.flatten(0, 1).flatten(1).unique(dim=0)) == 20  # no two crops are the same
    run = loader(photos, seed=1, num_workers=num_workers)
    assert torch.equal(torch.stack(take(run, 2)), expected[:2])
    run.start_at(3)
    assert torch.equal(torch.stack(take(run, 2)), expected[3:])
    assert not torch.equal(torch.stack(take(loader(photos, seed=2), 5)), expected)


def test_a_resumed_run_on_shards_sees_the_same_batches(tmp_path, photos):
    for number in range(2):
        with TarWriter(str(tmp_path / f"{number}.tar")) as shard:
            for index in range(number, 5, 2):
                shard.write({"__key__": str(index), "jpg": (photos / f"{index}.jpg").read_bytes()})
    dataset = f"{tmp_path}/{{0..1}}.tar"
    expected = torch.stack(take(loader(dataset), 5))
    for num_workers in (0, 1):
        run = loader(dataset, num_workers=num_workers)
        run.start_at(2)
        assert torch.equal(torch.stack(take(run, 3)), expected[2:])


def test_processes_share_the_batch_of_one(photos, monkeypatch):
    expected = torch.stack(take(loader(photos), 3))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(torch.stack(take(loader(photos), 3)))
    assert torch.equal(torch.cat(parts, dim=1), expected)
    with pytest.raises(ValueError, match="total_batch_size=3: .* processes \\(2\\)"):
        loader(photos, total_batch_size=3)


def test_global_generators_are_left_alone(photos):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    take(loader(photos), 2)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


# Bad images


def damage(path, kind):
    if kind == "cut JPEG":
        whole = encode(photo(40, 50), "JPEG")
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif kind == "cut PNG":
        whole = encode(photo(40, 50))
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif kind == "text":
        path.write_text("no image")
    elif kind == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize("kind", ["cut JPEG", "cut PNG", "text", "empty", "absent"])
def test_a_bad_image_is_named_in_one_line(tmp_path, monkeypatch, kind):
    damage(tmp_path / "bad.jpg", kind)
    # What OpenCV 4 makes of a JPEG that was cut short; OpenCV 5 refuses it.
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.full((40, 50, 3), 128, np.uint8))
    with pytest.raises(UndecodableImageError) as error:
        RandomCrops(8)(StoredImage(str(tmp_path / "bad.jpg")), [0])
    assert one_line(error).startswith(f"{tmp_path}/bad.jpg: the image cannot be decoded (")


def test_what_follows_the_end_of_a_jpeg_does_no_harm(tmp_path):
    pixels = np.full((20, 30, 3), 77, np.uint8)
    (tmp_path / "a.jpg").write_bytes(encode(pixels, "JPEG") + b"\0\0 something else")
    assert RandomCrops(8)(StoredImage(str(tmp_path / "a.jpg")), [0]).float().mean() == 77


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_images_are_skipped_counted_and_named_once(folder, caplog, num_workers):
    plain = take(loader(folder, total_batch_size=COUNT), 3)
    damage(folder / "2.png", "cut PNG")
    damage(folder / "5.png", "text")
    run = loader(folder, total_batch_size=COUNT, num_workers=num_workers)
    with caplog.at_level(logging.WARNING, "crossmae_det"):
        batches = take(run, 3)
    bad = {f"{folder}/2.png", f"{folder}/5.png"}
    assert run.skipped.keys() == bad
    assert all(run.skipped[name] >= 3 for name in bad)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2 and all(any(name in m for m in messages) for name in bad)
    assert "(2 images so far)" in messages[1]
    for before, after in zip(shown(plain), shown(batches), strict=True):
        # The others keep their places.
        assert after not in (2, 5) if before in (2, 5) else after == before


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_but_bad_images_ends_in_one_line(folder, num_workers):
    for path in folder.iterdir():
        damage(path, "text")
    with pytest.raises(ValueError) as error:
        take(loader(folder, num_workers=num_workers), 1)
    assert ".png: none of 10 images drawn could be decoded; check the data" in one_line(error)


def test_a_look_at_a_set_takes_images_from_all_over_it(tmp_path):
    for index in range(9):
        Image.fromarray(np.full((20, 40, 3), 20 * index, np.uint8)).save(tmp_path / f"{index}.png")
    images = load_images(str(tmp_path), 8, 3)
    assert images.shape == (3, 3, 8, 8)
    assert images[:, 0, 0, 0].tolist() == [0, 80, 160]
    assert len(load_images(str(tmp_path), 8, 20)) == 9
    (tmp_path / "4.png").write_bytes(b"no image")
    assert load_images(str(tmp_path), 8, 3)[:, 0, 0, 0].tolist() == [0, 160]
    with pytest.raises(ValueError, match=r"4\.png: none of the images looked at can be decoded"):
        load_images(str(tmp_path / "4.png"), 8, 3)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        load_images(str(tmp_path), 8, 0)


def test_an_image_is_looked_at_in_its_middle(tmp_path):
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, 15:45] = 200  # the central square
    Image.fromarray(pixels).save(tmp_path / "one.png")
    (image,) = load_images(str(tmp_path / "one.png"), 30, 1)
    assert (image == 200).all()
    wide = load_images(str(tmp_path / "one.png"), (10, 20), 1)
    assert wide.shape == (1, 3, 10, 20) and (wide == 0).any()
