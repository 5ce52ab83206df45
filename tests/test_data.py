"""Data sets as their files are, long-tailed subsets, samplers, views and patches."""

import gzip
import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import zipfile

import build_fashion_mnist_lt
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from benchmark import photograph
from conftest import TREE_COUNTS
from PIL import Image
from torchvision import transforms

import data
from data import (
    DATASETS,
    BadInput,
    Batches,
    Draws,
    change_colors,
    color_matrices,
    crop,
    key_view,
    load_dataset,
    long_tailed_counts,
    long_tailed_indices,
    query_views,
    random_blur,
    random_boxes,
    recipe_of,
    shot_groups,
)

COUNTS = [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]
RECIPE = DATASETS["fashion_mnist_lt"] | dict(view_size=20, patch_size=8, patch_scale=(0.05, 0.6))


@pytest.fixture(scope="module")
def sets():
    return load_dataset("fashion_mnist_lt")


def test_long_tailed_counts_are_the_fields_formula():
    assert long_tailed_counts(1000, 10, 1 / 100) == COUNTS
    cifar100 = long_tailed_counts(500, 100, 1 / 100)
    assert (cifar100[0], cifar100[-1], sum(cifar100)) == (500, 5, 10847)  # CIFAR-100-LT, factor 100
    assert sum(long_tailed_counts(5000, 10, 1 / 100)) == 12406  # CIFAR-10-LT, factor 100


def test_long_tailed_indices_are_disjoint_of_their_class_and_the_same_every_time():
    labels = np.arange(300) % 3
    chosen, unused = long_tailed_indices(labels, [50, 20, 5])
    again, _ = long_tailed_indices(labels, [50, 20, 5])
    for label, (indices, rest) in enumerate(zip(chosen, unused)):
        assert (labels[indices] == label).all() and (indices == again[label]).all()
        assert sorted([*indices, *rest]) == np.flatnonzero(labels == label).tolist()
    assert [len(indices) for indices in chosen] == [50, 20, 5]


def test_shot_groups_end_at_100_and_20():
    groups = shot_groups([1000, 101, 100, 20, 19, 0])
    assert {name: mask.nonzero()[:, 0].tolist() for name, mask in groups.items()} == {
        "many": [0, 1],
        "medium": [2, 3],
        "few": [4, 5],
    }


def test_the_shipped_data_set_is_the_one_described(sets):
    assert sets["train"].labels.bincount().tolist() == COUNTS
    assert sets["val"].labels.bincount().tolist() == [100] * 10
    assert sets["test"].labels.bincount().tolist() == [1000] * 10
    assert {name: mask.sum().item() for name, mask in shot_groups(COUNTS).items()} == {
        "many": 5,
        "medium": 3,
        "few": 2,
    }
    for pictures in sets.values():
        assert pictures.images.shape == (len(pictures), 1, 28, 28)
        assert pictures.images.dtype == torch.uint8
    # Every class has pictures of its own: the class means differ by far more than noise.
    means = torch.stack(
        [sets["test"].images[sets["test"].labels == c].float().mean(0) for c in range(10)]
    )
    for name in ("train", "val"):
        for label in range(10):
            mine = sets[name].images[sets[name].labels == label].float().mean(0)
            assert (means - mine).flatten(1).norm(dim=1).argmin() == label


def test_no_picture_stands_in_two_splits(sets):
    def bytes_of(pictures):
        return {image.numpy().tobytes() for image in pictures.images}

    assert not bytes_of(sets["train"]) & bytes_of(sets["val"])
    assert len(bytes_of(sets["train"])) == len(sets["train"])


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(BadInput, match="fashion_mnist_lt.npz not found"):
        load_dataset("fashion_mnist_lt", tmp_path)
    whole = (data.HERE / "tests" / "fashion_mnist_lt.npz").read_bytes()
    for content in (b"", b"no zip", whole[: len(whole) // 2]):
        (tmp_path / "fashion_mnist_lt.npz").write_bytes(content)
        with pytest.raises(BadInput, match="fashion_mnist_lt.npz cannot be read"):
            load_dataset("fashion_mnist_lt", tmp_path)


def test_the_build_script_gives_the_same_bytes_every_time(tmp_path):
    random = np.random.default_rng(0)
    for name, size in (("train", 12000), ("t10k", 100)):
        arrays = {
            f"{name}-images-idx3-ubyte.gz": random.integers(256, size=(size, 28, 28)),
            f"{name}-labels-idx1-ubyte.gz": np.arange(size) % 10,
        }
        for file, array in arrays.items():
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            content = header + array.astype(np.uint8).tobytes()
            (tmp_path / file).write_bytes(gzip.compress(content, compresslevel=1))
    for target in ("a.npz", "b.npz"):
        build_fashion_mnist_lt.main(tmp_path, tmp_path / target)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:  # no clock in the file
        assert {info.date_time[0] for info in archive.infolist()} == {1980}
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.bincount(arrays["train_labels"]).tolist() == COUNTS
        assert np.bincount(arrays["val_labels"]).tolist() == [100] * 10
        assert len(arrays["test_images"]) == 100


# ------------------------------------------------------------- index files, CIFAR, folders, files


def labels_of(sets):
    return {split: pictures.labels.bincount().tolist() for split, pictures in sets.items()}


def test_an_index_gives_its_paths_and_labels_as_arrays(imagenet_tree):
    sets = load_dataset("imagenet_lt", imagenet_tree)
    assert labels_of(sets) == TREE_COUNTS
    train = sets["train"]
    assert train.path(24) == imagenet_tree / "train" / "n00000001" / "train_0.JPEG"
    assert train.labels[24] == 1
    # No Python object a line: what every worker would copy by counting references.
    assert train.paths.dtype.kind == "S" and train.labels.dtype == torch.int64


def test_index_files_may_lie_elsewhere_and_have_blanks_in_their_paths(tmp_path, imagenet_tree):
    shutil.copytree(imagenet_tree / "train", tmp_path / "my train")
    for split in ("train", "val", "test"):
        lines = (imagenet_tree / f"ImageNet_LT_{split}.txt").read_text()
        (tmp_path / f"ImageNet_LT_{split}.txt").write_text(lines.replace("train/", "my train/"))
    shutil.copytree(imagenet_tree / "val", tmp_path / "val")
    assert labels_of(load_dataset("imagenet_lt", tmp_path, tmp_path)) == TREE_COUNTS
    with pytest.raises(BadInput, match="not found, the first picture of .*ImageNet_LT_train.txt"):
        load_dataset("imagenet_lt", imagenet_tree, tmp_path)


@pytest.mark.parametrize(
    "split, line, says",
    [
        ("train", "train/a.jpg", r"ImageNet_LT_train.txt:46: 'train/a.jpg' is not"),
        ("train", "train/a.jpg one", r"ImageNet_LT_train.txt:46: 'train/a.jpg one' is not"),
        ("val", "", r"ImageNet_LT_val.txt:9: '' is not"),
        ("train", "train/a.jpg -1", r"ImageNet_LT_train.txt:46: label -1 in a file of 46"),
        ("train", "train/a.jpg 99999999999", r"ImageNet_LT_train.txt:46: label 99999999999 in"),
        (
            "train",
            "train/a.jpg 6",
            r"ImageNet_LT_train.txt: no picture of class 4 and 1 more; every class",
        ),
        ("test", "val/a.jpg 4", r"ImageNet_LT_test.txt: label 4 is none of the training set's"),
        ("test", "../a.jpg 0", r"ImageNet_LT_test.txt:13: ../a.jpg leaves --data-root"),
        ("test", "val/../../a.jpg 0", r"ImageNet_LT_test.txt:13: val/../../a.jpg leaves"),
        ("test", "/etc/a.jpg 0", r"ImageNet_LT_test.txt:13: /etc/a.jpg leaves --data-root"),
    ],
)
def test_a_wrong_line_of_an_index_is_named(split, line, says, tmp_path, imagenet_tree):
    for name in TREE_COUNTS:
        shutil.copy(imagenet_tree / f"ImageNet_LT_{name}.txt", tmp_path)
    with open(tmp_path / f"ImageNet_LT_{split}.txt", "a") as file:
        file.write(line + "\n")
    with pytest.raises(BadInput, match=says):
        load_dataset("imagenet_lt", imagenet_tree, tmp_path)


def test_a_missing_or_empty_index_and_an_empty_class_are_named(tmp_path, imagenet_tree):
    with pytest.raises(BadInput, match=f"{tmp_path}/ImageNet_LT_train.txt not found.*github"):
        load_dataset("imagenet_lt", imagenet_tree, tmp_path)
    for split in ("val", "test"):
        for name in TREE_COUNTS:
            shutil.copy(imagenet_tree / f"ImageNet_LT_{name}.txt", tmp_path)
        index = tmp_path / f"ImageNet_LT_{split}.txt"
        index.write_text("".join(line for line in open(index) if not line.endswith(" 2\n")))
        with pytest.raises(BadInput, match=f"ImageNet_LT_{split}.txt: no picture of class 2; "):
            load_dataset("imagenet_lt", imagenet_tree, tmp_path)
        index.write_text("")
        with pytest.raises(BadInput, match=f"ImageNet_LT_{split}.txt is empty"):
            load_dataset("imagenet_lt", imagenet_tree, tmp_path)
    with pytest.raises(BadInput, match="needs --data-root"):
        load_dataset("imagenet_lt")
    with pytest.raises(BadInput, match="--imbalance is for CIFAR and Fashion-MNIST"):
        load_dataset("imagenet_lt", imagenet_tree, imbalance=10)


def test_inaturalists_own_annotations_give_what_the_index_gives(tmp_path):
    for split, counts in (("train", [3, 1]), ("val", [1, 1])):
        labels = np.repeat([0, 1], counts).tolist()
        names = [f"train_val2018/Aves/{c}/{split}{i}.jpg" for i, c in enumerate(labels)]
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name)
        lines = [f"{name} {label}\n" for name, label in zip(names, labels)]
        (tmp_path / f"iNaturalist18_{split}.txt").write_text("".join(lines))
        annotations = dict(
            images=[dict(id=100 + i, file_name=name) for i, name in enumerate(names)],
            annotations=[dict(id=7, image_id=100 + i, category_id=c) for i, c in enumerate(labels)][
                ::-1
            ],
        )
        (tmp_path / f"{split}2018.json").write_text(json.dumps(annotations))
    from_index = load_dataset("inaturalist18", tmp_path)
    for split in ("train", "val"):
        (tmp_path / f"iNaturalist18_{split}.txt").unlink()
    official = load_dataset("inaturalist18", tmp_path)
    assert from_index.keys() == official.keys() == {"train", "val"}
    for split, pictures in official.items():
        assert pictures.paths.tolist() == from_index[split].paths.tolist()
        assert pictures.labels.tolist() == from_index[split].labels.tolist()
        assert pictures.origin.name == f"{split}2018.json"
    for broken in ("{", '{"images": []}', '{"images": [{"id": 1}], "annotations": []}'):
        (tmp_path / "val2018.json").write_text(broken)
        with pytest.raises(BadInput, match="val2018.json is not iNaturalist's annotation file"):
            load_dataset("inaturalist18", tmp_path)


@pytest.fixture
def cifar_files(tmp_path, monkeypatch):
    """Made CIFAR-10 files, 200 training and 3 test pictures a class, with MD5 sums that hold."""
    random, entries = np.random.default_rng(0), {}
    folder = tmp_path / data.CIFAR10.base_folder
    folder.mkdir()
    names = [name for name, _ in data.CIFAR10.train_list + data.CIFAR10.test_list] + [
        "batches.meta"
    ]
    for name in names:
        labels = random.permutation(np.repeat(np.arange(10), 3 if name == "test_batch" else 40))
        pixels = random.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        content = {"data": pixels, "labels": labels.tolist()}
        if name == "batches.meta":
            content = {"label_names": [f"class {c}" for c in range(10)]}
        (folder / name).write_bytes(pickle.dumps(content))
        entries[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(data.CIFAR10, "train_list", [(n, entries[n]) for n in names[:5]])
    monkeypatch.setattr(data.CIFAR10, "test_list", [("test_batch", entries["test_batch"])])
    meta = data.CIFAR10.meta | dict(md5=entries["batches.meta"])
    monkeypatch.setattr(data.CIFAR10, "meta", meta)
    return tmp_path


@pytest.mark.parametrize("imbalance", [10, 50, 100])
def test_cifar_lt_is_the_fields_subset(imbalance, cifar_files):
    sets = load_dataset("cifar10_lt", cifar_files, imbalance=imbalance)
    assert sets.keys() == {"train", "test"}  # the field has no val split
    # As the field's code has it: one global generator, class by class, the first of each shuffle.
    whole = data.CIFAR10(cifar_files, train=True)
    np.random.seed(0)
    expected, targets = [], np.array(whole.targets)
    for label in range(10):
        indices = np.where(targets == label)[0]
        np.random.shuffle(indices)
        expected.extend(indices[: int(200 * (1 / imbalance) ** (label / 9.0))])
    assert sets["train"].labels.tolist() == targets[expected].tolist()
    images = sets["train"].images.permute(0, 2, 3, 1).numpy()
    assert (images == whole.data[expected]).all()
    assert labels_of(sets)["test"] == [3] * 10 and labels_of(sets)["train"][0] == 200
    assert len(sets["train"]) == sum(long_tailed_counts(200, 10, 1 / imbalance))


@pytest.mark.parametrize("imbalance, largest, smallest", [(1, 247, 247), (10, 607, 60)])
def test_another_imbalance_has_as_many_pictures_and_none_of_val_and_test(
    imbalance, largest, smallest, sets
):
    other = load_dataset("fashion_mnist_lt", imbalance=imbalance)
    counts = other["train"].labels.bincount()
    assert (counts[0], counts[-1]) == (largest, smallest) and 2470 <= counts.sum() <= 2478
    own = {image.numpy().tobytes() for image in other["train"].images}
    assert len(own) == counts.sum()  # none twice
    for split in ("val", "test"):
        assert torch.equal(other[split].images, sets[split].images)
        assert not own & {image.numpy().tobytes() for image in sets[split].images}
    whole = load_dataset("fashion_mnist_lt", imbalance=100)["train"]
    assert torch.equal(whole.images, sets["train"].images)
    with pytest.raises(BadInput, match="--imbalance 300 takes .* at most 100"):
        load_dataset("fashion_mnist_lt", imbalance=300)


def test_missing_cifar_files_are_named_with_the_command_that_fetches_them(tmp_path):
    with pytest.raises(BadInput, match="cifar-100-python: python data.py .*--download"):
        load_dataset("cifar100_lt", tmp_path)


def write_folders(root, splits):
    random = np.random.default_rng(0)
    for split, counts in splits.items():
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")


def test_folders_of_your_own_are_taken_as_they_are(tmp_path):
    splits = dict(train=dict(cat=30, ant=5), val=dict(ant=2, cat=3), test=dict(cat=1, ant=1))
    write_folders(tmp_path, splits)
    sets = load_dataset("imagefolder", tmp_path)
    assert sets["train"].names == ["ant", "cat"]
    assert labels_of(sets) == dict(train=[5, 30], val=[2, 3], test=[1, 1])
    assert sets["val"].path(0).parent == tmp_path / "val" / "ant"
    (tmp_path / "test" / "dog").mkdir()
    with pytest.raises(BadInput, match="test/dog: .*train has no such class"):
        load_dataset("imagefolder", tmp_path)
    (tmp_path / "test" / "dog").rename(tmp_path / "train" / "bee")
    with pytest.raises(BadInput, match=r"train: no picture of class 1 \(bee\); every class"):
        load_dataset("imagefolder", tmp_path)


def test_what_folders_lack_is_held_out_of_train_class_by_class(tmp_path):
    write_folders(tmp_path, dict(train=dict(ant=60, bee=20, cat=3)))
    sets = load_dataset("imagefolder", tmp_path)
    assert labels_of(sets) == dict(train=[42, 14, 1], val=[6, 2, 1], test=[12, 4, 1])
    paths = [set(pictures.paths.tolist()) for pictures in sets.values()]
    assert len(set.union(*paths)) == 83  # nothing twice, nothing lost
    assert "1 to 12 pictures a class held out" in sets["test"].origin
    again = load_dataset("imagefolder", tmp_path)
    for split, pictures in sets.items():
        assert pictures.paths.tolist() == again[split].paths.tolist()
    # Another picture of one class leaves what is held out of the others as it was.
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "ant" / "new.png")
    for split, pictures in load_dataset("imagefolder", tmp_path).items():
        for label in (1, 2):
            kept, before = (
                part.paths[part.labels.numpy() == label] for part in (pictures, sets[split])
            )
            assert kept.tolist() == before.tolist()
    (tmp_path / "train" / "ant" / "new.png").unlink()
    write_folders(tmp_path, dict(val=dict(ant=1, bee=1, cat=1)))
    assert labels_of(load_dataset("imagefolder", tmp_path))["train"] == [48, 16, 2]
    (tmp_path / "train" / "cat" / "0.png").unlink()
    (tmp_path / "train" / "cat" / "1.png").unlink()
    with pytest.raises(BadInput, match="train/cat has 1 pictures, too few to hold out .* test"):
        load_dataset("imagefolder", tmp_path)
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(BadInput, match="train not found: pictures belong in"):
        load_dataset("imagefolder", tmp_path)


def test_the_recipe_of_folders_follows_from_their_size():
    assert recipe_of("imagefolder", 115_846)["stage1"] == recipe_of("imagenet_lt")["stage1"]
    small, large = recipe_of("imagefolder", 3_000), recipe_of("imagefolder", 10**6)
    assert small["stage1"]["queue_size"] == 1024 and large["stage1"]["queue_size"] == 65536
    assert small["stage1"]["epochs"] > 200 > large["stage1"]["epochs"]


def read(path):
    with data.open_picture(path) as image:
        return data.decode(image)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1"])
def test_pictures_of_every_kind_become_rgb(mode, tmp_path):
    pixels = np.kron(np.arange(0, 240, 15).reshape(4, 4), np.ones((8, 8))).astype(np.uint8)
    picture = Image.fromarray(pixels)
    picture = picture.convert("RGB").convert(mode)
    path = tmp_path / ("a.jpg" if mode in ("L", "CMYK") else "a.png")
    picture.save(path)
    image = read(path)
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    tolerance = {"1": 255, "P": 51, "L": 8, "CMYK": 12}  # dither, palette, JPEG
    assert (image.int() - torch.tensor(pixels)).abs().max() <= tolerance.get(mode, 0)
    assert image.max() > 150 and image.min() < 60


def test_a_picture_that_cannot_be_read_is_named(tmp_path, imagenet_tree):
    whole = next((imagenet_tree / "train" / "n00000000").iterdir()).read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("none", b""), ("text", b"Sorry.")):
        path = tmp_path / f"{name}.jpg"
        path.write_bytes(content)
        with pytest.raises(BadInput, match=f"{name}.jpg cannot be read as a picture .*mend it"):
            read(path)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(BadInput, match="deep.png cannot be read .*only 8 bits a channel"):
        read(tmp_path / "deep.png")
    with pytest.raises(BadInput, match="gone.jpg cannot be read as a picture .No such file"):
        read(tmp_path / "gone.jpg")


def test_files_are_cut_as_torchvision_cuts_them(imagenet_tree):
    train = load_dataset("imagenet_lt", imagenet_tree)["train"]
    recipe = DATASETS["imagenet_lt"] | dict(view_size=32)
    indices, seeds = [3, 30, 44], [7, 8, 9]
    views = train.views(indices, seeds, recipe, 2)
    assert views.shape == (2, 3, 3, 32, 32) and views.dtype == torch.uint8
    cut = transforms.v2.RandomResizedCrop(32, scale=(0.08, 1.0), antialias=True)
    for column, (index, seed) in enumerate(zip(indices, seeds)):
        image = read(train.path(index))
        torch.manual_seed(seed)
        for view in range(2):
            assert torch.equal(views[view, column], cut(image))
    # The same crops in any batch, and others with other seeds.
    assert torch.equal(train.views([30], [8], recipe, 2)[:, 0], views[:, 1])
    assert not torch.equal(train.views([30], [9], recipe, 2)[:, 0], views[:, 1])
    # Evaluation: 256 on the shorter side, the central 224, in proportion.
    recipe = recipe | dict(view_size=224)
    whole = train.views([3], [None], recipe, 0)
    resized = transforms.v2.Resize(256, antialias=True)(read(train.path(3)))
    assert torch.equal(whole[0, 0], transforms.v2.CenterCrop(224)(resized))


@pytest.fixture(scope="module")
def large_picture(tmp_path_factory):
    """800 x 600 pixels: red grows from left to right, green downwards, blue is a photograph's."""
    path = tmp_path_factory.mktemp("large") / "0.jpg"
    pixels = photograph(np.random.default_rng(0), 800, 600)
    pixels[..., 0], pixels[..., 1] = np.linspace(0, 255, 800), np.linspace(0, 255, 600)[:, None]
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)
    return path


def test_a_reduced_decode_gives_the_same_view_but_for_resampling(large_picture):
    def centre(reducible, interpolation):
        with data.open_picture(large_picture) as image:
            pixels = data.decode(image, reducible)
        return pixels.shape[1:], TF.resize(pixels, [90], interpolation, antialias=True)[2].float()

    bilinear, bicubic = TF.InterpolationMode.BILINEAR, TF.InterpolationMode.BICUBIC
    (_, full), (size, reduced) = centre(1, bilinear), centre(600 / 90, bilinear)
    assert size == (150, 200)  # a quarter; an eighth would be smaller than the view
    noise = (full - centre(1, bicubic)[1]).abs().mean()
    assert 0 < (full - reduced).abs().mean() < noise


def test_a_reduced_decode_shows_the_same_region(large_picture, monkeypatch):
    pictures = data.ImageFiles(large_picture.parent, [b"0.jpg"], [0], "made")
    recipe = DATASETS["imagenet_lt"] | dict(view_size=48)
    reduced = pictures.views([0] * 20, range(20), recipe, 2).float()
    whole, sizes = data.decode, set()

    def decode(image, reducible):
        sizes.add(whole(image, reducible).shape[2])
        with Image.open(image.filename) as again:
            return whole(again)

    monkeypatch.setattr(data, "decode", decode)
    full = pictures.views([0] * 20, range(20), recipe, 2).float()
    assert sizes == {400, 200, 100}
    # Red and green tell the position: within half a pixel of an eighth of the picture.
    corners = (reduced - full)[:, :, :2, ::47, ::47].abs()
    assert corners.max() < 4 * 255 / 600 + 2
    assert (reduced - full)[:, :, :2].mean().abs() < 0.2


def test_a_data_set_is_checked_before_training(tmp_path, imagenet_tree, monkeypatch, capsys):
    def check(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as error:
            data.main()
        return error.value.code, capsys.readouterr().out

    options = ["--dataset", "imagenet_lt", "--workers", 0, "--data-root"]
    root = tmp_path / "copy"
    shutil.copytree(imagenet_tree, root)
    (root / "train" / "n00000002" / "train_1.JPEG").unlink()
    cut = root / "val" / "n00000001" / "test_0.JPEG"
    cut.write_bytes(cut.read_bytes()[:300])
    with open(root / "ImageNet_LT_val.txt", "a") as file:
        file.write("train/n00000003/train_0.JPEG 3\n")  # as in train
    code, out = check(*options, root)
    assert code == 1
    rows = [line.split() for line in out.splitlines()]
    assert ["train", "45", "4", "24", "3", "0", "1", "3"] in rows
    assert ["val", "9", "4", "3", "2"] in rows and ["test", "12", "4", "3", "3"] in rows
    for problem in (
        "ImageNet_LT_train.txt: 45 pictures, 115,846 published",
        "1 pictures are in train and val: train/n00000003/train_0.JPEG",
        "n00000002/train_1.JPEG is missing",
        "problems: 5",
    ):
        assert problem in out
    code, out = check(*options, root, "--decode")
    assert code == 1 and "problems: 6" in out and "test_0.JPEG cannot be read" in out
    (root / "ImageNet_LT_test.txt").unlink()
    code, out = check(*options, root)
    assert code == 1 and "ImageNet_LT_test.txt not found" in out
    assert ["train", "45", "4", "24", "3", "0", "1", "3"] in [x.split() for x in out.splitlines()]


def test_the_check_is_a_command(tmp_path):
    for arguments, code, says in (
        ([], 0, "problems: 0"),  # the shipped set
        (
            ["--dataset", "imagenet_lt"],
            2,
            "data.py: error: --dataset imagenet_lt needs --data-root",
        ),
    ):
        command = [sys.executable, "data.py", *arguments]
        done = subprocess.run(command, cwd=data.HERE, capture_output=True, text=True, timeout=200)
        assert done.returncode == code and says in done.stdout + done.stderr
        assert (done.stderr.count("\n") == 1) == (code == 2)


def test_batches_have_memory_of_their_own_as_pinning_demands(sets, imagenet_tree):
    files = load_dataset("imagenet_lt", imagenet_tree)["train"]
    for pictures in (sets["train"], files):
        for crops in (0, 1, 2):
            views = pictures.views(
                [0, 1], [5, 6], DATASETS["imagenet_lt"] | dict(view_size=8), crops
            )
            assert all(views.stride()) and views.numel() == views.untyped_storage().nbytes()


# ------------------------------------------------------------------------------------- samplers


def test_an_epoch_shows_every_picture_at_most_once_and_epochs_differ():
    labels = torch.zeros(50, dtype=torch.long)
    batches = [indices for indices, _ in Batches(labels, 8, 3, seed=0)]
    assert len(batches) == 18 and all(len(batch) == 8 for batch in batches)
    epochs = [sum(batches[i : i + 6], []) for i in (0, 6, 12)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("balanced", [False, True])
def test_batches_resume_anywhere_and_ranks_share_them_out(balanced):
    labels = torch.arange(60) % 4
    options = dict(seed=3, balanced=balanced)
    whole = list(Batches(labels, 10, 4, **options))
    assert list(Batches(labels, 10, 4, start=7, **options)) == whole[7:]
    ranks = [list(Batches(labels, 10, 4, rank=r, world=2, **options)) for r in range(2)]
    joined = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(*ranks)]  # the crops' seeds as well
    assert joined == whole
    assert len({seed for _, seeds in whole for seed in seeds}) == 240
    assert list(Batches(labels, 10, 4, seed=4, balanced=balanced)) != whole


def test_class_balanced_sampling_draws_classes_and_their_pictures_uniformly():
    labels = torch.tensor([0] * 900 + [1] * 90 + [3] * 10)  # no picture of class 2
    batches = Batches(labels, 500, 20, seed=0, balanced=True)
    drawn = torch.tensor([index for indices, _ in batches for index in indices])
    shares = labels[drawn].bincount() / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([1, 1, 0, 1]) / 3, atol=0.01, rtol=0)
    tail = drawn[labels[drawn] == 3].bincount(minlength=1000)[990:]
    assert tail.min() > 0.85 * tail.max()


@pytest.mark.parametrize("batch_size, world", [(61, 1), (9, 2)])
def test_a_batch_that_cannot_be_made_is_refused(batch_size, world):
    with pytest.raises(BadInput, match="--batch-size"):
        Batches(torch.zeros(60, dtype=torch.long), batch_size, 1, seed=0, world=world)


# ----------------------------------------------------------------------------- views and patches


def drawn(count, rows=slice(None), seed=0):
    return Draws(seed, count, rows, "cpu")


def test_random_boxes_follow_random_resized_crop():
    torch.manual_seed(0)
    boxes = random_boxes(drawn(20000), 224, (0.08, 1.0))
    sides = boxes[:, 2:] - boxes[:, :2]
    area, ratio = sides.prod(1) / 224**2, sides[:, 0] / sides[:, 1]
    assert boxes.min() >= 0 and boxes.max() <= 224.001
    assert 0.0799 < area.min() < 0.09 and 0.95 < area.max() <= 1
    assert 0.7499 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.3334
    assert ratio.log().mean().abs() < 0.01
    # Against torchvision's own draws of the same crop.
    from torchvision.transforms import RandomResizedCrop

    image = torch.zeros(1, 224, 224)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(20000)]
    ).float()
    for ours, other in (
        (boxes[:, 0], theirs[:, 1]),
        (boxes[:, 1], theirs[:, 0]),
        (sides[:, 0], theirs[:, 3]),
        (sides[:, 1], theirs[:, 2]),
    ):
        assert (ours.mean() - other.mean()).abs() < 2 and (ours.std() - other.std()).abs() < 2


def test_crop_is_a_resize_of_the_box_with_half_pixel_centres():
    # On a ramp a crop must give the coordinates of its own pixels' centres.
    ramp = torch.arange(28.0).add(0.5).expand(1, 1, 28, 28).repeat(2, 1, 1, 1)
    boxes = torch.tensor(
        [
            [4.0, 3.0, 20.0, 27.0],
            [1.0, 0.5, 27.0, 27.0],
            [5.0, 5.0, 13.0, 13.0],
            [2.5, 1.0, 26.5, 9],
        ]
    )
    out = crop(ramp, boxes, 8)
    assert out.shape == (4, 1, 8, 8)
    for box, row in zip(boxes, out[:, 0, 3]):
        x1, x2 = box[0], box[2]
        torch.testing.assert_close(
            row, x1 + (torch.arange(8) + 0.5) * (x2 - x1) / 8, atol=1e-3, rtol=0
        )


def test_crop_takes_picture_i_for_box_i():
    pictures = torch.arange(3.0)[:, None, None, None].expand(3, 1, 28, 28)
    boxes = random_boxes(drawn(6), 28, (0.1, 0.5))
    assert crop(pictures, boxes, 4).mean((1, 2, 3)).tolist() == pytest.approx([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    "position, adjust",
    [
        (0, TF.adjust_brightness),
        (1, TF.adjust_contrast),
        (2, TF.adjust_saturation),
    ],
)
def test_each_colour_change_is_torchvisions(position, adjust):
    torch.manual_seed(0)
    images = 0.3 + 0.3 * torch.rand(6, 3, 16, 16)  # away from the clamps
    jitter = [0.0] * 4
    jitter[position] = 0.3
    matrices = color_matrices(images.mean((2, 3)), drawn(6), jitter)
    changed = change_colors(images, matrices)
    for image, matrix, ours in zip(images, matrices, changed):
        factor = (matrix[0, 0] - matrix[1, 0]).item()  # of each of the three changes
        assert 0.7 <= factor <= 1.3
        torch.testing.assert_close(ours, adjust(image, factor), atol=2e-3, rtol=0)


def test_hue_keeps_luma_and_grey_and_turns_red_to_yellow():
    torch.manual_seed(0)
    grey, red = torch.full((50, 3, 1, 1), 0.5), torch.zeros(50, 3, 1, 1)
    red[:, 0] = 0.5
    for images in (grey, red):
        matrices = color_matrices(images.mean((2, 3)), drawn(50), (0, 0, 0, 0.1))
        changed = matrices[:, :, :3] @ images[..., 0]
        luma = torch.tensor(data.LUMA) @ changed
        torch.testing.assert_close(
            luma, torch.tensor(data.LUMA) @ images[..., 0], atol=2e-3, rtol=0
        )
        chroma = (torch.tensor(data.RGB_TO_YIQ)[1:] @ x for x in (changed, images[..., 0]))
        torch.testing.assert_close(*(x.norm(dim=1) for x in chroma), atol=2e-3, rtol=0)
    torch.testing.assert_close(
        change_colors(grey, color_matrices(grey.mean((2, 3)), drawn(50), (0, 0, 0, 0.1))),
        grey,
        atol=5e-3,
        rtol=0,
    )
    # As torchvision's hue in direction: some draws turn red towards yellow, others towards magenta.
    changed = change_colors(red, color_matrices(red.mean((2, 3)), drawn(50), (0, 0, 0, 0.1)))
    assert (changed[:, 1] > 0.05).any() and (changed[:, 2] > 0.05).any()


def test_grey_makes_the_three_channels_the_luma():
    images = torch.rand(5, 3, 4, 4)
    matrices = color_matrices(images.mean((2, 3)), drawn(5), (0, 0, 0, 0), grey_p=1.0)
    changed = change_colors(images, matrices)
    for image, ours in zip(images, changed):
        torch.testing.assert_close(ours, TF.rgb_to_grayscale(image, 3), atol=1e-3, rtol=0)


def test_probabilities_of_colour_changes():
    torch.manual_seed(0)
    means = torch.rand(4000, 3)
    matrices = color_matrices(means, drawn(4000), (0.4, 0.4, 0.4, 0.1), jitter_p=0.8)
    unchanged = matrices == torch.eye(3, 4)
    assert unchanged.flatten(1).all(1).float().mean().item() == pytest.approx(0.2, abs=0.02)
    grey = color_matrices(means, drawn(4000), (0, 0, 0, 0), grey_p=0.2)
    assert (grey[:, 0] == grey[:, 1]).all(1).float().mean().item() == pytest.approx(0.2, abs=0.02)


def red_flower(size=48):
    y, x = np.mgrid[:size, :size] / size - 0.5
    petals = (np.hypot(x, y) < 0.3 + 0.1 * np.cos(6 * np.arctan2(y, x)))[..., None]
    red = np.stack([0.85 - 0.4 * np.hypot(x, y), 0.08 + 0 * x, 0.13 + 0 * x], -1)
    leaves = np.stack([0.15 + 0.1 * x, 0.35 + 0.2 * y, 0.1 + 0 * x], -1)
    return np.where(petals, red, leaves)


@pytest.mark.parametrize(
    "picture, tolerance",
    [(photograph(np.random.default_rng(0), 48, 48) / 255, 0.01), (red_flower(), 0.03)],
    ids=["photograph", "saturated red"],
)
def test_colours_are_distributed_as_torchvisions(picture, tolerance):
    torch.manual_seed(0)
    recipe = DATASETS["imagenet_lt"]
    jitter, jitter_p, grey_p = (recipe[n] for n in ("query_jitter", "query_jitter_p", "grey_p"))
    image = torch.tensor(picture).permute(2, 0, 1).float()
    images = image.expand(1000, -1, -1, -1)
    matrices = color_matrices(images.mean((2, 3)), drawn(1000), jitter, jitter_p, grey_p)
    ours = change_colors(images, matrices)
    change = transforms.Compose(
        [
            transforms.RandomApply([transforms.ColorJitter(*jitter)], jitter_p),
            transforms.RandomGrayscale(grey_p),
        ]
    )
    theirs = torch.stack([change(image) for image in images])
    for moment in (
        lambda draws: draws.mean((0, 2, 3)),
        lambda draws: draws.std((0, 2, 3)),
        lambda draws: draws.mean((2, 3)).std(0),
    ):
        torch.testing.assert_close(moment(ours), moment(theirs), atol=tolerance, rtol=0)


def test_blur_is_torchvisions_gaussian_and_leaves_the_rest():
    torch.manual_seed(0)
    images = torch.rand(40, 3, 32, 32)
    blurred = random_blur(images, drawn(40), 1.0, sigma=(1.5, 1.5))
    expected = TF.gaussian_blur(images, [9, 9], [1.5, 1.5])
    torch.testing.assert_close(blurred, expected, atol=0.01, rtol=0)
    some = random_blur(images, drawn(40), 0.5)
    same = (some - images).abs().flatten(1).max(1).values < 1e-6
    assert 8 < same.sum() < 32
    assert random_blur(images, drawn(40), 0.0) is images


def test_patches_are_the_boxes_of_the_query_view_before_its_colours(sets):
    recipe = RECIPE | dict(query_jitter=(0, 0, 0, 0), grey_p=0.0)
    images = sets["train"].images[::100]
    query, boxes, patches = query_views(images, drawn(len(images)), recipe, 5)
    view, size = recipe["view_size"], recipe["patch_size"]
    assert query.shape == (len(images), 3, view, view)
    assert boxes.shape == (5, len(images), 4)
    assert patches.shape == (5, len(images), 3, size, size)
    expected = crop(query, boxes.flatten(0, 1), size).view_as(patches)
    straight = (patches - expected).abs().flatten(2).max(2).values < 1e-4
    flipped = (patches.flip(4) - expected).abs().flatten(2).max(2).values < 1e-4
    assert (straight | flipped).all() and straight.any() and flipped.any()
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1) / view**2
    assert 0.0499 <= area.min() and area.max() <= 0.6001


def test_views_are_standardised_and_are_there_without_patches(sets):
    whole = data.evaluation_view(sets["train"].images[None], RECIPE)
    assert whole.mean().abs() < 0.1 and (whole.std() - 1).abs() < 0.1
    images = sets["train"].images[:200]
    view, boxes, patches = query_views(images, drawn(200), RECIPE, 0)
    assert view.shape == (200, 3, 20, 20) and boxes is None and patches is None


@pytest.mark.parametrize(
    "rows", [slice(8, 16), torch.arange(24).flip(0)[::3]], ids=["share", "shuffled"]
)
@pytest.mark.parametrize("dataset", ["fashion_mnist_lt", "imagenet_lt"])
def test_a_process_sees_the_views_that_one_process_would_make_of_its_pictures(dataset, rows):
    recipe = DATASETS[dataset] | dict(view_size=20, patch_size=8, patch_scale=(0.05, 0.6))
    images = torch.randint(256, (24, 3, 20, 20)).byte()
    whole = query_views(images, drawn(24), recipe, 3)
    share = query_views(images[rows], drawn(24, rows), recipe, 3)
    torch.testing.assert_close(share[0], whole[0][rows])
    torch.testing.assert_close(share[1], whole[1][:, rows])
    torch.testing.assert_close(share[2], whole[2][:, rows])
    keys = key_view(images, drawn(24), recipe)
    torch.testing.assert_close(key_view(images[rows], drawn(24, rows), recipe), keys[rows])
    again = (
        query_views(images, drawn(24), recipe, 3),
        query_views(images, drawn(24, seed=1), recipe, 3),
    )
    for first, same, other in zip(whole, *again):
        assert torch.equal(first, same) and not torch.equal(first, other)
