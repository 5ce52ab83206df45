"""Readers of data sets, long-tailed subsets, batches, views and patches, arguments."""

import gzip
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib

import build_fashion_mnist_lt
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from benchmark import cfg_of
from conftest import TREE_COUNTS, command, folders
from PIL import Image
from torch.testing import assert_close
from torchvision import transforms
from torchvision.transforms.v2.functional import pil_to_tensor

import data
import eval as stage2
import train
from data import HERE, BadInput, Batches, Draws, color_matrices, crop, load_dataset, query_views

COUNTS = [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]
SHIPPED = load_dataset("fashion_mnist_lt", HERE / "tests")


def small_cfg(name, **changes):
    """A data set's settings for views, with small views and patches."""
    return cfg_of(name, train.VIEWS, **dict(view_size=20, patch_size=8) | changes)


def drawn(count, rows=slice(None), seed=0):
    return Draws(seed, count, rows, "cpu")


def refused(says, *call):
    with pytest.raises(BadInput, match=says):
        load_dataset(*call)


def write_tiff(path, pixels, bits=8, photometric=None, planes=False, orientation=1):
    """An uncompressed TIFF of pixels [H, W] or [H, W, 3], as scanners and microscopes write."""
    (height, width), channels = pixels.shape[:2], 1 if pixels.ndim == 2 else 3
    if bits == 12:  # two values in three bytes
        a, b = pixels.reshape(-1, 2).T
        content = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], axis=1).astype(np.uint8)
    else:
        content = pixels.transpose(2, 0, 1) if planes else pixels
        content = content.astype(f"<u{bits // 8}")
    content, strips = content.tobytes(), channels if planes else 1
    photometric = (1 if channels == 1 else 2) if photometric is None else photometric
    offsets = [8 + n * len(content) // strips for n in range(strips)]
    tags = {256: [width], 257: [height], 258: [bits] * channels, 259: [1], 262: [photometric],
            273: offsets, 274: [orientation], 277: [channels], 278: [height],
            279: [len(content) // strips] * strips, 284: [2 if planes else 1]}
    entries, extra = b"", b""
    for tag, values in tags.items():
        value = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            place = 14 + len(content) + 12 * len(tags) + len(extra)
            value, extra = struct.pack("<I", place), extra + value
        entries += struct.pack("<HHI", tag, 4, len(values)) + value
    head = b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(tags))
    path.write_bytes(head + entries + bytes(4) + extra)


def labels_of(sets):
    return {split: dataset.labels.bincount().tolist() for split, dataset in sets.items()}


# ------------------------------------------------------------------------------------- data sets


def test_long_tailed_counts_and_groups_match_the_literature():
    assert data.long_tailed_counts(1000, 10, 1 / 100) == COUNTS
    assert sum(data.long_tailed_counts(500, 100, 1 / 100)) == 10847  # CIFAR-100-LT
    assert sum(data.long_tailed_counts(5000, 10, 1 / 100)) == 12406  # CIFAR-10-LT
    shots = data.shot_groups([1000, 101, 100, 20, 19, 0])
    shots = {name: mask.nonzero()[:, 0].tolist() for name, mask in shots.items()}
    assert shots == dict(many=[0, 1], medium=[2, 3], few=[4, 5])


def test_shipped_data_set_matches_its_description():
    assert labels_of(SHIPPED) == dict(train=COUNTS, val=[100] * 10, test=[1000] * 10)
    for dataset in SHIPPED.values():
        assert dataset.images.shape == (len(dataset), 1, 28, 28) and len(dataset.names) == 10
    own = {image.numpy().tobytes() for image in SHIPPED["train"].images}
    assert len(own) == sum(COUNTS)
    assert not own & {image.numpy().tobytes() for image in SHIPPED["val"].images}


def test_build_script_writes_the_same_bytes_every_time(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    for name, size in (("train", 12000), ("t10k", 100)):
        labels = np.arange(size, dtype=np.uint8) % 10
        images = random.integers(256, size=(size, 28, 28), dtype=np.uint8)
        for kind, array in (("images", images), ("labels", labels)):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            content = gzip.compress(content + array.tobytes(), compresslevel=1)
            (tmp_path / f"{name}-{kind}-idx{array.ndim}-ubyte.gz").write_bytes(content)
    target, contents = tmp_path / "fashion_mnist_lt.npz", set()
    for now in (1e9, 1.5e9):
        monkeypatch.setattr("time.time", lambda: now)
        build_fashion_mnist_lt.main(tmp_path, target)
        contents.add(target.read_bytes())
    built = load_dataset("fashion_mnist_lt", tmp_path)
    assert len(contents) == 1 and labels_of(built) == labels_of(SHIPPED) | dict(test=[10] * 10)
    both = torch.cat([built["train"].images, built["val"].images]).flatten(1)
    assert len(both.unique(dim=0)) == sum(COUNTS) + 1000


def test_cifar_lt_matches_the_usual_subset(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder, random = tmp_path / data.CIFAR10.base_folder, np.random.default_rng(0)
    folder.mkdir()
    for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch", "batches.meta"]:
        labels = random.permutation(np.repeat(np.arange(10), 3 if name == "test_batch" else 40))
        pixels = random.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        made = {"data": pixels, "labels": labels.tolist(), "label_names": list("abcdefghij")}
        (folder / name).write_bytes(pickle.dumps(made))
    whole = data.CIFAR10(tmp_path, train=True)
    for imbalance in (1, 10, 100):
        sets = load_dataset("cifar10_lt", tmp_path, imbalance=imbalance)
        # As in common code: one generator shuffles class by class, the first images are kept.
        np.random.seed(0)
        expected, targets = [], np.array(whole.targets)
        for label in range(10):
            indices = np.where(targets == label)[0]
            np.random.shuffle(indices)
            expected.extend(indices[: int(200 * (1 / imbalance) ** (label / 9.0))])
        assert sets["train"].labels.tolist() == targets[expected].tolist()
        assert (sets["train"].images.permute(0, 2, 3, 1).numpy() == whole.data[expected]).all()
        assert sets.keys() == {"train", "test"} and labels_of(sets)["test"] == [3] * 10


def test_missing_images_of_a_data_set_are_named_with_what_to_do(tmp_path, monkeypatch, capsys):
    for options, says in (
        (["imagenet_lt"], "datasets/imagenet_lt is not a directory: put or link .* --data-root"),
        (["imagefolder", "--data-root", "my"], "my is not a directory: put or link the images of"),
        (["fashion_mnist_lt", "--data-root", tmp_path], "npz not found; .* --dataset small_imagef"),
        (["cifar100_lt"], "datasets/cifar100_lt has no complete cifar-100-python: .*--download"),
        (["cifar100_lt", "--imbalance", 0], "--imbalance: must be from 1 to 10000, got 0"),
    ):
        code, _, said = command(monkeypatch, capsys, data, "--dataset", *options)
        assert code == 2 and said.count("\n") == 1 and re.search(says, said)


def test_index_files_may_be_elsewhere_and_list_paths_with_spaces(tmp_path, imagenet_tree):
    root = tmp_path / "root"
    shutil.copytree(imagenet_tree / "train", root / "my train")
    shutil.copytree(imagenet_tree / "val", root / "val")
    for split in TREE_COUNTS:
        path = tmp_path / f"ImageNet_LT_{split}.txt"
        says = f"{path} not found: git clone https://github.com/facebook.* copy .* --index-dir"
        refused(says, "imagenet_lt", root, tmp_path)
        lines = (imagenet_tree / path.name).read_text()
        path.write_text(lines.replace("train/", "my train/"))
    sets = load_dataset("imagenet_lt", root, tmp_path)
    assert labels_of(sets) == TREE_COUNTS and sets["train"].labels[24] == 1
    assert sets["train"].path(24) == root / "my train/n00000001/train_0.JPEG"
    # No Python object per line: reference counting would copy them into every worker.
    assert sets["train"].paths.dtype.kind == "S" and sets["train"].labels.dtype == torch.int64


@pytest.mark.parametrize("dataset", ["imagenet_lt", "places_lt"])
def test_val_needs_no_class_folders(dataset, tmp_path, imagenet_tree, monkeypatch, capsys):
    root, name = tmp_path / "root", dict(imagenet_lt="ImageNet", places_lt="Places")[dataset]
    shutil.copytree(imagenet_tree, root)
    for path in list(root.glob("val/*/*")):  # ILSVRC2012_val_00000001.JPEG: no name occurs twice
        path.rename(root / "val" / f"{path.parent.name}_{path.name}")
        path.parent.rmdir() if not any(path.parent.iterdir()) else None
    for split in TREE_COUNTS:
        lines = (root / f"ImageNet_LT_{split}.txt").read_text()
        lines = re.sub(r"val/(\w+)/", r"val/\1/\1_", lines)
        (root / f"{name}_LT_{split}.txt").write_text(lines)
    sets = load_dataset(dataset, root)
    paths = [sets["test"].path(n) for n in range(12)]
    assert all(path.parent == root / "val" and path.is_file() for path in paths)
    assert [int(path.name[8]) for path in paths] == sets["test"].labels.tolist()
    assert sets["train"].path(0).parent == root / "train" / "n00000000"
    _, out, _ = command(monkeypatch, capsys, data, "--dataset", dataset, "--data-root", root)
    assert "test: 12 images" in out and "cannot be read" not in out


def test_val_and_test_may_lack_classes(tmp_path, imagenet_tree, monkeypatch, capsys):
    for split in TREE_COUNTS:
        lines = (imagenet_tree / f"ImageNet_LT_{split}.txt").read_text().splitlines(keepends=True)
        kept = lines if split == "train" else lines[-3:]  # of the last one or two classes
        (tmp_path / f"ImageNet_LT_{split}.txt").write_text("".join(kept))
    sets = load_dataset("imagenet_lt", imagenet_tree, tmp_path)
    assert labels_of(sets) == TREE_COUNTS | dict(val=[0, 0, 1, 2], test=[0, 0, 0, 3])
    options = "--dataset", "imagenet_lt", "--data-root", imagenet_tree, "--index-dir", tmp_path
    _, out, _ = command(monkeypatch, capsys, data, *options)
    assert "val: 3 images, 2 of 4 classes, of 2 to 1 images each\n" in out


def test_errors_in_an_index_are_named(tmp_path, imagenet_tree):
    for split, keep, more, says in (
        ("train", 45, "train/a.jpg\n", "train.txt:46: 'train/a.jpg' is not \"path label\""),
        ("train", 45, "train/a.jpg one\n", "train.txt:46: 'train/a.jpg one' is not"),
        ("train", 45, "train/a.jpg -1\n", "train.txt:46: .* a label from 0 to 45"),
        ("train", 45, "train/a.jpg 46\n", "train.txt:46: .* a label from 0 to 45"),
        ("val", 7, "\nval/a.jpg 0\n", "val.txt:8: '' is not"),  # an empty last line is none
        ("train", 45, "train/a.jpg 6\n", "train.txt: no image of class 4; .* 0 to 6 without a gap"),
        ("test", 12, "val/a.jpg 6\n", "test.txt:13: .val/a.jpg 6. is not .* a label from 0 to 3"),
        ("val", 0, "", "val.txt is empty"),
    ):
        for name in TREE_COUNTS:
            shutil.copy(imagenet_tree / f"ImageNet_LT_{name}.txt", tmp_path)
        path = tmp_path / f"ImageNet_LT_{split}.txt"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:keep]) + more)
        refused(f"{tmp_path}/ImageNet_LT_{says}", "imagenet_lt", imagenet_tree, tmp_path)


def test_train_val_and_test_folders_are_read_as_splits(tmp_path):
    folders(tmp_path, train=dict(cat=9, ant=5, dog=0), val=dict(ant=2, cat=3), test=dict(cat=1))
    sets = load_dataset("imagefolder", tmp_path)
    assert labels_of(sets) == dict(train=[5, 9], val=[2, 3], test=[0, 1])  # test may lack a class
    assert sets["train"].names == ["ant", "cat"]
    assert sets["val"].path(0).parent == tmp_path / "val" / "ant"
    for name in ("valid", "Validation", "Val"):  # other common names of val
        (sets["val"].path(0).parent.parent).rename(tmp_path / name)
        sets = load_dataset("imagefolder", tmp_path)
        assert sets["val"].path(0).parent == tmp_path / name / "ant"
    folders(tmp_path, test=dict(bee=1))
    refused("/test/bee has images, but train has no class bee", "imagefolder", tmp_path)
    shutil.rmtree(tmp_path / "train")
    refused("/train: no images in class folders; they belong in", "imagefolder", tmp_path)
    root = folders(tmp_path / "one", train=dict(cat=9))
    refused("/one: only one class; at least two are needed", "imagefolder", root)


def test_class_folders_without_splits_are_the_training_set(tmp_path):
    for name, count in dict(ant=5, cat=40).items():
        folders(tmp_path, **{name: {"": count}})
    sets = load_dataset("imagefolder", tmp_path)
    assert sets["train"].names == ["ant", "cat"] and sum(map(len, sets.values())) == 45
    assert all(min(labels_of(sets)[split]) >= 1 for split in ("train", "val", "test"))
    assert sets["test"].path(0).parent == tmp_path / "ant"


def test_images_in_test_without_class_folders_are_ignored(tmp_path, capsys):
    folders(tmp_path, train=dict(ant=9, cat=9), test={"": 5})
    sets = load_dataset("imagefolder", tmp_path)
    assert len(sets["test"]) >= 2 and sets["test"].path(0).parent == tmp_path / "train" / "ant"
    assert f"{tmp_path}/test: 5 files are left out" in capsys.readouterr().err


def test_non_images_and_hidden_folders_are_left_out_and_counted(tmp_path, capsys):
    hidden = {".cache": 1, "@eaDir": 1, "ant/.ipynb_checkpoints": 1}  # @eaDir: a NAS box's
    folders(tmp_path, train={"ant": 9, "bee": 9} | hidden, val=dict(ant=1, bee=1))
    for name in ("ant/a.gif", "ant/b.heic", "bee/._1.png", "loose.png"):
        (tmp_path / "train" / name).write_bytes(b"")
    sets = load_dataset("small_imagefolder", tmp_path)
    assert sets["train"].names == ["ant", "bee"]
    assert sum(len(sets[split]) for split in ("train", "test")) == 18
    said = capsys.readouterr().err
    says = f"{tmp_path}/train: 7 files are left out (5 .png, 1 .gif, 1 .heic; first .cache/0.png, "
    assert said.startswith(says + "@eaDir/0.png, ant/.ipynb_checkpoints/0.png); only .jpg ")
    assert said.count("\n") == 2 and "\n2 classes: ant, bee\n" in said
    (tmp_path / "train" / "cow").mkdir()
    load_dataset("small_imagefolder", tmp_path)
    assert f"{tmp_path}/train: folders without images: cow\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shape, says",
    [
        (["Training/ant", "Training/bee", "Testing/ant"], "Testing, Training could be splits or"),
        (["my_train/ant", "my_train/bee", "my_test/ant"], "my_test, my_train could be splits"),
        (["train", "test"], "test, train could be splits or classes: name splits train, val and"),
        (["train/ant", "train/bee", "dev/ant"], ": dev could be splits or classes"),
        (["train/ant", "train/bee", "val/ant", "valid/ant"], ": val could be splits"),
        (["test/ant", "ant", "bee"], ": ant, bee could be splits or classes"),
    ],
)
def test_folders_that_could_be_splits_or_classes_are_refused(shape, says, tmp_path):
    for folder in shape:
        folders(tmp_path, **{folder: {"": 5}})
    refused(says, "imagefolder", tmp_path)


def test_classes_may_be_called_like_splits_and_other_folders_without_images_are_no_matter(tmp_path):
    for name in ("train", "car", "test"):  # vehicles
        folders(tmp_path / "a", **{name: {"": 5}})
    assert load_dataset("imagefolder", tmp_path / "a")["train"].names == ["car", "test", "train"]
    folders(tmp_path / "b", train=dict(ant=5, test=5), annotations={"": 0})
    (tmp_path / "b" / "annotations" / "a.json").write_text("{}")
    assert load_dataset("imagefolder", tmp_path / "b")["train"].names == ["ant", "test"]


def test_deeper_class_folders_and_links_to_a_folder_above_are_said(tmp_path, capsys):
    folders(tmp_path, train={"animal/cat": 3, "animal/dog": 4, "plant/oak": 5})
    (tmp_path / "train" / "plant" / "up").symlink_to(tmp_path)
    sets = load_dataset("imagefolder", tmp_path)
    assert sets["train"].names == ["animal", "plant"] and sum(map(len, sets.values())) == 12
    said = capsys.readouterr().err
    assert "deeper than their class folders, as in animal/cat: 3 folders make 2 classes\n" in said
    assert "2 classes: animal, plant\n" in said


def test_names_of_classes_are_equal_after_unicode_normalisation(tmp_path):
    folders(tmp_path, train={"caf\u00e9": 4, "bar": 4}, val={"cafe\u0301": 2}, test=dict(bar=1))
    sets = load_dataset("imagefolder", tmp_path)
    assert sets["train"].names == ["bar", "caf\u00e9"] and labels_of(sets)["val"] == [0, 2]


def test_index_may_begin_with_a_mark_and_names_classes_by_their_folders(tmp_path, imagenet_tree):
    for split in TREE_COUNTS:
        content = (imagenet_tree / f"ImageNet_LT_{split}.txt").read_bytes()
        (tmp_path / f"ImageNet_LT_{split}.txt").write_bytes(b"\xef\xbb\xbf" + content + b"\n\n")
    sets = load_dataset("imagenet_lt", imagenet_tree, tmp_path)
    assert labels_of(sets) == TREE_COUNTS
    assert sets["train"].names == [f"n0000000{label}" for label in range(4)]
    several = data.ImageFiles(tmp_path, [b"a/x/1.jpg", b"b/y/2.jpg", b"b/x/3.jpg"], [0, 1, 1], "")
    assert data.check_folders(dict(train=several)) is None


def test_folders_that_cannot_be_listed_are_errors(tmp_path, monkeypatch, capsys):
    folders(tmp_path, train={"ant": 3, "bee": 3, "bee/session": 2})
    for function in ("scandir", "listdir"):  # permissions do not stop the root user
        def fail(path, real=getattr(os, function)):
            if str(path).endswith(unlisted):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(os, function, fail)
    call = monkeypatch, capsys, data, "--dataset", "imagefolder", "--data-root", tmp_path
    for unlisted in ("train", "bee", "bee/session"):
        code, _, said = command(*call)
        assert code == 2 and f"/{unlisted}: Permission denied" in said
    for unlisted in ("lost+found", ".Trashes"):  # of a drive, which only the root user may list
        for place in (tmp_path, tmp_path / "train"):
            (place / unlisted).mkdir()
            assert command(*call)[0] == 0


def test_an_index_that_numbers_the_classes_otherwise_than_train_is_refused(tmp_path, imagenet_tree):
    for split in TREE_COUNTS:
        lines = (imagenet_tree / f"ImageNet_LT_{split}.txt").read_text()
        if split == "test":
            lines = "".join(f"{line[:-1]}{3 - int(line[-1])}\n" for line in lines.splitlines())
        (tmp_path / f"ImageNet_LT_{split}.txt").write_text(lines)
    says = "LT_test.txt gives n00000003 the label 0, but .*/ImageNet_LT_train.txt 3: use the lists"
    refused(says, "imagenet_lt", imagenet_tree, tmp_path)


def test_list_names_the_split_of_every_image(tmp_path, monkeypatch, capsys):
    root, lines = folders(tmp_path, train=dict(ant=6, bee=4)), []
    sys_argv = ["data.py", "--dataset", "imagefolder", "--data-root", str(root), "--list"]
    monkeypatch.setattr(sys, "argv", sys_argv)
    data.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(line["path"] for line in lines) == sorted(map(str, root.glob("train/*/*")))
    assert all(f"/{line['class']}/" in line["path"] for line in lines)
    for split, dataset in load_dataset("imagefolder", root).items():
        of_split = [line["path"] for line in lines if line["split"] == split]
        assert of_split == [str(dataset.path(n)) for n in range(len(dataset))]


def test_equal_files_in_two_splits_are_problems_of_the_check(tmp_path, monkeypatch, capsys):
    for split in ("train", "test"):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(4):
                color = (50 * n, 90 * label, 9 if split == "train" else 99)
                Image.new("RGB", (9, 8), color).save(tmp_path / split / name / f"{n}.png")
    shutil.copy(tmp_path / "train/ant/1.png", tmp_path / "test/ant/copy.png")
    call = monkeypatch, capsys, data, "--dataset", "imagefolder", "--data-root", tmp_path
    shutil.copy(tmp_path / "train/ant/2.png", tmp_path / "train/bee/other.png")
    code, out, _ = command(*call, "--decode")
    assert code == 1 and "problems: 2\n" in out and "/test/ant/copy.png of test equals " in out
    assert f"{tmp_path}/train/bee/other.png of train equals {tmp_path}/train/ant/2.png of" in out
    assert command(*call)[0] == 0  # contents are compared with --decode only


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "grey tif", "16-bit tif", "lzw tif"])
def test_images_of_own_folders_are_turned_once_as_their_orientation_says(kind, tmp_path):
    ramp = np.zeros((64, 96, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 96), np.arange(0, 256, 4)[:, None]
    upright, suffix = Image.fromarray(ramp), kind.rpartition(" ")[2]
    for orientation in range(1, 9):
        turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # Pillow's inverses
        stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
        path, exif = tmp_path / f"{orientation}.{suffix}", Image.Exif()
        exif[0x0112] = orientation
        if kind == "lzw tif":
            stored.save(path, compression="tiff_lzw", tiffinfo={274: orientation})
        elif suffix == "tif":
            pixels = np.asarray(stored.convert("RGB" if kind == "tif" else "L"))
            bits, scale = (16, 257) if kind == "16-bit tif" else (8, 1)
            write_tiff(path, pixels.astype(int) * scale, bits, orientation=orientation)
        else:
            stored.save(path, exif=exif, quality=95)
    names = [b"%d.%s" % (orientation, suffix.encode()) for orientation in range(1, 9)]
    cfg = small_cfg("imagefolder", view_size=56, crop_scale=(1.0, 1.0))
    files = data.ImageFiles(tmp_path, names, [0] * 8, "made", upright=True)
    # The widest crop is random along the longer side, and not turned views differ by 50 or more.
    tolerance = {0: 4, 1: 25}
    for held in (False, True):
        for crops in (0, 1):
            views = files.views(range(8), range(8), cfg, crops)[0].float()
            assert all((view - views[0]).abs().mean() < tolerance[crops] for view in views)
        if not held:
            files.hold(cfg, threads=2)
    assert all(pixels.shape[1:] == (56, 84) for pixels in files.pixels)


def test_images_of_benchmarks_are_not_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = np.linspace(0, 255, 64).astype(np.uint8)[:, None].repeat(64, 1)
    Image.fromarray(pixels).save(tmp_path / "0.jpg", exif=exif)
    files = data.ImageFiles(tmp_path, [b"0.jpg"], [0], "made")
    view = files.views([0], None, small_cfg("imagenet_lt"), 0)[0, 0, 0]
    assert view.float().diff(dim=0).mean() > 5
    assert load_dataset("imagefolder", folders(tmp_path / "a", train=dict(a=3, b=3)))["val"].upright


def test_missing_splits_are_held_out_of_train(tmp_path):
    sets = load_dataset("imagefolder", folders(tmp_path / "a", train=dict(ant=60, cat=3)))
    paths = [path for dataset in sets.values() for path in dataset.paths.tolist()]
    assert len(set(paths)) == len(paths) == 63  # nothing twice, nothing lost
    for dataset in sets.values():
        assert [b"/cat/" in path for path in dataset.paths.tolist()] == dataset.labels.tolist()
    (tmp_path / "a").rename(tmp_path / "b")  # the root does not matter
    again = load_dataset("imagefolder", folders(tmp_path / "b", val=dict(ant=4, cat=2)))
    assert labels_of(again)["val"] == [4, 2]
    assert again["test"].paths.tolist() == sets["test"].paths.tolist()


def test_classes_of_one_or_two_images_are_not_held_out(tmp_path):
    sets = load_dataset("imagefolder", folders(tmp_path / "a", train=dict(ant=3, bee=1, cat=2)))
    assert labels_of(sets) == dict(train=[1, 1, 2], val=[1], test=[1])
    both = dict(train=dict(ant=3, bee=2), test=dict(ant=1, bee=1))
    sets = load_dataset("imagefolder", folders(tmp_path / "b", **both))
    assert labels_of(sets) == dict(train=[2, 2], val=[1], test=[1, 1])
    both["train"] = dict(ant=2, bee=1)
    sets = load_dataset("imagefolder", folders(tmp_path / "c", **both))
    assert labels_of(sets) == dict(train=[2, 1], test=[1, 1])  # and no val at all
    root = folders(tmp_path / "d", train=dict(ant=2, bee=2))
    refused("/train: no class has the three images", "imagefolder", root)


def test_hold_out_takes_a_fifth_and_a_tenth_of_each_class_by_the_hash_of_the_path():
    paths = [b"%03d/%d.png" % (n % 2, n) for n in range(500)]
    labels = [path[:3] for path in paths]
    splits = data.hold_out(paths, labels, ["test", "val"])
    for label in (b"000", b"001"):
        of_class = [split for split, of in zip(splits, labels) if of == label]
        assert [of_class.count(split) for split in ("train", "val", "test")] == [175, 25, 50]
    assert set(splits[:60]) == {"train", "val", "test"}  # not in the order of the names
    order = np.random.default_rng(0).permutation(500)
    again = data.hold_out([paths[n] for n in order], [labels[n] for n in order], ["test", "val"])
    assert again == [splits[n] for n in order]
    assert data.hold_out(paths, labels, ["val"]).count("val") == 50  # a test/ of the user's own
    small = data.hold_out(paths[:7], [0, 0, 0, 1, 1, 1, 2], ["test", "val"])
    assert sorted(small[:3]) == sorted(small[3:6]) == ["test", "train", "val"]
    assert small[6] == "train"


# -------------------------------------------------------------------------- images and batches


def photograph(generator, width, height):
    """A synthetic image with the 1/f spectrum of natural ones: uint8 [height, width, 3]."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf

    def field():
        phase = generator.normal(size=frequency.shape)
        phase = phase + 1j * generator.normal(size=frequency.shape)
        values = np.fft.irfft2(phase / frequency**1.4, s=(height, width))
        return values / values.std()

    light = field()
    pixels = 120 + 50 * np.stack([light + 0.3 * field() for _ in range(3)], axis=-1)
    return pixels.clip(0, 255).astype(np.uint8)


def read(path):
    with data.open_image(path) as image:
        return data.decode(image)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1"])
def test_images_of_every_kind_become_rgb(mode, tmp_path):
    pixels = np.kron(np.arange(0, 240, 15).reshape(4, 4), np.ones((8, 8))).astype(np.uint8)
    path = tmp_path / ("a.jpg" if mode in ("L", "CMYK") else "a.png")
    Image.fromarray(pixels).convert("RGB").convert(mode).save(path)
    image = read(path)
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    tolerance = {"1": 255, "P": 51, "L": 8, "CMYK": 12}  # dither, palette, JPEG
    assert (image.int() - torch.tensor(pixels)).abs().max() <= tolerance.get(mode, 0)
    assert image.max() > 150 and image.min() < 60


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_16_bit_grey_is_read_as_8_bit(kind, tmp_path):
    pixels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    if kind == "pgm":
        (tmp_path / "a.pgm").write_bytes(b"P5 64 64 65535\n" + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(tmp_path / f"a.{kind}")
    expected = torch.tensor((pixels // 256).astype(np.uint8)).expand(3, 64, 64)
    assert torch.equal(read(tmp_path / f"a.{kind}"), expected)


def test_16_bit_tiffs_use_their_bits_and_are_no_negatives_and_no_noise(tmp_path):
    grey = np.random.default_rng(0).integers(0, 65536, (16, 24))
    for name, pixels, expected, options in (
        ("white is zero", 65535 - grey, grey, dict(bits=16, photometric=0)),
        ("white is zero, 8 bits", 255 - (grey >> 8), grey, dict(photometric=0)),
        ("packed 12 bits", grey >> 4, grey, dict(bits=12)),
        ("planes", np.stack([grey, grey // 2, grey // 3], 2), None, dict(bits=16, planes=True)),
    ):
        write_tiff(tmp_path / "a.tif", pixels, **options)
        expected = (pixels if expected is None else expected[..., None].repeat(3, 2)) >> 8
        assert_close(read(tmp_path / "a.tif").permute(1, 2, 0).int(), torch.tensor(expected).int())


@pytest.mark.parametrize("kind", "grey png,rgb png,grey tif,rgb tif,grey pgm,rgb ppm".split(","))
def test_16_bit_images_that_keep_few_levels_are_named(kind, tmp_path, monkeypatch, capsys):
    color, suffix = kind.split()
    shape = (16, 24) if color == "grey" else (16, 24, 3)
    for name, largest, levels in (("ant", 1023, 4), ("bee", 65535, 256)):
        for n in range(3):
            path = tmp_path / name / f"{n}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            values = np.random.default_rng(n).integers(0, largest, shape).astype(np.uint16)
            values.flat[:3] = largest
            if suffix == "tif":
                write_tiff(path, values, bits=16)
            elif suffix == "png":  # Pillow cannot write 16 bits of colours
                lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
                chunks = b"IHDR", struct.pack(">IIBBBBB", 24, 16, 16, 2 * (color == "rgb"), 0, 0, 0)
                chunks = chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")
                path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
                    struct.pack(">I", len(content)) + kind + content
                    + struct.pack(">I", zlib.crc32(kind + content)) for kind, content in chunks))
            else:
                head = b"P5" if color == "grey" else b"P6"
                path.write_bytes(head + b" 24 16 65535\n" + values.astype(">u2").tobytes())
    call = monkeypatch, capsys, data, "--dataset", "imagefolder", "--data-root", tmp_path
    code, out, _ = command(*call, "--decode")
    levels = "below 1,280 of 65,536, which leaves 5" if kind == "rgb ppm" else (  # Pillow rounds it
        "below 1,024 of 65,536, which leaves 4")
    says = f"/ant/.*: its 16-bit values are {levels} of 256 levels: "
    assert code == 1 and "problems: 3" in out and len(re.findall(says, out)) == 3
    files = load_dataset("imagefolder", tmp_path)["train"]
    for read_all in (lambda: files.views(range(2), [0, 1], small_cfg("imagefolder"), 1),
                     lambda: files.hold(small_cfg("imagefolder"), threads=1)):
        data.noted.clear()
        capsys.readouterr()
        read_all()
        assert len(re.findall(says, capsys.readouterr().err)) == 1  # the first of them


def test_jpeg_pixels_match_pillow(tmp_path):
    pixels = photograph(np.random.default_rng(0), 90, 60)
    for options in (dict(quality=90), dict(quality=60, progressive=True), dict(subsampling=0)):
        Image.fromarray(pixels).save(tmp_path / "a.jpg", **options)
        with Image.open(tmp_path / "a.jpg") as image:
            assert_close(read(tmp_path / "a.jpg"), pil_to_tensor(image), atol=1, rtol=0)


def test_unreadable_images_are_named_with_the_reason(tmp_path, imagenet_tree):
    whole = next((imagenet_tree / "train" / "n00000000").iterdir()).read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("none", b""), ("text", b"Sorry.")):
        (tmp_path / name).write_bytes(content)
    Image.fromarray(np.zeros((8, 8), np.int32)).save(tmp_path / "deep", format="TIFF")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "real", format="TIFF")
    reasons = dict(gone="No such file", cut="trunc", none="", text="")
    reasons |= dict.fromkeys(("deep", "real"), "its pixels have 32 bits")
    for name, reason in reasons.items():
        with pytest.raises(BadInput, match=f"/{name} cannot be read as an image .*{reason}"):
            read(tmp_path / name)


def test_images_that_others_read_are_read(tmp_path):
    pixels = Image.fromarray(photograph(np.random.default_rng(0), 200, 200))
    pixels.save(tmp_path / "0.jpg", quality=92)
    whole = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[:-2] + bytes(64))  # the end marker was lost
    pixels.save(tmp_path / "0.png")
    png = (tmp_path / "0.png").read_bytes()
    text = b"tEXtexif\0b'Exif\\x00\\x00MM'"  # malformed EXIF, which a web interface wrote
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    (tmp_path / "1.png").write_bytes(png[:33] + chunk + png[33:])
    pixels.save(tmp_path / "0.webp", lossless=True)
    pixels.save(tmp_path / "1.webp", lossless=True, exif=b"Exif\0\0MM")
    for kind in ("jpg", "png", "webp"):
        files = [os.fsencode(f"{n}.{kind}") for n in (0, 1)]
        files = data.ImageFiles(tmp_path, files, [0, 0], "made", upright=True)
        for size in (48, 160):  # JPEGs are decoded at a quarter, and whole
            good, odd = files.views([0, 1], None, small_cfg("imagefolder", view_size=size), 0)[0]
            assert_close(odd, good, atol=1, rtol=0)


def test_only_the_first_page_is_read_which_is_said_once(tmp_path, capsys):
    pages = [Image.new("L", (16, 16), 60 * n) for n in range(4)]
    data.noted.clear()
    for name in ("0.tif", "1.tif"):
        pages[1].save(tmp_path / name, save_all=True, append_images=pages[2:])
        assert (read(tmp_path / name) == 60).all()
    says = f"{tmp_path}/0.tif has 3 pages or frames: of such files only the first is read\n"
    assert capsys.readouterr().err == says


def test_crops_of_files_match_torchvision(imagenet_tree):
    train = load_dataset("imagenet_lt", imagenet_tree)["train"]
    views = train.views([3, 30, 44], [7, 8, 9], small_cfg("imagenet_lt", view_size=32), 2)
    assert views.shape == (2, 3, 3, 32, 32) and views.dtype == torch.uint8
    cut = transforms.v2.RandomResizedCrop(32, scale=(0.08, 1.0), antialias=True)
    for column, (index, seed) in enumerate([(3, 7), (30, 8), (44, 9)]):
        torch.manual_seed(seed)
        for view in range(2):
            assert torch.equal(views[view, column], cut(read(train.path(index))))
    for size, shorter in ((224, 256), (28, 32)):  # evaluation
        whole = train.views([3], [None], small_cfg("imagenet_lt", view_size=size), 0)
        resized = transforms.v2.Resize(shorter, antialias=True)(read(train.path(3)))
        assert torch.equal(whole[0, 0], transforms.v2.CenterCrop(size)(resized))


@pytest.mark.parametrize("crops, widths", [(2, {400, 200, 100}), (0, {100})])
def test_reduced_decoding_gives_the_same_views(crops, widths, tmp_path, monkeypatch):
    # Red grows from left to right, green downwards: they show the position. Blue is a photograph.
    pixels = photograph(np.random.default_rng(0), 800, 600)
    pixels[..., 0], pixels[..., 1] = np.linspace(0, 255, 800), np.linspace(0, 255, 600)[:, None]
    Image.fromarray(pixels).save(tmp_path / "0.jpg", quality=95, subsampling=0)
    dataset = data.ImageFiles(tmp_path, [b"0.jpg"], [0], "made")
    call = [0] * 20, range(20), small_cfg("imagenet_lt", view_size=48), crops
    reduced, whole, seen = dataset.views(*call).float(), data.decode, set()

    def decode(image, max_downscale):
        seen.add(whole(image, max_downscale).shape[2])
        with Image.open(image.filename) as again:
            return whole(again)

    monkeypatch.setattr(data, "decode", decode)
    differ = reduced - dataset.views(*call).float()
    assert seen == widths
    # Positions agree within half a pixel of the 1/8 image; blue, with deviation 49, stays sharp.
    assert differ[:, :, :2, ::47, ::47].abs().max() < 4 * 255 / 600 + 2
    assert differ[:, :, :2].mean().abs() < 0.2 and 0 < differ[:, :, 2].abs().mean() < 4


def test_reduced_decoding_keeps_the_colours_of_every_chroma_format(tmp_path):
    colors = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    smooth = Image.fromarray(colors).resize((1600, 1600), Image.Resampling.BICUBIC)
    for subsampling in (0, 1, 2):  # 4:4:4, 4:2:2, 4:2:0
        smooth.save(tmp_path / "0.jpg", quality=95, subsampling=subsampling)
        with data.open_image(tmp_path / "0.jpg") as image:
            reduced = data.decode(image, 8.0).float()
        factor = 1600 // reduced.shape[1]
        whole = torch.nn.functional.avg_pool2d(read(tmp_path / "0.jpg").float(), factor)
        assert factor == (4 if subsampling == 1 else 8)
        assert (reduced - whole).abs().mean() < 1.5  # 4:2:2 at 1/8: 8


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_exif_orientation_is_the_same_on_every_path_of_decoding(orientation, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    ramp = np.zeros((128, 256, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(256), np.arange(0, 256, 2)[:, None]
    Image.fromarray(ramp).save(tmp_path / "0.jpg", quality=95, subsampling=0, exif=exif)
    Image.fromarray(ramp).save(tmp_path / "0.png", exif=exif)
    original = data.decode_jpeg
    for size in (28, 112):  # decoded at a quarter, and whole
        cfg, views = small_cfg("imagefolder", view_size=size), []
        for name, decoder in ((b"0.jpg", original), (b"0.jpg", None), (b"0.png", None)):
            monkeypatch.setattr(data, "decode_jpeg", decoder)
            dataset = data.ImageFiles(tmp_path, [name], [0], "made")
            views.append(dataset.views([0], [None], cfg, 0)[0, 0].float())
        for view in views[1:]:
            assert (view - views[0]).abs().mean() < 3  # the ramps show where each pixel is from


def test_held_images_give_the_views_of_their_files_and_are_read_once(tmp_path, capsys):
    generator, names, exif = np.random.default_rng(0), [b"0.png", b"1.png", b"2.png"], Image.Exif()
    exif[0x0112] = 6
    for name, side in ((b"0.png", (400, 300)), (b"1.png", (300, 500)), (b"2.png", (40, 50))):
        image = Image.fromarray(photograph(generator, *side))
        image.save(tmp_path / name.decode(), exif=exif if name == b"1.png" else None)
    cfg = small_cfg("small_imagefolder", view_size=32)
    files = data.ImageFiles(tmp_path, names, [0] * 3, "made", upright=True)
    whole = small_cfg("small_imagefolder", view_size=32, crop_scale=(1.0, 1.0))
    before = [files.views([0, 1, 2], range(3), of, 2).float() for of in (whole, cfg)]
    files.hold(cfg, threads=2)
    assert "reading images: 3 of 3" in capsys.readouterr().err
    assert [image.shape for image in files.pixels] == [(3, 59, 78), (3, 59, 98), (3, 50, 40)]
    for name in names:
        (tmp_path / name.decode()).unlink()
    after = [files.views([0, 1, 2], range(3), of, 2).float() for of in (whole, cfg)]
    differ = [(a - b).abs().mean((0, 2, 3, 4)) for a, b in zip(before, after)]
    assert 0 < differ[0].max() < 5 and differ[0][2] == differ[1][2] == 0  # 2.png is held as it is
    with pytest.raises(BadInput, match="0.png cannot be read as an image"):
        data.ImageFiles(tmp_path, names, [0] * 3, "made").hold(cfg, threads=2)


def test_held_jpegs_are_decoded_at_a_fraction_by_which_crops_grow_little(tmp_path):
    for name, height in (("0.jpg", 224), ("1.jpg", 218)):  # a quarter is 0.95 or 0.93 of 59
        Image.fromarray(photograph(np.random.default_rng(0), 300, height)).save(tmp_path / name)
    files = data.ImageFiles(tmp_path, [b"0.jpg", b"1.jpg"], [0] * 2, "made")
    files.hold(small_cfg("small_imagefolder", view_size=32), threads=1)
    assert [image.shape[1] for image in files.pixels] == [56, 59]


def test_more_images_than_memory_allows_are_not_held(tmp_path, capsys, monkeypatch):
    Image.fromarray(np.zeros((60, 100, 3), np.uint8)).save(tmp_path / "0.png")
    files = data.ImageFiles(tmp_path, [b"0.png"] * 100, [0] * 100, "made")
    kept = 3 * 59 * 59 * 100 / 60 * 100  # bytes; in two processes, within half of the free memory
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for free, says in ((3.9, "would take 0.0 GB, more than the 0.0"), (4.1, "are kept in 0.0 GB")):
        monkeypatch.setattr(data, "free_memory", lambda: free * kept)
        files.hold(small_cfg("small_imagefolder", view_size=32), threads=2)
        assert bool(files.pixels) == (free > 4)
        assert f"100 images {says}" in capsys.readouterr().err


def test_free_memory_is_that_of_the_host_within_the_limits_of_its_containers(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4000000 kB\n",
             "/proc/self/cgroup": "0::/job/step\n",
             "/sys/fs/cgroup/job/step/memory.max": "max\n"}

    def read_text(path):
        if str(path) not in files:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr(data.Path, "read_text", read_text)
    assert data.free_memory() == min(4000000 * 1024, data.os.sysconf("SC_PHYS_PAGES") * 4096)
    job = "/sys/fs/cgroup/job/memory."
    files |= {job + "max": "3000\n", job + "current": "2500", job + "stat": "anon 5\nfile 700\nx 1"}
    assert data.free_memory() == 1200  # what only caches files is free


def test_batches_own_their_memory_as_pinning_requires(imagenet_tree):
    for dataset in (SHIPPED["train"], load_dataset("imagenet_lt", imagenet_tree)["train"]):
        for crops in (0, 1, 2):
            views = dataset.views([0, 1], [5, 6], small_cfg("imagenet_lt"), crops)
            assert all(views.stride()) and views.numel() == views.untyped_storage().nbytes()


def test_epochs_contain_every_image_at_most_once_and_differ():
    batches = [indices for indices, _ in Batches(torch.zeros(50).long(), 8, 3, seed=0)]
    assert len(batches) == 18 and all(len(batch) == 8 for batch in batches)
    epochs = [sum(batches[i : i + 6], []) for i in (0, 6, 12)]
    assert all(len(set(epoch)) == 48 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("balanced", [False, True])
def test_batches_resume_at_any_step_and_are_split_over_ranks(balanced):
    labels, options = torch.arange(60) % 4, dict(seed=3, balanced=balanced)
    whole = list(Batches(labels, 10, 4, **options))
    assert list(Batches(labels, 10, 4, start=7, **options)) == whole[7:]
    ranks = [list(Batches(labels, 10, 4, rank=r, world=2, **options)) for r in range(2)]
    assert [(a[0] + b[0], a[1] + b[1]) for a, b in zip(*ranks)] == whole  # the crops' seeds as well
    assert len({seed for _, seeds in whole for seed in seeds}) == 240
    assert list(Batches(labels, 10, 4, seed=4, balanced=balanced)) != whole
    for batch_size, world in ((61, 1), (9, 2)):
        with pytest.raises(BadInput, match=f"size {batch_size} must be a multiple of {world} "):
            Batches(labels, batch_size, 1, world=world, **options)


def test_class_balanced_sampling_draws_classes_and_their_images_uniformly():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    batches = Batches(labels, 500, 20, seed=0, balanced=True)
    counts = torch.tensor([indices for indices, _ in batches]).flatten().bincount()
    assert all(abs(part.sum() - 20000 / 3) < 200 for part in counts.split([900, 90, 10]))
    assert counts[990:].min() > 0.85 * counts[990:].max()


# ----------------------------------------------------------------------------- views and patches


def test_random_boxes_match_random_resized_crop_in_distribution():
    torch.manual_seed(0)
    boxes = data.random_boxes(drawn(20000), 224, (0.08, 1.0))
    sides = boxes[:, 2:] - boxes[:, :2]
    area, ratio = sides.prod(1) / 224**2, sides[:, 0] / sides[:, 1]
    assert boxes.min() >= 0 and boxes.max() <= 224.001
    assert 0.0799 < area.min() < 0.09 and 0.95 < area.max() <= 1
    assert 0.7499 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.3334
    image, draw = torch.zeros(1, 224, 224), transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([draw(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in boxes]).float()
    ours = torch.cat([boxes[:, :2].flip(1), sides.flip(1)], dim=1)  # top, left, height, width
    assert_close(ours.mean(0), theirs.mean(0), atol=2, rtol=0)
    assert_close(ours.std(0), theirs.std(0), atol=2, rtol=0)


def test_crop_resizes_box_i_of_image_i_with_half_pixel_centres():
    # A crop of a ramp must give the coordinates of its pixels' centres; image 1 is negated.
    ramp = torch.arange(28.0).add(0.5).expand(1, 1, 28, 28)
    boxes = [[4, 3, 20, 27], [1, 0.5, 27, 27], [5, 5, 13, 13], [2.5, 1, 26.5, 9]]
    out = crop(torch.cat([ramp, -ramp]), torch.tensor(boxes), 8)
    for sign, (left, _, right, _), row in zip((1, -1, 1, -1), boxes, out[:, 0, 3]):
        centres = left + (torch.arange(8) + 0.5) * (right - left) / 8
        assert_close(row, sign * centres, atol=1e-3, rtol=0)


def test_each_colour_change_matches_torchvision():
    torch.manual_seed(0)
    images = 0.3 + 0.3 * torch.rand(50, 3, 16, 16)  # away from the clamps
    for position, name in enumerate(("brightness", "contrast", "saturation")):
        jitter = [0.3 * (position == n) for n in range(4)]
        matrices = color_matrices(images.mean((2, 3)), drawn(50), jitter)
        factors = (matrices[:, 0, 0] - matrices[:, 1, 0]).tolist()  # for all three changes
        assert 0.7 <= min(factors) < 0.75 and 1.25 < max(factors) <= 1.3
        for image, factor, ours in zip(images, factors, data.color_transform(images, matrices)):
            assert_close(ours, getattr(TF, f"adjust_{name}")(image, factor), atol=2e-3, rtol=0)
    matrices = color_matrices(images.mean((2, 3)), drawn(50), [0] * 4, 1, 1)
    grey = data.color_transform(images, matrices)
    assert_close(grey, TF.rgb_to_grayscale(images, 3), atol=1e-3, rtol=0)


def test_hue_keeps_grey_luma_and_chroma_and_turns_red_both_ways():
    turn = color_matrices(torch.zeros(50, 3), drawn(50), (0, 0, 0, 0.1))[:, :, :3]
    colors, to_yiq = torch.tensor([[1.0, 1, 1], [1, 0, 0]]).T, torch.tensor(data.RGB_TO_YIQ).float()
    (y, *iq), before = (to_yiq @ turn @ colors).unbind(1), to_yiq @ colors
    assert_close(y, before[0].expand(50, 2), atol=4e-3, rtol=0)
    assert_close(torch.hypot(*iq), before[1:].norm(dim=0).expand(50, 2), atol=4e-3, rtol=0)
    green, blue = (turn @ colors)[:, 1:, 1].T
    assert (green > 0.1).any() and (blue > 0.1).any()


def test_colour_changes_are_applied_with_their_probabilities():
    matrices = color_matrices(torch.rand(4000, 3), drawn(4000), [0.4] * 4, jitter_p=0.8, grey_p=0.3)
    unchanged = (matrices == torch.eye(3, 4)).flatten(1).all(1).sum()
    assert abs((matrices[:, 0] == matrices[:, 1]).all(1).sum() - 4000 * 0.3) < 100
    assert abs(unchanged - 4000 * 0.2 * 0.7) < 80


@pytest.mark.parametrize("tint, tolerance", [((1, 1, 1), 0.01), ((1, 0.2, 0.3), 0.04)])
def test_colours_match_torchvision_in_distribution(tint, tolerance):
    def moments(x):
        return torch.stack([x.mean((0, 2, 3)), x.std((0, 2, 3)), x.mean((2, 3)).std(0)])

    torch.manual_seed(0)
    cfg = small_cfg("imagenet_lt")
    jitter, jitter_p, grey_p = cfg.query_jitter, cfg.query_jitter_p, cfg.grey_p
    image = photograph(np.random.default_rng(0), 48, 48) / 255 * tint
    images = torch.tensor(image).permute(2, 0, 1).float().expand(1000, -1, -1, -1)
    matrices = color_matrices(images.mean((2, 3)), drawn(1000), jitter, jitter_p, grey_p)
    change = transforms.RandomApply([transforms.ColorJitter(*jitter)], jitter_p)
    grey = transforms.RandomGrayscale(grey_p)
    theirs = torch.stack([grey(change(image)) for image in images])
    ours = data.color_transform(images, matrices)
    assert_close(moments(ours), moments(theirs), atol=tolerance, rtol=0)


def test_blur_matches_torchvision_and_skips_other_images():
    torch.manual_seed(0)
    images = torch.rand(40, 3, 32, 32)
    blurred = data.random_blur(images, drawn(40), 1.0, sigma=(1.5, 1.5))
    assert_close(blurred, TF.gaussian_blur(images, [9, 9], [1.5, 1.5]), atol=0.01, rtol=0)
    some = data.random_blur(images, drawn(40), 0.5)
    assert 8 < ((some - images).abs().amax((1, 2, 3)) < 1e-6).sum() < 32


def test_patches_are_cut_from_the_query_view_before_colour_changes():
    images = SHIPPED["train"].images[::100]
    cfg = small_cfg("fashion_mnist_lt", query_jitter=(0,) * 4, grey_p=0.0, patches=5)
    query, boxes, patches = query_views(images, drawn(25), cfg, cfg.patches)
    assert query.shape == (25, 3, 20, 20) and boxes.shape == (5, 25, 4)
    assert patches.shape == (5, 25, 3, 8, 8)
    expected = crop(query, boxes.flatten(0, 1), 8).view_as(patches)
    straight = (patches - expected).abs().amax((2, 3, 4)) < 1e-4
    flipped = (patches.flip(4) - expected).abs().amax((2, 3, 4)) < 1e-4
    assert (straight | flipped).all() and 0.3 < straight.float().mean() < 0.7
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1) / 20**2
    assert 0.0499 <= area.min() and area.max() <= 0.6001
    flat = torch.full((9, 1, 28, 28), 128).byte()  # each patch gets its own colour changes
    jittered = small_cfg("fashion_mnist_lt", query_jitter_p=1.0)
    _, _, patches = query_views(flat, drawn(9), jittered, 2)
    assert ((patches[0] - patches[1]).abs().amax((1, 2, 3)) > 0.01).float().mean() > 0.5


def test_views_follow_their_settings_and_are_standardised():
    whole = stage2.evaluation_view(SHIPPED["train"].images[None], small_cfg("fashion_mnist_lt"))
    assert whole.mean().abs() < 0.1 and (whole.std() - 1).abs() < 0.1
    red = torch.tensor([200, 20, 40]).byte().view(1, 3, 1, 1).expand(9, 3, 20, 20)
    cfg = small_cfg("cifar10_lt", grey_p=1.0, query_jitter_p=0.0, key_jitter=(0,) * 4)
    mean, std = (torch.tensor(values)[:, None, None] for values in (cfg.mean, cfg.std))
    view, boxes, patches = query_views(red, drawn(9), cfg)
    assert boxes is None and patches is None
    assert_close(view * std + mean, TF.rgb_to_grayscale(red / 255, 3), atol=1e-3, rtol=0)
    key = data.key_view(red, drawn(9), cfg)
    assert_close(key * std + mean, red / 255, atol=1e-5, rtol=0)  # never grey


@pytest.mark.parametrize("rows", [slice(8, 16), torch.arange(24).flip(0)[::3]])
@pytest.mark.parametrize("dataset", ["fashion_mnist_lt", "imagenet_lt"])
def test_views_of_an_image_do_not_depend_on_the_processes(dataset, rows):
    def views(rows=slice(None), seed=0):
        of = images[rows], drawn(24, rows, seed), small_cfg(dataset)
        query, boxes, patches = query_views(*of, 3)
        return query, boxes.transpose(0, 1), patches.transpose(0, 1), data.key_view(*of)

    images = torch.randint(256, (24, 3, 20, 20)).byte()
    for whole, share, again, other in zip(views(), views(rows), views(), views(seed=1)):
        assert_close(share, whole[rows])
        assert torch.equal(again, whole) and not torch.equal(other, whole)


def test_drawn_views_show_what_the_networks_see(tmp_path):
    # Red grows to the right, green downwards: colours show where a view or a patch is from.
    ramp = torch.linspace(0, 200, 32).byte().expand(32, 32)
    images = torch.stack([ramp, ramp.T, torch.full_like(ramp, 90)]).expand(8, 3, 32, 32)
    still = dict(query_jitter_p=0.0, grey_p=0.0, key_jitter=(0,) * 4, view_size=32, seed=5)
    still |= dict(loss="dscl")
    dataset = data.ImageArrays(images, torch.zeros(8).long(), "made")
    train.draw_views(tmp_path / "views", dataset, small_cfg("cifar10_lt", **still))
    sheet = read(tmp_path / "views").float()
    assert sheet.shape == (3, 6 * 130 + 2, 5 * 130 + 2)
    cells = sheet[:, 2:, 2:].unfold(1, 128, 130).unfold(2, 128, 130).permute(1, 2, 0, 3, 4)
    for view, boxed, key, *patches in cells:
        assert (view[2] - 90).abs().max() <= 1 and (key[2] - 90).abs().max() <= 1
        assert not torch.equal(view, key)
        for patch, color in zip(patches, ([255, 0, 0], [0, 255, 0])):
            line = (boxed == torch.tensor(color)[:, None, None]).all(0).nonzero()
            (top, left), (bottom, right) = line.min(0).values, line.max(0).values
            seen = view[:, top:bottom, left:right].mean((1, 2))
            assert_close(seen, patch.mean((1, 2)), atol=4, rtol=0)


# ---------------------------------------------------------------------- commands and arguments


def test_check_reports_counts_and_unusable_files(tmp_path, imagenet_tree, monkeypatch, capsys):
    root = tmp_path / "copy"
    call = monkeypatch, capsys, data, "--dataset", "imagenet_lt", "--data-root", root
    shutil.copytree(imagenet_tree, root)
    (root / "train/n00000002/train_1.JPEG").unlink()
    cut = root / "val/n00000001/test_0.JPEG"
    cut.write_bytes(cut.read_bytes()[:700])  # of about 1,000 bytes: the header is whole
    with open(root / "ImageNet_LT_val.txt", "a") as file:
        file.write("train/n00000003/train_0.JPEG 3\n")  # also in train
    with open(root / "ImageNet_LT_test.txt", "a") as file:
        file.write((root / "ImageNet_LT_test.txt").read_text().splitlines()[0] + "\n")  # twice
    code, out, _ = command(*call)
    for said in (
        "train: 45 images, 4 of 4 classes, of 24 to 3 images each: 0 many-, 1 medium-, 3 few-shot",
        "val: 9 images, 4 of 4 classes, of 3 to 2 images each\n",
        "ImageNet_LT_train.txt: 45 images, not the published 115,846", "problems: 6\n",
        "test_0.JPEG of test equals ",
        f"{root}/train/n00000002/train_1.JPEG cannot be read as an image (No such file",
        "n00000003/train_0.JPEG of val equals ",
    ):
        assert said in out
    assert code == 1 and f"{cut} cannot be read" not in out
    code, out, _ = command(*call, "--decode")
    assert code == 1 and "problems: 7\n" in out and f"{cut} cannot be read" in out
    # Counts and classes are printed even if all images are missing.
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "val")
    code, out, _ = command(*call)
    assert code == 1 and "train: 45 images" in out and "problems: 70, the first 20\n" in out


def test_check_of_the_shipped_set_passes_from_any_directory(tmp_path):
    check = [sys.executable, data.HERE / "data.py"]
    done = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stderr.startswith("10 classes: T-shirt, Trouser, ")
    assert "train: 2,478 images" in done.stdout
    assert "0 test images are also in train" in done.stdout


@pytest.mark.parametrize(
    "usable, quota, processes, workers",
    [(128, "max", 8, 15), (16, "max", 4, 3), (1, "max", 2, 1), (64, "1000000", 2, 4)],
)
def test_workers_leave_a_core_to_each_process(usable, quota, processes, workers, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(usable)))
    monkeypatch.setattr(train.Path, "read_text", lambda path: f"{quota} 100000\n")  # of a container
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert train.cores() == workers


def test_bad_input_prints_one_line_and_exits_with_2(monkeypatch, capsys):
    for arguments, says in (
        ("--dataset imagnet_lt", "--dataset: invalid choice: 'imagnet_lt'"),
        ("--downloa", "unrecognized arguments: --downloa"),  # no abbreviations
        ("--download", "--download are for cifar10_lt and cifar100_lt, not fashion_mnist_lt"),
        ("--dataset cifar10_lt --imbalance 0.5", "--imbalance: must be from 1 to 10000, got 0.5"),
    ):
        code, out, said = command(monkeypatch, capsys, data, *arguments.split())
        assert code == 2 and not out and said.count("\n") == 1
        assert said.startswith("data.py: error: ") and says in said


@pytest.mark.parametrize("dataset", data.DATASETS)
def test_help_shows_the_settings_of_the_data_set(dataset, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    for script, tables in (
        (data, []), (train, [train.VIEWS, train.STAGE1]), (stage2, [train.STAGE2])
    ):
        code, out, said = command(monkeypatch, capsys, script, "--dataset", dataset, "--help")
        assert code == 0 and not said and "python " in out
        where = data.HERE / "tests" if dataset == "fashion_mnist_lt" else f"datasets/{dataset}"
        assert f"directory of the images (default: {where})" in out
        assert ("--imbalance" in out) == dataset.startswith("cifar")
        texts = dict(re.findall(r"^  --([a-z-]+)((?:.|\n(?!  -))*)", out, re.MULTILINE))
        for name, value in vars(cfg_of(dataset, *tables)).items():
            if name == "dataset":
                continue
            value = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
            shown = re.findall(r"\(default: .*?\)", texts[name.replace("_", "-")])
            assert shown == [f"(default: {value})"]


def test_threads_have_ended_when_their_pool_is_left():
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), data.thread_pool(2) as pool:
        for number in pool.imap(lambda n: time.sleep(0.01) or n, range(1000), 4):
            if number == 5:
                raise KeyboardInterrupt
    assert threading.active_count() == before
