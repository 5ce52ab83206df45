"""Data sets with their recipes, long-tailed subsets, samplers, and the views the method trains on.

DATASETS is the one place where a data set's settings stand; a command line flag wins over it.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Sampler
from torchvision.ops import roi_align

HERE = Path(__file__).resolve().parent

DATASETS = {
    # Fashion-MNIST (28 x 28 grey), 1000 to 10 pictures a class; everything but tau, alpha and the
    # boxes is ours, chosen on held-out training pictures for six minutes on two CPU cores.
    "fashion_mnist_lt": dict(
        root=HERE / "tests",
        classes=10,
        mean=(0.286, 0.286, 0.286),
        std=(0.353, 0.353, 0.353),
        workers=0,
        # views and patches
        view_size=20,
        patch_size=8,
        crop_scale=(0.3, 1.0),  # of the picture's area
        patch_scale=(0.05, 0.6),  # of the query view's area
        query_jitter=(0.2, 0.2, 0.2, 0.1),  # brightness, contrast, saturation, hue
        query_jitter_p=0.8,
        key_jitter=(0.2, 0.2, 0.2, 0.0),
        grey_p=0.2,
        blur_p=0.0,  # 28 pixels are blurred enough
        # stage 1
        stage1=dict(
            arch="resnet_small",
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
        ),
        # stage 2
        stage2=dict(
            epochs=20,
            batch_size=256,
            lr=10.0,
            weight_decay=5e-4,
            milestones=(0.5, 0.75),  # of the epochs; the learning rate falls to a tenth at each
            augment=False,  # heavy crops of 28 pixels shift what a small frozen backbone gives
            bn="eval",
        ),
    ),
}


class BadInput(Exception):
    """Something the user gave cannot be used; the message says what and how to mend it."""


# ------------------------------------------------------------------------------ long-tailed sets


def long_tailed_counts(largest, classes, factor):
    """Pictures a class, n_c = int(largest * factor^(c / (classes - 1))); factor is min/max."""
    return [int(largest * factor ** (c / (classes - 1))) for c in range(classes)]


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

    def __init__(self, images, labels, classes):
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        """The DataLoader's whole batch at once: (images [B, C, H, W], labels [B])."""
        return self.images[indices], self.labels[indices]

    @property
    def counts(self):
        """Pictures a class [classes]."""
        return self.labels.bincount(minlength=self.classes)


def load_dataset(name, root=None):
    """{"train": Pictures, "val": ..., "test": ...}; BadInput if a file is missing or broken."""
    recipe = DATASETS[name]
    path = Path(root or recipe["root"]) / f"{name}.npz"
    if not path.is_file():
        raise BadInput(f"{path} not found: --data-root must be the directory of {path.name}")
    try:
        with np.load(path) as arrays:
            return {
                split: Pictures(
                    torch.from_numpy(arrays[f"{split}_images"])[:, None],
                    torch.from_numpy(arrays[f"{split}_labels"]).long(),
                    recipe["classes"],
                )
                for split in ("train", "val", "test")
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(
            f"{path} cannot be read ({error}); get it again from the repository"
        ) from None


# ------------------------------------------------------------------------------------- samplers


def seed_from(*numbers):
    """One seed from several non-negative integers (seed, step, rank, ...), well mixed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


class Batches(Sampler):
    """Index lists of a whole run, each a function of (seed, step): a run can resume anywhere.

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
            yield batch[self.slice].tolist()


# ----------------------------------------------------------------------------- views and patches


def random_boxes(count, size, scale, device, ratio=(3 / 4, 4 / 3), tries=10):
    """Random resized crops of a square of `size` pixels: boxes [count, 4] as x1, y1, x2, y2.

    As torchvision's RandomResizedCrop, in sub-pixels: area uniform in `scale` of the square, log
    aspect ratio uniform, the first of `tries` that fits, else the whole square; position uniform.
    """
    draw = torch.rand(tries, 2, count, device=device)
    area = size**2 * torch.lerp(*(torch.tensor(s, device=device) for s in scale), draw[:, 0])
    low, high = np.log(ratio)
    aspect = (low + (high - low) * draw[:, 1]).exp()
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()])  # [2, tries, count]
    sides = torch.cat([sides, sides.new_full((2, 1, count), size)], dim=1)
    fits = (sides <= size).all(0).byte().argmax(0)  # the first that fits
    sides = sides[:, :, None].gather(1, fits.expand(2, 1, 1, count)).view(2, count)
    corner = torch.rand(2, count, device=device) * (size - sides)
    return torch.cat([corner, corner + sides]).T


def crop(images, boxes, size):
    """Cut and resize: images [B, C, H, W] and boxes [n B, 4] to [n B, C, size, size].

    Box i is of picture i mod B, in pixels. RoIAlign is a bilinear resize, averaging when it
    shrinks, for all pictures at once.
    """
    rows = torch.arange(len(images), device=boxes.device, dtype=boxes.dtype)
    rows = rows.repeat(len(boxes) // len(images))
    return roi_align(images, torch.cat([rows[:, None], boxes], dim=1), size, aligned=True)


def random_flip(images):
    """Mirror each picture with probability 1/2."""
    flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flip, images.flip(3), images)


LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
RGB_TO_YIQ = (LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def color_matrices(channel_means, jitter, jitter_p=1.0, grey_p=0.0):
    """Colour jitter and random grey of each picture as one affine map of its pixels: [B, 3, 4].

    channel_means [B, 3], pixels in [0, 1]. `jitter` (brightness, contrast, saturation, hue) as in
    torchvision's ColorJitter, in random order, with probability jitter_p. Hue is a rotation in YIQ
    where torchvision's is a shift in HSV; values are clamped once in the end, not at each change.
    """
    count, device = len(channel_means), channel_means.device
    luma = torch.tensor(LUMA, device=device)
    identity = torch.eye(3, device=device)
    grey = luma.expand(3, 3)

    *strengths, hue = jitter
    factor = torch.stack(
        [torch.empty(count, device=device).uniform_(max(0, 1 - s), 1 + s) for s in strengths]
    )[..., None, None]  # [3, B, 1, 1]
    angle = 2 * torch.pi * torch.empty(count, device=device).uniform_(-hue, hue)
    rotation = torch.zeros(count, 3, 3, device=device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2] = -angle.sin()
    rotation[:, 2, 1] = angle.sin()
    to_yiq = torch.tensor(RGB_TO_YIQ, device=device)
    changes = torch.stack(
        [
            factor[0] * identity,  # brightness
            factor[1] * identity,  # contrast; its offset depends on what came before
            factor[2] * identity + (1 - factor[2]) * grey,  # saturation
            torch.linalg.inv(to_yiq) @ rotation @ to_yiq,  # hue
        ]
    )  # [4, B, 3, 3]

    order = torch.rand(count, 4, device=device).argsort(1)
    picture = torch.arange(count, device=device)
    unchanged = torch.eye(3, 4, device=device).expand(count, 3, 4)
    matrix = unchanged
    for change in order.T:
        means = (matrix[:, :, :3] @ channel_means[..., None])[..., 0] + matrix[:, :, 3]
        offset = (1 - factor[1, :, 0]) * (means @ luma)[:, None]  # [B, 1] towards the mean grey
        offset = torch.where(change[:, None] == 1, offset, 0.0)
        matrix = changes[change, picture] @ matrix
        matrix = torch.cat([matrix[:, :, :3], (matrix[:, :, 3] + offset)[..., None]], dim=2)

    chance = torch.rand(2, count, 1, 1, device=device)
    matrix = torch.where(chance[0] < jitter_p, matrix, unchanged)
    return torch.where(chance[1] < grey_p, grey @ matrix, matrix)


def change_colors(images, matrices):
    """Apply color_matrices to float images [B, 1 or 3, H, W] in [0, 1]; returns [B, 3, H, W]."""
    pixels = images.expand(-1, 3, -1, -1).flatten(2)
    changed = torch.baddbmm(matrices[:, :, 3:], matrices[:, :, :3], pixels)
    return changed.clamp_(0, 1).view(len(images), 3, *images.shape[2:])


def random_blur(images, probability, sigma=(0.1, 2.0)):
    """Gaussian blur of each picture with the given probability; sigma uniform, in pixels."""
    if not probability:
        return images
    count, channels, height, width = images.shape
    radius = min(round(3 * sigma[1]), min(height, width) - 1)
    width_of = torch.empty(count, 1, device=images.device).uniform_(*sigma)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = (-0.5 * (offsets / width_of) ** 2).softmax(1)  # [B, 2 radius + 1], sums to 1
    chosen = torch.rand(count, 1, device=images.device) < probability
    kernel = torch.where(chosen, kernel, (offsets == 0).to(kernel.dtype))
    kernel = kernel.repeat_interleave(channels, 0)[:, None]  # each plane its own, both ways
    planes = F.pad(images.reshape(1, -1, height, width), [radius] * 4, mode="reflect")
    planes = F.conv2d(planes, kernel[:, :, None], groups=count * channels)
    planes = F.conv2d(planes, kernel[:, :, :, None], groups=count * channels)
    return planes.view(images.shape)


def normalize(images, recipe):
    """Float images [B, 1 or 3, H, W] in [0, 1] to three standardised channels, channels last."""
    mean, std = (
        torch.tensor(recipe[name], device=images.device)[:, None, None] for name in ("mean", "std")
    )
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def query_colors(images, recipe):
    """Colour changes, blur and normalisation of query views and patches [B, C, H, W] in [0, 1]."""
    matrices = color_matrices(
        images.mean((2, 3)).expand(-1, 3),
        recipe["query_jitter"],
        recipe["query_jitter_p"],
        recipe["grey_p"],
    )
    return normalize(random_blur(change_colors(images, matrices), recipe["blur_p"]), recipe)


def random_view(images, recipe):
    """A random resized crop and flip of uint8 images [B, C, H, W]: float [B, C, V, V] in [0, 1]."""
    boxes = random_boxes(len(images), images.shape[-1], recipe["crop_scale"], images.device)
    return random_flip(crop(images.float() / 255, boxes, recipe["view_size"]))


@torch.no_grad()
def classifier_view(images, recipe):
    """Stage 2's training view [B, 3, V, V], augmented as the query view."""
    return query_colors(random_view(images, recipe), recipe)


@torch.no_grad()
def evaluation_view(images, recipe):
    """The whole picture, only normalised."""
    return normalize(images.float() / 255, recipe)


@torch.no_grad()
def training_views(images, recipe, patches):
    """All that a step of stage 1 sees of uint8 images [B, C, H, W] (section 5 of the method).

    Returns query view and key view [B, 3, V, V], `patches` = L boxes a picture in the query view
    [L, B, 4] in pixels, and these regions as patches [L, B, 3, S, S].
    """
    query, key = random_view(images, recipe), random_view(images, recipe)
    # Boxes are drawn after the query's crop and flip and cut before its colour changes.
    size = recipe["view_size"]
    boxes = random_boxes(patches * len(images), size, recipe["patch_scale"], images.device)
    regions = random_flip(crop(query, boxes, recipe["patch_size"])) if patches else query[:0]
    key_matrices = color_matrices(key.mean((2, 3)).expand(-1, 3), recipe["key_jitter"])
    return (
        query_colors(query, recipe),
        normalize(change_colors(key, key_matrices), recipe),
        boxes.unflatten(0, (patches, len(images))),
        query_colors(regions, recipe).unflatten(0, (patches, len(images))) if patches else None,
    )
