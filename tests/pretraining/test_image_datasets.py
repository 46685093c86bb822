"""Image datasets, each named by one string."""

import json
import tarfile

import numpy as np
import pytest
from image_files import encode, shade, write_shard, write_tar

from crossmae_det.pretraining import image_datasets
from crossmae_det.pretraining.image_datasets import ShardedImages, find_images


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
    images = {"n1.5/x.JPG": b"1", "x" * 90 + "/" + "y" * 90 + ".jpeg": b"22"}
    others = {"n1.5/x.seg.png": b"b", "n1.5/x.txt": b"a", "n1.5/.png": b"c", "n1.5/png": b"d"}
    write_tar(tmp_path / "a.tar", others | images)
    found = find_images(f"{tmp_path}/a.tar")
    assert {image.member: image.read() for image in found} == images


def test_an_epoch_of_shards_reads_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(image_datasets, "SHARDS_AT_A_TIME", 2)
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
        ("nowhere", None, FileNotFoundError, "nowhere"),
        ("empty", "", ValueError, "empty: "),
        ("empty.txt", "", ValueError, "empty.txt: "),
        ("wrong.txt", "a/b.jpg", FileNotFoundError, "a/b.jpg: .*wrong.txt"),
        ("binary.txt", b"\xff\xfe", ValueError, "binary.txt: "),
        ("a.json", "{}", ValueError, "a.json:FOLDER"),
        ("a.json:.", "{}", ValueError, "a.json: "),
        ("a.json:.", '{"images": [{"file_name": "0.jpg"}]}', FileNotFoundError, "0.jpg: "),
        ("a.json:none", "{}", FileNotFoundError, "none: "),
        ("b.json:.", None, FileNotFoundError, "b.json"),
        ("{0..1}.tar", None, FileNotFoundError, "0.tar: "),
        ("a.tar", "no tar", ValueError, "a.tar: .*tar file"),
    ],
)
def test_a_bad_dataset_is_named_in_one_line(tmp_path, name, content, error, message):
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


def test_a_compressed_or_cut_shard_is_rejected(tmp_path, shards):
    whole = (shards / "set-1.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1000])
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as shard:
        shard.add(shards / "set-0.tar", "0.jpg")
    for name in ("cut.tar", "gz.tar"):
        with pytest.raises(ValueError, match=f"{name}: .*tar file"):
            find_images(str(tmp_path / name))
