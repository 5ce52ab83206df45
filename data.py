"""Data sets, views and patches, and batches; as a command, check a data set.

    python data.py --dataset imagenet_lt               # check a data set: counts, missing files
    python data.py --dataset imagenet_lt --decode      # and that every image can be decoded
    python data.py --dataset cifar100_lt --download    # download and check CIFAR
    python data.py --dataset imagefolder --list        # a JSON line for each image: its split

The check counts images and classes, and names missing and broken files and those that are in two
splits or classes; exit code 1 if there are any.
"""

import argparse
import atexit
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import unicodedata
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import lru_cache
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path

# On ARM these make oneDNN compute float32 in bfloat16, and a loaded torch cannot set it back.
for variable in ("DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE"):
    os.environ.pop(variable, None)
for stream in ("stdout", "stderr"):  # closed: the next file that is opened would get its number
    if getattr(sys, stream) is None:
        setattr(sys, stream, open(os.devnull, "w"))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, TiffImagePlugin
from PIL.JpegImagePlugin import JpegImageFile, get_sampling
from torch.utils.data import DataLoader, default_collate, get_worker_info
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

# Pillow's own reader garbles some uncompressed TIFFs: 16-bit colours in planes, turned grey ones.
TiffImagePlugin.READ_LIBTIFF = True

HERE = Path(__file__).resolve().parent
RANK = int(os.environ.get("RANK", 0))  # rank of this process, set by torchrun
RATIO = (3 / 4, 4 / 3)  # range of the aspect ratio of all crops

# ----------------------------------------------------------------------- what the data sets are

# Data sets with "npz" or "cifar" are arrays in memory, cropped on the device; images of those with
# an "index" or "folders" are decoded and cropped by worker processes. train.py has the settings.
FASHION_CLASSES = "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle-boot".split()
DATASETS = {
    "fashion_mnist_lt": dict(npz="fashion_mnist_lt.npz", names=FASHION_CLASSES),
    "cifar10_lt": dict(cifar=CIFAR10),
    "cifar100_lt": dict(cifar=CIFAR100),
    "imagenet_lt": dict(index="ImageNet_LT", published=dict(train=115846, val=20000, test=50000)),
    "places_lt": dict(index="Places_LT", published=dict(train=62500, val=7300, test=36500)),
    # It has no test split.
    "inaturalist18": dict(index="iNaturalist18", published=dict(train=437513, val=24426)),
    "imagefolder": dict(folders=True),
    "small_imagefolder": dict(folders=True),
}
DEFAULT = "fashion_mnist_lt"


def cropped_on_device(name):
    """Whether a data set is held as arrays, of which whole images go to the device."""
    return "npz" in DATASETS[name] or "cifar" in DATASETS[name]


class BadInput(Exception):
    """The user's input cannot be used; the message names it and says how to fix it."""


def tell(text, end="\n"):
    """Print to stderr. What nobody can read is dropped: no message ends a run."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # the terminal was closed, or the reader of the pipe has gone
        sys.stderr = open(os.devnull, "w")
    except RuntimeError:  # a signal came while another message was being printed
        pass


def say(text, end="\n"):
    """Print a note to stderr, once for all processes."""
    if RANK == 0:
        tell(text, end)


noted = set()


def note_once(kind, text):
    """Say what is unusual about an image: the first of each kind; of workers only one does."""
    worker = get_worker_info()
    if kind not in noted and (worker is None or worker.id == 0):
        noted.add(kind)
        say(text)


# ----------------------------------------------------------------------------- views and patches

# cfg: the arguments of train.py.


@lru_cache
def constant(values, device):
    """A cached tensor of a tuple of numbers; copying it at every call would make the GPU wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)


class Draws:
    """Random numbers for the views of images, the same with any number of processes.

    They are drawn for the whole global batch, and this process uses those at its `positions` in it.
    Copy j of image i is element j * (number of images) + i.
    """

    def __init__(self, seed, batch_size, positions, device):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.batch_size, self.positions, self.device = batch_size, positions, device

    def uniform(self, low, high, *shape, copies=1):
        """Uniform in [low, high], `copies` for each image: [copies * images, *shape]."""
        shape = copies, self.batch_size, *shape
        draw = torch.empty(shape, device=self.device).uniform_(low, high, generator=self.generator)
        return draw[:, self.positions].flatten(0, 1)


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
    chosen = (sides <= size).all(2).byte().argmax(1)  # [N] the first that fits
    sides = sides.take_along_dim(chosen[:, None, None], dim=1).squeeze(1)  # [N, 2]
    corner = draws.uniform(0, 1, 2, copies=copies) * (size - sides)
    return torch.cat([corner, corner + sides], dim=1)


def crop(images, boxes, size):
    """Crop images [B, C, H, W] to boxes [n B, 4] in pixels and resize: [n B, C, size, size].

    Box i is of image i mod B. RoIAlign interpolates bilinearly, and averages where it shrinks.
    """
    image_index = torch.arange(len(images), device=boxes.device, dtype=boxes.dtype)
    image_index = image_index.repeat(len(boxes) // len(images))
    return roi_align(images, torch.cat([image_index[:, None], boxes], dim=1), size, aligned=True)


def random_flip(images, draws, copies=1):
    """Mirror each image with probability 1/2."""
    flip = draws.uniform(0, 1, 1, 1, 1, copies=copies) < 0.5
    return torch.where(flip, images.flip(3), images)


LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
RGB_TO_YIQ = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])


def hue_rotation(angle):
    """Rotations of the colours I and Q by angles [B, 1, 1], as matrices for RGB: [B, 3, 3]."""

    def in_rgb(matrix):  # inverse(YIQ) · matrix · YIQ
        matrix = np.linalg.inv(RGB_TO_YIQ) @ np.array(matrix) @ RGB_TO_YIQ
        return constant(tuple(matrix.flatten()), angle.device).view(3, 3)

    unchanged = in_rgb([[1, 0, 0], [0, 0, 0], [0, 0, 0]])  # Y
    cosine = in_rgb([[0, 0, 0], [0, 1, 0], [0, 0, 1]])  # I and Q to themselves
    sine = in_rgb([[0, 0, 0], [0, 0, -1], [0, 1, 0]])  # I to Q, and Q to -I
    return unchanged + angle.cos() * cosine + angle.sin() * sine


def color_matrices(channel_means, draws, jitter, jitter_p=1.0, grey_p=0.0, copies=1):
    """Colour jitter and random grey of each image as one affine map of its pixels: [B, 3, 4].

    channel_means [B, 3] are of pixels in [0, 1]. `jitter`: brightness, contrast, saturation and hue
    as in torchvision's ColorJitter, with probability jitter_p. But hue is a rotation in YIQ, not a
    shift in HSV, and values are clamped once at the end, so that the order does not matter.
    """
    device = channel_means.device
    luma, unchanged = constant(LUMA, device), torch.eye(3, 4, device=device)
    identity, to_grey = unchanged[:, :3], luma.expand(3, 3)
    smallest = constant((*(max(0, 1 - s) for s in jitter[:3]), -2 * math.pi * jitter[3]), device)
    largest = constant((*(1 + s for s in jitter[:3]), 2 * math.pi * jitter[3]), device)
    drawn = torch.lerp(smallest, largest, draws.uniform(0, 1, 4, copies=copies))
    brightness, contrast, saturation, angle = drawn[..., None, None].unbind(1)  # each [B, 1, 1]

    # pixel -> brightness * (contrast * hue * saturation * pixel + (1 - contrast) * mean grey).
    # Saturation and hue do not change the mean grey of an image, which contrast mixes in.
    matrix = hue_rotation(angle) @ torch.lerp(to_grey, identity, saturation)
    mean_grey = (channel_means @ luma)[:, None, None].expand(-1, 3, 1)
    matrix = torch.cat([contrast * matrix, (1 - contrast) * mean_grey], dim=2)
    matrix = brightness * matrix
    is_jittered = draws.uniform(0, 1, 1, 1, copies=copies) < jitter_p
    matrix = torch.where(is_jittered, matrix, unchanged)
    is_grey = draws.uniform(0, 1, 1, 1, copies=copies) < grey_p
    return torch.where(is_grey, to_grey @ matrix, matrix)


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
    channel_means = images.mean((2, 3)).expand(-1, 3)
    matrices = color_matrices(channel_means, draws, jitter, jitter_p, grey_p, copies)
    images = color_transform(images, matrices)
    return normalize(random_blur(images, draws, blur_p, copies), cfg)


def random_view(images, draws, cfg):
    """A random view of uint8 images: float [B, C, V, V] in [0, 1], flipped with probability 1/2."""
    images = images.float() / 255
    if cropped_on_device(cfg.dataset):  # else they are random crops already
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
        boxes = boxes.unflatten(0, (count, len(view)))
        patches = patches.unflatten(0, (count, len(view)))
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


def fingerprint(content, labels):
    """Number and hash of the images, of which `content` has the bytes, and of their labels."""
    digest = sha256(content.tobytes() + labels.numpy().tobytes()).hexdigest()
    return f"{len(labels)} images, hash {digest[:12]}"


class ImageArrays:
    """Images in memory: uint8 [N, C, H, W], labels int64 [N], and class names or None."""

    def __init__(self, images, labels, origin, names=None):
        self.images, self.labels, self.origin, self.names = images, labels, origin, names

    def __len__(self):
        return len(self.labels)

    def fingerprint(self):
        """Number and hash of images and labels."""
        return fingerprint(self.images.numpy(), self.labels)

    def views(self, indices, seeds, cfg, crops):
        """The whole images, uint8 [1, B, C, H, W]; they are cropped on the device."""
        return self.images[indices][None]


class ImageFiles:
    """Images on disk: their paths below root, labels int64 [N], and class names or None."""

    def __init__(self, root, paths, labels, origin, names=None, upright=False):
        self.root, self.origin, self.names = root, origin, names
        self.paths = np.asarray(paths)  # an array of bytes, which workers share
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        self.pixels = None  # from hold(): the images, decoded and shrunk, [3, H, W] each
        self.upright = upright  # turn images as EXIF says, which papers of the benchmarks do not

    def __len__(self):
        return len(self.labels)

    def fingerprint(self):
        """Number and hash of paths and labels."""
        return fingerprint(self.paths, self.labels)

    def path(self, index):
        return self.root / os.fsdecode(self.paths[index])

    def views(self, indices, seeds, cfg, crops):
        """`crops` random crops of each image, uint8 [crops, B, 3, V, V]; if 0, its central crop.

        The random crops depend only on seeds [B]. BadInput names a file that cannot be read.
        """
        views = []
        for n, index in enumerate(indices):
            with self.opened(index) as image:
                if crops:
                    # torch.manual_seed would seed GPUs too, which a worker must not use.
                    torch.default_generator.manual_seed(seeds[n])
                    of_image = random_crops(image, cfg.crop_scale, cfg.view_size, crops)
                else:
                    of_image = [central_crop(image, cfg.view_size)]
                # Square crops of a turned image and turned crops have the same distribution.
                orientation = exif_orientation(image) if self.upright else 1
                views += [turned(view, orientation) for view in of_image]
        # In a worker, default_collate writes to shared memory; channels last, like decoded images.
        views = default_collate([view.permute(1, 2, 0) for view in views])
        return views.unflatten(0, (len(indices), -1)).permute(1, 0, 4, 2, 3)

    def opened(self, index):
        """A context with an open image file, or with the pixels [3, H, W] that hold() kept."""
        return nullcontext(self.pixels[index]) if self.pixels else open_image(self.path(index))

    def hold(self, cfg, threads):
        """Read all images once and keep them, shrunk as far as the crops of cfg allow.

        If they would take more than half of this host's free memory, shared by its processes, they
        are not kept: workers read them in every epoch.
        """
        side = math.ceil(cfg.view_size / cfg.crop_scale[0] ** 0.5)  # of the smallest square crop
        # 6 % less, so that 12-megapixel photographs are decoded at a quarter of their size. Of the
        # crops about 1 % grow then, by up to 6 %.
        least = 0.94 * side

        def shrunk_bytes(index):
            with self.opened(index) as image:
                width, height = image.size
            return 3 * width * height * min(1, side / min(width, height)) ** 2

        sample = range(0, len(self), math.ceil(len(self) / 100))
        size = sum(map(shrunk_bytes, sample)) / len(sample) * len(self)
        usable = free_memory() / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if size > usable:
            return say(f"{len(self):,} images would take {size / 1e9:.1f} GB, more than the "
                       f"{usable / 1e9:.1f} GB that may be used: every epoch reads them anew")
        say(f"{len(self):,} images are kept in {size / 1e9:.1f} GB of memory")

        def read(index):
            with self.opened(index) as image:
                pixels = decode(image, min(image.size) / least)
                pixels = resize(pixels, [min(side, *pixels.shape[1:])], antialias=True)
                return turned(pixels, exif_orientation(image) if self.upright else 1)

        pixels, few, progress = [], [], Progress(len(self))
        with thread_pool(threads) as pool:
            for done, image in enumerate(pool.imap(read, range(len(self)), 8), 1):
                few.append(image.permute(1, 2, 0))  # channels last, as resize() is fast
                # Copied to large blocks they leave no gaps in memory between decoded images.
                if done == len(self) or sum(map(torch.numel, few)) > 2**26:
                    block = torch.cat([image.flatten() for image in few])
                    parts = block.split([image.numel() for image in few])
                    parts = [part.view(image.shape) for part, image in zip(parts, few)]
                    pixels += [part.permute(2, 0, 1) for part in parts]
                    few = []
                progress.show(done, f"reading images: {done:,} of {len(self):,}")
        self.pixels = pixels


@contextmanager
def thread_pool(threads):
    """A pool whose threads have ended when it is left: at the exit of Python torch would abort."""
    pool = ThreadPool(threads)
    try:
        yield pool
    finally:
        pool.terminate()
        pool.join()


def free_memory():
    """Bytes of memory that are free on this host and, on Linux, within its container's limits."""
    bounds = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):
        available = re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())
        bounds.append(1024 * int(available[1]))
        # "0::/job" or, in the first version of control groups, "4:memory:/job".
        groups = re.findall(r"^\d+:(memory)?:/(.*)", Path("/proc/self/cgroup").read_text(), re.M)
        for kind, group in groups:
            root, names = Path("/sys/fs/cgroup", kind), ("max", "current", r"^file (\d+)")
            if kind:
                names = "limit_in_bytes", "usage_in_bytes", r"^cache (\d+)"
            for place in (root / group, *(root / group).parents):
                with suppress(OSError, ValueError):  # no limit here, or "max"
                    limit, used = (int((place / f"memory.{n}").read_text()) for n in names[:2])
                    cache = re.search(names[2], (place / "memory.stat").read_text(), re.M)
                    bounds.append(limit - used + int(cache[1]))  # a cache makes room
    return min(bounds)


@contextmanager
def open_image(path):
    """An image file, open but not decoded; BadInput names it if it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                note_once("pages", f"{path} has {image.n_frames} pages or frames: of such files "
                                   "only the first is read")
            if image.format == "TIFF":
                image.load()  # Pillow turns it as its orientation says; only then its size is right
            yield image
    except Exception as error:  # Pillow raises many kinds of errors on broken files
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path} cannot be read as an image ({reason}): fix or replace the file, "
                       "then run the same command again") from None


def exif_orientation(image):
    """The EXIF orientation, 1 to 8, that is still to be applied to an image after decode()."""
    with suppress(Exception):  # Pillow raises many kinds of errors on malformed EXIF
        return image.getexif().get(0x0112, 1)  # Pillow has applied and removed that of a TIFF
    return 1


def bits_per_sample(image):
    """Bits of each sample, as an open image file states them, before its pixels are loaded."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,)))
    reading = image.tile[0][3] if image.tile else ""  # how Pillow will read the pixels
    deep = image.mode[0] == "I" or image.format == "PNG" and ";16" in str(reading)
    deep |= image.format == "PPM" and isinstance(reading, tuple) and reading[-1] > 255
    return 16 if deep else 8


def decode(image, max_downscale=1.0, note=note_once):
    """An open image as uint8 [3, H, W]; grey, CMYK, palette and alpha become RGB.

    Of 16 bits the upper 8 are taken, as image viewers do; note(kind, text) is called if that leaves
    few levels. Other depths raise ValueError. A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size,
    but never at less than 1 / max_downscale, so that the resize that follows still shrinks it.
    """
    if isinstance(image, torch.Tensor):  # from ImageFiles.hold
        return image
    # 16-bit grey has mode "I;16" or, in some versions of Pillow, "I".
    grey_16 = image.mode[:4] == "I;16" or image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode[0] in "IF" and not grey_16:
        raise ValueError("its pixels have 32 bits or a sign; 8 or 16 bits without are supported")
    if bits_per_sample(image) > 8:
        return decode_16_bits(image, note)
    if isinstance(image, JpegImageFile) and get_sampling(image) == 1:  # 4:2:2
        max_downscale /= 2  # its colours are shrunk twice as far: findings/jpeg_draft_chroma.sh
    if max_downscale >= 2:
        image.draft("RGB", [side // int(max_downscale) for side in image.size])
    elif decode_jpeg and (image.format, image.mode) == ("JPEG", "RGB"):
        image.fp.seek(0)
        content = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
        with suppress(RuntimeError):  # Pillow is less strict, or says what is wrong
            return decode_jpeg(content, ImageReadMode.RGB)
    return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))


def decode_16_bits(image, note):
    """decode() for more than 8 bits a sample, which Pillow cuts to 8 in colours but not in grey."""
    bits, is_grey, pixels = bits_per_sample(image), image.mode[0] == "I", np.asarray(image)
    if is_grey:
        pixels = (pixels >> (bits - 8)).astype(np.uint8)
    levels = int(pixels.max()) + 1
    if levels <= 16:
        end = levels << (bits - 8)
        note("levels", f"{image.filename}: its {bits}-bit values are below {end:,} of {2**bits:,}, "
             f"which leaves {levels} of 256 levels: multiply the values of such images by "
             f"{256 // levels}, or save them with 8 bits")
    # "White is zero" (tag 262): Pillow inverts files of 1 and 8 bits only.
    if is_grey and image.format == "TIFF" and image.tag_v2.get(262, 0) == 0:
        pixels = 255 - pixels
    return pil_to_tensor((Image.fromarray(pixels) if is_grey else image).convert("RGB"))


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
        sets["train"].names = check_folders(sets)
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


def check_folders(sets):
    """The folder of each label's training images, or None if they are not one to one.

    BadInput if val or test has a folder of training images under another label.
    """

    def pairs(dataset):  # (label, folder without the first) of its images
        folders = [b"/".join(path.split(b"/")[1:-1]) for path in dataset.paths.tolist()]
        return sorted(set(zip(dataset.labels.tolist(), folders)))

    labels, folders = zip(*pairs(sets["train"]))
    if not len(labels) == len(set(labels)) == len(set(folders)):
        return None
    label_of = dict(zip(folders, labels))
    for dataset in sets.values():
        for label, folder in pairs(dataset):
            if label_of.get(folder, label) != label:  # in a flat val/ the folder says nothing
                raise BadInput(f"{dataset.origin} gives {os.fsdecode(folder)} the label {label}, "
                               f"but {sets['train'].origin} {label_of[folder]}: use the lists of "
                               "one source")
    return [os.fsdecode(folder).rpartition("/")[2] for folder in folders]


def read_npz(path, names):
    """The arrays {train,val,test}_{images,labels} of the file that ships with the repository."""
    if not path.is_file():
        raise BadInput(f"{path} not found; for images in folders give --dataset small_imagefolder "
                       "or --dataset imagefolder, for others their name")
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
        train, test = (files(root, train=is_train, download=download) for is_train in (True, False))
    except (RuntimeError, OSError) as error:
        reason = f" ({str(error).splitlines()[0]})" if download else ""
        raise BadInput(f"{root} has no complete {files.base_folder}{reason}: data.py with "
                       f"--download fetches it from {files.url}") from None
    counts = long_tailed_counts(len(train) // len(train.classes), len(train.classes), 1 / imbalance)
    order, sets = shuffled_by_class(train.targets, len(train.classes)), {}
    subset = np.concatenate([indices[:count] for indices, count in zip(order, counts)])
    for split, dataset, indices in (("train", train, subset), ("test", test, slice(None))):
        images = torch.from_numpy(dataset.data[indices]).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(dataset.targets)[indices]
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


# In the path of an image: a file or folder with a dot, or a folder of a NAS box or of a drive.
HIDDEN = r"/(\.|(@|\$RECYCLE|lost\+found|System Volume Information)[^/]*/)"


def subfolders(place):
    """The folders in a folder, but for hidden ones."""
    paths = [path for path in place.iterdir() if not re.search(HIDDEN, f"/{path.name}/")]
    return sorted(path for path in paths if path.is_dir())


def find_images(folder):
    """The images below a folder, sorted, and its other files, among them hidden images.

    OSError names a folder that cannot be listed.
    """

    def is_hidden(path):
        return re.search(HIDDEN, path[len(str(folder)) :])

    def fail(error):  # os.walk would go on without that folder
        if not is_hidden(f"{error.filename}/"):
            raise error

    images, others, seen = [], [], set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link, perhaps to a folder above: each real folder is read once
            folders.clear()
        for name in names:
            path, is_image = os.path.join(place, name), name.lower().endswith(IMG_EXTENSIONS)
            is_read = is_image and not is_hidden(path) and real not in seen
            (images if is_read else others).append(path)
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

        root/train/cat/1.png   root/val/cat/9.png   root/Test/dog/7.png     three splits
        root/cat/1.png         root/dog/old/3.png   root/test/5.png         three classes
    """
    has_folders = {path: bool(subfolders(path)) for path in subfolders(root)}
    splits = {SPLIT_OF[p.name.lower()]: p for p in has_folders if p.name.lower() in SPLIT_OF}
    if any(has_folders[path] for path in splits.values()):
        unclear = [p for p in has_folders if p not in splits.values() and find_images(p)[0]]
    else:
        splits, alike = {"train": root}, [p for p in has_folders if re.search(LIKE_A_SPLIT, p.name)]
        unclear = [path for path in alike if has_folders[path] or alike == list(has_folders)]
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
        samples[split] = [sample for sample, its_split in zip(train, splits) if its_split == split]
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
    """The split of each training image by the hash of its path: "train", or one of `missing`.

    Of ten images of a class, in the order of their hashes, the first two become "test", the next
    one "val". An image that is added or removed moves few others.
    """
    splits, of_class = ["train"] * len(paths), {}
    for index in sorted(range(len(paths)), key=lambda index: sha256(paths[index]).digest()):
        of_class.setdefault(labels[index], []).append(index)
    for indices in of_class.values():
        remaining = iter(indices)
        for split in missing if len(indices) >= 3 else ():
            for _ in range(max(1, round(HELD_OUT[split] * len(indices)))):
                splits[next(remaining)] = split
    return splits


# -------------------------------------------------------------------------------------- batches

# Streams of random numbers in a step, beside the one that draws its images.
SHUFFLE, QUERY, KEY = 1, 2, 3  # stage 1: shuffle BN; query views and patches; key views
CLASSIFIER = 1  # stage 2: views


def seed_from(*numbers):
    """One seed from (seed, step or epoch) or (seed, step, stream), well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def crop_seeds(seed, step, count):
    """The seeds of the random crops that workers cut of each image of the global batch."""
    sequence = np.random.SeedSequence((seed, step), spawn_key=(1,))
    return (sequence.generate_state(count, np.uint64) >> np.uint64(1)).tolist()


class Batches:
    """The batches of a whole run: (indices, seeds of their random crops) for each step.

    Each epoch shuffles all images and drops the last incomplete batch; with `balanced`, sampling is
    class-balanced instead. A batch depends only on (seed, step), so that a run can continue at any
    step. Every rank gets the images at its `positions` in the global batch.
    """

    def __init__(self, labels, batch_size, epochs, seed, balanced=False, start=0, rank=0, world=1):
        if batch_size > len(labels) or batch_size % world:
            raise BadInput(f"--batch-size {batch_size} must be a multiple of {world} (processes) "
                           f"and at most {len(labels)} (training images)")
        self.labels, self.batch_size, self.seed, self.balanced = labels, batch_size, seed, balanced
        self.per_epoch = len(labels) // batch_size
        self.steps = range(start, epochs * self.per_epoch)
        per_rank = batch_size // world
        self.positions = slice(rank * per_rank, (rank + 1) * per_rank)

    def __iter__(self):
        batches = self.class_balanced() if self.balanced else self.shuffled()
        for step, indices in zip(self.steps, batches):
            seeds = crop_seeds(self.seed, step, self.batch_size)
            yield indices[self.positions].tolist(), seeds[self.positions]

    def shuffled(self):
        """The indices of each batch: every epoch is a new order of all images."""
        for step in self.steps:
            epoch, position = divmod(step, self.per_epoch)
            if position == 0 or step == self.steps.start:
                generator = torch.Generator().manual_seed(seed_from(self.seed, epoch))
                order = torch.randperm(len(self.labels), generator=generator)
            yield order[position * self.batch_size :][: self.batch_size]

    def class_balanced(self):
        """The indices of each batch: a class is drawn uniformly, then an image of it."""
        by_class, counts = self.labels.argsort(stable=True), self.labels.bincount()
        start = counts.cumsum(0) - counts  # of each class in by_class
        for step in self.steps:
            generator = torch.Generator().manual_seed(seed_from(self.seed, step))
            draw = torch.rand(2, self.batch_size, generator=generator, dtype=torch.float64)
            drawn = (draw[0] * len(counts)).long()
            yield by_class[start[drawn] + (draw[1] * counts[drawn]).long()]


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
    """Kill them at exit: they ignore the SIGTERM by which multiprocessing would end them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report that they were killed
    for worker in multiprocessing.active_children():
        worker.kill()


def load_batches(dataset, batches, workers, device):
    """A loader of a BatchDataset; `batches` is Batches, or a list of (indices, seeds)."""
    # The forkserver of Python 3.14 would get SIGTERM as well, and copy the paths to each worker.
    fork = sys.platform == "linux"
    if getattr(dataset.dataset, "pixels", None) and not fork:
        workers = 0  # each would get a copy of the pixels
    return DataLoader(dataset, sampler=batches, batch_size=None, num_workers=workers,
                      pin_memory=device.type == "cuda", persistent_workers=workers > 0,
                      worker_init_fn=ignore_interrupts,
                      multiprocessing_context="fork" if workers and fork else None)


# -------------------------------------------------------------------- what the commands share


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors raise BadInput."""

    def __init__(self, **options):
        options |= dict(usage="%(prog)s [flags]", add_help=False, allow_abbrev=False)
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        if "--local-rank" in message or "--local_rank" in message:
            raise BadInput("torch.distributed.launch is not supported: start processes by torchrun")
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
            with suppress(OSError):  # not a terminal, or not any more
                line = line[: os.get_terminal_size(2).columns - 1]
            say(CLEAR + line, end="" if CLEAR and not last else "\n")


AGAIN = "the same command continues from the last checkpoint, or starts over if there is none"


def set_output(**options):
    """Set how standard output is encoded, since file names and classes may be any bytes."""
    with suppress(AttributeError):  # a notebook's
        sys.stdout.reconfigure(**options)


def run(main, explain=lambda error: (1, None)):
    """Call main(); print errors that are not bugs in the code as one line.

    The exit code is 2 if the user can fix the error, and 130 after Ctrl-C. `explain` returns it and
    a message for a RuntimeError, or no message if it is a bug.
    """
    set_output(errors="backslashreplace")
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
    except KeyboardInterrupt as stop:
        code, message = 130, f"interrupted; {str(stop) or AGAIN}"
    except RuntimeError as error:
        code, message = explain(error)
        if not message:
            raise
    process = f" (rank {RANK})" if "RANK" in os.environ else ""
    tell(f"{CLEAR}{Path(sys.argv[0]).name}{process}: error: {message}")
    if dist.is_initialized():  # NCCL may wait in the destructor of a group that others have left
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


# ------------------------------------------------------------------------- checking a data set


def check_counts(sets, published):
    """Print the counts of every split; returns messages on those that are not the published."""
    names, problems = sets["train"].names, []
    for split, dataset in sets.items():
        counts, count = dataset.labels.bincount(minlength=len(names)), f"{len(dataset):,} images"
        present = counts[counts > 0]
        line = (f"{split}: {count}, {len(present):,} of {len(names):,} classes, of "
                f"{present.max():,} to {present.min():,} images each")
        if split == "train":
            groups = [f"{mask.sum()} {name}-" for name, mask in shot_groups(counts).items()]
            line += f": {', '.join(groups)}shot"
        print(line)
        for number, says in ((0, "without an image"), (1, "of a single image")):
            few = [names[label] for label in (counts == number).nonzero()[:, 0]]
            more = f" and {len(few) - 10} more" if len(few) > 10 else ""
            if few:
                print(f"{split}: classes {says}: {', '.join(few[:10])}{more}")
        if published.get(split, len(dataset)) != len(dataset):
            problems.append(f"{dataset.origin}: {count}, not the published {published[split]:,}")
    return problems


def check_files(sets, decoding, threads):
    """Messages on the files of all splits that are missing or broken, or that lose levels.

    Also on those that are listed twice or, if decoding, equal in two splits or under two classes.
    """

    def examine(path):  # its problem, and its path or, if decoding, the hash of its pixels
        said, key = [], path
        try:
            with open_image(path) as image:
                if decoding:
                    pixels = decode(image, note=lambda kind, text: said.append(text)).numpy()
                    key = pixels.shape, sha256(pixels.tobytes()).digest()
        except BadInput as error:
            said = [str(error)]
        return said, key

    problems, seen = [], {}
    for split, dataset in sets.items():
        paths, progress = list(map(dataset.path, range(len(dataset)))), Progress(len(dataset))
        before = len(problems)
        with thread_pool(max(1, threads)) as pool:
            for index, (said, key) in enumerate(pool.imap(examine, paths, 16)):
                found = split, int(dataset.labels[index])
                twin, where = seen.setdefault(key, (paths[index], found))
                if where != found or (twin == paths[index] and where is not found):
                    said.append(f"{paths[index]} of {split} equals {twin} of {where[0]}")
                problems += said[:1]
                done, count = index + 1, len(problems) - before
                progress.show(done, f"{split}: {done:,}, {count:,} problems")
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
                 16 bits are read as 8, transparency is dropped, EXIF orientation is applied.

Index files, such as ImageNet_LT_train.txt, list the images of each split, a line "path label" each.
They are in data/ImageNet_LT, data/Places_LT and data/iNaturalist18 of
{INDEX_FILES}.
"""


def list_images(sets):
    """Print a JSON line for each image; those of an array have their index as path."""
    for split, dataset in sets.items():
        for index, label in enumerate(dataset.labels.tolist()):
            path = str(dataset.path(index)) if isinstance(dataset, ImageFiles) else index
            line = {"path": path, "class": sets["train"].names[label], "split": split}
            print(json.dumps(line, ensure_ascii=False))


def main():
    parser = Parser(description=__doc__, epilog=CONTENTS)
    dataset = add_data_flags(parser)
    flag = parser.add_argument_group("check").add_argument
    flag("--decode", action="store_true", help="also decode every image")
    flag("--download", action="store_true", help="download CIFAR into --data-root")
    flag("--list", action="store_true", help="print path, class and split of each image as JSON")
    flag("--workers", type=int, default=os.cpu_count(), metavar="N", help="threads")
    args = parser.parse_args()
    sets = load_dataset(dataset, args.data_root, args.index_dir, args.imbalance, args.download)
    if args.list:
        return list_images(sets)
    problems = check_counts(sets, DATASETS[dataset].get("published", {}))
    if cropped_on_device(dataset):
        train, test = ({i.numpy().tobytes() for i in sets[s].images} for s in ("train", "test"))
        print(f"{len(train & test)} test images are also in train, as the benchmark has them")
    else:
        problems += check_files(sets, args.decode, args.workers)
    first = ", the first 20" if len(problems) > 20 else ""
    print(f"\nproblems: {len(problems)}{first}", *problems[:20], sep="\n  ")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    run(main)
