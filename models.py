"""What DSCL + PBSD trains: an encoder, its moving average, and the queue of past keys.

Encoder          backbone + projection head: pictures, patches and regions to unit embeddings;
                 several experts share the first stages
MomentumEncoder  its exponential moving average, which makes the keys
Queue            first-in-first-out memory of keys and labels
"""

import copy
from collections import OrderedDict
from contextlib import contextmanager
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import roi_align

ARCHS = ("resnet_small", "resnet18", "resnet50", "resnet152", "resnext50_32x4d")


def build_backbone(arch, width=1.0):
    """A ResNet up to its last feature map, and the channels of that map.

    Module names are torchvision's (conv1, bn1, layer1, ...), so weights move both ways. `width`
    is a factor to the channels of what experts have of their own, layer3 and layer4.
    """
    if arch == "resnet_small":
        return resnet_small(width=width)
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {arch}")
    resnet = torchvision.models.get_model(arch, weights=None, zero_init_residual=True)
    channels = resnet.fc.in_features
    if width != 1:
        stages = resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4

        class Narrow(torchvision.models.ResNet):
            def _make_layer(self, block, planes, *rest, **options):
                planes = round(width * planes) if planes >= 256 else planes
                return super()._make_layer(block, planes, *rest, **options)

        resnet = Narrow(
            type(resnet.layer1[0]),
            [len(stage) for stage in stages],
            zero_init_residual=True,
            groups=resnet.groups,
            width_per_group=resnet.base_width,
        )
        channels = round(width * 512) * resnet.layer1[0].expansion
    layers = [(name, m) for name, m in resnet.named_children() if name not in ("avgpool", "fc")]
    return nn.Sequential(OrderedDict(layers)), channels


def load_pretrained(backbone, arch, source):
    """Fill a backbone of build_backbone(arch) with weights of torchvision's architecture.

    source is a file with a state dict, or torchvision's name of weights (such as IMAGENET1K_V1),
    which it downloads once. Their classifier `fc` is left out. ValueError if they do not fit.
    """
    names = {}
    if arch != "resnet_small":
        names = torchvision.models.get_model_weights(arch).__members__
    try:
        if source in names:
            state = names[source].get_state_dict()
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        backbone.load_state_dict(state)
    except URLError as error:
        raise ValueError(f"cannot fetch {names[source].url} ({error.reason})") from None
    except Exception as error:  # a missing or foreign file, weights of another network
        reason = " ".join(str(error).split())[:160]
        known = f", nor torchvision's {' or '.join(names)}" if names else ""
        raise ValueError(f"no file of {arch} weights{known} ({reason})") from None


def resnet_small(channels=32, width=1.0):
    """ResNet-8 for pictures of 28 to 32 pixels: 3x3 stem, three residual blocks, stride 4 in all.

    The stem strides as well, which buys twice the width of a ResNet-20 (He et al., 2016, section
    4.2) at equal time. No zero-init: in so few blocks it costs a short run several points.
    """

    def block(inputs, outputs, stride):
        shortcut = None
        if (inputs, 1) != (outputs, stride):
            shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        return BasicBlock(inputs, outputs, stride, shortcut)

    last = round(width * 4 * channels)
    backbone = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False),
            bn1=nn.BatchNorm2d(channels),
            relu=nn.ReLU(inplace=True),
            layer1=block(channels, channels, 1),
            layer2=block(channels, 2 * channels, 2),
            layer3=block(2 * channels, last, 1),
        )
    )
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):  # as torchvision initialises its ResNets
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone, last


class Encoder(nn.Module):
    """Backbone f and projection head g: the embedding of x is normalise(g(f(x))), float32.

    arch is one of ARCHS, dim that of the embedding. With `classes` the head is a linear classifier
    and gives its logits instead: the cross-entropy baseline.

    `experts` E share the backbone up to layer2; each has its own layer3, layer4 and head (RIDE,
    Wang et al., 2021), of `width` times the channels. Their embeddings stand side by side in E dim
    columns, an expert's in a chunk(E, -1). The first is `backbone` and `head`.
    """

    def __init__(self, arch, dim=128, classes=None, experts=1, width=1.0):
        super().__init__()
        self.backbone, channels = build_backbone(arch, width)
        self.shared = list(dict(self.backbone.named_children())).index("layer3")
        self.dim = experts * (classes or dim)

        def head():
            if classes:
                return nn.Linear(channels, classes)
            return nn.Sequential(
                nn.Linear(channels, channels),
                nn.ReLU(inplace=True),
                nn.Linear(channels, dim),
                UnitLength(),
            )

        self.head = head()
        self.experts = nn.ModuleList()
        for _ in range(experts - 1):
            layers = build_backbone(arch, width)[0][self.shared :]
            self.experts.append(nn.ModuleDict(dict(layers=layers, head=head())))

    def forward(self, images, patches=None):
        """images [B, 3, H, W] to (embedding [B, E dim], E feature maps [B, channels, h, w], None).

        With patches [L, B, 3, S, S] the third is their embeddings [L, B, E dim]: one pass for all
        L patches of the batch. It leaves BatchNorm's running statistics alone, so that these
        describe whole views.
        """
        feature_maps = self.features(images)
        embedding = self.embed(feature_maps)
        if patches is None:
            return embedding, feature_maps, None
        with frozen_running_statistics(self):
            patch_maps = self.features(patches.flatten(0, 1))
        return embedding, feature_maps, self.embed(patch_maps).unflatten(0, patches.shape[:2])

    def features(self, images):
        """The last feature map of every expert."""
        shared = self.backbone[: self.shared](images)
        own = self.backbone[self.shared :], *(expert["layers"] for expert in self.experts)
        return [layers(shared) for layers in own]

    @property
    def heads(self):
        """The head of every expert."""
        return [self.head, *(expert["head"] for expert in self.experts)]

    def embed(self, feature_maps):
        """Embeddings of the mean over each expert's feature map [N, channels, h, w]: [N, E dim]."""
        embeddings = [head(maps.mean((2, 3))) for head, maps in zip(self.heads, feature_maps)]
        return torch.cat(embeddings, dim=-1)

    def embed_regions(self, feature_maps, boxes, view_size):
        """Embeddings c_i[j] [L, B, E dim] of regions of each picture's feature map: the teacher.

        feature_maps: E x [B, channels, h, w] of square views of `view_size` pixels; boxes
        [L, B, 4] as x1, y1, x2, y2 in pixels of the view. RoIAlign to 2 x 2 bins and their mean.
        """
        count, size, _ = boxes.shape
        rows = torch.arange(size, device=boxes.device, dtype=boxes.dtype).repeat(count)
        rois = torch.cat([rows[:, None], boxes.flatten(0, 1)], dim=1)
        regions = [
            roi_align(
                feature_map.float(),
                rois,
                output_size=2,
                spatial_scale=feature_map.shape[-1] / view_size,
                aligned=True,
            )
            for feature_map in feature_maps
        ]
        return self.embed(regions).unflatten(0, (count, size))


class UnitLength(nn.Module):
    """L2-normalise rows, in float32 even under autocast."""

    def forward(self, rows):
        return F.normalize(rows.float(), dim=-1)


@contextmanager
def frozen_running_statistics(module):
    """BatchNorm normalises by the batch as in training, but its running statistics stand still."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracked = [m.track_running_stats for m in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, track in zip(norms, tracked):
            norm.track_running_stats = track


class MomentumEncoder(nn.Module):
    """Exponential moving average of an encoder: theta_key <- m theta_key + (1 - m) theta_query.

    Only parameters are averaged. BatchNorm normalises keys by their own batch, and its buffers
    are those of the key views it saw itself.
    """

    def __init__(self, encoder, momentum):
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.average = get_ema_multi_avg_fn(momentum)

    @torch.no_grad()
    def update(self, encoder):
        """One step of the average, a single fused operation on all parameters."""
        self.average(list(self.encoder.parameters()), list(encoder.parameters()), None)

    @torch.no_grad()
    def forward(self, images):
        """images [B, 3, H, W] to keys [B, dim], without gradient."""
        return self.encoder(images)[0]


class Queue(nn.Module):
    """The last `size` keys and their labels, first in, first out; any batch size.

    Slots that were never written are never given: `keys` [K, dim] and `labels` [K] grow from
    empty to `size`. All of it is part of the state dict.
    """

    def __init__(self, size, dim):
        super().__init__()
        self.size = size
        self.written = 0  # keys ever put in; a host integer, so that no step waits for the device
        self.register_buffer("key_slots", torch.zeros(size, dim))
        self.register_buffer("label_slots", torch.zeros(size, dtype=torch.long))

    @property
    def keys(self):
        return self.key_slots[: self.written]

    @property
    def labels(self):
        return self.label_slots[: self.written]

    @torch.no_grad()
    def put(self, keys, labels):
        """keys [B, dim] and labels [B] take the place of the oldest; of B > size the last stay."""
        start = self.written + max(len(keys) - self.size, 0)
        self.written += len(keys)
        slots = torch.arange(start, self.written, device=keys.device) % max(self.size, 1)
        stay = len(keys) - len(slots)
        self.key_slots[slots] = keys[stay:]
        self.label_slots[slots] = labels[stay:]

    def get_extra_state(self):
        return self.written

    def set_extra_state(self, written):
        self.written = written
