"""Check a data set; and views and patches, data sets and batches (cfg: train.py's arguments).

    python data.py --dataset imagenet_lt               # check a data set: counts, missing files
    python data.py --dataset imagenet_lt --decode      # and that every image can be decoded
    python data.py --dataset cifar100_lt --download    # download and check CIFAR

The check counts images and classes and names missing, broken and repeated files; exit code 1.
"""

import argparse
import atexit
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import unicodedata
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, get_sampling
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.ops import roi_align
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2.functional import center_crop, get_size, pil_to_tensor, resize

# The same pixels as Pillow's, 1.4 times as fast. torchvision plans to remove it; its successor,
# torchcodec, turns images by their EXIF orientation and divides 16-bit grey by 257, not by 256.
try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

HERE = Path(__file__).resolve().parent
RANK = int(os.environ.get("RANK", 0))  # rank of this process, set by torchrun
RATIO = (3 / 4, 4 / 3)  # range of the aspect ratio of all crops

# ----------------------------------------------------------------------- what the data sets are

# Data sets with "npz" or "cifar" are held in memory and cropped on the device; images of those with
# an "index" or with class folders are decoded and cropped by worker processes. train.py has the
# settings for each data set.
FASHION = "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle-boot".split()
DATASETS = {
    "fashion_mnist_lt": dict(npz="fashion_mnist_lt.npz", names=FASHION),
    "cifar10_lt": dict(cifar=CIFAR10),
    "cifar100_lt": dict(cifar=CIFAR100),
    "imagenet_lt": dict(index="ImageNet_LT", published=dict(train=115846, val=20000, test=50000)),
    "places_lt": dict(index="Places_LT", published=dict(train=62500, val=7300, test=36500)),
    # It has no test split.
    "inaturalist18": dict(index="iNaturalist18", published=dict(train=437513, val=24426)),
    "imagefolder": dict(),
    "small_imagefolder": dict(held=True),
}
DEFAULT = "fashion_mnist_lt"


def in_memory(name):
    """Whether a data set is held in memory and cropped on the device."""
    return "npz" in DATASETS[name] or "cifar" in DATASETS[name]


class BadInput(Exception):
    """The user's input cannot be used; the message names it and says how to fix it."""


def say(text):
    """Print a note to stderr, once for all processes."""
    if RANK == 0:
        print(text, file=sys.stderr)


# ----------------------------------------------------------------------------- views and patches


@lru_cache
def constant(values, device):
    """A cached tensor of a tuple of numbers; copying it at every call would make the GPU wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)


class Draws:
    """Random numbers for the views of images, the same with any number of processes.

    They are drawn for the whole global batch, and this process uses those of its `rows`. Copy j of
    image i is row j * (number of images) + i.
    """

    def __init__(self, seed, batch_size, rows, device):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.batch_size, self.rows, self.device = batch_size, rows, device

    def uniform(self, low, high, *shape, copies=1):
        """Uniform in [low, high], `copies` for each image: [copies * images, *shape]."""
        shape = copies, self.batch_size, *shape
        draw = torch.empty(shape, device=self.device).uniform_(low, high, generator=self.generator)
        return draw[:, self.rows].flatten(0, 1)


def random_boxes(draws, size, scale, copies=1, tries=10):
    """Boxes of random resized crops in a square of `size` pixels: [N, 4] as x1, y1, x2, y2.

    Like torchvision's RandomResizedCrop, but not rounded to pixels: area (a fraction in the range
    `scale`), log aspect ratio and position are uniform. The first of `tries` boxes that fits into
    the square is used, else the whole square.
    """
    area = size**2 * draws.uniform(*scale, tries, copies=copies)  # [N, tries]
    aspect = draws.uniform(*np.log(RATIO), tries, copies=copies).exp()
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=2)  # [N, tries, 2]
    sides = torch.cat([sides, sides.new_full((len(sides), 1, 2), size)], dim=1)
    fits = (sides <= size).all(2).byte().argmax(1)  # the first that fits
    sides = sides.take_along_dim(fits[:, None, None], dim=1).squeeze(1)  # [N, 2]
    corner = draws.uniform(0, 1, 2, copies=copies) * (size - sides)
    return torch.cat([corner, corner + sides], dim=1)


def crop(images, boxes, size):
    """Crop images [B, C, H, W] to boxes [n B, 4] in pixels and resize: [n B, C, size, size].

    Box i is of image i mod B. RoIAlign interpolates bilinearly, and averages where it shrinks.
    """
    rows = torch.arange(len(images), device=boxes.device, dtype=boxes.dtype)
    rows = rows.repeat(len(boxes) // len(images))
    return roi_align(images, torch.cat([rows[:, None], boxes], dim=1), size, aligned=True)


def random_flip(images, draws, copies=1):
    """Mirror each image with probability 1/2."""
    flip = draws.uniform(0, 1, 1, 1, 1, copies=copies) < 0.5
    return torch.where(flip, images.flip(3), images)


LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
RGB_TO_YIQ = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
# A hue change rotates I and Q by an angle a: in RGB, HUE[0] + cos(a) HUE[1] + sin(a) HUE[2].
TURN = np.array([np.diag([1, 0, 0]), np.diag([0, 1, 1]), [[0, 0, 0], [0, 0, -1], [0, 1, 0]]])
HUE = tuple((np.linalg.inv(RGB_TO_YIQ) @ TURN @ RGB_TO_YIQ).flatten())


def color_matrices(channel_means, draws, jitter, jitter_p=1.0, grey_p=0.0, copies=1):
    """Colour jitter and random grey of each image as one affine map of its pixels: [B, 3, 4].

    channel_means [B, 3] are of pixels in [0, 1]. `jitter`: brightness, contrast, saturation and hue
    as in torchvision's ColorJitter, with probability jitter_p. But hue is a rotation in YIQ, not a
    shift in HSV, and values are clamped once at the end, so that the order does not matter.
    """
    device = channel_means.device
    luma, hues = constant(LUMA, device), constant(HUE, device).view(3, 3, 3)
    unchanged = torch.eye(3, 4, device=device)
    identity, grey = unchanged[:, :3], luma.expand(3, 3)
    low = constant((*(max(0, 1 - s) for s in jitter[:3]), -2 * math.pi * jitter[3]), device)
    high = constant((*(1 + s for s in jitter[:3]), 2 * math.pi * jitter[3]), device)
    changes = torch.lerp(low, high, draws.uniform(0, 1, 4, copies=copies))[..., None, None]
    brightness, contrast, saturation, angle = changes.unbind(1)  # each [B, 1, 1]

    turn = hues[0] + angle.cos() * hues[1] + angle.sin() * hues[2]
    matrix = brightness * contrast * (turn @ torch.lerp(grey, identity, saturation))
    # Contrast mixes pixels with the mean grey of the image, which saturation and hue do not change.
    offset = brightness * (1 - contrast) * (channel_means @ luma)[:, None, None]
    matrix = torch.cat([matrix, offset.expand(-1, 3, 1)], dim=2)
    jittered = draws.uniform(0, 1, 1, 1, copies=copies) < jitter_p
    matrix = torch.where(jittered, matrix, unchanged)
    return torch.where(draws.uniform(0, 1, 1, 1, copies=copies) < grey_p, grey @ matrix, matrix)


def color_transform(images, matrices):
    """Apply color_matrices to float images [B, 1 or 3, H, W] in [0, 1]; returns [B, 3, H, W]."""
    pixels = images.expand(-1, 3, -1, -1).flatten(2).contiguous()  # else baddbmm is 10x slower
    changed = torch.baddbmm(matrices[:, :, 3:], matrices[:, :, :3], pixels)
    return changed.clamp_(0, 1).view(len(images), 3, *images.shape[2:])


def random_blur(images, draws, probability, copies=1, sigma=(0.1, 2.0)):
    """Gaussian blur of each image with the given probability; sigma uniform, in pixels."""
    if not probability:
        return images
    count, channels, height, width = images.shape
    radius = min(round(3 * sigma[1]), min(height, width) - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    sigmas = draws.uniform(*sigma, 1, copies=copies)
    kernel = (-0.5 * (offsets / sigmas) ** 2).softmax(1)  # [B, 2 radius + 1], sums to 1
    chosen = draws.uniform(0, 1, 1, copies=copies) < probability
    kernel = torch.where(chosen, kernel, (offsets == 0).to(kernel.dtype))
    kernel = kernel.repeat_interleave(channels, 0)[:, None]  # one for each channel of each image
    planes = F.pad(images.reshape(1, -1, height, width), [radius] * 4, mode="reflect")
    planes = F.conv2d(planes, kernel[:, :, None], groups=count * channels)
    planes = F.conv2d(planes, kernel[:, :, :, None], groups=count * channels)
    return planes.view(images.shape)


def normalize(images, cfg):
    """Float images [B, 1 or 3, H, W] in [0, 1] to three standardised channels, channels last."""
    mean, std = (constant(tuple(v), images.device)[:, None, None] for v in (cfg.mean, cfg.std))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def photometric(images, draws, cfg, jitter, jitter_p=1.0, grey_p=0.0, blur_p=0.0, copies=1):
    """Colour changes, blur and normalisation of images [copies * B, C, H, W] in [0, 1]."""
    means = images.mean((2, 3)).expand(-1, 3)
    matrices = color_matrices(means, draws, jitter, jitter_p, grey_p, copies)
    images = color_transform(images, matrices)
    return normalize(random_blur(images, draws, blur_p, copies), cfg)


def random_view(images, draws, cfg):
    """A random view of uint8 images: float [B, C, V, V] in [0, 1], flipped with probability 1/2."""
    images = images.float() / 255
    if in_memory(cfg.dataset):  # else they are crops from the worker process that decoded them
        boxes = random_boxes(draws, images.shape[-1], cfg.crop_scale)
        images = crop(images, boxes, cfg.view_size)
    return random_flip(images, draws)


def query_views(images, draws, cfg, count=0):
    """The query view of uint8 images, boxes in it, and the view inside the boxes, as patches.

    Returns the view [B, 3, V, V]; L = `count` boxes for each image, [L, B, 4] in pixels of the
    cropped and flipped view; and the patches [L, B, 3, S, S], which are cut out by RoIAlign before
    the view's colours are changed. Boxes and patches are None if L is 0.
    """
    view, boxes, patches = random_view(images, draws, cfg), None, None
    changes = cfg.query_jitter, cfg.query_jitter_p, cfg.grey_p, cfg.blur_p
    if count:
        boxes = random_boxes(draws, cfg.view_size, cfg.patch_scale, copies=count)
        patches = random_flip(crop(view, boxes, cfg.patch_size), draws, count)
        patches = photometric(patches, draws, cfg, *changes, copies=count)
        boxes, patches = (part.unflatten(0, (count, len(view))) for part in (boxes, patches))
    return photometric(view, draws, cfg, *changes), boxes, patches


def key_view(images, draws, cfg):
    """The key view [B, 3, V, V] of uint8 images."""
    return photometric(random_view(images, draws, cfg), draws, cfg, cfg.key_jitter)


# ---------------------------------- long-tailed subsets; many-, medium- and few-shot classes


def long_tailed_counts(largest, classes, factor):
    """Images in class c: int(largest * factor^(c / (classes - 1))), factor = smallest / largest."""
    return [int(largest * factor ** (c / (classes - 1))) for c in range(classes)]


def shuffled_by_class(labels, classes):
    """Each class's indices, shuffled by numpy's legacy generator with seed 0, as papers do."""
    random, labels = np.random.RandomState(0), np.asarray(labels)
    return [random.permutation(np.flatnonzero(labels == label)) for label in range(classes)]


def shot_groups(counts):
    """Masks [classes] of many- (> 100 images), medium- (20 to 100) and few-shot classes (< 20)."""
    counts = torch.as_tensor(counts)
    return {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}


# ----------------------------------------------------------------------------- images and splits


class ImageArrays:
    """Images in memory: uint8 [N, C, H, W], labels int64 [N], and class names or None."""

    def __init__(self, images, labels, origin, names=None):
        self.images, self.labels, self.origin, self.names = images, labels, origin, names

    def __len__(self):
        return len(self.labels)

    def fingerprint(self):
        """Number and hash of images (on disk: of their paths) and labels."""
        content = np.asarray(self.images).tobytes() + self.labels.numpy().tobytes()
        return f"{len(self)} images, hash {sha256(content).hexdigest()[:12]}"

    def views(self, indices, seeds, cfg, crops):
        """The whole images, uint8 [1, B, C, H, W]; they are cropped on the device."""
        return self.images[indices][None]


class ImageFiles(ImageArrays):
    """Images on disk: their paths below root, labels int64 [N], and class names or None."""

    def __init__(self, root, paths, labels, origin, names=None, upright=False):
        paths = np.asarray(paths)  # an array of bytes, which workers share
        super().__init__(paths, torch.as_tensor(labels, dtype=torch.long), origin, names)
        self.root, self.paths, self.held = root, paths, None
        self.upright = upright  # turn images as EXIF says, which papers of the benchmarks do not

    def path(self, index):
        return self.root / os.fsdecode(self.paths[index])

    def views(self, indices, seeds, cfg, crops):
        """`crops` random crops of each image, uint8 [crops, B, 3, V, V]; if 0, its central crop.

        The random crops depend only on seeds [B]. BadInput names a file that cannot be read.
        """
        views = []
        for place, index in enumerate(indices):
            with self.opened(index) as (image, orientation):
                if crops:
                    # torch.manual_seed would seed GPUs too, which a worker must not use.
                    torch.default_generator.manual_seed(seeds[place])
                    of_image = random_crops(image, cfg.crop_scale, cfg.view_size, crops)
                else:
                    of_image = [central_crop(image, cfg.view_size)]
                # Square crops of a turned image and turned crops are alike.
                views += [turned(view, orientation) for view in of_image]
        # In a worker, default_collate writes to shared memory; channels last, like decoded images.
        views = default_collate([view.permute(1, 2, 0) for view in views])
        return views.unflatten(0, (len(indices), -1)).permute(1, 0, 4, 2, 3)

    @contextmanager
    def opened(self, index):
        """An open image, or the pixels that hold() kept; and the EXIF orientation to apply."""
        if self.held:
            yield torch.from_numpy(self.held[index]), 1
        else:
            with open_image(self.path(index)) as image:
                yield image, image.getexif().get(0x0112, 1) if self.upright else 1

    def hold(self, cfg, threads):
        """Read all images once and keep them, shrunk as far as the crops of cfg allow."""
        side = math.ceil(cfg.view_size / cfg.crop_scale[0] ** 0.5)  # of the smallest square crop
        if 4 * side**2 * len(self) > 4e9:  # bytes of three colours, sides about 3:4
            return say(f"{len(self):,} images of {side} pixels take more than 4 GB: every epoch "
                       "reads them anew")

        def read(index):
            with self.opened(index) as (image, orientation):
                pixels = decode(image, min(image.size) / side)
                pixels = resize(pixels, [min(side, *pixels.shape[1:])], antialias=True)
                return turned(pixels, orientation).numpy()

        images, progress = [], Progress(len(self))
        with ThreadPool(threads) as pool:
            for image in pool.imap(read, range(len(self)), 8):
                images.append(image)
                progress.show(len(images), f"reading images: {len(images):,} of {len(self):,}")
        self.held = images


@contextmanager
def open_image(path):
    """An image file, open but not decoded; BadInput names it if it cannot be read."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow raises many kinds of errors on broken files
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path} cannot be read as an image ({reason}): fix or replace the file, "
                       "then run the same command again") from None


def decode(image, max_downscale=1.0):
    """An open image as uint8 [3, H, W]; grey, CMYK, palette and alpha become RGB.

    16-bit grey is read as value // 256, as image viewers show it; 32-bit pixels raise ValueError. A
    JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, but never at less than 1 / max_downscale, so
    that the resize that follows still shrinks it.
    """
    if isinstance(image, torch.Tensor):  # from ImageFiles.hold
        return image
    # 16-bit grey has mode "I;16" or, in some versions of Pillow, "I".
    if image.mode[:4] == "I;16" or image.mode == "I" and image.format in ("PNG", "PPM"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    elif image.mode[0] in "IF":
        raise ValueError("its pixels have 32 bits; 8 are supported, or 16 in grey images")
    if isinstance(image, JpegImageFile) and get_sampling(image) == 1:  # 4:2:2
        max_downscale /= 2  # its colours are shrunk twice as far: findings/jpeg_draft_chroma.sh
    if max_downscale >= 2:
        image.draft("RGB", [side // int(max_downscale) for side in image.size])
    elif decode_jpeg and (image.format, image.mode) == ("JPEG", "RGB"):
        image.fp.seek(0)
        content = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
        return decode_jpeg(content, ImageReadMode.RGB)
    return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))


def turned(view, orientation):
    """A view [3, H, W] as the EXIF orientation, 1 to 8, says that it is to be shown."""
    view = view.transpose(1, 2) if orientation in (5, 6, 7, 8) else view
    flips = [1] * (orientation in (3, 4, 7, 8)) + [2] * (orientation in (2, 3, 6, 7))
    return view.flip(flips) if flips else view


def random_crops(image, scale, size, count):
    """Random resized crops of an open image: `count` uint8 views [3, size, size]."""
    width = get_size(image)[1]
    boxes = [RandomResizedCrop.get_params(image, scale, RATIO) for _ in range(count)]
    pixels = decode(image, min(min(box[2:]) for box in boxes) / size)
    shrunk = pixels.shape[2] / width
    views = []
    for box in boxes:
        top, left, height, width = (round(side * shrunk) for side in box)
        region = pixels[None, :, top : top + height, left : left + width]
        # Given a slice, resize would make a contiguous copy itself, which takes twice as long.
        region = region.contiguous(memory_format=torch.channels_last)
        views.append(resize(region, [size, size], antialias=True)[0])
    return views


def shorter_side(size):
    """Pixels of the shorter side of an image before evaluation crops its centre: 256 for 224."""
    return size * 256 // 224


def central_crop(image, size):
    """Resize the shorter side of an open image and crop its centre, for evaluation."""
    shorter = shorter_side(size)
    pixels = decode(image, min(get_size(image)) / shorter)
    return center_crop(resize(pixels, [shorter], antialias=True), [size, size])


# -------------------------------------------------------------------------------------- readers


def load_dataset(name, root, index_dir=None, imbalance=None, download=False):
    """A data set's splits, {"train": ImageArrays or ImageFiles, "val": ..., "test": ...}.

    CIFAR-LT has no val and takes `imbalance`; iNaturalist has no test. Classes may be missing in
    val and test. BadInput names what is missing or wrong; images on disk are not opened here.
    """
    entry, root = DATASETS[name], Path(root)
    if "cifar" in entry:
        sets = read_cifar(entry["cifar"], root, 100 if imbalance is None else imbalance, download)
    elif imbalance is not None or download:
        raise BadInput(f"--imbalance and --download are for cifar10_lt and cifar100_lt, not {name}")
    elif not root.is_dir():
        raise BadInput(f"{root} is not a directory: put or link the images of {name} there, or "
                       "give their directory as --data-root; data.py --help describes its contents")
    elif "npz" in entry:
        sets = read_npz(root / entry["npz"], entry["names"])
    elif "index" in entry:
        sets, classes = {}, None
        for split in entry["published"]:
            sets[split] = read_index(entry["index"], split, root, Path(index_dir or root), classes)
            classes = int(sets["train"].labels.max()) + 1
        sets["train"].names = names_of_folders(sets["train"])
    else:
        sets = read_folders(root)
    origin, counts = sets["train"].origin, sets["train"].labels.bincount()
    if not counts.all():
        empty, last = int(counts.argmin()), len(counts) - 1
        raise BadInput(f"{origin}: no image of class {empty}; labels are 0 to {last} without a gap")
    if len(counts) < 2:
        raise BadInput(f"{root}: only one class; at least two are needed")
    names = sets["train"].names = sets["train"].names or [f"class {n}" for n in range(len(counts))]
    shown = names if len(names) <= 10 else [*names[:3], "...", *names[-3:]]
    say(f"{len(names)} classes: {', '.join(shown)}")
    return sets


def names_of_folders(dataset):
    """The name of the folder of each label's images, or None if they are not one to one."""
    folders = [os.fsdecode(path).rpartition("/")[0].rpartition("/")[2] for path in dataset.paths]
    pairs = sorted(set(zip(dataset.labels.tolist(), folders)))
    labels, names = zip(*pairs)
    return list(names) if len(pairs) == len(set(labels)) == len(set(names)) else None


def read_npz(path, names):
    """The arrays {train,val,test}_{images,labels} of the file that ships with the repository."""
    sets = {}
    with np.load(path) as arrays:
        for split in ("train", "val", "test"):
            images = torch.from_numpy(arrays[f"{split}_images"])[:, None]
            labels = torch.from_numpy(arrays[f"{split}_labels"]).long()
            sets[split] = ImageArrays(images, labels, path, names)
    return sets


def read_cifar(files, root, imbalance, download):
    """CIFAR-10/100-LT: the usual subset of the training images, and the whole test set."""
    if not 1 <= imbalance <= 1e4:
        raise BadInput(f"--imbalance: must be from 1 to 10000, got {imbalance}")
    try:
        train, test = (files(root, train=train, download=download) for train in (True, False))
    except (RuntimeError, OSError) as error:
        reason = f" ({str(error).splitlines()[0]})" if download else ""
        raise BadInput(f"{root} has no complete {files.base_folder}{reason}: data.py with "
                       f"--download fetches it from {files.url}") from None
    counts = long_tailed_counts(len(train) // len(train.classes), len(train.classes), 1 / imbalance)
    order, sets = shuffled_by_class(train.targets, len(train.classes)), {}
    chosen = np.concatenate([indices[:count] for indices, count in zip(order, counts)])
    for split, dataset, rows in (("train", train, chosen), ("test", test, slice(None))):
        images = torch.from_numpy(dataset.data[rows]).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(dataset.targets)[rows]
        sets[split] = ImageArrays(images, labels, f"{root}, {split}", train.classes)
    return sets


INDEX_FILES = "https://github.com/facebookresearch/classifier-balancing"


def read_index(index, split, root, directory, classes=None):
    """A split from its index file: lines "relative/path label", with labels below `classes`."""
    path = directory / f"{index}_{split}.txt"
    if not path.is_file():
        raise BadInput(f"{path} not found: git clone {INDEX_FILES}, and copy the files of "
                       f"data/{index} to {directory} or give their directory as --index-dir")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip()  # a byte-order mark
    lines, paths, labels = content.splitlines(), [], []
    classes = classes or len(lines)  # in the training set every class has a line
    for number, line in enumerate(lines, 1):
        try:
            name, label = line.rsplit(None, 1)
            if not 0 <= int(label) < classes:
                raise ValueError
        except ValueError:
            raise BadInput(f'{path}:{number}: {os.fsdecode(line)!r} is not "path label" with a '
                           f"label from 0 to {classes - 1}") from None
        paths.append(name)
        labels.append(int(label))
    if not paths:
        raise BadInput(f"{path} is empty")

    # In ImageNet's val archive "val/n01440764/x" of the index is "val/x": look at the first ten.
    flat = [name.partition(b"/")[0] + b"/" + name.rpartition(b"/")[2] for name in paths]
    there = [any((root / os.fsdecode(n)).is_file() for n in names[:10]) for names in (paths, flat)]
    return ImageFiles(root, flat if there == [False, True] else paths, labels, path)


HELD_OUT = {"test": 0.2, "val": 0.1}  # fractions of each class, as CONTENTS explains
SPLIT_OF = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LIKE_A_SPLIT = r"(?i)(?<![a-z])(train|test|val|dev|eval)(ing|id|idation|elopment|uation)?(?![a-z])"


def subfolders(place):
    """The folders in a folder, but for those that begin with . or @."""
    return [path for path in sorted(place.glob("[!.@]*")) if path.is_dir()]


def find_images(folder):
    """The images below a folder, sorted, and its other files, among them hidden images."""
    images, others, seen = [], [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link, perhaps to a folder above: each real folder is read once
            folders.clear()
        for name in names:
            path = os.path.join(place, name)
            # The name begins with a dot, or that of a folder with a dot or @.
            hidden = re.search(r"/(\.|@[^/]*/)", path[len(str(folder)) :])
            read = name.lower().endswith(IMG_EXTENSIONS) and not hidden and real not in seen
            (images if read else others).append(path)
        seen.add(real)
    return sorted(images), others


def say_left_out(place, files, read):
    """Print how many files are not read, and their most frequent endings."""
    endings = Counter(os.path.splitext(path)[1].lower() or "no ending" for path in files)
    if files:
        kinds = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(4))
        first = ", ".join(os.path.relpath(path, place) for path in sorted(files)[:3])
        say(f"{place}: {len(files)} files are left out ({kinds}; first {first}); only {read} are "
            "read")


def read_classes(place, root):
    """(path below root, class name) of every image in place/<class>/; prints what it skips."""
    images, others = find_images(place)
    folders = {path: os.path.relpath(path, place).split(os.sep)[:-1] for path in images}
    loose = [path for path in images if not folders[path]]
    say_left_out(place, others + loose, f"{' '.join(IMG_EXTENSIONS)} in class folders")
    deep = {os.sep.join(names) for names in folders.values() if len(names) > 1}
    if deep:
        classes = len({names.partition(os.sep)[0] for names in deep})
        say(f"{place}: images lie deeper than their class folders, as in {min(deep)}: "
            f"{len(deep)} folders make {classes} classes")
    full = {names[0] for names in folders.values() if names}
    empty = [path.name for path in subfolders(place) if path.name not in full]
    if empty:
        say(f"{place}: folders without images: {', '.join(empty)}")
    return [
        (os.fsencode(os.path.relpath(path, root)), unicodedata.normalize("NFC", names[0]))
        for path, names in folders.items()
        if names
    ]


def find_splits(root):
    """{"train": folder, ...} of root, or {"train": root} if its folders are classes, not splits.

    A split holds class folders, a class holds images. BadInput if a folder could be either.
    """
    folders = {path: bool(subfolders(path)) for path in subfolders(root)}
    splits = {SPLIT_OF[p.name.lower()]: p for p in folders if p.name.lower() in SPLIT_OF}
    if any(folders[path] for path in splits.values()):
        unclear = [p for p in folders if p not in splits.values() and find_images(p)[0]]
    else:
        splits, alike = {"train": root}, [p for p in folders if re.search(LIKE_A_SPLIT, p.name)]
        unclear = [path for path in alike if folders[path] or alike == list(folders)]
    if unclear:
        names = ", ".join(path.name for path in unclear)
        raise BadInput(f"{root}: {names} could be splits or classes: name splits train, val and "
                       "test, with class folders in them and no other image folders beside them")
    return splits


def read_folders(root):
    """The splits of root/{train,val,test}/<class>/*, or of root/<class>/*, which is then train."""
    places = find_splits(root)
    samples = {split: read_classes(place, root) for split, place in places.items()}
    train, missing = samples.get("train"), [split for split in HELD_OUT if not samples.get(split)]
    if not train:
        raise BadInput(f"{places.get('train', root / 'train')}: no images in class folders; they "
                       f"belong in {root}/<class>/, or in {root}/train/<class>/ with val/ and "
                       "test/ beside train/")
    splits = hold_out(*zip(*train), missing)
    for split in ("train", *missing):
        samples[split] = [sample for sample, of in zip(train, splits) if of == split]
    if not (samples["val"] or samples["test"]):
        raise BadInput(f"{places['train']}: no class has the three images needed to hold one out "
                       f"for testing; put images of some classes into {root}/test/<class>/")
    label_of = {name: label for label, name in enumerate(sorted({name for _, name in train}))}
    sets = {}
    for split in filter(samples.get, ("train", "val", "test")):
        paths, names = zip(*samples[split])
        for name in sorted(set(names) - label_of.keys()):
            raise BadInput(f"{places[split] / name} has images, but train has no class {name}: "
                           "add training images, or move them away")
        labels = [label_of[name] for name in names]
        origin = places["train" if split in missing else split]
        sets[split] = ImageFiles(root, paths, labels, origin, list(label_of), upright=True)
    return sets


def hold_out(paths, labels, missing):
    """The split of each training image by the hash of its path: "train", or one of `missing`."""
    splits, rows_of = ["train"] * len(paths), {}
    for row in sorted(range(len(paths)), key=lambda row: sha256(paths[row]).digest()):
        rows_of.setdefault(labels[row], []).append(row)
    for rows in rows_of.values():
        remaining = iter(rows)
        for split in missing if len(rows) >= 3 else ():
            for _ in range(max(1, round(HELD_OUT[split] * len(rows)))):
                splits[next(remaining)] = split
    return splits


# -------------------------------------------------------------------------------------- batches


def seed_from(*numbers):
    """One seed from several non-negative integers (seed, step, stream), well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class Batches:
    """The batches of a whole run: (indices, seeds of their random crops) for each step.

    Each epoch shuffles all images and drops the last incomplete batch; with `balanced`, sampling is
    class-balanced instead. A batch depends only on (seed, step), so that a run can continue at any
    step. Every rank gets its rows of the global batch.
    """

    def __init__(self, labels, batch_size, epochs, seed, balanced=False, start=0, rank=0, world=1):
        if batch_size > len(labels) or batch_size % world:
            raise BadInput(f"--batch-size {batch_size} must be a multiple of {world} (processes) "
                           f"and at most {len(labels)} (training images)")
        self.labels, self.batch_size, self.seed, self.balanced = labels, batch_size, seed, balanced
        self.per_epoch = len(labels) // batch_size
        self.steps = range(start, epochs * self.per_epoch)
        per_rank = batch_size // world
        self.rows = slice(rank * per_rank, (rank + 1) * per_rank)

    def __iter__(self):
        by_class = self.labels.argsort(stable=True)
        counts = self.labels.bincount()
        first = counts.cumsum(0) - counts
        for step in self.steps:
            if self.balanced:  # a class is drawn uniformly, then an image of it
                random = torch.Generator().manual_seed(seed_from(self.seed, step))
                draw = torch.rand(2, self.batch_size, generator=random, dtype=torch.float64)
                drawn = (draw[0] * len(counts)).long()
                batch = by_class[first[drawn] + (draw[1] * counts[drawn]).long()]
            else:
                epoch, position = divmod(step, self.per_epoch)
                if position == 0 or step == self.steps.start:
                    random = torch.Generator().manual_seed(seed_from(self.seed, epoch))
                    order = torch.randperm(len(self.labels), generator=random)
                batch = order[position * self.batch_size :][: self.batch_size]
            # The crops of an image do not depend on the number of processes.
            seeds = np.random.SeedSequence((self.seed, step), spawn_key=(1,))
            seeds = seeds.generate_state(self.batch_size, np.uint64) >> np.uint64(1)
            yield batch[self.rows].tolist(), seeds[self.rows].tolist()


class BatchDataset:
    """Maps a batch (indices, seeds) to images, uint8 [1 or 2, B, C, H, W], and labels [B]."""

    def __init__(self, dataset, cfg, crops):
        self.dataset, self.cfg, self.crops = dataset, cfg, crops

    def __getitem__(self, batch):
        indices, seeds = batch
        images = self.dataset.views(indices, seeds, self.cfg, self.crops)
        return images, self.dataset.labels[indices]


def ignore_interrupts(worker):
    """Ctrl-C and the SIGTERM of Slurm reach workers, too; only the main process answers them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_workers():
    """End them at exit, where multiprocessing would wait for the answer to its SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report that they were killed
    for worker in multiprocessing.active_children():
        worker.kill()


def load_batches(dataset, batches, workers, device):
    """A loader of a BatchDataset; `batches` is Batches, or a list of (indices, seeds)."""
    # The forkserver of Python 3.14 would get SIGTERM as well, and copy the paths to each worker.
    method = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(dataset, sampler=batches, batch_size=None, num_workers=workers,
                      pin_memory=device.type == "cuda", persistent_workers=workers > 0,
                      worker_init_fn=ignore_interrupts, multiprocessing_context=method)


# -------------------------------------------------------------------- what the commands share


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors raise BadInput."""

    def __init__(self, **options):
        options |= dict(usage="%(prog)s [flags]", add_help=False, allow_abbrev=False)
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise BadInput(f"{message}; see --help")


def add_data_flags(parser, default=DEFAULT):
    """Add --help and the flags that say what to read; returns --dataset, which sets defaults."""
    flag = parser.add_argument_group("data").add_argument
    text = f"data set, which sets all other defaults (default: {default})"
    flag("--dataset", default=default, choices=DATASETS, help=text)
    dataset = parser.parse_known_args()[0].dataset
    flag("-h", "--help", action="help", help="show this and exit")
    root = HERE / "tests" if "npz" in DATASETS[dataset] else Path("datasets") / dataset
    text = f"directory of the images (default: {root})"
    flag("--data-root", type=Path, default=root, metavar="DIR", help=text)
    text = "directory of the index files (default: --data-root)"
    flag("--index-dir", type=Path, metavar="DIR", help=text)
    text = "size of the largest class divided by that of the smallest: 10, 50 or 100 (default: 100)"
    imbalance, text = (100.0, text) if "cifar" in DATASETS[dataset] else (None, argparse.SUPPRESS)
    flag("--imbalance", type=float, default=imbalance, metavar="X", help=text)
    return dataset


CLEAR = "\r\x1b[K" if sys.stderr.isatty() else ""  # clears a live line


class Progress:
    """A line that starts with the remaining time: live on a terminal, else every ten seconds."""

    def __init__(self, steps, done=0):
        self.steps, self.first, self.began, self.shown = steps, done, time.monotonic(), -math.inf

    def show(self, done, text):
        now, last = time.monotonic(), done >= self.steps
        if RANK == 0 and (last or now - self.shown > (0.1 if CLEAR else 10)):
            self.shown = now
            left = (now - self.began) / max(done - self.first, 1) * (self.steps - done)
            line = f"ETA {timedelta(seconds=int(left))}  {text}"
            line = line[: os.get_terminal_size(2).columns - 1] if CLEAR else line
            print(CLEAR + line, end="" if CLEAR and not last else "\n", file=sys.stderr, flush=True)


AGAIN = "the same command continues from the last checkpoint, or starts over if there is none"


def run(main, explain=lambda error: (1, None)):
    """Call main(); print errors that are not bugs in the code as one line.

    The exit code is 2 if the user can fix the error, and 130 after Ctrl-C. `explain` returns it and
    a message for a RuntimeError, or no message if it is a bug.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except BadInput as error:
        # The error of a worker process arrives as its traceback, which ends with the message.
        code, message = 2, str(error).rpartition("BadInput: ")[2].strip()
    except BrokenPipeError:  # the reader of the output has gone, such as head
        os._exit(141)
    except OSError as error:
        reason = error.strerror or str(error).strip().rpartition("\n")[2]
        code, message = 2, f"{error.filename or 'system'}: {reason}; give another path"
    except KeyboardInterrupt:
        code, message = 130, f"interrupted; {AGAIN}"
    except RuntimeError as error:
        code, message = explain(error)
        if not message:
            raise
    process = f" (rank {RANK})" if "RANK" in os.environ else ""
    print(f"{CLEAR}{Path(sys.argv[0]).name}{process}: error: {message}", file=sys.stderr)
    if dist.is_initialized():  # NCCL may wait in the destructor of a group that others have left
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# ------------------------------------------------------------------------- checking a data set


def check_counts(sets, published):
    """Print the counts of every split; returns messages on those that are not the published."""
    classes, problems = len(sets["train"].labels.bincount()), []
    for split, dataset in sets.items():
        counts, count = dataset.labels.bincount(minlength=classes), f"{len(dataset):,} images"
        here = counts[counts > 0]
        line = (f"{split}: {count}, {len(here):,} of {classes:,} classes, of {here.max():,} to "
                f"{here.min():,} images each")
        if split == "train":
            groups = [f"{mask.sum()} {name}-" for name, mask in shot_groups(counts).items()]
            line += f": {', '.join(groups)}shot"
        print(line)
        if published.get(split, len(dataset)) != len(dataset):
            problems.append(f"{dataset.origin}: {count}, not the published {published[split]:,}")
    return problems


def check_files(sets, decoding, threads):
    """Messages on the files of all splits that are missing, broken, or in two splits."""

    def examine(path):  # its problem, and its path or, if decoding, the hash of its content
        try:
            with open_image(path) as image:
                if decoding:
                    decode(image)
            return None, sha256(path.read_bytes()).digest() if decoding else path
        except BadInput as error:
            return str(error), path

    problems, seen = [], {}
    for split, dataset in sets.items():
        paths, progress = list(map(dataset.path, range(len(dataset)))), Progress(len(dataset))
        old = len(problems)
        with ThreadPool(max(1, threads)) as pool:
            found = enumerate(zip(paths, pool.imap(examine, paths, 64)), 1)
            for done, (path, (problem, key)) in found:
                first, of = seen.get(key, (None, split))
                seen.setdefault(key, (path, split))
                if problem or of != split or first == path:  # in two splits, or listed twice
                    problems.append(problem or f"{path} of {split} equals {first} of {of}")
                progress.show(done, f"{split}: {done:,}, {len(problems) - old:,} problems")
    return problems


CONTENTS = f"""
contents of --data-root, by default datasets/NAME, and of --index-dir:

  imagenet_lt    ILSVRC 2012: train/n01440764/*.JPEG, and val/*.JPEG or val/n01440764/*.JPEG, as in
                 ILSVRC/Data/CLS-LOC of Kaggle's archive. (The official train is a tar of tars, one
                 a class folder.) Test images are ILSVRC's val/, val images are from its train/.
  places_lt      places365standard_easyformat.tar, the "small images (256 x 256) with easy directory
                 structure" of Places365: train/airfield/*.jpg, val/airfield/*.jpg or val/*.jpg.
  inaturalist18  train_val2018.tar.gz: train_val2018/Aves/*/*.jpg. No test split: val is reported.
  cifar10_lt, cifar100_lt         torchvision's download, which --download fetches.
  imagefolder, small_imagefolder  your own images, <class>/*, or train/<class>/* with val/ and
                 test/ beside train/. A missing test/ takes a fifth of the training images of each
                 class and a missing val/ a tenth, at least one each, in the order of the hash of
                 their paths; classes of one or two images are not tested. Sort photographs of the
                 same object or patient into the three folders yourself: near-copies in train and
                 test make the accuracy look better than it is. {" ".join(IMG_EXTENSIONS)};
                 16-bit grey is read as 8 bits, transparency is dropped, EXIF orientation applied.

Index files, such as ImageNet_LT_train.txt, list the images of each split, a line "path label" each.
They are in data/ImageNet_LT, data/Places_LT and data/iNaturalist18 of
{INDEX_FILES}.
"""


def main():
    parser = Parser(description=__doc__, epilog=CONTENTS)
    dataset = add_data_flags(parser)
    flag = parser.add_argument_group("check").add_argument
    flag("--decode", action="store_true", help="also decode every image")
    flag("--download", action="store_true", help="download CIFAR into --data-root")
    flag("--workers", type=int, default=os.cpu_count(), metavar="N", help="threads")
    args = parser.parse_args()
    sets = load_dataset(dataset, args.data_root, args.index_dir, args.imbalance, args.download)
    problems = check_counts(sets, DATASETS[dataset].get("published", {}))
    if in_memory(dataset):
        train, test = ({i.numpy().tobytes() for i in sets[s].images} for s in ("train", "test"))
        print(f"{len(train & test)} test images are also in train, as the benchmark has them")
    else:
        problems += check_files(sets, args.decode, args.workers)
    first = ", the first 20" if len(problems) > 20 else ""
    print(f"\nproblems: {len(problems)}{first}", *problems[:20], sep="\n  ")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    run(main)
