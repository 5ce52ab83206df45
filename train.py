"""Stage 1 of DSCL + PBSD: learns the representation. eval.py, stage 2, puts a classifier on it.

    python train.py                                                # the default, on a laptop
    python train.py --loss scl --pbsd-weight 0                     # the plain SCL baseline
    torchrun --nproc_per_node=8 train.py --dataset imagenet_lt --data-root DIR       # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        --rdzv-id=1 train.py --dataset imagenet_lt --data-root DIR     # on each of two hosts

Writes OUTPUT/checkpoint.pth and OUTPUT/log.jsonl; the same command again goes on from there.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data import (
    DATASETS,
    BadInput,
    Batches,
    Draws,
    Views,
    evaluation_view,
    identity,
    key_view,
    load_dataset,
    query_views,
    recipe_of,
    seed_from,
)
from losses import dscl_and_own_key, pbsd_loss
from models import ARCHS, Encoder, MomentumEncoder, Queue, load_pretrained

DEFAULT = "fashion_mnist_lt"
LOG_EVERY = 10  # steps; also at the end of every epoch
STAGE = "DSCL + PBSD, stage 1"


# ------------------------------------------------------------------ what eval.py needs as well


class Parser(argparse.ArgumentParser):
    """A parser with the arguments that name a data set and, if given, those of a stage.

    Its errors are one line.
    """

    def __init__(self, description, stage=None):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--dataset", choices=DATASETS, help=f"data set (default: {DEFAULT})")
        self.add_argument(
            "--data-root",
            type=Path,
            metavar="DIR",
            help="where its pictures are (default: where the repository ships them)",
        )
        self.add_argument(
            "--index-dir",
            type=Path,
            metavar="DIR",
            help="where index files such as ImageNet_LT_train.txt are (default: --data-root)",
        )
        self.add_argument(
            "--imbalance",
            type=number(float, 1),
            metavar="X",
            help="CIFAR and Fashion-MNIST: pictures of the largest class over those of the "
            "smallest; the field takes 10, 50 and 100 (default: 100)",
        )
        self.add_argument(
            "--workers",
            type=number(int, 0),
            metavar="N",
            help="processes that decode pictures, for each GPU (default: the machine's cores "
            "shared out; 0 for sets that are in memory)",
        )
        if stage:
            self.epilog = "What has no flag takes the value of the data set's recipe in data.py."
            self.recipe = DATASETS[DEFAULT][stage]
            self.add_stage_arguments(stage)

    def add_stage_arguments(self, stage):
        self.add_argument(
            "--output",
            type=Path,
            metavar="DIR",
            help="directory of all that a run writes (default: runs/DATASET, or the checkpoint's)",
        )
        text = "passes over the training set"
        if stage == "stage2":
            text += "; 0 reports the classifier that --loss ce trained in stage 1"
        self.setting("--epochs", number(int, 0 if stage == "stage2" else 1), text)
        self.setting("--batch-size", number(int, 1), "pictures a step, over all processes")
        self.setting(
            "--lr",
            number(float, 0, above=True),
            "peak learning rate of SGD; when not given, the recipe's in proportion to --batch-size",
        )
        self.add_argument(
            "--seed", type=number(int, 0), default=0, help="seed of everything (default: 0)"
        )
        self.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
        self.add_argument(
            "--amp",
            choices=("auto", "off"),
            default="auto",
            help="auto runs the networks in bfloat16 where the device computes in it (GPUs from "
            "Ampere on, CPUs with AVX512_BF16 or AMX); losses and averages stay float32 "
            "(default: auto)",
        )

    def setting(self, flag, type, text, **options):
        """A flag that wins over the recipe's value of the same name."""
        default = self.recipe[flag[2:].replace("-", "_")]
        if "choices" not in options:
            options.setdefault("metavar", "N" if isinstance(default, int) else "X")
        if isinstance(default, tuple):
            options["nargs"], default = len(default), " ".join(map(str, default))
        self.add_argument(
            flag, type=type, help=f"{text} (recipe of {DEFAULT}: {default})", **options
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or float in [low, high], or in (low, high] if `above`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number of type {kind.__name__}"
            ) from None
        if not low <= value <= high or (above and value == low) or math.isinf(value):
            limits = f"{'above' if above else 'at least'} {low}"
            limits += f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return value

    return parse


def cores():
    """The cores that each process of this machine can have for its workers, at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def with_recipe(args, stage, pictures):
    """Fill every argument that was not given with the data set's recipe.

    Returns the recipe, with the stage's settings as they are now beside the others.
    """
    recipe = recipe_of(args.dataset, pictures)
    if args.workers is None:
        args.workers = cores() if recipe["workers"] is None else recipe["workers"]
    if args.imbalance is None:
        args.imbalance = recipe.get("imbalance")
    if args.lr is None and args.batch_size:
        args.lr = recipe[stage]["lr"] * args.batch_size / recipe[stage]["batch_size"]
    for name, value in recipe[stage].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.output = args.output or Path("runs") / args.dataset
    return recipe | {name: getattr(args, name) for name in recipe[stage]}


def plain(args):
    """Arguments as a dict that JSON and torch.load(weights_only=True) take."""
    return json.loads(json.dumps(vars(args), default=str))


def start(device):
    """Join the processes torchrun started, or stand alone: (rank, world size, device)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise BadInput(f"--device must be cpu, cuda or auto, got {device}")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise BadInput("--device cuda: torch finds no usable GPU; use --device cpu")
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    return rank, world, torch.device(device)


def precision(amp, device):
    """ "bf16" or "off": what --amp comes to on this device."""
    if device.type == "cuda":
        able = torch.cuda.get_device_capability(device) >= (8, 0)
    else:  # without these instructions bfloat16 is slower than float32; torch < 2.6 cannot tell
        can = getattr(torch.cpu, "get_capabilities", dict)()
        able = can.get("avx512_bf16") or can.get("amx_bf16")
    return "bf16" if amp == "auto" and able else "off"


def autocast(device, amp):
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def save(path, content, write=torch.save):
    """Write a file beside `path`, then put it in its place: there is always a whole one.

    write(content, file) fills the file, opened for bytes; by default as a checkpoint. BadInput if
    it cannot be written, a full disk for one; what stood there before stays.
    """
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as file:
            write(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save makes the latter of the former
        beside.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise BadInput(
            f"{path} cannot be written ({reason}); the one before it, if any, is whole: make room, "
            "then the same command goes on from there"
        ) from None


def save_text(path, text):
    save(path, text.encode(), lambda content, file: file.write(content))


def load(path, stage, device):
    """Read what save() wrote; BadInput if it is missing, broken or of another stage."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path} not found: train first, or name the checkpoint of a run") from None
    except Exception as error:  # torch.load raises many kinds on files that are not its own
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise BadInput(f"{path} cannot be read as a checkpoint ({reason}); move it away") from None
    if not isinstance(content, dict) or content.get("stage") != stage:
        raise BadInput(
            f"{path} is not a checkpoint of {stage}; name one that is, or another --output"
        )
    return content


def same_everywhere(value, output):
    """BadInput if processes found different checkpoints, on hosts that do not share --output."""
    if gather(torch.tensor([value])).unique().numel() > 1:
        raise BadInput(
            f"processes found different checkpoints in {output}: it must be one directory that all "
            "hosts share"
        )


def only_lost_pictures(before, now):
    """Whether a data set, described by data.identity, is what it was but for dropped pictures."""

    def kept(split):
        old, new = before[split], now[split]
        return new == old or (
            new["classes"] == old["classes"] and new["pictures"] < old["pictures"]
        )

    return before.keys() == now.keys() and all(map(kept, now))


# What may differ while a run goes on.
HARMLESS = {"output", "data_root", "index_dir", "workers", "device", "amp", "save_minutes"}
HARMLESS |= {"processes", "checkpoint", "knn_epochs", "plots", "compare", "export", "summary"}


def same_settings(path, before, now):
    """What differs between a run's settings before and now, if it may while the run goes on.

    BadInput lists the differences if one of them may not.
    """
    differ = {
        name: f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }
    if "stage1" in differ:  # the arguments of runs
        runs = zip(before["stage1"], now["stage1"])
        names = {name for old, new in runs for name in new if new[name] != old.get(name)}
        differ["stage1"] = f"stage 1 is another in {', '.join(sorted(names)) or 'its runs'}"
    harmless = HARMLESS - ({"processes"} if now.get("contrast") == "local" else set())
    if "data" in differ:
        sizes = [{s: part["pictures"] for s, part in run["data"].items()} for run in (before, now)]
        now_are = "others" if sizes[0] == sizes[1] else sizes[1]
        differ["data"] = f"pictures were {sizes[0]}, now {now_are}"
        if only_lost_pictures(before["data"], now["data"]):
            harmless = harmless | {"data"}
    if differ.keys() - harmless:
        listed = "; ".join(text for name, text in differ.items() if name not in harmless)
        raise BadInput(f"{path} is of another run ({listed}); choose another --output")
    return list(differ.values())


def leave_signals_to_the_main_process(worker):
    """A scheduler's SIGTERM goes to all processes; without workers there would be no checkpoint."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def load_batches(pictures, batches, recipe, crops, workers, device):
    """A DataLoader of (images uint8 [1 or 2, B, C, H, W], labels [B]), see data.Views."""
    return DataLoader(
        Views(pictures, recipe, crops),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=leave_signals_to_the_main_process,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )


def shard(count, rank, world, batch_size=128):
    """Batches of every picture of a split, for a loader: this process's part, none twice."""
    rows = torch.arange(count)[rank::world]
    return [(batch.tolist(), None) for batch in rows.split(batch_size) if len(batch)]


@torch.no_grad()
def embed_all(encoder, pictures, recipe, workers, device):
    """The backbone's features of a split's pictures, all experts', of unit length: [N, C].

    BatchNorm uses its running statistics; the encoder is left in eval mode.
    """
    encoder.eval()
    batches, features = shard(len(pictures), 0, 1), []
    for images, _ in load_batches(pictures, batches, recipe, 0, workers, device):
        maps = encoder.features(evaluation_view(images.to(device, non_blocking=True), recipe))
        features.append(torch.cat([own.mean((2, 3)) for own in maps], dim=1).float())
    return F.normalize(torch.cat(features), dim=1)


class Progress:
    """One live line on a terminal; elsewhere a plain line every ten seconds."""

    def __init__(self, steps, done=0, enabled=True):
        self.steps, self.first, self.began = steps, done, time.monotonic()
        self.live, self.enabled, self.printed = sys.stderr.isatty(), enabled, -math.inf

    def show(self, done, text):
        now = time.monotonic()
        last = done == self.steps
        if not self.enabled or not (self.live or last or now - self.printed >= 10):
            return
        self.printed = now
        left = (now - self.began) / max(done - self.first, 1) * (self.steps - done)
        line = f"{text}  ETA {int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
        if self.live:
            line = "\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1]
        print(line, end="\n" if last or not self.live else "", file=sys.stderr, flush=True)


class Stopped(Exception):
    """A signal asked the run to end, and its checkpoint is written."""


def run(main):
    """Call main(); an end that is no fault of the code is one line and an exit code.

    2: what the user can mend; 75 (try again): stopped by a signal, after a checkpoint; 130: Ctrl-C;
    1: another process of the run died or cannot be reached.
    """
    again = "the same command goes on from the last checkpoint"
    first = os.environ.get("RANK", "0") == "0"  # speaks for all where all know the same
    code, message = 0, ""
    try:
        main()
    except BadInput as error:
        # What a worker raised arrives as the text of its traceback, with the message in the end.
        text = str(error).rpartition(f"{BadInput.__name__}: ")[2].strip()
        code, message = 2, f"error: {text}"
    except OSError as error:
        text = error.strerror or str(error).strip().splitlines()[-1]
        code, message = 2, f"error: {error.filename or 'system'}: {text}"
    except Stopped:
        code, message = 75, first and f"stopped by a signal; {again}"
    except KeyboardInterrupt:
        code, message = 130, first and f"interrupted; {again}"
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = str(error).splitlines()[0]
        code, message = 1, f"error: the connection to another process failed ({reason}); {again}"
    if message:
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        print(f"{clear}{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    if code:  # without a farewell to processes that may be waiting for this one
        sys.exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------- stage 1


def parse_args():
    parser = Parser(__doc__, "stage1")
    parser.setting("--arch", str, "backbone", choices=ARCHS)
    parser.setting(
        "--pretrained",
        str,
        "weights the backbone starts from: a file with a state dict of torchvision's ResNet, "
        "torchvision's name of such (IMAGENET1K_V1), or none",
        metavar="WEIGHTS",
    )
    parser.add_argument(
        "--loss",
        choices=("dscl", "scl", "ce"),
        default="dscl",
        help="dscl; scl weighs the own key as any other positive; ce is the cross-entropy "
        "baseline, query view and linear classifier alone (default: dscl)",
    )
    parser.setting(
        "--alpha", number(float, 0, 1), "DSCL's share of the anchor's own key, 0 to 1; paper: 0.1"
    )
    parser.setting("--pbsd-weight", number(float, 0), "lambda of PBSD, 0 turns it off; paper: 1.5")
    parser.setting("--patches", number(int, 1), "patches L a picture; paper: 5")
    parser.setting(
        "--experts",
        number(int, 1),
        "experts, which share the first stages; stage 2 averages their logits",
    )
    parser.setting(
        "--expert-width",
        number(float, 0, 1, above=True),
        "channels of what experts have of their own, as a share of the backbone's; RIDE: 0.75",
    )
    parser.setting("--view-size", number(int, 8), "pixels of the views' sides; paper: 224")
    parser.setting("--patch-size", number(int, 4), "pixels of the patches' sides; paper: 64")
    parser.setting(
        "--patch-scale",
        number(float, 0, 1, above=True),
        "smallest and largest patch, as a share of the query view's area; paper: 0.05 0.6",
        metavar=("LOW", "HIGH"),
    )
    parser.setting(
        "--queue-size",
        number(int, 0),
        "keys K in the queue; more than the training set holds are stale copies of its pictures",
    )
    parser.setting(
        "--momentum-encoder", number(float, 0, 1), "m of the key encoder's moving average"
    )
    parser.setting("--temperature", number(float, 0, above=True), "tau of both losses; paper: 0.07")
    parser.add_argument(
        "--contrast",
        choices=("global", "local"),
        default="global",
        help="DSCL's contrast within the batch: among all processes, so that their number changes "
        "no loss, or within each process, as the published code (default: global)",
    )
    parser.add_argument(
        "--save-minutes",
        type=number(float, 0),
        default=30,
        metavar="X",
        help="a checkpoint at least so often, besides that of every epoch (default: 30)",
    )
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="DIR",
        help="draw the views, boxes and patches of the first batch as the networks see them, and, "
        "in the end, the curves of log.jsonl, as PNG files",
    )
    parser.setting(
        "--warmup-epochs", number(int, 0), "epochs in which the learning rate rises to its peak"
    )
    parser.setting(
        "--knn-epochs",
        number(int, 0),
        "epochs between two measurements of kNN accuracy (k = 10) on val, which the first process "
        "makes alone; 0 for none",
    )
    args = parser.parse_args()
    if args.patch_scale and args.patch_scale[0] > args.patch_scale[1]:
        parser.error("--patch-scale: the smallest comes first")
    args.dataset = args.dataset or DEFAULT
    return args


def learning_rate(step, args, per_epoch):
    """Linear warm-up, then cosine to 0, per step."""
    warmup, steps = args.warmup_epochs * per_epoch, args.epochs * per_epoch
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr / 2 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def gather(tensor):
    """The rows of all processes in rank order; the tensor itself if there is one process."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class Shuffle:
    """Shuffle BN: a process makes keys of pictures drawn from those of all processes.

    Normalised with the pictures of its queries, a key could be told by the batch's statistics. The
    order follows from the seed, so that all processes know it. None of it for one process.
    Of the global batch, `own` are the rows of a process's queries, `others` those of its keys.
    """

    def __init__(self, seed, batch_size, rank, world, device):
        share = batch_size // world
        self.own = self.others = slice(rank * share, (rank + 1) * share)
        self.order = None
        if world > 1:
            generator = torch.Generator().manual_seed(seed)
            self.order = torch.randperm(batch_size, generator=generator)
            self.order = self.order.to(device, non_blocking=True)
            self.others = self.order[self.own]

    def spread(self, images):
        """This process's part, in the new order, of everyone's uint8 images [B, C, H, W]."""
        return images if self.order is None else gather(images)[self.others]

    def collect(self, keys):
        """Everyone's keys in the order of their pictures, the processes one after another."""
        return keys if self.order is None else gather(keys)[self.order.argsort()]


def among_all(query, own):
    """The queries of all processes [B, D], of which this one's, the rows `own`, carry gradient.

    A loss of them all is computed by every process, which adds the gradient at its own queries.
    """
    queries = gather(query.detach())
    world = len(queries) // len(query)
    if world > 1:  # DDP takes the mean over processes where their sum is due
        query.register_hook(lambda gradient: gradient * world)
    return torch.cat([queries[: own.start], query, queries[own.stop :]])


def dscl_and_pbsd(
    model, momentum_encoder, queue, query_view, boxes, patches, key_view, labels, shuffle, args
):
    """The method: [total, DSCL] of a batch or, with patches, [total, DSCL, PBSD]; p(z_i+|z_i) [B].

    Views, boxes and patches are those of data.query_views and data.key_view, labels [B]. The keys
    go into the queue. Every expert has its own embeddings, and so its own losses: their mean.
    """
    query, feature_maps, patch = model(query_view, patches)  # z_i, f(x), s_i[j]
    encoder = getattr(model, "module", model)
    momentum_encoder.update(encoder)
    keys = shuffle.collect(momentum_encoder(key_view))
    key, all_labels = keys[shuffle.own], gather(labels)  # z_i+
    if patches is not None:
        with torch.no_grad():
            roi = encoder.embed_regions(feature_maps, boxes, query_view.shape[-1])  # c_i[j]

    anchors, own_rows = (query, key, labels), slice(None)
    if args.contrast == "global":
        anchors, own_rows = (among_all(query, shuffle.own), keys, all_labels), shuffle.own
    tau, terms, probabilities = args.temperature, [], []
    dim = encoder.dim // len(encoder.heads)
    for start in range(0, encoder.dim, dim):
        own = slice(start, start + dim)  # an expert's columns
        bank = queue.keys[:, own]
        embeddings = anchors[0][:, own], anchors[1][:, own], anchors[2], bank, queue.labels
        dscl, probability = dscl_and_own_key(*embeddings, alpha=args.alpha, temperature=tau)
        terms.append([dscl])
        probabilities.append(probability[own_rows])
        if patches is not None:
            embeddings = roi[..., own], patch[..., own], key[:, own], bank
            terms[-1].append(pbsd_loss(*embeddings, temperature=tau))
    queue.put(keys, all_labels)
    dscl, *pbsd = (torch.stack(term).mean() for term in zip(*terms))
    total = dscl + args.pbsd_weight * pbsd[0] if pbsd else dscl
    return [total, dscl, *pbsd], torch.stack(probabilities).mean(0)


@torch.no_grad()
def neighbour_accuracy(bank, bank_labels, features, labels, neighbours=10, temperature=0.07):
    """Balanced accuracy, in percent, of a vote of the nearest rows of a bank; a 0-dim tensor.

    bank [N, C] and features [M, C] of unit length, labels [N] and [M]. A vote weighs
    exp(cosine / temperature) (Wu et al., 2018).
    """
    counts = labels.bincount()
    right = torch.zeros(len(counts), device=labels.device)
    for rows, own in zip(features.split(256), labels.split(256)):
        cosine, nearest = (rows @ bank.T).topk(min(neighbours, len(bank)))
        votes = rows.new_zeros(len(rows), len(counts))
        votes.scatter_add_(1, bank_labels[nearest], (cosine / temperature).exp())
        right.index_add_(0, own, (votes.argmax(1) == own).float())
    return 100 * (right / counts).mean()


def look_at_val(encoder, sets, recipe, args, device):
    """neighbour_accuracy of val among the training set; leaves the encoder in eval mode."""
    rows = []
    for split in ("train", "val"):
        with autocast(device, args.amp):
            rows.append(embed_all(encoder, sets[split], recipe, args.workers, device))
        rows.append(sets[split].labels.to(device))
    return round(neighbour_accuracy(*rows).item(), 2)


NOTHING, SAVE, STOP, BROKEN = range(4)  # what a process may have met before a step


def agree(news):
    """The most urgent news of all processes, so that all act on it before the same step.

    Over gloo, on host integers: no GPU is waited for.
    """
    if not dist.is_initialized():
        return news
    most = torch.tensor(news)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.item()


def watched(loader, checkpoint, minutes):
    """The loader's batches, with a checkpoint() between them when one is due.

    It is when `minutes` have passed, after SIGTERM or SIGUSR1, which schedulers send before they
    take a machine away, and when a picture cannot be read: then the run ends as well.
    """
    signals = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: signals.append(number))
    loader, saved = iter(loader), time.monotonic()
    while True:
        batch, news, message = None, NOTHING, ""
        try:
            batch = next(loader, None)
        except BadInput as error:
            news, message = BROKEN, str(error)
        if signals:
            news = max(news, STOP)
        elif time.monotonic() - saved > 60 * minutes:
            news = max(news, SAVE)
        news = agree(news)
        if news:
            checkpoint()
            saved = time.monotonic()
        if news == BROKEN:
            messages = [message]
            if dist.is_initialized():
                messages = [None] * dist.get_world_size()
                dist.all_gather_object(messages, message)
            raise BadInput(next(filter(None, messages)))
        if news == STOP:
            raise Stopped
        if batch is None:
            return
        yield batch


def open_log(path, args, splits, step, changes):
    """log.jsonl, line by line; a resumed run keeps the records up to its checkpoint."""
    lines = []
    if step:
        with contextlib.suppress(FileNotFoundError, ValueError):  # a last line cut short
            for line in path.read_text().splitlines(keepends=True):
                if json.loads(line).get("step", 0) <= step:
                    lines.append(line)
    if not lines:
        versions = {"python": sys.version.split()[0]}
        versions |= {m.__name__: m.__version__ for m in (torch, torchvision)}
        header = dict(command=shlex.join(sys.argv), versions=versions, splits=splits)
        header["arguments"] = plain(args)
        lines = [json.dumps(header) + "\n"]
    if step and changes:
        lines.append(json.dumps(dict(resumed=True, step=step, changes=changes)) + "\n")
    save_text(path, "".join(lines))
    return open(path, "a", buffering=1)


def main():
    args = parse_args()
    sets = load_dataset(args.dataset, args.data_root, args.index_dir, args.imbalance)
    train_set = sets["train"]
    recipe = with_recipe(args, "stage1", len(train_set))
    if args.knn_epochs and "val" not in sets:
        raise BadInput(f"--knn-epochs {args.knn_epochs}: {args.dataset} has no val split; give 0")
    if args.loss == "scl":
        args.alpha = None
    contrastive = args.loss != "ce"
    patches = args.patches if contrastive and args.pbsd_weight else 0
    rank, world, device = start(args.device)

    torch.manual_seed(args.seed)
    counts = train_set.labels.bincount()
    shape = dict(
        classes=None if contrastive else len(counts), experts=args.experts, width=args.expert_width
    )
    encoder = Encoder(args.arch, **shape)
    args.processes, args.data = world, identity(sets)
    args.amp = precision(args.amp, device)
    path, step, changes = args.output / "checkpoint.pth", 0, []
    if args.pretrained != "none" and not path.exists():
        try:
            load_pretrained(encoder.backbone, args.arch, args.pretrained)
            for expert in encoder.experts:
                own = encoder.backbone[encoder.shared :].state_dict()
                expert["layers"].load_state_dict(own)
        except ValueError as error:
            raise BadInput(
                f"--pretrained {args.pretrained}: {error}; give a file, or none"
            ) from None
    encoder = encoder.to(device, memory_format=torch.channels_last)
    momentum_encoder = MomentumEncoder(encoder, args.momentum_encoder)
    queue = Queue(args.queue_size if contrastive else 0, encoder.dim).to(device)
    optimizer = torch.optim.SGD(
        encoder.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True
    )

    # The same command again goes on from the checkpoint.
    for directory in (args.output, args.plots or args.output):
        directory.mkdir(parents=True, exist_ok=True)
    parts = dict(
        encoder=encoder, momentum_encoder=momentum_encoder, queue=queue, optimizer=optimizer
    )
    terms = ["loss", *["dscl"] * contrastive, *["pbsd"] * bool(patches)]
    # p(z_i+|z_i) by class size: from 2^n to less than 2^(n + 1) training pictures.
    sizes, size_of = counts.log2().long().unique(return_inverse=True)
    size_of = size_of.to(device)
    # Of this process since the last record: terms; p(z_i+|z_i) by size, and of how many anchors.
    sums = torch.zeros(len(terms) + 2 * contrastive * len(sizes), device=device)
    if path.exists():
        saved = load(path, STAGE, device)
        changes = same_settings(path, saved["args"], plain(args))
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        step, sums = saved["step"], saved["sums"]
        sums = sums[rank] if len(sums) == world else sums.mean(0)
    same_everywhere(step, args.output)
    share = dict(start=step, rank=rank, world=world)
    batches = Batches(train_set.labels, args.batch_size, args.epochs, seed=args.seed, **share)
    steps, per_epoch = args.epochs * batches.per_epoch, batches.per_epoch
    splits = {split: f"{len(part)} pictures of {part.origin}" for split, part in sets.items()}
    log = open_log(args.output / "log.jsonl", args, splits, step, changes) if rank == 0 else None
    progress = Progress(steps, step, enabled=rank == 0)
    if rank == 0:
        verb = f"going on from epoch {step / per_epoch:.4g} of" if step else "training"
        verb = f"({'; '.join(changes)}) {verb}" if changes else verb
        print(
            f"{verb} {args.arch} on {args.dataset}: {len(train_set)} pictures, "
            f"{args.epochs} epochs of {per_epoch} steps, {world} x {device.type}",
            file=sys.stderr,
        )
        for split in ("val", "test"):
            if "held out" in splits.get(split, ""):
                print(f"{split}: {splits[split]}", file=sys.stderr)

    model = encoder
    if world > 1:
        options = dict(gradient_as_bucket_view=True, static_graph=True)
        model = DistributedDataParallel(encoder, **options)
    model.train()
    momentum_encoder.train()

    def everyones_sums():
        """[processes, terms]; BadInput if training ran away: no checkpoint ever holds that."""
        rows = gather(sums[None])
        finite = [
            rows.isfinite().all(),
            *(weight.isfinite().all() for weight in encoder.parameters()),
        ]
        if not torch.stack(finite).all():
            lr = learning_rate(step - 1, args, per_epoch)
            good = f"{path} is good and stays" if path.exists() else "there is no checkpoint yet"
            raise BadInput(
                f"loss or weights are not finite at step {step}, lr {lr:.3g}; {good}: "
                "try a smaller --lr in another --output"
            )
        return rows

    def checkpoint():
        rows = everyones_sums()
        if rank == 0:
            os.fsync(log.fileno())
            states = {name: part.state_dict() for name, part in parts.items()}
            save(path, dict(stage=STAGE, args=plain(args), step=step, sums=rows, **states))

    looks, broken = set(), None  # the steps after which val is looked at
    if args.knn_epochs:
        looks = {steps, *range(0, steps, per_epoch * args.knn_epochs)}
    views = 2 if contrastive else 1
    loader = load_batches(train_set, batches, recipe, views, args.workers, device)
    began, timed, since = time.monotonic(), step, step % per_epoch % LOG_EVERY
    for images, labels in watched(loader, checkpoint, args.save_minutes):
        lr = learning_rate(step, args, per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

        # All that a step draws follows from (seed, step): there is no generator's state to save.
        seeds = [seed_from(args.seed, step, stream) for stream in (1, 2, 3)]
        shuffle = Shuffle(seeds[0], args.batch_size, rank, world, device)
        draws = Draws(seeds[1], args.batch_size, shuffle.own, device)
        queries = query_views(images[0], draws, recipe, patches)
        if args.plots and rank == 0 and step == batches.steps.start:
            from eval import draw_views  # here, as eval.py imports this module

            draws = Draws(seeds[2], args.batch_size, shuffle.own, device)
            keys = key_view(images[-1], draws, recipe) if contrastive else None
            draw_views(args.plots / "views.png", *queries, keys, recipe)
        if contrastive:
            draws = Draws(seeds[2], args.batch_size, shuffle.others, device)
            keys = key_view(shuffle.spread(images[-1]), draws, recipe)
        with autocast(device, args.amp):
            if contrastive:
                values, probability = dscl_and_pbsd(
                    model, momentum_encoder, queue, *queries, keys, labels, shuffle, args
                )
            else:
                logits = model(queries[0])[0].chunk(args.experts, dim=1)
                values = [torch.stack([F.cross_entropy(own, labels) for own in logits]).mean()]

        values[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, since = step + 1, since + 1
        sums[: len(terms)] += torch.stack(values).detach()
        if contrastive:
            by_size = sums[len(terms) :].view(2, len(sizes))
            probability = torch.stack([probability, torch.ones_like(probability)])
            by_size.index_add_(1, size_of[labels], probability)

        if step % per_epoch % LOG_EVERY == 0:
            now, epoch = time.monotonic(), math.ceil(step / per_epoch)
            means = everyones_sums().mean(0)
            values = dict(zip(terms, (means[: len(terms)] / since).tolist()))
            if rank == 0:
                rate = (step - timed) * args.batch_size / (now - began)
                record = dict(
                    epoch=epoch, step=step, **values, lr=lr, images_per_second=round(rate, 1)
                )
                if contrastive:
                    total, anchors = means[len(terms) :].view(2, len(sizes))
                    record["own_key"] = {
                        2**size: value if value == value else None  # NaN: no anchor of that size
                        for size, value in zip(sizes.tolist(), (total / anchors).tolist())
                    }
                text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
                if step in looks:
                    try:
                        record["knn"] = look_at_val(encoder, sets, recipe, args, device)
                        text += f"  knn {record['knn']:.1f}"
                    except BadInput as error:  # a broken picture: after a checkpoint
                        broken = error
                    model.train()
                print(json.dumps(record), file=log)
                progress.show(
                    step,
                    f"epoch {epoch}/{args.epochs}  {text}  lr {lr:.3f}  {rate:.0f} pictures/s",
                )
            sums, since, began, timed = torch.zeros_like(sums), 0, time.monotonic(), step
        if step % per_epoch == 0:
            checkpoint()
        if broken:
            raise broken

    if args.plots and rank == 0:
        from eval import draw_curves

        draw_curves(args.plots / "curves.png", args.output)
    if rank == 0:
        print(f"done: {path}; stage 2: python eval.py --output {args.output}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
