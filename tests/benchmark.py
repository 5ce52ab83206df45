"""Speed and memory, side by side in one run, on this machine.

python tests/benchmark.py losses        # both losses against a dense implementation
python tests/benchmark.py losses --device cuda
python tests/benchmark.py step          # a training step against the networks alone
python tests/benchmark.py input         # pictures a second of one data loading process
python tests/benchmark.py cost          # FLOPs and memory of a picture, by data set
"""

import argparse
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Draws, ImageFiles, key_view, load_dataset, query_views, read_index, recipe_of
from losses import dscl_loss, pbsd_loss
from models import Encoder, MomentumEncoder, Queue
from train import Shuffle, autocast, dscl_and_pbsd, load_batches, precision

BATCH, QUEUE, DIM, PATCHES, CLASSES = 256, 65536, 128, 5, 1000
BATCH_INPUT = 32  # 256 on eight GPUs


def dense_losses(query, key, labels, queue, queue_labels, roi, patch, alpha=0.1, temperature=0.07):
    """DSCL and PBSD written out with masks and [B, K] matrices, as the published code has them."""
    size = len(query)
    contrast = torch.cat([query, key, queue])
    mask = (labels[:, None] == torch.cat([labels, labels, queue_labels])).float()
    others = torch.ones_like(mask).fill_diagonal_(0)
    own = torch.zeros_like(mask)
    own[torch.arange(size), torch.arange(size) + size] = 1
    mates = mask * others - own
    count = mates.sum(1, keepdim=True)
    share = torch.where(count > 0, alpha, 1.0)
    weights = share * own + (1 - share) * mates / count.clamp(min=1)
    logits = query @ contrast.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    log_total = (logits.exp() * others).sum(1, keepdim=True).log()
    dscl = -((logits - log_total) * weights).sum(1).mean()

    def bank_logits(embedding):
        own_logit = (embedding * key).sum(-1, keepdim=True)
        return torch.cat([own_logit, embedding @ queue.T], dim=-1) / temperature

    teacher = bank_logits(roi).softmax(-1)
    return dscl, -(teacher * bank_logits(patch).log_softmax(-1)).sum(-1).mean()


def our_losses(query, key, labels, queue, queue_labels, roi, patch):
    return dscl_loss(query, key, labels, queue, queue_labels), pbsd_loss(roi, patch, key, queue)


SIDES = {"dense": dense_losses, "ours": our_losses}


def inputs(device):
    torch.manual_seed(0)

    def unit(*shape):
        return F.normalize(torch.randn(*shape), dim=-1).to(device)

    labels, queue_labels = (torch.randint(CLASSES, (n,)).to(device) for n in (BATCH, QUEUE))
    query, patch = unit(BATCH, DIM).requires_grad_(), unit(PATCHES, BATCH, DIM).requires_grad_()
    roi = unit(PATCHES, BATCH, DIM)
    return query, unit(BATCH, DIM), labels, unit(QUEUE, DIM), queue_labels, roi, patch


def forward_backward(side, tensors):
    """One step of a side: its two losses and the gradients of query and patch."""
    query, patch = tensors[0], tensors[-1]
    query.grad = patch.grad = None
    values = SIDES[side](*tensors)
    sum(values).backward()
    wait(query.device)
    return [value.item() for value in values], query.grad, patch.grad


def wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def loss_step(side, device):
    """A step of a side of the losses, and a small one that has torch load its code."""
    tensors = inputs(device)
    small = [t.detach()[..., :64, :].clone() if t.is_floating_point() else t[:64] for t in tensors]
    small[0].requires_grad_(), small[-1].requires_grad_()
    return lambda: forward_backward(side, tensors), lambda: forward_backward(side, small)


def losses(args):
    # Memory first: a child's peak starts at what its parent holds when it is born.
    memory = {side: peak_of(args.device, "losses", side) for side in SIDES}
    tensors = inputs(args.device)
    results = {side: forward_backward(side, tensors) for side in SIDES}
    times = {side: [] for side in SIDES}
    for _ in range(args.rounds):  # in turn, so that a machine that drifts is fair to both
        for side in SIDES:
            began = time.perf_counter()
            forward_backward(side, tensors)
            times[side].append(time.perf_counter() - began)

    print(
        f"DSCL + PBSD, forward and backward, float32: "
        f"B = {BATCH}, K = {QUEUE}, D = {DIM}, L = {PATCHES}"
    )
    print(f"{machine(args.device)}; {args.rounds} rounds in turn, median (min to max)\n")
    print(f"{'':<8}{'seconds':>24}{'extra memory':>16}{'DSCL':>12}{'PBSD':>12}")
    for side in SIDES:
        t = sorted(times[side])
        seconds = f"{statistics.median(t):.3f} ({t[0]:.3f} to {t[-1]:.3f})"
        dscl, pbsd = results[side][0]
        print(f"{side:<8}{seconds:>24}{memory[side]:>13.0f} MB{dscl:>12.6f}{pbsd:>12.6f}")
    ratios = sorted(dense / ours for dense, ours in zip(times["dense"], times["ours"]))
    print(
        f"\nours is {statistics.median(ratios):.1f} times as fast (by round {ratios[0]:.1f} to "
        f"{ratios[-1]:.1f}) in 1/{memory['dense'] / memory['ours']:.0f} of the memory"
    )
    for index, name in ((1, "query"), (2, "patch")):
        dense, ours = results["dense"][index], results["ours"][index]
        difference = ((dense - ours).abs().max() / dense.abs().max()).item()
        print(f"gradient at {name}: largest difference {difference:.0e} of the largest entry")


# ---------------------------------------------------------------------------------------- step


RECIPES = {"fashion_mnist_lt": {}, "imagenet_lt": {"batch_size": 8}}  # a CPU's memory and patience


class Straightforward:
    """A step as first written down: five patch passes, an EMA loop, dense losses, contiguous."""

    layout, amp = torch.contiguous_format, "off"

    def __init__(self, args, device):
        torch.manual_seed(0)
        self.args, self.device = args, device
        encoder = Encoder(args.arch, experts=args.experts, width=args.expert_width)
        self.encoder = encoder.to(device, memory_format=self.layout).train()
        self.momentum_encoder = MomentumEncoder(self.encoder, args.momentum_encoder)
        self.optimizer = self.make_optimizer(lr=1e-3, momentum=0.9, weight_decay=args.weight_decay)
        size, dim = args.queue_size, self.encoder.dim
        self.queue = Queue(size, dim).to(device)
        for count in torch.arange(size).split(1024):  # at once it would be the peak of memory
            keys = F.normalize(torch.randn(len(count), dim), dim=1).to(device)
            self.queue.put(keys, torch.randint(CLASSES, (len(count),)).to(device))

    def make_optimizer(self, **options):
        return torch.optim.SGD(self.encoder.parameters(), **options)

    def inputs(self, *sizes):
        args = self.args
        recipe = args.batch_size, args.view_size, args.patch_size
        batch_size, view_size, patch_size = sizes or recipe
        images = torch.rand(batch_size, 3, view_size, view_size)
        patches = torch.rand(args.patches * batch_size, 3, patch_size, patch_size)
        query, key, patches = (
            tensor.to(self.device).contiguous(memory_format=self.layout)
            for tensor in (images, images.flip(3), patches)
        )
        boxes = torch.tensor([0.1, 0.2, 0.5, 0.7], device=self.device) * view_size
        boxes = boxes.expand(args.patches, batch_size, 4)
        labels = torch.randint(CLASSES, (batch_size,)).to(self.device)
        return query, boxes, patches.unflatten(0, (args.patches, batch_size)), key, labels

    def loss(self, view, boxes, patches, view_of_key, labels):
        query, feature_maps, _ = self.encoder(view)
        embedded = torch.stack([self.encoder(patch)[0] for patch in patches])
        averages, m = self.momentum_encoder.parameters(), self.args.momentum_encoder
        with torch.no_grad():
            for average, parameter in zip(averages, self.encoder.parameters()):
                average.data = average.data * m + parameter.data * (1 - m)
            key = self.momentum_encoder(view_of_key)
            roi = self.encoder.embed_regions(feature_maps, boxes, view.shape[-1])
        bank = self.queue.keys.clone(), self.queue.labels.clone()  # autograd keeps them
        dscl, pbsd = dense_losses(query, key, labels, *bank, roi, embedded)
        self.queue.put(key, labels)
        return dscl + self.args.pbsd_weight * pbsd

    def step(self, *inputs):
        with autocast(self.device, self.amp):
            loss = self.loss(*inputs)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait(self.device)


class Ours(Straightforward):
    layout = torch.channels_last

    def make_optimizer(self, **options):
        return torch.optim.SGD(self.encoder.parameters(), fused=True, **options)

    def loss(self, *inputs):
        shuffle = Shuffle(0, self.args.batch_size, 0, 1, self.device)
        parts = self.encoder, self.momentum_encoder, self.queue
        return dscl_and_pbsd(*parts, *inputs, shuffle, self.args)[0][0]


class Floor(Ours):
    """The same networks forward and backward, and nothing else."""

    def step(self, view, boxes, patches, view_of_key, labels):
        with autocast(self.device, self.amp):
            query, _, patch = self.encoder(view, patches)
            self.momentum_encoder(view_of_key)
        (query.sum() + patch.sum()).backward()
        self.encoder.zero_grad(set_to_none=True)
        wait(self.device)


STEPS = {
    "straightforward": Straightforward,
    "ours": Ours,
    "ours, bfloat16": type("", (Ours,), dict(amp="bf16")),
    "floor": Floor,
    "floor, bfloat16": type("", (Floor,), dict(amp="bf16")),
}


def settings_of(name, **changes):
    """train.py's arguments for a data set's recipe, with a batch for a CPU."""
    settings = recipe_of(name)["stage1"] | RECIPES[name] | changes
    return argparse.Namespace(**settings, contrast="global")


def views_of(name, args, device):
    """Makes all views of a batch."""
    recipe = recipe_of(name) | vars(args)
    if recipe["cut"] == "device":
        images = load_dataset(name)["train"].images[: args.batch_size].to(device)
    else:
        size = args.batch_size, 3, args.view_size, args.view_size
        images = torch.randint(256, size, dtype=torch.uint8, device=device)

    def make():
        draws = Draws(0, len(images), slice(None), device)
        query_views(images, draws, recipe, args.patches)
        key_view(images, draws, recipe)
        wait(device)

    return make


def step_of(side, args, device):
    """A step of a side, and a small one that has torch load its code."""
    part = STEPS[side](args, torch.device(device))
    inputs, small = part.inputs(), part.inputs(2, 32, 16)
    return lambda: part.step(*inputs), lambda: part.step(*small)


def step(args):
    device = torch.device(args.device)
    sides = [side for side in STEPS if precision("auto", device) == "bf16" or "," not in side]
    print(
        f"a training step: views given, weights, averages and queue changed; {args.rounds} rounds"
    )
    print(f"in turn, median (min to max); {machine(args.device)}")
    for name in args.recipes:
        memory = {side: peak_of(args.device, "step", side, name) for side in sides}
        settings = settings_of(name)
        steps = {side: step_of(side, settings, args.device)[0] for side in sides}
        steps["views"] = views_of(name, settings, args.device)
        seconds = {side: [] for side in steps}
        for number in range(args.rounds + 1):  # in turn, so that a machine that drifts is fair
            for side, run in steps.items():
                began = time.perf_counter()
                run()
                if number:  # the first loads code and makes momentum
                    seconds[side].append(time.perf_counter() - began)
        print(
            f"\n{name}: {settings.arch}, {settings.view_size} pixels, {settings.patches} patches "
            f"of {settings.patch_size}, batch {settings.batch_size}, K = {settings.queue_size}"
        )
        print(f"{'':<17}{'seconds':>25}{'speed':>21}{'over its floor':>21}{'memory':>10}")
        for side in sides:
            t = seconds[side]
            values = f"{statistics.median(t):.4f} ({min(t):.4f} to {max(t):.4f})"
            line = f"{side:<17}{values:>25}"
            line += f"{against(seconds['straightforward'], t):>21}"
            line += f"{against(t, seconds[side.replace('ours', 'floor')]):>21}"
            print(f"{line}{memory[side]:>7.0f} MB")
        print(f"making the views took {statistics.median(seconds['views']):.4f} s besides")


def against(one, other):
    """Ratio of two lists of seconds, round by round: median (min to max)."""
    ratios = sorted(a / b for a, b in zip(one, other))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


# --------------------------------------------------------------------------------------- input


def photograph(generator, width, height):
    """A made picture with the 1/f spectrum of natural ones: uint8 [height, width, 3]."""
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


class Published:
    """The published pipeline's equivalent: seven PIL crops, each augmented and made a tensor."""

    def __init__(self, files, recipe):
        def augment(jitter, jitter_p, grey_p, blur_p):
            return transforms.Compose(
                [
                    transforms.RandomHorizontalFlip(),
                    transforms.RandomApply([transforms.ColorJitter(*jitter)], jitter_p),
                    transforms.RandomGrayscale(grey_p),
                    transforms.RandomApply([self.blur], blur_p),
                    transforms.ToTensor(),
                    transforms.Normalize(recipe["mean"], recipe["std"]),
                ]
            )

        self.files = files
        self.cut = transforms.RandomResizedCrop(recipe["view_size"], recipe["crop_scale"])
        self.patch = transforms.RandomResizedCrop(recipe["patch_size"], recipe["patch_scale"])
        self.patches = recipe["patches"]
        colors = recipe["query_jitter"], recipe["query_jitter_p"], recipe["grey_p"]
        self.query_colors = augment(*colors, recipe["blur_p"])
        self.key_colors = augment(recipe["key_jitter"], 1.0, 0.0, 0.0)

    @staticmethod
    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        with Image.open(self.files.path(index)) as file:
            image = file.convert("RGB")
        query, key = self.cut(image), self.cut(image)
        patches = torch.stack([self.query_colors(self.patch(query)) for _ in range(self.patches)])
        return self.query_colors(query), self.key_colors(key), patches, self.files.labels[index]


class Decoding(Published):
    """Decoding alone."""

    def __getitem__(self, index):
        with Image.open(self.files.path(index)) as file:
            file.convert("RGB")
        return 0


def input_pipeline(args):
    recipe = recipe_of("imagenet_lt")
    recipe |= recipe["stage1"]
    with tempfile.TemporaryDirectory() as directory:
        directory, generator = Path(directory), np.random.default_rng(0)
        for number in range(64):
            picture = Image.fromarray(photograph(generator, args.width, args.height))
            picture.save(directory / f"{number}.jpg", quality=90)
        size = statistics.mean(path.stat().st_size for path in directory.iterdir())
        paths = [b"%d.jpg" % (number % 64) for number in range(args.batches * BATCH_INPUT)]
        files = ImageFiles(directory, paths, [0] * len(paths), directory)
        rows = np.arange(len(files)).reshape(-1, BATCH_INPUT).tolist()
        batches = [(indices, indices) for indices in rows]  # the index as the seed
        sides = {
            "decoding alone": DataLoader(Decoding(files, recipe), BATCH_INPUT, num_workers=1),
            "published": DataLoader(Published(files, recipe), BATCH_INPUT, num_workers=1),
            "ours": load_batches(files, batches, recipe, 2, 1, torch.device("cpu")),
        }
        rates, wire = {side: [] for side in sides}, {}
        for _ in range(args.rounds):  # in turn, so that a machine that drifts is fair to all
            for side, loader in sides.items():
                iterator = iter(loader)
                batch = next(iterator)  # from here on the worker is at work all the time
                began = time.perf_counter()
                count = sum(BATCH_INPUT for _ in iterator)
                rates[side].append(count / (time.perf_counter() - began))
                tensors = [part for part in batch if torch.is_tensor(part)]
                wire[side] = sum(part.nbytes for part in tensors) / BATCH_INPUT / 1000
        index = directory / "iNaturalist18_train.txt"
        names = (f"train_val2018/Plantae/{n % 8142}/{n:032x}.jpg {n % 8142}" for n in range(437513))
        index.write_text("\n".join(names))
        began = time.perf_counter()
        lines = read_index(recipe_of("inaturalist18"), "train", directory, directory)
        seconds = time.perf_counter() - began

    print(
        f"one data loading process, JPEGs of {args.width} x {args.height} pixels, quality 90, "
        f"{size / 1000:.0f} KB, batches of {BATCH_INPUT}"
    )
    print(f"{machine('cpu')}; {args.rounds} rounds in turn, median (min to max)\n")
    print(f"{'':<16}{'pictures a second':>22}{'of decoding':>14}{'KB to the device':>19}")
    medians = {side: statistics.median(values) for side, values in rates.items()}
    for side, values in rates.items():
        rate = f"{medians[side]:.0f} ({min(values):.0f} to {max(values):.0f})"
        share = f"{100 * medians[side] / medians['decoding alone']:.0f} %"
        print(f"{side:<16}{rate:>22}{share:>14}{wire[side]:>19.0f}")
    ratios = sorted(ours / other for ours, other in zip(rates["ours"], rates["published"]))
    print(
        f"\nours is {statistics.median(ratios):.1f} times as fast as the published pipeline (by "
        f"round {ratios[0]:.1f} to {ratios[-1]:.1f}), with 1/{wire['published'] / wire['ours']:.1f}"
        " of its bytes"
    )
    print(
        f"an index of {len(lines):,} lines: {seconds:.2f} s to read, "
        f"{(lines.paths.nbytes + lines.labels.nbytes) / 1e6:.0f} MB, shared by the workers"
    )


# ---------------------------------------------------------------------------------------- cost


def network_cost(recipe, **shape):
    """Of a picture: GFLOP of (query and patches, key, stage 2), MB; and the parameters.

    Counted on two; MB is what autograd keeps in float32.
    """
    stage1 = recipe["stage1"]
    encoder = Encoder(stage1["arch"], **shape).to(memory_format=torch.channels_last)
    views = torch.randn(2, 3, stage1["view_size"], stage1["view_size"])
    patches = torch.randn(stage1["patches"], 2, 3, stage1["patch_size"], stage1["patch_size"])
    kept, ours = {}, {p.untyped_storage().data_ptr() for p in encoder.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def count(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops() / 2e9

    def student():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            embedding, _, patch = encoder(views, patches)
        (embedding.sum() + patch.sum()).backward()

    with torch.no_grad():
        key, whole = count(lambda: encoder(views)), count(lambda: encoder.features(views))
    flops = count(student), key, whole
    megabytes = sum(size for place, size in kept.items() if place not in ours) / 2e6
    return flops, megabytes, sum(p.numel() for p in encoder.parameters())


def cost(args):
    print(
        "counted by torch.utils.flop_counter; memory: what autograd keeps in float32, a picture\n"
    )
    print(f"{'':<16}{'GFLOP a picture':>32}{'MB':>8}{'batch MB on 1 GPU':>20}{'on 8':>8}", end="")
    print(f"{'pictures seen':>16}{'EFLOP':>8}{'GPU hours':>11}")
    print(f"{'':<16}{'query, patches':>16}{'key':>7}{'stage 2':>9}")
    for name in ("imagenet_lt", "places_lt", "inaturalist18"):
        recipe = recipe_of(name)
        stage1, stage2 = recipe["stage1"], recipe["stage2"]
        (query, key, whole), megabytes, _ = network_cost(recipe)
        seen = recipe["published"]["train"]
        total = seen * (stage1["epochs"] * (query + key) + stage2["epochs"] * whole) * 1e9
        batch = stage1["batch_size"] * megabytes
        print(f"{name:<16}{query:>16.1f}{key:>7.1f}{whole:>9.1f}{megabytes:>8.0f}", end="")
        print(f"{batch:>20,.0f}{batch / 8:>8,.0f}{seen * stage1['epochs']:>16,}", end="")
        print(f"{total / 1e18:>8.2f}{total / (args.teraflops * 3.6e15):>11.1f}")
    print(f"\nGPU hours: an estimate, for a GPU that sustains {args.teraflops:g} TFLOP/s")

    print(f"\n{'':<18}{'experts':>8}{'width':>8}{'parameters':>14}{'GFLOP a picture':>18}", end="")
    print(f"{'of one wide':>13}{'stage 2':>10}")
    for name in ("fashion_mnist_lt", "imagenet_lt"):
        recipe, wide = recipe_of(name), None
        for experts, width in ((1, 1.0), (1, 0.75), (2, 0.75), (3, 0.75), (3, 1.0)):
            (query, key, whole), _, parameters = network_cost(recipe, experts=experts, width=width)
            wide = wide or query + key
            print(f"{name:<18}{experts:>8}{width:>8}{parameters:>14,}{query + key:>18.3f}", end="")
            print(f"{(query + key) / wide:>13.2f}{whole:>10.3f}")


def peak_of(device, *what):
    """Peak memory in MB of one step above what is there before it, in a process of its own."""
    command = [sys.executable, __file__, "peak", *what, "--device", device]
    return float(subprocess.check_output(command))


def peak_megabytes(make, device):
    """The same in this process. make() gives the step, and a small one to load torch's code."""
    run, warm_up = make()
    if device == "cuda":
        warm_up()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    unit, scale = 2**20, 1 if sys.platform == "darwin" else 2**10
    warm_up()
    if Path("/proc/self/statm").exists():  # what is held now, where the system tells
        before = (
            int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / unit
        )
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / unit
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / unit - before


def machine(device):
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser(
        "losses", help="time and memory of both losses against a dense implementation"
    )
    table.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    steps = commands.add_parser("step", help="time and memory of a training step, and its floor")
    steps.add_argument("--rounds", type=int, default=9, help="timed rounds (default: 9)")
    steps.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    peak = commands.add_parser("peak", help="peak memory of one side, in MB; what others call")
    peak.add_argument("what", choices=("losses", "step"))
    peak.add_argument("side", choices=(*SIDES, *STEPS))
    peak.add_argument("recipe", nargs="?", choices=RECIPES)
    reading = commands.add_parser(
        "input", help="pictures a second of one data loading process against the published pipeline"
    )
    reading.add_argument("--width", type=int, default=500, help="of the pictures (default: 500)")
    reading.add_argument("--height", type=int, default=334, help="of the pictures (default: 334)")
    reading.add_argument("--batches", type=int, default=12, help="a round (default: 12)")
    reading.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    counting = commands.add_parser("cost", help="FLOPs and memory of a picture, by data set")
    counting.add_argument(
        "--teraflops", type=float, default=20, help="that a GPU sustains (default: 20)"
    )
    for command in (table, steps, peak):
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.command == "peak":
        make = partial(loss_step, args.side, args.device)
        if args.what == "step":
            make = partial(step_of, args.side, settings_of(args.recipe), args.device)
        print(peak_megabytes(make, args.device))
    elif args.command == "step":
        step(args)
    elif args.command == "input":
        input_pipeline(args)
    elif args.command == "cost":
        cost(args)
    else:
        losses(args)


if __name__ == "__main__":
    main()
