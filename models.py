"""The networks of DSCL + PBSD: an encoder, its moving average, and the queue of past keys.

Encoder         backbone f and projection head g, which embed views, regions and patches
moving_average  updates the key encoder, whose embeddings are the keys z_i+
Queue           M, the first-in-first-out memory of keys and labels
"""

import re
from collections import OrderedDict
from contextlib import contextmanager
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.models import get_model, get_model_weights
from torchvision.models.resnet import BasicBlock
from torchvision.ops import roi_align

SMALL_ARCHS = {
    "resnet_small": dict(blocks=1, channels=32, strides=(2, 1, 2, 1)),
    "resnet_tiny": dict(blocks=1, channels=24, strides=(2, 1, 2, 1)),
    "resnet20": dict(blocks=3, channels=16, strides=(1, 1, 2, 2)),
    "resnet32": dict(blocks=5, channels=16, strides=(1, 1, 2, 2)),
}
ARCHS = (*SMALL_ARCHS, "resnet18", "resnet50", "resnet152", "resnext50_32x4d")


class Encoder(nn.Module):
    """Backbone f and projection head g of E experts; an embedding is normalise(g(f(x))), float32.

    The experts share the backbone up to layer2 (`shared`); each has its own layer3, layer4
    (`branches`) and head, as in RIDE (Wang et al., 2021). The first dimension of all outputs is E.
    With `classes` the heads are linear classifiers, for the cross-entropy baselines and stage 2,
    and the outputs are logits [E, B, classes].
    """

    def __init__(self, arch, experts=1, classes=None):
        super().__init__()
        backbones, channels = zip(*(build_backbone(arch) for _ in range(experts)))
        split = list(dict(backbones[0].named_children())).index("layer3")
        self.shared = backbones[0][:split]
        self.branches = nn.ModuleList(backbone[split:] for backbone in backbones)
        self.heads = Heads(nn.Linear(c, classes) if classes else projection(c) for c in channels)

    def forward(self, view, boxes=None, patches=None):
        """Embeddings of views, of their regions (the teacher) and of their patches (the student).

        view [B, 3, V, V], boxes [L, B, 4] as x1, y1, x2, y2 in pixels of the view, patches
        [L, B, 3, S, S]. Returns z [E, B, D], c [E, L, B, D] without gradient, and s [E, L, B, D].
        Without patches c and s are None.
        """
        feature_maps = self.feature_maps(view)
        z = self.heads(global_average_pool(feature_maps))
        if patches is None:
            return z, None, None
        with torch.no_grad():
            regions = [roi_means(maps, boxes, view.shape[-1]) for maps in feature_maps]
            c = self.heads(torch.stack(regions))
        # All L x B patches are one batch, which does not change BatchNorm's running statistics.
        with frozen_running_statistics(self):
            s = self.heads(global_average_pool(self.feature_maps(patches.flatten(0, 1))))
        return z, c, s.unflatten(1, patches.shape[:2])

    def feature_maps(self, view):
        """The last feature map [B, C, h, w] of every expert."""
        shared = self.shared(view)
        return [branch(shared) for branch in self.branches]


class Heads(nn.ModuleList):
    """One head for each expert: features [E, ..., C] to outputs [E, ..., D]."""

    def forward(self, features):
        return torch.stack([head(part) for head, part in zip(self, features)])


class UnitLength(nn.Module):
    """L2-normalise embeddings [..., D], in float32 even under autocast."""

    def forward(self, embeddings):
        return F.normalize(embeddings.float(), dim=-1)


def projection(channels, dim=128):
    """The head g: Linear, ReLU, Linear, normalise."""
    hidden = nn.Linear(channels, channels), nn.ReLU(inplace=True)
    return nn.Sequential(*hidden, nn.Linear(channels, dim), UnitLength())


def global_average_pool(feature_maps):
    """The features [E, B, C]: the mean of each expert's feature map over its cells."""
    return torch.stack([maps.mean((2, 3)) for maps in feature_maps])


def roi_means(feature_map, boxes, view_size):
    """RoIAlign every box [L, B, 4], in pixels of the view, to 2 x 2 and average: [L, B, C]."""
    count, size, _ = boxes.shape
    image_index = torch.arange(size, device=boxes.device, dtype=boxes.dtype).repeat(count)
    rois = torch.cat([image_index[:, None], boxes.flatten(0, 1)], dim=1)
    scale = feature_map.shape[-1] / view_size
    # Without aligned=True every box would be shifted by half a cell.
    regions = roi_align(feature_map.float(), rois, 2, spatial_scale=scale, aligned=True)
    return regions.mean((2, 3)).unflatten(0, (count, size))


@contextmanager
def frozen_running_statistics(module):
    """BatchNorm normalises by the batch, as in training, but does not update running statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@torch.no_grad()
def moving_average(key_encoder, encoder, momentum):
    """Update the key encoder: theta_key <- m theta_key + (1 - m) theta_query, all in one operation.

    Only parameters are averaged. The key encoder's BatchNorm normalises by the batch of keys.
    """
    average = get_ema_multi_avg_fn(momentum)
    average(list(key_encoder.parameters()), list(encoder.parameters()), None)


class Queue(nn.Module):
    """The last `size` keys of E experts and their labels, first in, first out.

    `keys` [E, K, D] and `labels` [K] contain only slots that have been written: K grows from 0 to
    `size`. Batches may have any size. The state dict holds everything.
    """

    def __init__(self, size, experts=1, dim=128):
        super().__init__()
        self.size = size
        self.written = 0  # keys so far; a Python integer, so that no step waits for the GPU
        self.register_buffer("key_slots", torch.zeros(experts, size, dim))
        self.register_buffer("label_slots", torch.zeros(size, dtype=torch.long))

    @property
    def keys(self):
        return self.key_slots[:, : self.written]

    @property
    def labels(self):
        return self.label_slots[: self.written]

    @torch.no_grad()
    def put(self, keys, labels):
        """Replace the oldest entries by keys [E, B, D], labels [B]; only the last `size` stay."""
        skipped = max(len(labels) - self.size, 0)  # these would be overwritten at once
        slots = torch.arange(self.written + skipped, self.written + len(labels), device=keys.device)
        slots %= max(self.size, 1)
        self.key_slots[:, slots] = keys[:, skipped:]
        self.label_slots[slots] = labels[skipped:]
        self.written += len(labels)

    def get_extra_state(self):
        return self.written

    def set_extra_state(self, written):
        self.written = written


def build_backbone(arch):
    """One of ARCHS, with torchvision's names, up to its last feature map; and its channels."""
    if arch in SMALL_ARCHS:
        return cifar_resnet(**SMALL_ARCHS[arch])
    resnet = get_model(arch, weights=None, zero_init_residual=True)
    layers = [(name, m) for name, m in resnet.named_children() if name not in ("avgpool", "fc")]
    return nn.Sequential(OrderedDict(layers)), resnet.fc.in_features


def cifar_resnet(blocks, channels, strides):
    """A ResNet for images of 28 to 64 pixels (He et al., 2016, section 4.2).

    A 3x3 stem and three stages of `blocks` basic blocks with projection shortcuts; `strides` are
    those of the stem and the stages. resnet_small is wide and shallow, which gave more accuracy in
    equal time; resnet_tiny has 3/4 of its width. The last BatchNorm of a block is not initialised
    to zero: with so few blocks that would cost a short run several points.
    """

    def stage(inputs, outputs, stride):
        shortcut = None
        if (inputs, 1) != (outputs, stride):
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
        strided = BasicBlock(inputs, outputs, stride, shortcut)
        return nn.Sequential(strided, *[BasicBlock(outputs, outputs) for _ in range(blocks - 1)])

    stem, *rest = strides
    layers = dict(
        conv1=nn.Conv2d(3, channels, 3, stem, padding=1, bias=False),
        bn1=nn.BatchNorm2d(channels),
        relu=nn.ReLU(inplace=True),
        layer1=stage(channels, channels, rest[0]),
        layer2=stage(channels, 2 * channels, rest[1]),
        layer3=stage(2 * channels, 4 * channels, rest[2]),
    )
    backbone = nn.Sequential(OrderedDict(layers))
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):  # as torchvision initialises its ResNets
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone, 4 * channels


def smallest_sides(arch):
    """Side lengths, in pixels, of the smallest useful view and of the smallest useful patch.

    The last feature map of a view needs 2 x 2 cells: all regions of a single cell are the same. A
    patch may shrink to one cell only at the last stride: if it does so earlier, bfloat16 gradients
    of convolutions are wrong by any factor on x86 CPUs (torch 2.14); on ARM they are right.
    """
    halvings = 2 if arch in SMALL_ARCHS else 5  # a stride halves a side, rounding up
    return 2**halvings + 1, 2 ** (halvings - 1) + 1


def load_pretrained(encoder, arch, source):
    """Load weights of torchvision's architecture into every expert's backbone.

    source is torchvision's name of weights (IMAGENET1K_V1), which are downloaded once, or a file: a
    checkpoint.pth or model.pth of ours, or weights as such, as "state_dict" or "model", also under
    names with a common prefix, such as module.encoder_q. of MoCo; other weights are left out.
    Raises ValueError on a mismatch.
    """
    names = {} if arch in SMALL_ARCHS else get_model_weights(arch).__members__
    try:
        if source in names:
            state = names[source].get_state_dict()
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model", "encoder"):
            state = state.get(key, state)
        for part in ("shared.", "branches.0."):  # of an Encoder: its first expert
            state = {name.removeprefix(part): weight for name, weight in state.items()}
        stems = [name for name in state if name.endswith("conv1.weight") and "layer" not in name]
        prefix = min(stems, key=lambda name: "_k." in name, default="")[: -len("conv1.weight")]
        for branch in encoder.branches:
            layers = *encoder.shared.named_children(), *branch.named_children()
            backbone = nn.Sequential(OrderedDict(layers))
            # Torchvision's files lack num_batches_tracked, which nothing uses.
            names_here = {n: prefix + n for n in backbone.state_dict() if "num_batches" not in n}
            missing = [name for name in names_here.values() if name not in state]
            if missing:
                raise ValueError(f"it has {list(state)[:2]}, but not {missing[:2]}")
            backbone.load_state_dict({name: state[here] for name, here in names_here.items()})
    except URLError as error:
        reason = f"cannot fetch {names[source].url} ({error.reason})"
        raise ValueError(f"{reason}; download it elsewhere and give the file's path") from None
    except Exception as error:  # a missing or foreign file, weights of another network
        reason = " ".join(str(error).split())[:160]
        if found := re.search(r"GLOBAL (\S+)", str(error)):  # torch's text is long, and in colours
            reason = f"it holds {found[1]}, which could run code: save the weights alone"
        known = f", nor torchvision's {' or '.join(names)}" if names else "; torchvision has none"
        raise ValueError(f"not a file of {arch} weights{known} ({reason})") from None
