"""Speed and memory, side by side in one run, on this machine.

    python tests/benchmark.py losses                   # both losses against a dense implementation
    python tests/benchmark.py step --device cuda       # a training step and the networks alone
    python tests/benchmark.py input --images DIR       # one data loading process, on your JPEGs
    python tests/benchmark.py held --images DIR        # class folders: read anew or once
    python tests/benchmark.py ranks                    # what a step costs one of 8, 64, 512 GPUs

The sides take turns, so that drift of the machine affects all alike; shown is the median (min to
max) of the rounds. Speed is relative to the first side. Launches are the operations of a step on a
GPU, without views of tensors, which launch nothing. Memory is what a step adds at its peak, in a
separate process.
"""

import argparse
import copy
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torchvision import transforms

try:  # they are no part of torch's public interface
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore
except ImportError:
    FakeTensorMode = FakeStore = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from data import BatchDataset, Draws, ImageFiles
from losses import BLOCK, dscl_loss, pbsd_loss
from models import Encoder, Queue, frozen_running_statistics, global_average_pool, roi_means

BATCH, QUEUE, DIM, PATCHES, CLASSES = 256, 65536, 128, 5, 1000
BATCH_INPUT = 32  # 256 on eight GPUs
# Images in a step: on a CPU, few enough for memory and time; on a GPU, for ImageNet-LT, the paper's
# batch divided by eight, two and one GPUs.
SIZES = {"cpu": {"fashion_mnist_lt": [128], "imagenet_lt": [8]}}
SIZES["cuda"] = SIZES["cpu"] | {"imagenet_lt": [32, 128, 256]}

# ---------------------------------------------------------------------------------- measuring


def in_turn(runs, args):
    """Seconds of each run in every round, {name: [rounds]}; an untimed first round loads code.

    Also returns the seconds until the host had launched the work. On a GPU the host waits for the
    rest of the time; if both are equal, the GPU waits for the host.
    """
    seconds, launching = ({name: [] for name in runs} for _ in range(2))
    for count in range(args.rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            launched = time.perf_counter() - began
            if args.device == "cuda":
                torch.cuda.synchronize()
            if count:
                seconds[name].append(time.perf_counter() - began)
                launching[name].append(launched)
    return seconds, launching


def spread(values, digits=2):
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratio(one, other):
    """The ratio of two lists, round by round."""
    return spread([a / b for a, b in zip(one, other)])


def show(rows):
    """Print rows of text, each column as wide as its widest entry."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *cells in rows:
        aligned = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:])]
        print(f"{name:<{widths[0]}}", *aligned, sep="   ")


def machine(device):
    name, info = platform.machine(), Path("/proc/cpuinfo")
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif info.exists():
        name = info.read_text().partition("model name\t: ")[2].partition("\n")[0] or name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


class Launches(TorchDispatchMode):
    """Counts the operations that are dispatched, except views, which compute nothing."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aliases = [returned.alias_info for returned in function._schema.returns]
        self.count += not any(alias and not alias.is_write for alias in aliases)
        return function(*args, **(kwargs or {}))


def peak_megabytes(make, device):
    """Megabytes a step adds at its peak; make() returns it and a small one, which loads code."""
    step, small = make()
    small()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets earlier peaks
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(field):
    """Megabytes that this process holds, VmRSS, or held at its peak, VmHWM."""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) / 2**10


def compare(args, makes):
    """Print a table of the sides, {name: make(device)}; returns the result of a step of each."""
    memory = {}
    for side, make in makes.items():
        with multiprocessing.get_context("spawn").Pool(1) as process:
            memory[side] = process.apply(peak_megabytes, (partial(make, args.device), args.device))
    steps = {side: make(args.device)[0] for side, make in makes.items()}
    (seconds, launching), results = in_turn(steps, args), {}
    first, floored, gpu = next(iter(seconds.values())), "floor" in seconds, args.device == "cuda"
    rows = [["", "seconds", "speed", "launches", "memory"] + ["over its floor"] * floored]
    rows[0] += ["launched after"] * gpu
    for side, own in seconds.items():
        with Launches() as launches, mock.patch.dict(BLOCK, clear=True):
            results[side] = steps[side]()
        rows.append([side, spread(own, 4), ratio(first, own)])
        rows[-1] += [f"{launches.count:,}", f"{memory[side]:.0f} MB"]
        if floored:
            rows[-1] += [ratio(own, seconds["floor, bf16" if "bf16" in side else "floor"])]
        rows[-1] += [spread(launching[side], 4)] * gpu
    show(rows)
    return results


# ------------------------------------------------------------------------------------- losses


def dense_losses(z, z_plus, y, M, y_M, c, s, alpha=0.1, tau=0.07):
    """The definition of both losses, with the paper's names, masks and dense matrices.

    z, z_plus [B, D]: queries z_i and keys z_i+; M [K, D]: the queue; y, y_M: labels; c, s
    [L, B, D]: regions c_i[j], the teacher, and patches s_i[j], the student. With t over z_i+ and
    P_i, w_t = alpha (|P_i| + 1) for z_i+ and (1 - alpha) (|P_i| + 1) / |P_i| for the others:

        DSCL_i = -1 / (|P_i| + 1) sum_t log [exp(w_t z_t.z_i / tau) / sum_m exp(z_m.z_i / tau)]
        PBSD_i = 1/L sum_j sum_t -p(z_t|c_i[j]) log p(z_t|s_i[j]),  t over z_i+ and M
    """
    B = len(z)
    contrast = torch.cat([z, z_plus, M])  # [2B + K, D] z_m
    same_class = (y[:, None] == torch.cat([y, y, y_M])).float()  # [B, 2B + K]
    not_itself = torch.ones_like(same_class).fill_diagonal_(0)  # m runs over all but the anchor
    own_key = torch.zeros_like(same_class)
    own_key[torch.arange(B), torch.arange(B) + B] = 1
    P = same_class * not_itself - own_key  # 1 for the positives P_i
    P_size = P.sum(1, keepdim=True)  # [B, 1] |P_i|
    alpha_i = torch.where(P_size > 0, alpha, 1.0)  # with P_i empty, all weight is that of z_i+
    share = alpha_i * own_key + (1 - alpha_i) * P / P_size.clamp(min=1)  # w_t / (|P_i| + 1), sum 1
    logits = z @ contrast.T / tau
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    log_total = (logits.exp() * not_itself).sum(1, keepdim=True).log()
    dscl = -((logits - log_total) * share).sum(1).mean()

    def logits_of(q):  # [L, B, 1 + K] over z_i+ and M
        return torch.cat([(q * z_plus).sum(-1, keepdim=True), q @ M.T], dim=-1) / tau

    p = logits_of(c).softmax(-1)  # p(z_t|c)
    return dscl, -(p * logits_of(s).log_softmax(-1)).sum(-1).mean()


def our_losses(query, key, labels, queue, queue_labels, roi, patch):
    return dscl_loss(query, key, labels, queue, queue_labels), pbsd_loss(roi, patch, key, queue)


def floor_losses(query, key, labels, queue, queue_labels, roi, patch):
    """The matrix products and exponentials of our losses alone, in blocks of the same shapes."""
    for rows in (query.detach(), torch.cat([roi, patch.detach()]).flatten(0, 1)):
        columns = max(256, BLOCK.get(rows.device.type, 2**25) // len(rows))
        block, sums = rows.new_empty(len(rows), min(columns, len(queue))), torch.empty_like(rows)
        for chunk in queue.split(columns):
            torch.mm(rows, chunk.T, out=block[:, : len(chunk)])
            torch.mm(block[:, : len(chunk)].exp_(), chunk, out=sums)
    return query.sum(), patch.sum()  # with gradient, as every side has a backward pass


LOSSES = {"dense": dense_losses, "ours": our_losses, "floor": floor_losses}


def losses_of(side, device, sizes=None):
    """A step (forward, backward) of a side and a small one; each returns losses and gradients."""
    of_step = sizes or (BATCH, QUEUE, PATCHES)

    def step_on(batch, size, patches):
        torch.manual_seed(0)
        shapes = [(batch, DIM), (batch, DIM), (size, DIM), *[(patches, batch, DIM)] * 2]
        rows = [F.normalize(torch.randn(shape), dim=-1).to(device) for shape in shapes]
        query, key, queue, roi, patch = rows
        labels, queue_labels = (torch.randint(CLASSES, (n,)).to(device) for n in (batch, size))

        def step():
            learned = query.detach().requires_grad_(), patch.detach().requires_grad_()
            values = LOSSES[side](learned[0], key, labels, queue, queue_labels, roi, learned[1])
            sum(values).backward()
            return [value.detach() for value in values] + [leaf.grad for leaf in learned]

        return step

    return step_on(*of_step), step_on(64, 64, of_step[2])


def losses(args):
    sizes = batch, queue, patches = (args.batch_size or [BATCH])[0], args.queue, args.patches
    print("DSCL + PBSD, forward and backward, float32: "
          f"B = {batch}, K = {queue}, D = {DIM}, L = {patches}")
    print("floor: only the matrix products and exponentials of ours, in the same blocks")
    print(f"{args.rounds} rounds; {machine(args.device)}\n")
    makes = {side: partial(losses_of, side, sizes=sizes) for side in LOSSES}
    results = compare(args, makes).values()
    names = "DSCL", "PBSD", "gradient at query", "gradient at patch"
    for name, dense, ours, _ in zip(names, *results):
        difference = ((dense - ours).abs().max() / dense.abs().max()).item()
        print(f"{name}: largest difference {difference:.0e} of the largest entry")


# --------------------------------------------------------------------------------------- step


def cfg_of(name, *tables, **changes):
    """A data set's settings in tables (train.VIEWS, STAGE1, STAGE2), as attributes."""
    settings = {key: v for table in tables for key, v in train.values_for(name, table).items()}
    return argparse.Namespace(dataset=name, **settings | changes)


def train_args(name, **changes):
    """train.py's arguments for a data set, with a batch size for a CPU."""
    run = dict(seed=0, amp="off", batch_size=SIZES["cpu"][name][0])
    return cfg_of(name, train.VIEWS, train.STAGE1, **run | changes)


def images_of(args, device):
    """uint8 images [B, C, H, W] of random pixels, in the shape that the loader returns."""
    shape = 3, args.view_size, args.view_size
    if data.cropped_on_device(args.dataset):
        with mock.patch.object(data, "say"):  # every process and side would repeat the data set
            sets = data.load_dataset(args.dataset, data.HERE / "tests")
        shape = sets["train"].images.shape[1:]
    return torch.randint(256, (args.batch_size, *shape), dtype=torch.uint8).to(device)


def views_of(images, args):
    """Query view [B, 3, V, V], boxes [L, B, 4], patches [L, B, 3, S, S] and key view."""
    draws = Draws(0, len(images), slice(None), images.device)
    query = data.query_views(images, draws, args, args.patches)
    return *query, data.key_view(images, draws, args)


class Ours:
    """train.py's step on given views; it updates weights, moving averages and queue."""

    layout, optimizer_options = torch.channels_last, dict(fused=True)

    def __init__(self, args, device):
        torch.manual_seed(0)
        self.args, self.device = args, device
        encoder = Encoder(args.arch, args.experts)
        self.encoder = encoder.to(device, memory_format=self.layout)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        options = dict(momentum=0.9, weight_decay=args.weight_decay) | self.optimizer_options
        self.optimizer = torch.optim.SGD(self.encoder.parameters(), lr=1e-3, **options)
        self.queue = Queue(args.queue_size, args.experts).to(device)
        for part in torch.arange(args.queue_size).split(1024):  # all at once would set the peak
            keys = F.normalize(torch.randn(args.experts, len(part), DIM), dim=2).to(device)
            self.queue.put(keys, torch.randint(CLASSES, (len(part),)).to(device))

    def inputs(self, **changes):
        """The inputs of a step: views of random images, and labels."""
        args = argparse.Namespace(**vars(self.args) | changes)
        views = views_of(images_of(args, self.device), args)
        return *views, torch.randint(CLASSES, (args.batch_size,)).to(self.device)

    def loss(self, view, boxes, patches, key_view, labels):
        batch = train.ShuffledBatch(self.args, 0, slice(0, self.args.batch_size), self.device)
        parts = self.encoder, self.key_encoder, self.queue
        given = dict(query_views=lambda *_: (view, boxes, patches), key_view=lambda *_: key_view)
        with mock.patch.multiple(data, **given):
            return train.dscl_pbsd_step(*parts, (None, None), labels, batch, self.args)["loss"]

    def step(self, *inputs):
        self.loss(*inputs).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Straightforward(Ours):
    """A first version: L patch passes, an EMA loop, dense losses, contiguous images."""

    layout, optimizer_options = torch.contiguous_format, {}

    def inputs(self, **changes):
        return [part.contiguous() for part in super().inputs(**changes)]

    def loss(self, view, boxes, patches, key_view, labels):
        feature_maps, m = self.encoder.feature_maps(view), self.args.momentum_encoder
        z = self.encoder.heads(global_average_pool(feature_maps))
        s = torch.stack([self.encoder(patch)[0][0] for patch in patches])
        with torch.no_grad():
            averages = self.key_encoder.parameters()
            for average, parameter in zip(averages, self.encoder.parameters()):
                average.data = average.data * m + parameter.data * (1 - m)
            z_plus, _, _ = self.key_encoder(key_view)
            c = self.encoder.heads([roi_means(feature_maps[0], boxes, view.shape[-1])])
        bank = self.queue.keys[0].clone(), self.queue.labels.clone()  # autograd keeps them
        dscl, pbsd = dense_losses(z[0], z_plus[0], labels, *bank, c[0], s)
        self.queue.put(z_plus, labels)
        return dscl + self.args.pbsd_weight * pbsd


class Floor(Ours):
    """The same networks forward and backward, and nothing else."""

    def step(self, view, boxes, patches, key_view, labels):
        with train.autocast(self.device, self.args.amp):
            z, _, _ = self.encoder(view)
            with frozen_running_statistics(self.encoder):
                s, _, _ = self.encoder(patches.flatten(0, 1))
            self.key_encoder(key_view)
        (z.sum() + s.sum()).backward()
        self.encoder.zero_grad()


class Views(Ours):
    """Making the views of a batch, which the other sides are given."""

    def inputs(self, **changes):
        args = argparse.Namespace(**vars(self.args) | changes)
        return images_of(args, self.device), args

    def step(self, images, args):
        views_of(images, args)


STEPS = {"straightforward": (Straightforward, "off"), "ours": (Ours, "off")}
STEPS |= {"ours, bf16": (Ours, "bf16"), "floor": (Floor, "off"), "floor, bf16": (Floor, "bf16")}
STEPS |= {"views": (Views, "off")}


def step_of(side, args, device):
    """A step of a side, and a small one that makes torch load its code."""
    kind, amp = STEPS[side]
    part = kind(argparse.Namespace(**vars(args) | dict(amp=amp)), torch.device(device))
    small = part.inputs(batch_size=2, view_size=32, patch_size=16)
    return partial(part.step, *part.inputs()), partial(part.step, *small)


def step(args):
    args.amp = "auto"
    train.start(args)  # sets args.amp by what the device supports
    sides = [side for side, (_, amp) in STEPS.items() if amp in ("off", args.amp)]
    print("a training step on given views; floor: only its networks; views: only making views")
    print(f"{args.rounds} rounds; {machine(args.device)}")
    for name in args.recipes:
        for size in args.batch_size or SIZES[args.device][name]:
            cfg = train_args(name, batch_size=size)
            print(
                f"\n{name}: {cfg.arch}, {cfg.view_size} pixels, {cfg.patches} "
                f"patches of {cfg.patch_size}, batch {size}, K = {cfg.queue_size}"
            )
            compare(args, {side: partial(step_of, side, cfg) for side in sides})


# -------------------------------------------------------------------------------------- ranks


class Costs(TorchDispatchMode):
    """Counts the losses' products in FLOP, bytes from other ranks and bytes of the largest tensor.

    The networks' products have a bias, so they are another operation, addmm.
    """

    products = received = largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function._overloadpacket.__name__
        tensors = [part for part in tree_leaves(result) if isinstance(part, torch.Tensor)]
        self.largest = max([self.largest, *(part.nbytes for part in tensors)])
        if name in ("mm", "addmm_"):
            self.products += 2 * result.numel() * len(args[-1])
        if name in ("allgather_", "alltoall_base_"):
            others = 1 - 1 / dist.get_world_size()
            self.received += others * sum(part.nbytes for part in tree_leaves(args[0]))
        return result


def costs_of(world):
    """The costs of a step of imagenet_lt for one of many ranks, on tensors without data."""
    cfg, images = train_args("imagenet_lt", batch_size=BATCH_INPUT * world), BATCH_INPUT
    order = argparse.Namespace(numpy=lambda: np.random.default_rng(0).permutation(cfg.batch_size))
    unseeded = argparse.Namespace(manual_seed=lambda seed: None)  # fake tensors take no generator
    fakes = dict(Generator=lambda device=None: unseeded, randperm=lambda *_, **__: order)
    data.constant.cache_clear()
    dist.init_process_group("fake", rank=1, world_size=world, store=FakeStore())
    with (
        FakeTensorMode(),
        mock.patch.multiple(torch, **fakes),
        mock.patch.dict(BLOCK, clear=True),  # the blocks of a GPU
        Costs() as costs,
    ):
        encoder, key_encoder = Encoder(cfg.arch), Encoder(cfg.arch).requires_grad_(False)
        queue, embeddings = Queue(cfg.queue_size), []
        queue.written = cfg.queue_size  # it is full
        encoder.register_forward_hook(lambda *call: embeddings.extend(call[2]))
        pair = torch.zeros(2, images, 3, cfg.view_size, cfg.view_size, dtype=torch.uint8)
        labels = torch.zeros(images, dtype=torch.long)
        batch = train.ShuffledBatch(cfg, 0, slice(images, 2 * images), pair.device)
        parts = encoder, key_encoder, queue, pair.unbind(), labels, batch, cfg
        loss = train.dscl_pbsd_step(*parts)["loss"]
        z, _, s = embeddings
        torch.autograd.grad(loss, [z, s])  # the backward pass of the losses alone
    dist.destroy_process_group()
    data.constant.cache_clear()
    return costs


def ranks(args):
    print("a step of imagenet_lt for one GPU, counted: 32 images a GPU, K = 65,536; received: "
          "images, keys and labels, queries and their gradient")
    rows = [["GPUs", "products of the losses", "received", "largest tensor"]]
    for world in (8, 64, 512):
        costs = costs_of(world)
        rows.append([str(world), f"{costs.products / 1e9:.1f} GFLOP"])
        rows[-1] += [f"{costs.received / 1e6:.0f} MB", f"{costs.largest / 1e6:.0f} MB"]
    show(rows)


# -------------------------------------------------------------------------------------- input


class Published:
    """Like the published pipeline: seven PIL crops, each augmented and converted to a tensor."""

    def __init__(self, files, cfg):
        def augment(jitter, jitter_p, grey_p, blur_p):
            jitter = transforms.RandomApply([transforms.ColorJitter(*jitter)], jitter_p)
            blur = transforms.RandomApply([self.blur], blur_p)
            colors = jitter, transforms.RandomGrayscale(grey_p), blur
            tensor = transforms.ToTensor(), transforms.Normalize(cfg.mean, cfg.std)
            return transforms.Compose([transforms.RandomHorizontalFlip(), *colors, *tensor])

        self.files, self.patches = files, cfg.patches
        self.cut = transforms.RandomResizedCrop(cfg.view_size, cfg.crop_scale)
        self.patch = transforms.RandomResizedCrop(cfg.patch_size, cfg.patch_scale)
        jitter = cfg.query_jitter, cfg.query_jitter_p
        self.query_colors = augment(*jitter, cfg.grey_p, cfg.blur_p)
        self.key_colors = augment(cfg.key_jitter, 1.0, 0.0, 0.0)

    @staticmethod
    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    def __len__(self):
        return len(self.files)

    def decode(self, index):
        with Image.open(self.files.path(index)) as file:
            return file.convert("RGB")

    def __getitem__(self, index):
        image = self.decode(index)
        query, key = self.cut(image), self.cut(image)
        patches = torch.stack([self.query_colors(self.patch(query)) for _ in range(self.patches)])
        return self.query_colors(query), self.key_colors(key), patches, self.files.labels[index]


class Decoding(Published):
    """Decoding alone."""

    def __getitem__(self, index):
        self.decode(index)
        return 0


def jpegs(args):
    """The JPEGs of --images, repeated to fill the batches; and batches, with indices as seeds."""
    if not args.images:
        raise data.BadInput(f"{args.command} needs JPEGs: --images DIR")
    directory, kinds = args.images, (".jpg", ".jpeg")
    found = sorted(path for path in directory.iterdir() if path.suffix.lower() in kinds)
    if not found:
        raise data.BadInput(f"--images {directory} holds no JPEGs")
    total = args.batches * BATCH_INPUT
    names = [os.fsencode(found[count % len(found)].name) for count in range(total)]
    kilobytes = statistics.mean(path.stat().st_size for path in found) / 1000
    print(f"batches of {BATCH_INPUT} of {len(found)} JPEGs, mean size {kilobytes:.0f} KB; "
          f"{args.rounds} rounds; {machine('cpu')}\n")
    rows = torch.arange(total).view(-1, BATCH_INPUT).tolist()
    return ImageFiles(directory, names, [0] * total, directory), [(i, i) for i in rows]


def rates_of(sides, args):
    """Images a second of loaders with one process each, {name: [rounds]}, and bytes an image."""
    rates, sizes = {side: [] for side in sides}, {}
    for _ in range(args.rounds):
        for side, loader in sides.items():
            iterator = iter(loader)
            batch = next(iterator)  # from here on the worker is always busy
            began = time.perf_counter()
            following = sum(BATCH_INPUT for _ in iterator)
            rates[side].append(following / (time.perf_counter() - began))
            sizes[side] = sum(part.nbytes for part in batch) / BATCH_INPUT
    return rates, sizes


def input_pipeline(args):
    """Images a second of a directory's JPEGs, each side in one process."""
    cfg, (files, batches) = cfg_of("imagenet_lt", train.VIEWS), jpegs(args)
    sides = {
        "published": DataLoader(Published(files, cfg), BATCH_INPUT, num_workers=1),
        "ours": data.load_batches(BatchDataset(files, cfg, 2), batches, 1, torch.device("cpu")),
        "decoding alone": DataLoader(Decoding(files, cfg), BATCH_INPUT, num_workers=1),
    }
    rates, sizes = rates_of(sides, args)
    rows = [["one data loading process", "images a second", "speed", "of decoding", "KB to device"]]
    for side, own in rates.items():
        rows.append([side, spread(own, 0), ratio(own, rates["published"])])
        rows[-1] += [ratio(own, rates["decoding alone"]), f"{sizes[side] / 1000:.0f}"]
    show(rows)


def proportional_megabytes():
    """Megabytes of this process and its workers, in which shared pages count once."""
    workers = [child.pid for child in multiprocessing.active_children()]
    text = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in (os.getpid(), *workers)]
    return sum(int(one.partition("\nPss:")[2].split()[0]) for one in text) / 2**10


def held(args):
    """The folder data sets with images read anew in every epoch, and read at the start."""
    cores, cpu = train.cores() + 1, torch.device("cpu")
    for name in ("small_imagefolder", "imagefolder"):
        cfg, (files, batches) = cfg_of(name, train.VIEWS), jpegs(args)
        once = copy.copy(files)

        def loader(files, workers):
            return data.load_batches(BatchDataset(files, cfg, 2), batches, workers, cpu)

        began = time.perf_counter()
        for _ in loader(files, cores):
            pass
        epoch, before = time.perf_counter() - began, proportional_megabytes()
        began = time.perf_counter()
        once.hold(cfg, cores)
        start = time.perf_counter() - began
        working = loader(once, cores)
        for _ in working:
            pass
        memory = proportional_megabytes() - before
        rates, _ = rates_of(dict(anew=loader(files, 1), once=loader(once, 1)), args)
        rows = [[f"{name}, one data loading process", "images a second", "speed"]]
        rows += [[how, spread(own, 0), ratio(own, rates["anew"])] for how, own in rates.items()]
        show(rows)
        pixels = sum(image.nbytes for image in once.pixels) / 2**20
        print(f"{len(files)} images with {cores} cores: reading once {start:.1f} s, an epoch of "
              f"reading anew {epoch:.1f} s; {1024 * pixels / len(files):.1f} KB held for each; "
              f"{memory:.0f} MB more with {cores} workers, {memory / pixels:.2f} of the pixels\n")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = dict(losses=losses, step=step, ranks=ranks, input=input_pipeline, held=held)
    parser.add_argument("command", choices=commands)
    text = "device for losses and step (default: cpu)"
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=text)
    text, recipes = "data sets for step (default: all)", list(SIZES["cpu"])
    parser.add_argument("--recipes", nargs="+", choices=recipes, default=recipes, help=text)
    text = "images in a step (default: 8 for imagenet_lt, on a GPU 32, 128 and 256; else 128)"
    parser.add_argument("--batch-size", nargs="+", type=int, metavar="N", help=text)
    parser.add_argument("--images", type=Path, metavar="DIR", help="JPEGs for input and held")
    for flag, default, text in (
        ("--queue", QUEUE, "keys K in the queue, for losses"),
        ("--patches", PATCHES, "patches L of a view, for losses"),
        ("--rounds", 7, "timed rounds"), ("--batches", 12, "batches a round, for input and held"),
    ):
        text += f" (default: {default})"
        parser.add_argument(flag, type=int, default=default, metavar="N", help=text)
    args = parser.parse_args()
    commands[args.command](args)


if __name__ == "__main__":
    train.run(main)
