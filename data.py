"""Data sets and their settings, long-tailed subsets, batches, and the views that training sees.

    python data.py --dataset imagenet_lt --data-root DIR              # check a data set
    python data.py --dataset cifar100_lt --data-root DIR --download   # download and check CIFAR
    python data.py --views views.png                                  # draw what the networks see

The check counts the images and classes of every split and names missing, broken and repeated files;
the exit code is 1 if there are any.
"""

import argparse
import json
import math
import os
import sys
import time
import zipfile
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.ops import roi_align
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize
from torchvision.utils import draw_bounding_boxes, save_image

try:  # the same pixels as Pillow's, 1.4 times as fast; torchvision plans to remove it
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

HERE = Path(__file__).resolve().parent
DEFAULT = "fashion_mnist_lt"
RATIO = (3 / 4, 4 / 3)  # range of the aspect ratio of all crops
RANK = int(os.environ.get("RANK", 0))  # rank of this process, set by torchrun

# ------------------------------------------------------------------------------------ settings

# Every setting of the method is a flag. Each entry has its value for photographs, its limits or
# choices, its meaning, and "any number" if it takes any number of values. The values are the
# paper's for ImageNet-LT, or its published code's where the paper gives none; `penalty` is ours.
# DATASETS below has the values that differ for other data sets.
SETTINGS = dict(
    views=dict(
        mean=((0.485, 0.456, 0.406), (0, 1), "mean of red, green and blue, from 0 to 1"),
        std=((0.229, 0.224, 0.225), (0.001, 1), "standard deviation of red, green and blue"),
        view_size=(224, (8, 4096), "width and height of the views in pixels; paper: 224"),
        crop_scale=((0.08, 1.0), (0.001, 1),
                    "smallest and largest area of a view, as a fraction of the image's"),
        grey_p=(0.2, (0, 1), "probability that a query view or a patch becomes grey"),
        blur_p=(0.5, (0, 1), "probability that a query view or a patch is blurred"),
        query_jitter=((0.4, 0.4, 0.4, 0.1), (0, 1),
                      "jitter of query views and patches: brightness, contrast, saturation, hue"),
        query_jitter_p=(0.8, (0, 1), "probability that a query view or a patch is jittered"),
        key_jitter=((0.4, 0.4, 0.4, 0.0), (0, 1),
                    "jitter of all key views: brightness, contrast, saturation, hue"),
        patches=(5, (1, 1024), "number L of patches cut from a query view; paper: 5"),
        patch_size=(64, (4, 4096), "width and height of the patches in pixels; paper: 64"),
        patch_scale=((0.05, 0.6), (0.001, 1),
                     "smallest and largest area of a patch, as a fraction of the query view's"),
    ),
    stage1=dict(
        arch=("resnet50", None, "backbone"),  # train.py has the choices
        pretrained=("none", None, "weights to start from: a file, the name of torchvision's "
                    "weights, or none"),
        experts=(1, (1, 16), "experts that share the first stages; stage 2 averages their logits"),
        epochs=(200, (1, 1e6), "passes over the training set"),
        warmup=(0.05, (0, 1), "fraction of the run in which the learning rate rises; paper: 0.05"),
        batch_size=(256, (1, 1e6), "images in a step, over all processes"),
        lr=(0.1, (1e-8, 1e3),
            "peak learning rate for 256 images a step; scaled for other batch sizes"),
        weight_decay=(5e-4, (0, 1), "weight decay of SGD"),
        queue_size=(65536, (0, 1e7),
                    "keys K in the queue; keys beyond one per training image are stale copies"),
        momentum_encoder=(0.999, (0, 1), "momentum m of the key encoder's moving average"),
        temperature=(0.07, (1e-3, 1e3), "temperature tau of both losses; paper: 0.07"),
        alpha=(0.1, (0, 1), "weight of the anchor's own key in DSCL; paper: 0.1"),
        pbsd_weight=(1.5, (0, 1e3), "weight lambda of PBSD; 0 turns it off; paper: 1.5"),
    ),
    stage2=dict(
        classifier=("balanced", ("adjusted", "balanced"),
                    "adjusted: logistic regression with logit adjustment, no learning rate; "
                    "balanced: SGD with class-balanced sampling, as in the paper"),
        penalty=((3e-3, 1e-4, 3e-4, 1e-3, 1e-2, 3e-2, 1e-1), (0, 1e6),
                 "penalty on the squared weights, for --classifier adjusted; val chooses one of "
                 "several; without val the first is used. All flags below are for --classifier "
                 "balanced", "any number"),
        epochs=(40, (0, 1e6),
                "passes over the training set; 0 evaluates the classifier of --loss ce or la"),
        batch_size=(2048, (1, 1e6), "images in a step, over all processes"),
        lr=(10.0, (1e-8, 1e4), "learning rate of SGD, not scaled with the batch size"),
        weight_decay=(0.0, (0, 1), "weight decay of SGD"),
        milestones=((0.5, 0.75), (0, 1),
                    "fractions of the run after which the learning rate falls to a tenth"),
        augment=(True, None,
                 "train on random views like stage 1's query views, not on whole images"),
        bn=("train", ("train", "eval"),
            "BatchNorm statistics of the backbone; train: the batch's, eval: stage 1's"),
    ),
)


def derive(base, **changes):
    """A copy of the entry `base` with changes; changes in nested dicts are merged."""
    return base | {k: base.get(k, {}) | v if isinstance(v, dict) else v for k, v in changes.items()}


# Photographs on disk, which worker processes decode and crop.
PHOTOGRAPHS = {
    group: {name: value for name, (value, *_) in settings.items()}
    for group, settings in SETTINGS.items()
}

# Small images, held in memory and cropped on the device. The changes are ours, chosen on held-out
# images of Fashion-MNIST-LT: images this small need no blur, and random crops in stage 2 would
# shift the features of a small frozen backbone.
SMALL = derive(
    PHOTOGRAPHS,
    views=dict(view_size=32, crop_scale=(0.3, 1.0), blur_p=0.0, patches=2, patch_size=16),
    stage1=dict(
        arch="resnet_small", warmup=0.025, batch_size=128, lr=0.6,
        queue_size=1024, momentum_encoder=0.99, pbsd_weight=0.3,
    ),
    stage2=dict(
        classifier="adjusted",
        epochs=20, batch_size=256, weight_decay=5e-4, augment=False, bn="eval",
    ),
)

# Images of 32 x 32 pixels; imbalance is the size of the largest class divided by that of the
# smallest. The paper has no CIFAR. The settings are ours, chosen on held-out training images of
# CIFAR-100-LT and used unchanged for CIFAR-10-LT.
CIFAR = derive(
    SMALL, source="cifar", imbalance=100.0,
    stage1=dict(queue_size=4096, pbsd_weight=1.0),
    stage2=dict(penalty=(1e-3,), weight_decay=1e-4),
)

DATASETS = {
    # Grey images of 28 x 28 pixels, 1000 to 10 of each class; trains in minutes on two CPU cores.
    "fashion_mnist_lt": derive(
        SMALL,
        source="npz", root=HERE / "tests",
        names="T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle-boot".split(),
        views=dict(
            mean=(0.286, 0.286, 0.286), std=(0.353, 0.353, 0.353),
            view_size=20, patches=1, patch_size=8,
            query_jitter=(0.2, 0.2, 0.2, 0.1), key_jitter=(0.2, 0.2, 0.2, 0.0),
        ),
        stage1=dict(
            arch="resnet_tiny", epochs=120, warmup=0.0417, queue_size=256, momentum_encoder=0.98
        ),
    ),
    "cifar10_lt": derive(
        CIFAR, files=CIFAR10,
        views=dict(mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262)),
    ),
    "cifar100_lt": derive(
        CIFAR, files=CIFAR100,
        views=dict(mean=(0.507, 0.487, 0.441), std=(0.267, 0.256, 0.276)),
    ),
    "imagenet_lt": derive(
        PHOTOGRAPHS,
        source="index", index=("ImageNet_LT_{}.txt", "{}.json"),
        index_folder="ImageNet_LT", published=dict(train=115846, val=20000, test=50000),
    ),
    # Starts from weights trained on ImageNet, as is usual. Epochs, lr and K are ours and not tuned:
    # a short fine-tuning, and a queue of half the training set, as on ImageNet-LT.
    "places_lt": derive(
        PHOTOGRAPHS,
        source="index", index=("Places_LT_{}.txt", "{}.json"),
        index_folder="Places_LT", published=dict(train=62500, val=7300, test=36500),
        stage1=dict(
            arch="resnet152", pretrained="IMAGENET1K_V1",
            epochs=30, warmup=0.0667, lr=0.05, queue_size=32768,
        ),
    ),
    # Half the epochs of ImageNet-LT for four times the images. Settings are ours and not tuned.
    "inaturalist18": derive(
        PHOTOGRAPHS,
        source="index", index=("iNaturalist18_{}.txt", "{}2018.json"),
        index_folder="iNaturalist18",
        published=dict(train=437513, val=24426),  # there is no test split
        stage1=dict(epochs=100),
    ),
    # Your own images in DATA_ROOT/<class>/ or DATA_ROOT/{train,val,test}/<class>/. These settings
    # are for a few thousand photographs, those of small_imagefolder for images of 32 to 64 pixels.
    # Both are ours and not tuned; see the README for more.
    "imagefolder": derive(
        PHOTOGRAPHS, source="folder",
        stage1=dict(
            arch="resnet18", epochs=400, warmup=0.025, batch_size=128,
            queue_size=1024, momentum_encoder=0.99,
        ),
        stage2=dict(classifier="adjusted", batch_size=256, bn="eval"),
    ),
    "small_imagefolder": derive(SMALL, source="folder"),
}


def in_memory(name):
    """Whether a data set is held in memory and cropped on the device."""
    return DATASETS[name]["source"] in ("npz", "cifar")


class BadInput(Exception):
    """The user's input cannot be used; the message names it and says how to fix it."""


# ----------------------------------------------------------------------------- views and patches


@lru_cache
def constant(values, device):
    """A cached tensor of a tuple of numbers; copying it at every call would make the GPU wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)


class Draws:
    """Random numbers for the views of images, the same with any number of processes.

    They are drawn for all `batch_size` images of the global batch, and this process uses those of
    its `rows`.
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

    Like torchvision's RandomResizedCrop, but not rounded to pixels. The area is uniform in the
    range `scale`, as a fraction of the square, and the log aspect ratio is uniform. The first of
    `tries` boxes that fits into the square is used, else the whole square; the position is uniform.
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
    """Crop images [B, C, H, W] to boxes [n B, 4] and resize: [n B, C, size, size].

    Box i, in pixels, belongs to image i mod B. RoIAlign crops and resizes all boxes in one call:
    it interpolates bilinearly, and averages where it shrinks.
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

    channel_means [B, 3] are of pixels in [0, 1]. `jitter` holds brightness, contrast, saturation
    and hue as in torchvision's ColorJitter, and is applied with probability jitter_p. Two things
    differ: hue is a rotation in YIQ instead of a shift in HSV, and values are clamped once at the
    end instead of after each change, so that the order of the changes does not matter.
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
    # [B, 2 radius + 1], sums to 1
    kernel = (-0.5 * (offsets / draws.uniform(*sigma, 1, copies=copies)) ** 2).softmax(1)
    chosen = draws.uniform(0, 1, 1, copies=copies) < probability
    kernel = torch.where(chosen, kernel, (offsets == 0).to(kernel.dtype))
    kernel = kernel.repeat_interleave(channels, 0)[:, None]  # one for each channel of each image
    planes = F.pad(images.reshape(1, -1, height, width), [radius] * 4, mode="reflect")
    planes = F.conv2d(planes, kernel[:, :, None], groups=count * channels)
    planes = F.conv2d(planes, kernel[:, :, :, None], groups=count * channels)
    return planes.view(images.shape)


def mean_and_std(cfg, device):
    """Mean and standard deviation of the channels, each [3, 1, 1]."""
    return (constant(tuple(v), device)[:, None, None] for v in (cfg.mean, cfg.std))


def normalize(images, cfg):
    """Float images [B, 1 or 3, H, W] in [0, 1] to three standardised channels, channels last."""
    mean, std = mean_and_std(cfg, images.device)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def photometric(images, draws, cfg, jitter, jitter_p=1.0, grey_p=0.0, blur_p=0.0, copies=1):
    """Colour changes, blur and normalisation of images [copies * B, C, H, W] in [0, 1]."""
    means = images.mean((2, 3)).expand(-1, 3)
    matrices = color_matrices(means, draws, jitter, jitter_p, grey_p, copies)
    images = color_transform(images, matrices)
    return normalize(random_blur(images, draws, blur_p, copies), cfg)


def random_view(images, draws, cfg):
    """Randomly flip uint8 crops [B, C, V, V]; returns float [B, C, V, V] in [0, 1].

    For a data set held in memory the images are whole images, which are cropped here first.
    """
    images = images.float() / 255
    if in_memory(cfg.dataset):
        boxes = random_boxes(draws, images.shape[-1], cfg.crop_scale)
        images = crop(images, boxes, cfg.view_size)
    return random_flip(images, draws)


def evaluation_view(images, cfg):
    """Normalise uint8 images [1, B, C, H, W] for evaluation: [B, 3, H, W]."""
    return normalize(images[0].float() / 255, cfg)


def query_views(images, draws, cfg):
    """Query view, boxes and patches, made from uint8 crops [B, C, V, V] or whole images.

    Returns the query view [B, 3, V, V]; L = cfg.patches boxes for each image, [L, B, 4] in pixels
    of the cropped and flipped view; and the patches [L, B, 3, S, S], which are cut out at the boxes
    before the view's colours are changed. Boxes and patches are None if L is 0.
    """
    view, count = random_view(images, draws, cfg), cfg.patches
    changes = cfg.query_jitter, cfg.query_jitter_p, cfg.grey_p, cfg.blur_p
    boxes = patches = None
    if count:
        boxes = random_boxes(draws, cfg.view_size, cfg.patch_scale, copies=count)
        patches = random_flip(crop(view, boxes, cfg.patch_size), draws, count)
        patches = photometric(patches, draws, cfg, *changes, copies=count)
        patches = patches.unflatten(0, (count, len(view)))
        boxes = boxes.unflatten(0, (count, len(view)))
    return photometric(view, draws, cfg, *changes), boxes, patches


def key_view(images, draws, cfg):
    """The key view [B, 3, V, V], made from uint8 crops [B, C, V, V] or whole images."""
    return photometric(random_view(images, draws, cfg), draws, cfg, cfg.key_jitter)


# --------------------------------------------------------------------------- long-tailed subsets


def long_tailed_counts(largest, classes, factor):
    """Images in class c: int(largest * factor^(c / (classes - 1))), factor = smallest / largest."""
    return [int(largest * factor ** (c / (classes - 1))) for c in range(classes)]


def shuffled_by_class(labels, classes):
    """The indices of each class, shuffled; the first n_c of them are its long-tailed subset.

    One class after the other, by numpy's legacy generator with seed 0, as most CIFAR-LT papers do.
    """
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

    def views(self, indices, seeds, cfg, crops):
        """The whole images, uint8 [1, B, C, H, W]; they are cropped on the device."""
        return self.images[indices][None]


class ImageFiles(ImageArrays):
    """Images on disk: their paths below root, labels int64 [N], and class names or None.

    `layout` describes where the files were found, if that is not where their index says.
    """

    def __init__(self, root, paths, labels, origin, names=None, layout=""):
        self.root, self.origin, self.names, self.layout = root, origin, names, layout
        self.paths = np.asarray(paths)  # one array of bytes, which workers share
        self.labels = torch.as_tensor(labels, dtype=torch.long)

    def path(self, index):
        return self.root / os.fsdecode(self.paths[index])

    def views(self, indices, seeds, cfg, crops):
        """`crops` random crops of each image, uint8 [crops, B, 3, V, V]; if 0, its central crop.

        The random crops depend only on seeds [B]. BadInput names a file that cannot be read.
        """
        views = []
        for place, index in enumerate(indices):
            with open_image(self.path(index)) as image:
                if crops:
                    # torch.manual_seed would seed GPUs too, which a worker must not use.
                    torch.default_generator.manual_seed(seeds[place])
                    views += random_crops(image, cfg.crop_scale, cfg.view_size, crops)
                else:
                    views.append(central_crop(image, cfg.view_size))
        # In a worker, default_collate writes to shared memory; channels last, like decoded images.
        views = default_collate([view.permute(1, 2, 0) for view in views])
        return views.unflatten(0, (len(indices), -1)).permute(1, 0, 4, 2, 3)


@contextmanager
def open_image(path):
    """An image file, open but not decoded; BadInput names it if it cannot be read."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow raises many kinds of errors on broken files
        reason = getattr(error, "strerror", None) or error
        raise BadInput(
            f"{path} cannot be read as an image ({reason}): fix or replace the file, then run the "
            "same command again"
        ) from None


def decode(image, max_downscale=1.0):
    """An open image as uint8 [3, H, W]; grey, CMYK, palette and alpha become RGB.

    16-bit grey is read as value // 256, as image viewers show it; 32-bit pixels raise ValueError.
    A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, but is never reduced by more than the
    factor `max_downscale`, so that the resize that follows still shrinks it.
    """
    # 16-bit grey has mode "I;16", or "I" as read by some versions of Pillow from formats whose
    # pixels never have more than 16 bits.
    if image.mode[:4] == "I;16" or image.mode == "I" and image.format in ("PNG", "PPM"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    elif image.mode[0] in "IF":
        raise ValueError("its pixels have 32 bits; 8 are supported, or 16 in grey images")
    if max_downscale >= 2:
        image.draft("RGB", [side // int(max_downscale) for side in image.size])
    elif decode_jpeg and (image.format, image.mode) == ("JPEG", "RGB"):
        image.fp.seek(0)
        content = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
        return decode_jpeg(content, ImageReadMode.RGB)
    return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))


def random_crops(image, scale, size, count):
    """Random resized crops of an open image: `count` uint8 views [3, size, size]."""
    width = image.width
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
    pixels = decode(image, min(image.size) / shorter)
    return center_crop(resize(pixels, [shorter], antialias=True), [size, size])


# -------------------------------------------------------------------------------------- readers


def load_dataset(name, root=None, index_dir=None, imbalance=100.0, download=False, checking=False):
    """A data set's splits, {"train": ImageArrays or ImageFiles, "val": ..., "test": ...}.

    CIFAR-LT has no val and takes `imbalance`; iNaturalist has no test. Classes may be missing in
    val and test. Raises BadInput if a file is missing or broken, or if a class has no training
    image; with `checking`, image files may be missing.
    """
    entry = DATASETS[name]
    root = root or entry.get("root")
    if root is None or not Path(root).is_dir():
        raise BadInput(f"--data-root must be the directory of {name}'s images, got {root}")
    root = Path(root)
    if entry["source"] == "npz":
        sets = read_npz(root / f"{name}.npz", entry["names"])
    elif entry["source"] == "cifar":
        sets = read_cifar(entry["files"], root, imbalance, download)
    elif entry["source"] == "folder":
        sets = read_folders(root)
    else:
        sets, classes = {}, None
        for split in entry["published"]:
            sets[split] = read_index(entry, split, root, Path(index_dir or root), classes)
            classes = int(sets["train"].labels.max()) + 1
    counts = sets["train"].labels.bincount()
    if not counts.all():
        raise BadInput(
            f"{sets['train'].origin}: no image of class {int(counts.argmin())}; the labels must be "
            f"0 to {len(counts) - 1} without a gap"
        )
    if len(counts) < 2:
        only = f", {sets['train'].names[0]}" if sets["train"].names else ""
        raise BadInput(f"{sets['train'].origin}: only one class{only}; at least two are needed")
    for part in sets.values():
        if not (checking or in_memory(name) or part.path(0).is_file()):
            raise BadInput(
                f"{part.path(0)} not found, the first image of {part.origin}: --data-root must be "
                "the directory to which its paths are relative; data.py counts missing images"
            )
    return sets


def read_npz(path, names):
    """The arrays {train,val,test}_{images,labels} of the file that ships with the repository."""
    try:
        with np.load(path) as arrays:
            return {
                split: ImageArrays(
                    torch.from_numpy(arrays[f"{split}_images"])[:, None],
                    torch.from_numpy(arrays[f"{split}_labels"]).long(), path, names,
                )
                for split in ("train", "val", "test")
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} cannot be read ({error}): get it from the repository") from None


def read_cifar(files, root, imbalance, download):
    """CIFAR-10/100-LT: the usual subset of the training images, and the whole test set."""
    try:
        train, test = (files(root, train=train, download=download) for train in (True, False))
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"{root} has no complete {files.base_folder} ({reason}): data.py with "
            f"--download fetches it from {files.url}"
        ) from None
    classes = len(train.classes)
    counts = long_tailed_counts(len(train) // classes, classes, 1 / imbalance)
    order = shuffled_by_class(train.targets, classes)
    chosen = np.concatenate([indices[:count] for indices, count in zip(order, counts)])
    return {
        split: ImageArrays(
            torch.from_numpy(dataset.data[rows]).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(dataset.targets)[rows], f"{root}, {split}", train.classes,
        )
        for split, dataset, rows in (("train", train, chosen), ("test", test, slice(None)))
    }


def read_index(entry, split, root, directory, classes=None):
    """A split from its index file: lines "relative/path label", or JSON as read_json reads it.

    Labels must be below `classes` or, in the training set, below the number of lines.
    """
    candidates = [directory / name.format(split) for name in entry["index"]]
    path = next(filter(Path.is_file, candidates), None)
    if path is None:
        raise BadInput(
            f"{candidates[0]} not found: --index-dir must be the directory of the index files. Get "
            "them by git clone https://github.com/facebookresearch/classifier-balancing and use "
            f"--index-dir classifier-balancing/data/{entry['index_folder']}"
        )
    if path.suffix == ".json":
        entries = lines = read_json(path)
    else:
        lines = path.read_bytes().splitlines()
        entries = (line.rsplit(None, 1) for line in lines)
    classes, paths, labels = classes or len(lines), [], []
    for number, fields in enumerate(entries, 1):
        try:
            name, label = fields[0], int(fields[1])
            outside = name[:1] == b"/" or (b".." in name and b".." in name.split(b"/"))
            if outside or not 0 <= label < classes:
                raise ValueError
        except (ValueError, IndexError):
            line = os.fsdecode(b" ".join(fields))
            raise BadInput(
                f'{path}:{number}: {line!r} is not "path label" with a path below --data-root and '
                f"a label from 0 to {classes - 1}"
            ) from None
        paths.append(name)
        labels.append(label)
    if not paths:
        raise BadInput(f"{path} is empty")

    # ImageNet's val archive has no class folders: "val/n01440764/x" of the index is "val/x" there.
    # The first ten images show which layout the split has.
    def flat(name):
        return name.partition(b"/")[0] + b"/" + name.rpartition(b"/")[2]

    def found(names):
        return any((root / os.fsdecode(name)).is_file() for name in names)

    if found(paths[:10]) or not found(map(flat, paths[:10])):
        return ImageFiles(root, paths, labels, path)
    layout = f"found in {root / os.fsdecode(flat(paths[0])).partition('/')[0]}, no class folders"
    return ImageFiles(root, list(map(flat, paths)), labels, path, layout=layout)


def read_json(path):
    """[path, label] of every image in iNaturalist's annotations or the published DSCL index."""
    try:
        content = json.loads(path.read_bytes())
        entries = content["annotations"]
        if "images" in content:  # iNaturalist has paths and labels in two lists
            label_of = {entry["image_id"]: entry["category_id"] for entry in entries}
            images = content["images"]
            entries = [dict(fpath=i["file_name"], category_id=label_of[i["id"]]) for i in images]
        return [(os.fsencode(entry["fpath"]), b"%d" % entry["category_id"]) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(
            f"{path} is not an iNaturalist annotation file or the published DSCL index ({reason})"
        ) from None


HELD_OUT = {"test": 0.2, "val": 0.1}  # fractions of each class
FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def find_images(folder, classes=("",)):
    """(path, class) of every image in the class folders of a folder, or anywhere in it; sorted."""
    samples = make_dataset(folder, {c: c for c in classes}, IMG_EXTENSIONS, allow_empty=True)
    shown = [os.sep + os.path.relpath(path, folder) for path, _ in samples]
    return [sample for sample, name in zip(samples, shown) if os.sep + "." not in name]


def read_classes(place, root):
    """(path below root, class name) of every image in place/<class>/; prints what it skips."""
    folders = sorted(path.name for path in place.glob("[!.]*") if path.is_dir())
    found = find_images(place, folders) if folders else []
    left_out = sum(len(files) for _, _, files in os.walk(place, followlinks=True)) - len(found)
    if left_out and RANK == 0:
        kinds = " ".join(IMG_EXTENSIONS)
        print(
            f"{place}: {left_out} files are left out; only {kinds} in class folders are read",
            file=sys.stderr,
        )
    return [(os.fsencode(os.path.relpath(path, root)), name) for path, name in found]


def read_folders(root):
    """The splits of root/{train,val,test}/<class>/*, or of root/<class>/*, read as train.

    If val or test has no images, some are held out of train for it. Train defines the classes.
    """
    there = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    places = {
        split: next((there[name] for name in names if name in there), None)
        for split, names in FOLDERS.items()
    }
    if not any(places.values()):
        places["train"] = root
    samples = {split: read_classes(place, root) if place else [] for split, place in places.items()}
    train, missing = samples["train"], [split for split in HELD_OUT if not samples[split]]
    if not train:
        raise BadInput(
            f"{places['train'] or root / 'train'}: no images in class folders; they belong in "
            f"{root}/<class>/, or in {root}/train/<class>/ with val/ and test/ beside train/"
        )
    label_of = {name: label for label, name in enumerate(sorted({name for _, name in train}))}
    for split, part in samples.items():
        for name in sorted({name for _, name in part} - label_of.keys()):
            raise BadInput(
                f"{places[split] / name} has images, but {places['train'] / name} has none"
            )
    splits = hold_out(*zip(*train), missing)
    for split in ("train", *missing):
        samples[split] = [sample for sample, of in zip(train, splits) if of == split]
    if not (samples["val"] or samples["test"]):
        raise BadInput(
            f"{places['train']}: no class has the three images needed to hold one out for "
            f"testing; put images of some classes into {root}/test/<class>/"
        )
    return {
        split: ImageFiles(
            root, [path for path, _ in part], [label_of[name] for _, name in part],
            f"{root}/{split}", list(label_of),
        )
        for split, part in samples.items()
        if part
    }


def hold_out(paths, labels, missing):
    """The split of every training image, after holding images out for the `missing` splits.

    A hash of the image's path decides, so that neither the seed nor other images matter. But each
    missing split gets an image of every class of three or more, and none of a smaller class.
    """
    digests = [sha256(path).digest() for path in paths]
    splits, rows_of = ["train"] * len(paths), {}
    for row in sorted(range(len(paths)), key=digests.__getitem__):
        rows_of.setdefault(labels[row], []).append(row)
    for rows in rows_of.values():
        end, fraction = 0, 0.0
        for waiting, split in zip(range(len(missing), 0, -1), missing if len(rows) >= 3 else ()):
            begin, fraction = end, fraction + HELD_OUT[split]
            below = sum(digests[row][0] / 256 < fraction for row in rows)
            end = min(max(below, begin + 1), len(rows) - waiting)
            for row in rows[begin:end]:
                splits[row] = split
    return splits


# -------------------------------------------------------------------------------------- batches


def seed_from(*numbers):
    """One seed from several non-negative integers (seed, step, stream), well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class Batches:
    """The batches of a whole run: (indices, seeds of their random crops) for each step.

    Each epoch shuffles all images and drops the last incomplete batch. With `balanced`, sampling is
    class-balanced instead: a class is drawn uniformly, then an image of this class. A batch depends
    only on (seed, step), so that a run can continue at any step. Every rank gets its rows of the
    global batch.
    """

    def __init__(self, labels, batch_size, epochs, seed, balanced=False, start=0, rank=0, world=1):
        if batch_size > len(labels) or batch_size % world:
            raise BadInput(
                f"--batch-size {batch_size} must be a multiple of {world} (processes) and at most "
                f"{len(labels)} (training images)"
            )
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
            if self.balanced:
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
    """Maps a batch (indices, seeds) of a split to its images and labels."""

    def __init__(self, dataset, cfg, crops):
        self.dataset, self.cfg, self.crops = dataset, cfg, crops

    def __getitem__(self, batch):
        indices, seeds = batch
        images = self.dataset.views(indices, seeds, self.cfg, self.crops)
        return images, self.dataset.labels[indices]


def load_batches(dataset, batches, cfg, crops, workers, device, kind=BatchDataset):
    """A loader of (images uint8 [1 or 2, B, C, H, W], labels [B]).

    `batches` is Batches, or a list of (indices, seeds); `crops` is the number of random crops of an
    image, or 0 for the image as evaluation sees it. `kind` may be a subclass of BatchDataset that
    returns something else.
    """
    return DataLoader(
        kind(dataset, cfg, crops), sampler=batches, batch_size=None, num_workers=workers,
        pin_memory=device.type == "cuda", persistent_workers=workers > 0,
    )


# -------------------------------------------------------------------- what the commands share


def bounded(kind, low, high):
    """An argparse type: an int or float from low to high."""

    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, got {text}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse shows this name in its error
    return parse


def cores():
    """Cores that each process of this host can have for its workers, at most 8.

    One core is left to the process itself, which launches the work of its GPU.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


class Parser(argparse.ArgumentParser):
    """The argument parser of a command on a data set; errors raise BadInput.

    --dataset is read first, since it sets the defaults of the other flags. `chosen_by` is shown in
    --help: the arguments that choose which defaults are listed.
    """

    def __init__(self, description, dataset=DEFAULT, chosen_by="--dataset NAME"):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
            usage=f"%(prog)s [flags]    (%(prog)s {chosen_by} --help shows its defaults)",
            add_help=False, allow_abbrev=False,
        )
        self.group = self.add_argument_group("data")
        self.flag("dataset", dataset, tuple(DATASETS), "data set, which sets all other defaults")
        self.dataset = self.parse_known_args()[0].dataset
        self.entry = DATASETS[self.dataset]
        self.path("data-root", "DIR", "directory of the images")
        self.path("index-dir", "DIR", "directory of the index files (default: --data-root)")
        text = "size of the largest class divided by that of the smallest: 10, 50 or 100"
        self.flag("imbalance", self.entry.get("imbalance"), (1, 1e4), text)

    def begin(self, title):
        """Group the flags that follow under this title in --help."""
        self.group = self.add_argument_group(title)

    def flag(self, name, default, limits, text, any_number=False, shown=None):
        """Add a flag of its default's type; limits are the smallest and largest value, or choices.

        If the default is a tuple, the flag takes as many values, or any number if `any_number`. If
        it is None, the flag does not apply to this data set and is hidden; it takes a float.
        """
        values = default if isinstance(default, tuple) else (default,)
        options = dict(default=default, help=argparse.SUPPRESS)
        if default is not None:
            options["help"] = f"{text} (default: {shown or ' '.join(map(str, values))})"
        if isinstance(default, bool):
            options |= dict(action=argparse.BooleanOptionalAction)
        elif isinstance(default, str):
            options |= dict(choices=limits, metavar=None if limits else "NAME")
        else:
            kind = int if isinstance(values[0], int) else float
            options |= dict(type=bounded(kind, *limits), metavar="N" if kind is int else "X")
        if isinstance(default, tuple):
            options["nargs"] = "+" if any_number else len(default)
        self.group.add_argument("--" + name.replace("_", "-"), **options)

    def path(self, name, metavar, text, **options):
        """A flag that takes a path."""
        self.group.add_argument(f"--{name}", type=Path, metavar=metavar, help=text, **options)

    def switch(self, name, text):
        """A flag without value, off by default."""
        self.group.add_argument(f"--{name}", action="store_true", help=text)

    def settings(self, group, **choices):
        """Add a flag for every setting of a group of SETTINGS; `choices` replace its limits."""
        for name, (_, limits, text, *any_number) in SETTINGS[group].items():
            default = self.entry[group][name]
            self.flag(name, default, choices.get(name, limits), text, any_number)

    def run_flags(self):
        """The flags that every command has, whatever it computes."""
        text = "worker processes that decode images, per GPU"
        rule = "cores per process - 1, at most 8; 0 for data sets held in memory"
        default = 0 if in_memory(self.dataset) else cores()
        self.flag("workers", default, (0, 512), text, shown=rule)
        self.flag("seed", 0, (0, 2**63 - 1), "seed of all random numbers")
        self.group.add_argument("-h", "--help", action="help", help="show this and exit")

    def parse_args(self, args=None, namespace=None):
        args = super().parse_args(args, namespace)
        for name in ("crop-scale", "patch-scale"):
            smallest, largest = getattr(args, name.replace("-", "_"), (0, 1))
            if smallest > largest:
                self.error(f"--{name}: the smaller value must come first")
        for name in ("imbalance", "download"):
            if getattr(args, name, None) and self.entry["source"] != "cifar":
                takers = " and ".join(n for n in DATASETS if DATASETS[n]["source"] == "cifar")
                self.error(f"--{name}: only {takers} take it, not {self.dataset}")
        return args

    def error(self, message):
        raise BadInput(f"{message}; see --help")


CLEAR = "\r\x1b[K" if sys.stderr.isatty() else ""  # clears a live line


class Progress:
    """A line that starts with the remaining time: live on a terminal, else every ten seconds."""

    def __init__(self, steps, done=0):
        self.steps, self.first, self.began, self.shown = steps, done, time.monotonic(), -math.inf

    def show(self, done, text):
        now, last = time.monotonic(), done >= self.steps
        if last or now - self.shown > (0.1 if CLEAR else 10):
            self.shown = now
            left = (now - self.began) / max(done - self.first, 1) * (self.steps - done)
            line = f"ETA {timedelta(seconds=int(left))}  {text}"
            line = line[: os.get_terminal_size(2).columns - 1] if CLEAR else line
            print(CLEAR + line, end="" if CLEAR and not last else "\n", file=sys.stderr, flush=True)


AGAIN = "the same command continues from the last checkpoint, or starts over if there is none"


def run(main, explain=lambda error: (1, None)):
    """Call main(); print errors that are not bugs in the code as one line.

    The exit code is 2 if the user can fix the error, and 130 after Ctrl-C. `explain` returns exit
    code and message for a RuntimeError, or no message if it is a bug.
    """
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except BadInput as error:
        # The error of a worker process arrives as its traceback, which ends with the message.
        code, message = 2, str(error).rpartition("BadInput: ")[2].strip()
    except OSError as error:
        reason = error.strerror or str(error).strip().rpartition("\n")[2]
        code, message = 2, f"{error.filename or 'system'}: {reason}"
    except KeyboardInterrupt:
        code, message = 130, f"interrupted; {AGAIN}"
    except RuntimeError as error:
        code, message = explain(error)
        if not message:
            raise
    process = f" (rank {RANK})" if "RANK" in os.environ else ""
    print(f"{CLEAR}{Path(sys.argv[0]).name}{process}: error: {message}", file=sys.stderr)
    sys.exit(code)


# ------------------------------------------------------------------------- checking a data set


def problem_of(path, decoding):
    """The problem of a file: "missing", why it cannot be decoded (if `decoding`), or None."""
    if not path.is_file():
        return "missing"
    try:
        if decoding:
            with open_image(path) as image:
                decode(image)
    except BadInput as error:
        return str(error)


def check(sets, args):
    """Print the counts of every split; returns the missing files and messages on other problems."""
    published, problems = DATASETS[args.dataset].get("published", {}), []
    classes = len(sets["train"].labels.bincount())
    for split, dataset in sets.items():
        counts = dataset.labels.bincount(minlength=classes)
        here = counts[counts > 0]
        span = f"{here.max():,} to {here.min():,}" if here.max() > here.min() else f"{here.max():,}"
        line = f"{split}: {len(dataset):,} images, {len(here):,} classes of {span} images"
        if split == "train":
            many, medium, few = (int(mask.sum()) for mask in shot_groups(counts).values())
            line += f": {many} many-, {medium} medium- and {few} few-shot"
        elif len(here) < classes:
            line += f"; {classes - len(here)} of {classes} classes have none"
        layout = getattr(dataset, "layout", "")
        print(line + (f"; {layout}" if layout else ""))
        if published.get(split, len(dataset)) != len(dataset):
            expected = f"instead of the published {published[split]:,}"
            problems.append(f"{dataset.origin}: {len(dataset):,} images {expected}")
    if in_memory(args.dataset):
        return [], problems

    missing, seen = [], {}
    for split, dataset in sets.items():
        paths, progress = list(map(dataset.path, range(len(dataset)))), Progress(len(dataset))
        before = len(missing) + len(problems)
        for path in paths:
            if path in seen:
                problems.append(f"{path} is in {seen[path]} and again in {split}")
            seen[path] = split
        with ThreadPool(max(1, args.workers)) as pool:
            found = pool.imap(partial(problem_of, decoding=args.decode), paths, 64)
            for done, (path, problem) in enumerate(zip(paths, found), 1):
                if problem == "missing":
                    missing.append(str(path))
                elif problem:
                    problems.append(problem)
                count = len(missing) + len(problems) - before
                progress.show(done, f"{split}: {done:,} images, {count:,} problems")
    return missing, problems


def draw_views(path, dataset, args, count=6):
    """Draw what the networks see of some images: query view, its boxes, key view, patches."""
    count = min(count, len(dataset))
    indices = torch.linspace(0, len(dataset) - 1, count).long().tolist()
    images = dataset.views(indices, indices, args, 2)
    draws = [Draws(args.seed + n, count, slice(None), "cpu") for n in (0, 1)]
    view, boxes, patches = query_views(images[0], draws[0], args)
    key = key_view(images[-1], draws[1], args)
    mean, std = mean_and_std(args, "cpu")

    side = max(args.view_size, 128)
    shown = [(part * std + mean).clamp(0, 1) for part in (view, view, key, *patches)]
    shown = [F.interpolate(part, (side, side)) for part in shown]
    scaled = boxes.transpose(0, 1) * side / args.view_size
    colors = [("red", "lime", "cyan", "yellow", "magenta")[n % 5] for n in range(args.patches)]
    shown[1] = torch.stack(
        [draw_bounding_boxes(*pair, colors=colors, width=2) for pair in zip(shown[1], scaled)]
    )
    rows = torch.stack(shown, dim=1).flatten(0, 1)
    save_image(rows, path, format="png", nrow=len(shown), pad_value=1)
    print(f"drew {path}: query view, its boxes, key view, patches", file=sys.stderr)


def main():
    parser = Parser(__doc__)
    parser.begin("check")
    parser.switch("decode", "also decode every image")
    parser.switch("download", "download CIFAR into --data-root")
    parser.path("views", "FILE", "draw the networks' views to this PNG file instead of checking")
    parser.run_flags()
    parser.begin("views")
    parser.settings("views")
    args = parser.parse_args()
    choice = args.data_root, args.index_dir, args.imbalance, args.download
    sets = load_dataset(args.dataset, *choice, checking=not args.views)
    if args.views:
        return draw_views(args.views, sets["train"], args)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    missing, problems = check(sets, args)
    total = sum(map(len, sets.values()))
    if missing:
        title = f"{len(missing):,} of {total:,} images are missing below {sets['train'].root}"
        print(f"\n{title}, the first ten:", *missing[:10], sep="\n  ")
    other = "other problems" if missing else "problems"
    print(f"\n{other}: {len(problems)}", *problems[:10], sep="\n  ")
    sys.exit(1 if missing or problems else 0)


if __name__ == "__main__":
    run(main)
