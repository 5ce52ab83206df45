"""Data sets with their recipes, long-tailed subsets, samplers, and the views the method trains on.

DATASETS is the one place where a data set's settings stand; a command line flag wins over it.

    python data.py --dataset imagenet_lt --data-root DIR             # check a set before training
    python data.py --dataset cifar100_lt --data-root DIR --download  # fetch it as well

prints what every split holds and the problems found; exit code 1 if there are any.
"""

import json
import math
import os
import sys
import zipfile
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.ops import roi_align
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

HERE = Path(__file__).resolve().parent

# Small pictures, held in memory; whole ones go to the device and are cut there. Everything but tau,
# alpha and the boxes is ours, chosen on held-out pictures of Fashion-MNIST-LT.
SMALL = dict(
    cut="device",
    workers=0,
    crop_scale=(0.3, 1.0),  # of the picture's area
    query_jitter=(0.2, 0.2, 0.2, 0.1),  # brightness, contrast, saturation, hue
    query_jitter_p=0.8,
    key_jitter=(0.2, 0.2, 0.2, 0.0),
    grey_p=0.2,
    blur_p=0.0,  # 28 pixels are blurred enough
    stage1=dict(
        arch="resnet_small",
        experts=1,
        expert_width=1.0,
        pretrained="none",
        view_size=20,
        patch_size=8,
        patch_scale=(0.05, 0.6),  # of the query view's area
        epochs=120,
        warmup_epochs=5,
        batch_size=128,
        lr=0.3,
        weight_decay=5e-4,
        queue_size=256,
        momentum_encoder=0.99,
        temperature=0.07,
        alpha=0.1,
        pbsd_weight=0.3,
        patches=2,
        knn_epochs=10,
    ),
    stage2=dict(
        epochs=20,
        batch_size=256,
        lr=10.0,
        weight_decay=5e-4,
        milestones=(0.5, 0.75),  # of the epochs; the learning rate falls to a tenth at each
        augment=False,  # heavy crops of 28 pixels shift what a small frozen backbone gives
        bn="eval",
    ),
)

# Photographs on disk, decoded and cut by workers. The settings of ImageNet-LT in the paper and its
# published code (sections 5 and 6 of the method), where nothing else is said.
PHOTOGRAPHS = dict(
    cut="worker",
    workers=None,  # the machine's cores, shared among its processes
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    crop_scale=(0.08, 1.0),
    query_jitter=(0.4, 0.4, 0.4, 0.1),
    query_jitter_p=0.8,
    key_jitter=(0.4, 0.4, 0.4, 0.0),
    grey_p=0.2,
    blur_p=0.5,
    stage1=dict(
        arch="resnet50",
        experts=1,
        expert_width=1.0,
        pretrained="none",
        view_size=224,
        patch_size=64,
        patch_scale=(0.05, 0.6),
        epochs=200,
        warmup_epochs=10,
        batch_size=256,
        lr=0.1,
        weight_decay=5e-4,
        queue_size=65536,
        momentum_encoder=0.999,
        temperature=0.07,
        alpha=0.1,
        pbsd_weight=1.5,
        patches=5,
        knn_epochs=0,  # it would decode all of them
    ),
    stage2=dict(
        epochs=40,
        batch_size=2048,
        lr=10.0,
        weight_decay=0.0,
        milestones=(0.5, 0.75),
        augment=True,
        bn="eval",  # ours, as patches leave the running statistics alone; published: train
    ),
)


def row(base, stage1={}, stage2={}, **settings):
    """A data set's recipe: its kind's, and what differs from that."""
    stages = dict(stage1=base["stage1"] | stage1, stage2=base["stage2"] | stage2)
    return base | settings | stages


DATASETS = {
    # 28 x 28 grey, 1000 to 10 pictures a class; a recipe for five minutes on two CPU cores.
    "fashion_mnist_lt": row(
        SMALL,
        source="npz",
        root=HERE / "tests",
        imbalance=100.0,  # the largest class over the smallest
        names="T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle-boot".split(),
        mean=(0.286,) * 3,
        std=(0.353,) * 3,
    ),
    # 32 x 32; --imbalance. The paper has no CIFAR: all is ours, carried over and not tuned.
    "cifar10_lt": row(
        SMALL,
        source="cifar",
        imbalance=100.0,
        mean=(0.491, 0.482, 0.447),
        std=(0.247, 0.243, 0.262),
        query_jitter=(0.4, 0.4, 0.4, 0.1),
        key_jitter=(0.4, 0.4, 0.4, 0.0),
        stage1=dict(view_size=32, patch_size=16, epochs=200, queue_size=1024, knn_epochs=0),
    ),
    "cifar100_lt": row(
        SMALL,
        source="cifar",
        imbalance=100.0,
        mean=(0.507, 0.487, 0.441),
        std=(0.267, 0.256, 0.276),
        query_jitter=(0.4, 0.4, 0.4, 0.1),
        key_jitter=(0.4, 0.4, 0.4, 0.0),
        stage1=dict(view_size=32, patch_size=16, epochs=200, queue_size=1024, knn_epochs=0),
    ),
    "imagenet_lt": row(
        PHOTOGRAPHS,
        source="index",
        index="ImageNet_LT_{}.txt",
        published_at="github.com/zhmiao/OpenLongTailRecognition-OLTR",
        published=dict(train=115846, val=20000, test=50000),
    ),
    # Starts from ImageNet's weights, as the field does. Epochs, lr and K are ours, not tuned: a
    # short fine-tuning, and a queue that holds half the training set, as on ImageNet-LT.
    "places_lt": row(
        PHOTOGRAPHS,
        source="index",
        index="Places_LT_{}.txt",
        published_at="github.com/zhmiao/OpenLongTailRecognition-OLTR",
        published=dict(train=62500, val=7300, test=36500),
        stage1=dict(
            arch="resnet152",
            pretrained="IMAGENET1K_V1",
            epochs=30,
            warmup_epochs=2,
            lr=0.05,
            queue_size=32768,
        ),
    ),
    # Half the epochs over four times the pictures; ours, as is the rest, not tuned.
    "inaturalist18": row(
        PHOTOGRAPHS,
        source="index",
        index="iNaturalist18_{}.txt",
        annotations="{}2018.json",  # the official ones serve as well
        published_at="github.com/visipedia/inat_comp (train2018.json, val2018.json)",
        published=dict(train=437513, val=24426),  # there is no test split
        stage1=dict(epochs=100, warmup_epochs=5),
    ),
    # Pictures of your own, DATA_ROOT/{train,val,test}/<class>/*. All is ours, not tuned. K is the
    # power of two below 0.6 of the training set, ImageNet-LT's share, and at most 65536.
    "imagefolder": row(
        PHOTOGRAPHS,
        source="folder",
        by_size=(  # from this many training pictures on: what differs
            (
                0,
                dict(
                    stage1=dict(
                        arch="resnet18", epochs=400, batch_size=128, lr=0.05, momentum_encoder=0.99
                    ),
                    stage2=dict(batch_size=256),
                ),
            ),
            (20_000, dict()),
            (300_000, dict(stage1=dict(epochs=100, warmup_epochs=5))),
        ),
    ),
}


class BadInput(Exception):
    """Something the user gave cannot be used; the message says what and how to mend it."""


def recipe_of(name, pictures=0):
    """The recipe of a data set; imagefolder's depends on the number of training pictures."""
    recipe = DATASETS[name]
    if "by_size" in recipe:
        changes = [changes for least, changes in recipe["by_size"] if pictures >= least][-1]
        recipe = row(recipe, **changes)
        queue_size = 2 ** int(math.log2(max(1, 0.6 * pictures)))
        recipe["stage1"]["queue_size"] = min(queue_size, recipe["stage1"]["queue_size"])
    return recipe


# ------------------------------------------------------------------------------ long-tailed sets


def long_tailed_counts(largest, classes, factor):
    """Pictures a class, n_c = int(largest * factor^(c / (classes - 1))); factor is min/max."""
    return [int(largest * factor ** (c / (classes - 1))) for c in range(classes)]


def long_tailed_counts_of(total, classes, factor):
    """long_tailed_counts of the largest class with which all of them have at most `total`."""
    largest = 1
    while sum(long_tailed_counts(largest + 1, classes, factor)) <= total:
        largest += 1
    return long_tailed_counts(largest, classes, factor)


def long_tailed_indices(labels, counts, seed=0):
    """Indices [classes][n_c] of the field's subset: class by class, shuffle and take the first n_c.

    numpy's legacy generator with seed 0 is what CIFAR-LT papers share. What stays unused of class c
    follows in the shuffled order as a second list.
    """
    random = np.random.RandomState(seed)
    chosen, unused = [], []
    for label, count in enumerate(counts):
        indices = np.flatnonzero(np.asarray(labels) == label)
        random.shuffle(indices)
        chosen.append(indices[:count])
        unused.append(indices[count:])
    return chosen, unused


def shot_groups(counts):
    """Classes of each group by training pictures: many > 100, medium 20 to 100, few < 20.

    counts [classes]; returns {"many": mask [classes], "medium": ..., "few": ...}.
    """
    counts = torch.as_tensor(counts)
    many, few = counts > 100, counts < 20
    return {"many": many, "medium": ~many & ~few, "few": few}


class Pictures:
    """Pictures in memory: images uint8 [N, C, H, W], labels int64 [N]."""

    names = None  # of the classes

    def __init__(self, images, labels, origin):
        self.images, self.labels, self.origin = images, labels, origin

    def __len__(self):
        return len(self.labels)

    def subset(self, rows):
        return Pictures(self.images[rows], self.labels[rows], self.origin)

    def views(self, indices, seeds, recipe, crops):
        """The whole pictures, once, uint8 [1, B, C, H, W]: the device will cut them."""
        return self.images[indices][None]


class ImageFiles:
    """Pictures on disk: their paths below root, labels int64 [N] and, maybe, names of classes.

    Paths are one array of bytes, so that workers share it: no Python object a picture.
    """

    def __init__(self, root, paths, labels, origin, names=None):
        self.root, self.origin, self.names = root, origin, names
        self.paths, self.labels = np.asarray(paths), torch.as_tensor(labels)

    def __len__(self):
        return len(self.labels)

    def subset(self, rows, origin=None):
        paths, labels = self.paths[rows], self.labels[rows]
        return ImageFiles(self.root, paths, labels, origin or self.origin, self.names)

    def path(self, index):
        return self.root / os.fsdecode(self.paths[index])

    def views(self, indices, seeds, recipe, crops):
        """`crops` random resized crops of each, or its centre if 0: uint8 [crops or 1, B, 3, V, V].

        seeds [B] decide about random crops. BadInput names a file that cannot be read.
        """
        views = []
        for row, index in enumerate(indices):
            with open_picture(self.path(index)) as image:
                if crops:
                    # torch.manual_seed would seed GPUs as well, which no worker may touch.
                    torch.default_generator.manual_seed(seeds[row])
                    views += random_crops(image, recipe["crop_scale"], recipe["view_size"], crops)
                else:
                    views.append(central_crop(image, recipe["view_size"]))
        # Collated into shared memory when a worker does it; channels last, as pictures are decoded.
        views = default_collate([view.permute(1, 2, 0) for view in views])
        return views.unflatten(0, (len(indices), -1)).permute(1, 0, 4, 2, 3)


@contextmanager
def open_picture(path):
    """A picture file, open and not yet decoded; BadInput names it when it cannot be read."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow raises many kinds on broken files
        reason = getattr(error, "strerror", None) or error
        raise BadInput(
            f"{path} cannot be read as a picture ({reason}); mend it, or drop it from the data set"
        ) from None


def decode(image, reducible=1.0):
    """An open picture as uint8 [3, H, W]; grey, CMYK, palette and alpha become RGB.

    A JPEG that may shrink by the factor `reducible` is decoded at half, a quarter or an eighth of
    its size, as far as that allows: the resize that follows never enlarges what was thrown away.
    """
    if image.mode[0] in "IF":
        raise ValueError(f"pixels of mode {image.mode}; only 8 bits a channel are understood")
    if reducible >= 2:
        image.draft("RGB", [math.ceil(side / reducible) for side in image.size])
    return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))


def random_crops(image, scale, size, count):
    """Random resized crops of an open picture: `count` uint8 views [3, size, size]."""
    width = image.width
    boxes = [RandomResizedCrop.get_params(image, scale, RATIO) for _ in range(count)]
    pixels = decode(image, min(min(box[2:]) for box in boxes) / size)
    shrunk = pixels.shape[2] / width
    views = []
    for box in boxes:
        top, left, height, width = (round(side * shrunk) for side in box)
        region = pixels[None, :, top : top + height, left : left + width]
        # From a slice the resize makes a contiguous copy of its own, at twice the time of this.
        region = region.contiguous(memory_format=torch.channels_last)
        views.append(resize(region, [size, size], antialias=True)[0])
    return views


def central_crop(image, size):
    """Evaluation's view of an open picture: shorter side 256, centre 224, in proportion to size."""
    shorter = size * 256 // 224
    pixels = decode(image, min(image.size) / shorter)
    return center_crop(resize(pixels, [shorter], antialias=True), [size, size])


def load_dataset(name, root=None, index_dir=None, imbalance=None):
    """A data set's splits, {"train": Pictures or ImageFiles, "val": ..., "test": ...}.

    CIFAR-LT has no val, iNaturalist no test. BadInput if a file is missing or broken, if a label is
    skipped or a class has no picture in a split.
    """
    sets, problems = read_dataset(name, root, index_dir, imbalance)
    for pictures in sets.values():
        if isinstance(pictures, ImageFiles) and not problems and not pictures.path(0).is_file():
            problems.append(
                f"{pictures.path(0)} not found, the first picture of {pictures.origin}: "
                "--data-root must be the directory that its paths start from"
            )
    if problems:
        raise BadInput(problems[0])
    return sets


def identity(sets):
    """What tells data sets apart, by split: pictures, classes and a digest of all of them."""
    described = {}
    for split, pictures in sets.items():
        content = pictures.paths if isinstance(pictures, ImageFiles) else pictures.images.numpy()
        digest = sha256(np.ascontiguousarray(content))
        digest.update(pictures.labels.numpy())
        described[split] = dict(
            pictures=len(pictures),
            classes=pictures.names or int(pictures.labels.max()) + 1,
            digest=digest.hexdigest()[:16],
        )
    return described


def read_dataset(name, root=None, index_dir=None, imbalance=None, download=False):
    """The splits that can be read, and messages about what is wrong."""
    recipe = DATASETS[name]
    root = root or recipe.get("root")
    if root is None:
        raise BadInput(f"--dataset {name} needs --data-root, the directory of its pictures")
    if not Path(root).is_dir():
        raise BadInput(f"{root} is not a directory: --data-root must be that of {name}'s pictures")
    if imbalance and "imbalance" not in recipe:
        raise BadInput(f"--imbalance is for CIFAR and Fashion-MNIST, not for {name}")
    if download and recipe["source"] != "cifar":
        raise BadInput(f"--download is for CIFAR, not for {name}")
    root, problems = Path(root), []
    if recipe["source"] == "npz":
        sets = read_npz(
            root / f"{name}.npz", imbalance if imbalance != recipe["imbalance"] else None
        )
    elif recipe["source"] == "cifar":
        sets = read_cifar(name, root, imbalance or recipe["imbalance"], download)
    elif recipe["source"] == "folder":
        sets = read_folders(root)
    else:
        sets = {}
        for split in recipe["published"]:
            try:
                sets[split] = read_index(recipe, split, root, Path(index_dir or root))
            except BadInput as error:
                problems.append(str(error))
    return sets, problems + wrong_labels(sets)


def wrong_labels(sets):
    """Messages about labels that training does not know and classes without a picture."""
    problems, classes = [], None
    for pictures in sets.values():
        counts = pictures.labels.bincount(minlength=classes or 0)
        classes = classes or len(counts)  # those of the first split, train
        if len(counts) > classes:
            problems.append(
                f"{pictures.origin}: label {len(counts) - 1} is none of the training set's, "
                f"0 to {classes - 1}"
            )
        empty = (counts[:classes] == 0).nonzero()[:, 0].tolist()
        if empty:
            name = f" ({pictures.names[empty[0]]})" if pictures.names else ""
            more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
            problems.append(
                f"{pictures.origin}: no picture of class {empty[0]}{name}{more}; "
                "every class needs one in every split, and labels run from 0 without a gap"
            )
    return problems


def read_npz(path, imbalance=None):
    """The arrays {train,val,test}_{images,labels} of a file that ships with the repository.

    With an `imbalance`, the training pictures are about as many, but distributed so: from those of
    the shipped set, and where a class needs more, from the arrays more_{images,labels}.
    """
    if not path.is_file():
        raise BadInput(f"{path} not found: --data-root must be the directory of {path.name}")
    try:
        with np.load(path) as arrays:
            sets = {
                split: Pictures(
                    torch.from_numpy(arrays[f"{split}_images"])[:, None],
                    torch.from_numpy(arrays[f"{split}_labels"]).long(),
                    path,
                )
                for split in ("train", "val", "test", *["more"] * bool(imbalance))
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(
            f"{path} cannot be read ({error}); get it again from the repository"
        ) from None
    if imbalance:
        train, more = sets["train"], sets.pop("more")
        classes = len(train.labels.bincount())
        images, labels = (
            torch.cat([train.images, more.images]),
            torch.cat([train.labels, more.labels]),
        )
        rows = []
        for label, count in enumerate(long_tailed_counts_of(len(train), classes, 1 / imbalance)):
            rows.append((labels == label).nonzero()[:count, 0])
            if len(rows[-1]) < count:
                raise BadInput(
                    f"--imbalance {imbalance:g} takes {count} pictures of class {label} and {path} "
                    f"has {len(rows[-1])}: at most 100 can be had"
                )
        rows = torch.cat(rows)
        sets["train"] = Pictures(images[rows], labels[rows], f"{path}, {imbalance:g} to 1")
    return sets


def read_cifar(name, root, imbalance, download):
    """CIFAR-10/100-LT: the field's subset of the training pictures, and the whole test set."""
    cifar = {"cifar10_lt": CIFAR10, "cifar100_lt": CIFAR100}[name]
    try:
        whole = [cifar(root, train=train, download=download) for train in (True, False)]
    except RuntimeError:
        raise BadInput(
            f"{root} holds no complete {cifar.base_folder}: python data.py --dataset {name} "
            f"--data-root {root} --download fetches it"
        ) from None
    except OSError as error:
        raise BadInput(
            f"the download of {cifar.url} failed ({getattr(error, 'reason', error)}); "
            f"unpack it in {root} by hand"
        ) from None
    train, test = whole
    classes = len(train.classes)
    counts = long_tailed_counts(len(train) // classes, classes, 1 / imbalance)
    chosen = np.concatenate(long_tailed_indices(train.targets, counts)[0])
    return {
        split: Pictures(
            torch.from_numpy(pictures.data[rows]).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(pictures.targets)[rows],
            f"{root / cifar.base_folder}, {split}",
        )
        for split, pictures, rows in (("train", train, chosen), ("test", test, slice(None)))
    }


def read_index(recipe, split, root, directory):
    """A split from its index file, lines "relative/path label", or iNaturalist's annotations."""
    path = directory / recipe["index"].format(split)
    annotations = directory / recipe.get("annotations", "").format(split)
    if path.is_file():
        lines = path.read_bytes().splitlines()
        entries = (line.rsplit(None, 1) for line in lines)
    elif annotations.is_file():
        path, lines = annotations, read_annotations(annotations)
        entries = lines
    else:
        raise BadInput(
            f"{path} not found; it is published at {recipe['published_at']}, and --index-dir names "
            "the directory where it is"
        )
    paths, labels = [], []
    for number, entry in enumerate(entries, 1):
        try:
            name, label = entry
            label = int(label)
        except ValueError:
            line = b" ".join(entry).decode(errors="replace")
            raise BadInput(f'{path}:{number}: {line!r} is not "relative/path label"') from None
        if not 0 <= label < len(lines):
            raise BadInput(
                f"{path}:{number}: label {label} in a file of {len(lines)} pictures; "
                "labels run from 0 without a gap"
            )
        if name[:1] == b"/" or (b".." in name and b".." in name.split(b"/")):
            raise BadInput(f"{path}:{number}: {os.fsdecode(name)} leaves --data-root")
        paths.append(name)
        labels.append(label)
    if not paths:
        raise BadInput(f"{path} is empty")
    return ImageFiles(root, paths, labels, path)


def read_annotations(path):
    """[path, label] of every picture in iNaturalist's train2018.json or val2018.json."""
    try:
        content = json.loads(path.read_bytes())
        label_of = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
        return [(os.fsencode(i["file_name"]), label_of[i["id"]]) for i in content["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path} is not iNaturalist's annotation file ({type(error).__name__}: {error}); "
            "get it again"
        ) from None


HELD_OUT = {"val": (10, 20), "test": (5, 50)}  # one picture in so many of a class, at most


def read_folders(root):
    """{train,val,test}/<class>/* below root; val and test are held out of train where missing."""
    train = root / "train"
    if not train.is_dir():
        raise BadInput(
            f"{train} not found: pictures belong in DATA_ROOT/train/<class>/, "
            "and in val/ and test/ likewise where there are such"
        )
    sets = {}
    for split in ("train", "val", "test"):
        directory = f"{root}/{split}"
        if not os.path.isdir(directory):
            continue
        try:
            found, numbers = find_classes(directory)
        except FileNotFoundError:
            raise BadInput(f"{directory} has no directories of classes") from None
        if split == "train":
            names, number_of = found, numbers
        unknown = [name for name in found if name not in number_of]
        if unknown:
            raise BadInput(f"{directory}/{unknown[0]}: {train} has no such class")
        files = make_dataset(directory, number_of, IMG_EXTENSIONS, allow_empty=True)
        paths = [os.fsencode(path)[len(os.fsencode(f"{root}/")) :] for path, _ in files]
        labels = [label for _, label in files]
        if not paths:
            raise BadInput(f"{directory} holds no pictures ({', '.join(IMG_EXTENSIONS)})")
        sets[split] = ImageFiles(root, paths, labels, directory, names)

    missing = [split for split in HELD_OUT if split not in sets]
    return hold_out(sets, missing) if missing else sets


def hold_out(sets, missing):
    """Take the `missing` splits out of train, class by class, at least one picture of each.

    In the order of a hash of their paths: whatever the seed of a run, and however other classes
    change, the same pictures are held out.
    """
    train = sets["train"]
    counts = train.labels.bincount(minlength=len(train.names))
    if counts.min() <= len(missing):
        label = int(counts.argmin())
        raise BadInput(
            f"{train.origin}/{train.names[label]} has {counts[label]} pictures, too few to hold "
            f"out some for {' and '.join(missing)}: give it more, or make {train.root / missing[0]}"
        )
    order = sorted(range(len(train)), key=lambda row: sha256(train.paths[row]).digest())
    rows_of = [[] for _ in counts]
    for row in order:
        rows_of[train.labels[row]].append(row)
    for split in missing:
        fraction, most = HELD_OUT[split]
        sizes = (counts // fraction).clamp(1, most).tolist()
        origin = f"{train.origin}, {min(sizes)} to {max(sizes)} pictures a class held out"
        held_out = [rows[:size] for rows, size in zip(rows_of, sizes)]
        sets[split] = train.subset(np.sort(np.concatenate(held_out)), origin)
        rows_of = [rows[size:] for rows, size in zip(rows_of, sizes)]
    sets["train"] = train.subset(np.sort(np.concatenate(rows_of)))
    return {split: sets[split] for split in ("train", "val", "test")}


# ------------------------------------------------------------------------------------- samplers


def seed_from(*numbers):
    """One seed from several non-negative integers (seed, step, rank, ...), well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class Batches(Sampler):
    """(indices, seeds of their crops) of a whole run, a function of (seed, step): resume anywhere.

    Shuffled epochs without replacement, the rest that fills no batch left out; or, `balanced`,
    class-balanced sampling: a class drawn uniformly, then a picture of it.
    Each of `world` ranks gets its own slice of the global batch.
    """

    def __init__(
        self, labels, batch_size, epochs, *, seed, balanced=False, start=0, rank=0, world=1
    ):
        if batch_size > len(labels):
            raise BadInput(
                f"--batch-size {batch_size} is larger than the {len(labels)} training pictures"
            )
        if batch_size % world:
            raise BadInput(f"--batch-size {batch_size} does not divide among {world} processes")
        self.labels, self.batch_size, self.seed, self.balanced = labels, batch_size, seed, balanced
        self.per_epoch = len(labels) // batch_size
        self.steps = range(start, epochs * self.per_epoch)
        share = batch_size // world
        self.slice = slice(rank * share, (rank + 1) * share)

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        by_class = self.labels.argsort(stable=True)
        counts = self.labels.bincount()
        first = counts.cumsum(0) - counts
        present = counts.nonzero().squeeze(1)
        order_of = None
        for step in self.steps:
            if self.balanced:
                random = torch.Generator().manual_seed(seed_from(self.seed, step))
                draw = torch.rand(2, self.batch_size, generator=random, dtype=torch.float64)
                drawn = present[(draw[0] * len(present)).long()]
                batch = by_class[first[drawn] + (draw[1] * counts[drawn]).long()]
            else:
                epoch, position = divmod(step, self.per_epoch)
                if order_of != epoch:
                    random = torch.Generator().manual_seed(seed_from(self.seed, epoch))
                    order, order_of = torch.randperm(len(self.labels), generator=random), epoch
                batch = order[position * self.batch_size :][: self.batch_size]
            # A stream of its own; a picture's crops are the same on any number of processes.
            seeds = np.random.SeedSequence((self.seed, step), spawn_key=(1,))
            seeds = seeds.generate_state(self.batch_size, np.uint64) >> np.uint64(1)
            yield batch[self.slice].tolist(), seeds[self.slice].tolist()


class Views(Dataset):
    """What a loader hands over for a batch (indices, seeds) of a data set: images and labels.

    `crops` a picture, or 0 for the whole picture as evaluation sees it.
    """

    def __init__(self, pictures, recipe, crops):
        self.pictures, self.recipe, self.crops = pictures, recipe, crops

    def __getitem__(self, batch):
        indices, seeds = batch
        images = self.pictures.views(indices, seeds, self.recipe, self.crops)
        return images, self.pictures.labels[indices]


# ----------------------------------------------------------------------------- views and patches


RATIO = (3 / 4, 4 / 3)  # of the sides of all crops


@lru_cache
def constant(values, device):
    """A tensor of tuples of numbers, made once: a copy to a GPU would wait for it at every step."""
    return torch.tensor(values, device=device)


class Draws:
    """Random numbers for the views of pictures, the same in any number of processes.

    Drawn for all `batch_size` pictures of the global batch, of which `rows` are this process's;
    `copies` of each, one after another, for its patches.
    """

    def __init__(self, seed, batch_size, rows, device, copies=1):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.batch_size, self.rows, self.copies, self.device = batch_size, rows, copies, device

    def repeated(self, copies):
        """The stream goes on, `copies` rows a picture."""
        draws = copy(self)
        draws.copies = copies
        return draws

    def uniform(self, low, high, *shape):
        """Uniform in [low, high]: [copies * pictures, *shape]."""
        shape = self.copies, self.batch_size, *shape
        draw = torch.rand(shape, generator=self.generator, device=self.device)
        return low + (high - low) * draw[:, self.rows].flatten(0, 1)


def random_boxes(draws, size, scale, tries=10):
    """Random resized crops of a square of `size` pixels: boxes [N, 4] as x1, y1, x2, y2.

    As torchvision's RandomResizedCrop, in sub-pixels: area uniform in `scale` of the square, log
    aspect ratio uniform, the first of `tries` that fits, else the whole square; position uniform.
    """
    area = size**2 * draws.uniform(*scale, tries)  # [N, tries]
    aspect = draws.uniform(*np.log(RATIO), tries).exp()
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=2)  # [N, tries, 2]
    sides = torch.cat([sides, sides.new_full((len(sides), 1, 2), size)], dim=1)
    fits = (sides <= size).all(2).byte().argmax(1)  # the first that fits
    sides = sides.take_along_dim(fits[:, None, None], dim=1).squeeze(1)  # [N, 2]
    corner = draws.uniform(0, 1, 2) * (size - sides)
    return torch.cat([corner, corner + sides], dim=1)


def crop(images, boxes, size):
    """Cut and resize: images [B, C, H, W] and boxes [n B, 4] to [n B, C, size, size].

    Box i is of picture i mod B, in pixels. RoIAlign is a bilinear resize, averaging when it
    shrinks, for all pictures at once.
    """
    rows = torch.arange(len(images), device=boxes.device, dtype=boxes.dtype)
    rows = rows.repeat(len(boxes) // len(images))
    return roi_align(images, torch.cat([rows[:, None], boxes], dim=1), size, aligned=True)


def random_flip(images, draws):
    """Mirror each picture with probability 1/2."""
    flip = draws.uniform(0, 1, 1, 1, 1) < 0.5
    return torch.where(flip, images.flip(3), images)


LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
RGB_TO_YIQ = (LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
YIQ_TO_RGB = tuple(map(tuple, np.linalg.inv(RGB_TO_YIQ).tolist()))


def color_matrices(channel_means, draws, jitter, jitter_p=1.0, grey_p=0.0):
    """Colour jitter and random grey of each picture as one affine map of its pixels: [B, 3, 4].

    channel_means [B, 3], pixels in [0, 1]. `jitter` (brightness, contrast, saturation, hue) as in
    torchvision's ColorJitter, in random order, with probability jitter_p. Hue is a rotation in YIQ
    where torchvision's is a shift in HSV; values are clamped once in the end, not at each change.
    """
    count, device = len(channel_means), channel_means.device
    luma = constant(LUMA, device)
    identity = torch.eye(3, device=device)
    grey = luma.expand(3, 3)

    *strengths, hue = jitter
    factor = [draws.uniform(max(0, 1 - s), 1 + s, 1, 1) for s in strengths]  # each [B, 1, 1]
    angle = 2 * torch.pi * draws.uniform(-hue, hue)  # [B]
    rotation = torch.zeros(count, 3, 3, device=device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2] = -angle.sin()
    rotation[:, 2, 1] = angle.sin()
    changes = torch.stack(
        [
            factor[0] * identity,  # brightness
            factor[1] * identity,  # contrast; its offset depends on what came before
            factor[2] * identity + (1 - factor[2]) * grey,  # saturation
            constant(YIQ_TO_RGB, device) @ rotation @ constant(RGB_TO_YIQ, device),  # hue
        ]
    )  # [4, B, 3, 3]

    order = draws.uniform(0, 1, 4).argsort(1)
    picture = torch.arange(count, device=device)
    unchanged = torch.eye(3, 4, device=device).expand(count, 3, 4)
    matrix = unchanged
    for change in order.T:
        means = (matrix[:, :, :3] @ channel_means[..., None])[..., 0] + matrix[:, :, 3]
        offset = (1 - factor[1][:, 0]) * (means @ luma)[:, None]  # [B, 1] towards the mean grey
        offset = torch.where(change[:, None] == 1, offset, 0.0)
        matrix = changes[change, picture] @ matrix
        matrix = torch.cat([matrix[:, :, :3], (matrix[:, :, 3] + offset)[..., None]], dim=2)

    matrix = torch.where(draws.uniform(0, 1, 1, 1) < jitter_p, matrix, unchanged)
    return torch.where(draws.uniform(0, 1, 1, 1) < grey_p, grey @ matrix, matrix)


def change_colors(images, matrices):
    """Apply color_matrices to float images [B, 1 or 3, H, W] in [0, 1]; returns [B, 3, H, W]."""
    pixels = images.expand(-1, 3, -1, -1).flatten(2).contiguous()  # else baddbmm is 10x as slow
    changed = torch.baddbmm(matrices[:, :, 3:], matrices[:, :, :3], pixels)
    return changed.clamp_(0, 1).view(len(images), 3, *images.shape[2:])


def random_blur(images, draws, probability, sigma=(0.1, 2.0)):
    """Gaussian blur of each picture with the given probability; sigma uniform, in pixels."""
    if not probability:
        return images
    count, channels, height, width = images.shape
    radius = min(round(3 * sigma[1]), min(height, width) - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = (-0.5 * (offsets / draws.uniform(*sigma, 1)) ** 2).softmax(
        1
    )  # [B, 2 radius + 1], sums to 1
    chosen = draws.uniform(0, 1, 1) < probability
    kernel = torch.where(chosen, kernel, (offsets == 0).to(kernel.dtype))
    kernel = kernel.repeat_interleave(channels, 0)[:, None]  # each plane its own, both ways
    planes = F.pad(images.reshape(1, -1, height, width), [radius] * 4, mode="reflect")
    planes = F.conv2d(planes, kernel[:, :, None], groups=count * channels)
    planes = F.conv2d(planes, kernel[:, :, :, None], groups=count * channels)
    return planes.view(images.shape)


def normalize(images, recipe):
    """Float images [B, 1 or 3, H, W] in [0, 1] to three standardised channels, channels last."""
    mean, std = (constant(recipe[name], images.device)[:, None, None] for name in ("mean", "std"))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def query_colors(images, draws, recipe):
    """Colour changes, blur and normalisation of query views and patches [B, C, H, W] in [0, 1]."""
    matrices = color_matrices(
        images.mean((2, 3)).expand(-1, 3),
        draws,
        recipe["query_jitter"],
        recipe["query_jitter_p"],
        recipe["grey_p"],
    )
    return normalize(random_blur(change_colors(images, matrices), draws, recipe["blur_p"]), recipe)


def random_view(images, draws, recipe):
    """uint8 crops [B, C, V, V], or whole pictures to cut, as a view: float [B, C, V, V] in [0, 1].

    A random flip, and a random resized crop of what the workers have not cut.
    """
    images = images.float() / 255
    if recipe["cut"] == "device":
        boxes = random_boxes(draws, images.shape[-1], recipe["crop_scale"])
        images = crop(images, boxes, recipe["view_size"])
    return random_flip(images, draws)


@torch.no_grad()
def classifier_view(images, draws, recipe):
    """Stage 2's training view [B, 3, V, V] of uint8 images [1, B, C, H, W]; the query's colours."""
    return query_colors(random_view(images[0], draws, recipe), draws, recipe)


@torch.no_grad()
def evaluation_view(images, recipe):
    """uint8 images [1, B, C, H, W], whole or their centre, only normalised: [B, 3, H, W]."""
    return normalize(images[0].float() / 255, recipe)


@torch.no_grad()
def query_views(images, draws, recipe, patches):
    """What the trained encoder sees of uint8 crops [B, C, V, V], or whole pictures to cut.

    The query view [B, 3, V, V], `patches` = L boxes a picture in it [L, B, 4] in pixels, and these
    regions as patches [L, B, 3, S, S]; None and None without patches (section 5 of the method).
    """
    view = random_view(images, draws, recipe)
    boxes = regions = None
    if patches:
        # Boxes are drawn after the view's crop and flip and cut before its colour changes.
        of_patches = draws.repeated(patches)
        boxes = random_boxes(of_patches, recipe["view_size"], recipe["patch_scale"])
        regions = random_flip(crop(view, boxes, recipe["patch_size"]), of_patches)
        regions = query_colors(regions, of_patches, recipe).unflatten(0, (patches, len(view)))
        boxes = boxes.unflatten(0, (patches, len(view)))
    return query_colors(view, draws, recipe), boxes, regions


@torch.no_grad()
def key_view(images, draws, recipe):
    """What the momentum encoder sees of uint8 crops [B, C, V, V], or whole pictures to cut."""
    view = random_view(images, draws, recipe)
    matrices = color_matrices(view.mean((2, 3)).expand(-1, 3), draws, recipe["key_jitter"])
    return normalize(change_colors(view, matrices), recipe)


# ------------------------------------------------------------------------- checking a data set


SHOWN = 10  # problems


class Inspection(Dataset):
    """Messages about the files of pictures that are missing or, if asked, cannot be decoded."""

    def __init__(self, pictures, decoding):
        self.pictures, self.decoding = pictures, decoding

    def __getitem__(self, indices):
        messages = []
        for path in map(self.pictures.path, indices):
            try:
                if not path.is_file():
                    raise BadInput(f"{path} is missing")
                if self.decoding:
                    with open_picture(path) as image:
                        decode(image)
            except (BadInput, OSError) as error:  # a name too long, a directory that is closed
                messages.append(str(error))
        return messages


def shared_pictures(sets):
    """Messages about pictures that stand in a split twice, or in two splits."""
    splits = [(split, files) for split, files in sets.items() if isinstance(files, ImageFiles)]
    for number, (split, files) in enumerate(splits):
        twice = len(files) - len(np.unique(files.paths))
        if twice:
            yield f"{files.origin}: {twice} pictures stand there more than once"
        for other, others in splits[number + 1 :]:
            both = np.intersect1d(files.paths, others.paths)
            if len(both):
                yield f"{len(both)} pictures are in {split} and {other}: {os.fsdecode(both[0])}"


def main():
    from train import DEFAULT, Parser, Progress, cores  # train.py imports this module

    parser = Parser(__doc__)
    parser.add_argument("--decode", action="store_true", help="decode every picture as well")
    parser.add_argument(
        "--download", action="store_true", help="let torchvision fetch CIFAR into --data-root"
    )
    args = parser.parse_args()
    args.dataset = args.dataset or DEFAULT
    sets, problems = read_dataset(
        args.dataset, args.data_root, args.index_dir, args.imbalance, args.download
    )
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    columns = ("pictures", "classes", "most", "least", "many", "medium", "few")
    print("".join([f"{args.dataset:<18}", *(f"{name:>10}" for name in columns)]))
    for split, pictures in sets.items():
        counts = pictures.labels.bincount()
        numbers = [len(pictures), len(counts), counts.max(), counts.min()]
        if split == "train":
            numbers += [mask.sum() for mask in shot_groups(counts).values()]
        print("".join([f"{split:<18}", *(f"{int(number):>10,}" for number in numbers)]))
        published = DATASETS[args.dataset].get("published", {}).get(split, len(pictures))
        if published != len(pictures):
            problems.append(
                f"{pictures.origin}: {len(pictures):,} pictures, {published:,} published"
            )
    problems += shared_pictures(sets)

    files = [pictures for pictures in sets.values() if isinstance(pictures, ImageFiles)]
    progress, done = Progress(sum(map(len, files)), enabled=args.decode), 0
    for pictures in files:
        chunks = [chunk.tolist() for chunk in torch.arange(len(pictures)).split(256)]
        inspection = Inspection(pictures, args.decode)
        workers = cores() if args.workers is None else args.workers
        for chunk, messages in zip(
            chunks, DataLoader(inspection, sampler=chunks, batch_size=None, num_workers=workers)
        ):
            problems += messages
            done += len(chunk)
            progress.show(done, f"{done:,} pictures, {len(problems)} problems")

    print(f"\nproblems: {len(problems)}" + (", the first:" if len(problems) > SHOWN else ""))
    for problem in problems[:SHOWN]:
        print(f"  {problem}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    from data import main  # as train.py imports this module: one BadInput for both
    from train import run

    run(main)
