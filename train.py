r"""Stage 1 of DSCL + PBSD: train the representation. Stage 2, eval.py, fits a classifier on it.

    python train.py                                                # the default, on a laptop
    python train.py --loss scl --pbsd-weight 0                     # the SCL baseline
    python train.py --dataset imagefolder --views views.png        # draw what the networks see
    torchrun --nproc_per_node=8 train.py --dataset imagenet_lt     # 8 GPUs; data.py --help: images
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
        --rdzv-id=1 train.py --dataset imagenet_lt                 # on each of two hosts

It writes OUTPUT/checkpoint.pth and OUTPUT/log.jsonl. After an interruption the same command
continues from them. --dataset NAME --help shows the settings for a data set.
"""

import argparse
import contextlib
import copy
import fcntl
import inspect
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import data  # before torch, whose precision it settles
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import draw_bounding_boxes, save_image

from data import BadInput, BatchDataset, Batches, Draws, Progress, load_batches, seed_from
from losses import dscl_loss, pbsd_loss
from models import ARCHS, Encoder, Queue, load_pretrained, moving_average, smallest_sides

STAGE = "stage 1 of DSCL + PBSD"
CLASSIFIERS = ("ce", "la")  # the baselines of --loss that train a classifier
LOG_EVERY = 10  # steps; there is a record at the end of every epoch as well

# ----------------------------------------------------------------------------------------- the step


def dscl_pbsd_step(model, key_encoder, queue, images, labels, batch, args):
    """DSCL + PBSD on one batch: a dict of the total `loss`, of `dscl` and, with patches, of `pbsd`.

    Each is the mean over this rank's B of the batch's N images; DDP averages its gradient over the
    ranks. With --loss scl, `dscl` is the plain SCL. images: a pair of uint8 [B, C, H, W], for query
    and key views: two random crops, or twice the whole images, which are then cropped here. labels:
    [B]. batch: a ShuffledBatch, which has the random numbers.
    """
    # 1. Views (Algorithm 1 of the supplementary). Patches are cut from the query view, inside its
    # boxes, before its colours change. The key views are of B other images of the N: otherwise the
    # BatchNorm statistics could leak which key matches a query (shuffle BN).
    for_query, for_key = images
    count = args.patches if args.pbsd_weight else 0  # L; if it is 0, boxes and patches are None
    # view [B, 3, V, V], boxes [L, B, 4], patches [L, B, 3, S, S]
    view, boxes, patches = data.query_views(for_query, batch.draws(), args, count)
    key_view = data.key_view(batch.shuffle(for_key), batch.draws(keys=True), args)  # [B, 3, V, V]

    # 2. Embeddings by each of E experts: vectors of length 1, float32. No gradient flows into the
    # regions' c and the keys z+. The key encoder is updated before it embeds the keys, as in MoCo.
    with autocast(view.device, args.amp):
        z, c, s = model(view, boxes, patches)  # [E, B, D], [E, L, B, D], [E, L, B, D]
        with torch.no_grad():
            moving_average(key_encoder, model, args.momentum_encoder)
            shuffled_keys, _, _ = key_encoder(key_view)  # [E, B, D]
            all_keys = batch.gather_unshuffled(shuffled_keys)  # [E, N, D]
    all_queries, all_labels = gather_queries(z), gather(labels)  # [E, N, D], [N]

    # 3. The losses of this rank's images, for each expert with its own queue. In DSCL the queries
    # and keys of all ranks are contrast samples; the published code takes those of the local rank.
    own, tau = batch.positions, args.temperature
    alpha = None if args.loss == "scl" else args.alpha
    dscl, pbsd = [], []
    for e in range(args.experts):
        dscl.append(dscl_loss(all_queries[e], all_keys[e], all_labels, queue.keys[e], queue.labels,
                              alpha=alpha, temperature=tau, anchors=own))
        if args.pbsd_weight:
            keys = all_keys[e, own]  # [B, D]
            pbsd.append(pbsd_loss(c[e], s[e], keys, queue.keys[e], temperature=tau))
    values = dict(dscl=torch.stack(dscl).mean())
    if pbsd:
        values["pbsd"] = torch.stack(pbsd).mean()
    loss = values["dscl"] + args.pbsd_weight * values.get("pbsd", 0)

    # 4. The queue may change before backward(), which reads none of its tensors.
    queue.put(all_keys, all_labels)
    return dict(loss=loss, **values)


def cross_entropy_step(model, log_prior, images, labels, batch, args):
    """The baselines ce and la on one batch: linear classifiers on the query view.

    log_prior [classes] is added to the logits, in training only: 0 for cross-entropy, the logarithm
    of the class frequencies for logit adjustment (Menon et al., 2021).
    """
    view, _, _ = data.query_views(images[0], batch.draws(), args)
    with autocast(view.device, args.amp):
        logits, _, _ = model(view)  # [E, B, classes]
    losses = [F.cross_entropy(of_expert + log_prior, labels) for of_expert in logits]
    return dict(loss=torch.stack(losses).mean())


def learning_rate(step, per_epoch, args):
    """The learning rate of a step (from 0): linear warm-up to the scaled peak, then cosine to 0."""
    peak = args.lr * args.batch_size / 256
    steps = args.epochs * per_epoch
    warmup = round(args.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak / 2 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def main():
    args = parse_args()
    rank, world, device = start(args)
    sets = data.load_dataset(args.dataset, args.data_root, args.index_dir, args.imbalance)
    train_set = sets["train"]
    if args.views:
        return draw_views(args.views, train_set, args)
    settle(args, sets, world)
    lock = lock_output(args.output) if rank == 0 else None  # until this process ends
    path = args.output / "checkpoint.pth"
    saved = resume(path, STAGE, args, device)
    first_step = saved["step"] if saved else 0
    ranks = dict(seed=args.seed, start=first_step, rank=rank, world=world)
    batches = Batches(train_set.labels, args.batch_size, args.epochs, **ranks)

    torch.manual_seed(args.seed)  # every process starts with the same weights
    state, train_step = build(args, train_set.labels.bincount(), saved, device)
    encoder, optimizer = state["encoder"], state["optimizer"]
    model = distributed(encoder) if dist.is_initialized() else encoder
    if "folders" in data.DATASETS[args.dataset]:
        train_set.hold(args, threads=args.workers + 1)
    crops = BatchDataset(train_set, args, crops=1 if args.loss in CLASSIFIERS else 2)
    loader = load_batches(crops, batches, args.workers, device)
    recorder = Recorder(path, args, state, batches, device)

    for step, images, labels in recorder.read(loader):
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, batches.per_epoch, args)
        batch = ShuffledBatch(args, step, batches.positions, device)
        pair = images[0], images[-1]  # two crops; or twice the whole image, cropped on the device
        losses = train_step(model, images=pair, labels=labels, batch=batch, args=args)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        recorder.count_step(losses, lr)
    output = shlex.quote(str(args.output))
    data.say(f"done: {path}; stage 2: python eval.py --output {output}")


def settle(args, sets, world):
    """Set the arguments that follow from the images; a run belongs to them."""
    train_set = sets["train"]
    args.images = {split: len(dataset) for split, dataset in sets.items()}
    # resume() and eval.py refuse other training images or classes.
    args.training_images, args.classes = train_set.fingerprint(), train_set.names
    lower_batch_size(args, len(train_set))
    if args.batch_size < 2 * world:
        raise BadInput(f"--batch-size {args.batch_size}: BatchNorm needs two images a process")
    if not args.epochs:  # the baselines get twice the steps, which take about the same time
        steps = args.steps * (2 if args.loss in CLASSIFIERS else 1)
        args.epochs = math.ceil(steps / (len(train_set) // args.batch_size))


def build(args, counts, saved, device):
    """What a checkpoint holds, {name: module or optimizer}, and the function of a training step.

    counts [classes] are those of the training images. The state is that of `saved`, if given. The
    random numbers of a step are no part of it: they follow from (seed, step).
    """
    is_baseline = args.loss in CLASSIFIERS
    encoder = Encoder(args.arch, args.experts, len(counts) if is_baseline else None)
    if args.pretrained != "none" and not saved:
        try:
            load_pretrained(encoder, args.arch, args.pretrained)
        except ValueError as error:
            raise BadInput(f"--pretrained {args.pretrained}: {error}") from None
    encoder = encoder.to(device, memory_format=torch.channels_last)
    sgd = dict(lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    state = dict(encoder=encoder, optimizer=torch.optim.SGD(encoder.parameters(), **sgd))
    if is_baseline:
        frequencies = (counts / counts.sum()).to(device)
        log_prior = frequencies.log() if args.loss == "la" else torch.zeros_like(frequencies)
        train_step = partial(cross_entropy_step, log_prior=log_prior)
    else:
        parts = dict(
            key_encoder=copy.deepcopy(encoder).requires_grad_(False),
            queue=Queue(args.queue_size, args.experts).to(device),
        )
        state |= parts
        train_step = partial(dscl_pbsd_step, **parts)
    if saved:
        for name, part in state.items():
            part.load_state_dict(saved.pop(name))
    return state, train_step


# ---------------------------------------------------------------------------------------- processes


# What srun, Open MPI, MPICH, MVAPICH and jsrun set to the number of processes that they started.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE",
             "JSM_NAMESPACE_SIZE")


def start(args):
    """Join torchrun's process group; returns (rank, world size, device) and settles args.amp."""
    for name in LAUNCHERS:
        if int(os.environ.get(name, 1)) > 1 and "RANK" not in os.environ:
            raise BadInput(f"the environment has {name}={os.environ[name]}: every process would be "
                           "a run of its own; let srun or mpirun start torchrun, once on each host")
    needed = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
    here = [name for name in needed if name in os.environ]
    if 0 < len(here) < len(needed):
        missing = ", ".join(name for name in needed if name not in here)
        raise BadInput(f"the environment has {', '.join(here)}, but not {missing}: start several "
                       "processes by torchrun; for one process unset these variables")
    world = int(os.environ.get("WORLD_SIZE", 1))
    # The environment may ask for TF32, but what is printed as float32 is computed in float32.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch finds no usable GPU; use --device cpu")
    if args.device != "cpu" and torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if local > gpus:
            raise BadInput(f"{local} processes, but {gpus} GPUs on this host: start one per GPU")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes are the same in every step
        able = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # Without these instructions bfloat16 is slower than float32; torch < 2.6 cannot tell. On
        # ARM it is slower with them, too: oneDNN has only reference code for gradients there.
        device, can = torch.device("cpu"), getattr(torch.cpu, "get_capabilities", dict)()
        able = can.get("avx512_bf16") or can.get("amx_bf16")
    args.amp = "bf16" if args.amp == "auto" and able else "off"
    if here:
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    return data.RANK, world, device


def autocast(device, amp):
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def distributed(encoder):
    """The encoder as a DistributedDataParallel module, whose gradients are means over ranks."""
    # 1 x 1 convolutions in channels_last: the copy that this harmless warning is about is small.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    options = dict(gradient_as_bucket_view=True, static_graph=True)
    if "batched_grad_copy" in inspect.signature(DistributedDataParallel).parameters:
        options["batched_grad_copy"] = True  # since torch 2.14: one copy instead of 163
    model = DistributedDataParallel(encoder, **options)
    # average_statistics() does it at every record. Given as an argument, torch 2.14 would warn.
    model.broadcast_buffers = False
    return model


def explain(error):
    """Exit code and message for errors of torch that are not bugs here; no message for others."""
    text = str(error)
    first = text.partition("\n")[0]
    full = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
            "unable to find an engine to execute this computation")
    if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in full):
        return 2, (f"the GPU is out of memory ({first}); use a smaller --batch-size or more GPUs, "
                   "leave --amp at auto, and in stage 2 use --classifier balanced")
    # A worker was killed, or could not create a file in shared memory.
    if "DataLoader worker (pid" in text or "</torch_" in text:
        return 2, (f"a process that decodes images failed ({first}); often shared memory is too "
                   "small: start docker with --ipc=host or --shm-size=8g, or use --workers 0")
    if isinstance(error, dist.DistError) or "gloo" in text or "EADDRINUSE" in text:
        # NCCL's message ends with the cause. If a process was lost, the same command continues; if
        # a port is taken or the network is set up wrongly, it would fail again.
        cause = text.partition("Last error:")[2].strip().partition("\n")[0] or first
        lost = any(words in text for words in ("by peer", "Broken pipe", "remote process exited"))
        message = f"the connection to another process failed ({cause})"
        return 1, f"{message}; {data.AGAIN}" if lost else message
    return 1, None


run = partial(data.run, explain=explain)  # calls main(); errors that are not bugs are one line


@torch.no_grad()
def gather(tensor, dim=0):
    """The tensors of all ranks, joined along dim; without torchrun the tensor itself."""
    if not dist.is_initialized():
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts, dim)


class _GatherQueries(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return gather(z, dim=1)

    @staticmethod
    def backward(ctx, gradient):  # [E, N, D]; the sum over ranks, as the loss of each depends on z
        sent = torch.stack(gradient.chunk(dist.get_world_size(), dim=1))  # [ranks, E, B, D]
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        return received.sum(0)


def gather_queries(z):
    """The queries of all ranks [E, N, D], with gradient; this rank's are z [E, B, D]."""
    return _GatherQueries.apply(z) if dist.is_initialized() else z


@torch.no_grad()
def average_statistics(encoder):
    """Replace the running statistics of BatchNorm, which stage 2 may use, by their mean."""
    if dist.is_initialized():
        statistics = [buffer for buffer in encoder.buffers() if buffer.is_floating_point()]
        means = gather(torch.cat(statistics)[None]).mean(0)
        torch._foreach_copy_(statistics, means.split([len(part) for part in statistics]))


class ShuffledBatch:
    """Which images of the global batch this rank embeds in a step, and the step's random numbers.

    As queries it embeds the images at `positions`, as keys those at `key_positions`, which are
    randomly chosen (shuffle BN). Everything depends only on (seed, step). A single process embeds
    all images and shuffles nothing.
    """

    def __init__(self, args, step, positions, device):
        self.seed, self.step, self.device = args.seed, step, device
        self.batch_size = args.batch_size
        self.positions = self.key_positions = positions
        self.place_of_key = None  # [N] where the key of each image is among the keys of all ranks
        if dist.is_initialized():
            world, seed = dist.get_world_size(), seed_from(args.seed, step, data.SHUFFLE)
            order = torch.randperm(args.batch_size, generator=torch.Generator().manual_seed(seed))
            # Each rank's keys are sorted by image: images arrive sorted by sender, thus by image.
            order = np.sort(order.numpy().reshape(world, -1)).flatten()  # [N] the image of each key
            both = np.stack([order, order.argsort()])
            # How many images come from and go to each rank: the host knows it without the GPU.
            peers = both[:, positions] * world // args.batch_size
            self.counts = [np.bincount(row, minlength=world).tolist() for row in peers]
            both = torch.tensor(both)
            both = both.pin_memory() if device.type == "cuda" else both
            order, self.place_of_key = both.to(device, non_blocking=True)
            self.key_positions = order[positions]

    def draws(self, keys=False):
        """The random numbers of this rank's query views, or of its key views."""
        positions = self.key_positions if keys else self.positions
        seed = seed_from(self.seed, self.step, data.KEY if keys else data.QUERY)
        return Draws(seed, self.batch_size, positions, self.device)

    def shuffle(self, images):
        """Exchange this rank's uint8 images [B, C, H, W] for those whose keys it embeds."""
        if self.place_of_key is None:
            return images
        sent = images[self.place_of_key[self.positions].argsort()].contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, *self.counts)
        return received

    def gather_unshuffled(self, keys):
        """Gather the keys [E, B, D] of all ranks, in the order of the images: [E, N, D]."""
        return keys if self.place_of_key is None else gather(keys, dim=1)[:, self.place_of_key]


def lower_batch_size(args, count):
    """Lower a batch size above the training set's size to the largest power of two that fits."""
    if args.batch_size > count:
        fitting = 2 ** (count.bit_length() - 1)
        data.say(f"--batch-size {args.batch_size} is lowered to {fitting}: the training set has "
                 f"{count} images")
        args.batch_size = fitting


# --------------------------------------------------------------------------------- saving, resuming


class Stop:
    """Ctrl-C and SIGTERM end a run at its next record, after saving; a second Ctrl-C at once."""

    def __init__(self, step, device):
        self.asked, self.device = False, device
        self.step, self.time = step, time.monotonic()  # when asked_anywhere() was last called
        self.slow_steps = True  # until the first steps have been timed
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as in the background of a script
                signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        data.say(f"{data.CLEAR}saving a checkpoint at the next record; Ctrl-C: stop at once")

    def asked_anywhere(self, step):
        """Whether a rank was asked to stop. All ranks call this together, after the same step."""
        now = time.monotonic()
        asked, seconds = self.asked, (now - self.time) / (step - self.step)
        self.step, self.time = step, now
        if dist.is_initialized():
            mine = torch.tensor([[asked, seconds]], device=self.device)
            asked, seconds = gather(mine).amax(0).tolist()
        self.slow_steps = seconds > 1  # torchrun kills 30 seconds after SIGTERM: look at every step
        return bool(asked)


class Recorder:
    """Follows a run: its progress line, log.jsonl, checkpoints, and its end when asked to stop."""

    def __init__(self, path, args, state, batches, device):
        self.path, self.args, self.state, self.device = path, args, state, device
        self.per_epoch, self.steps = batches.per_epoch, batches.steps.stop
        self.done = self.saved = batches.steps.start  # steps, so far and in the last checkpoint
        self.log = None  # of rank 0
        if data.RANK == 0:
            self.log = open_log(path.with_name("log.jsonl"), args, self.done)
        precision = "bfloat16" if args.amp == "bf16" else "float32"
        world = dist.get_world_size() if dist.is_initialized() else 1
        data.say(f"{args.arch} on {args.dataset}, {len(batches.labels)} images, from step "
                 f"{self.done} of {self.steps}, {self.per_epoch} per epoch; {world} x "
                 f"{device.type}, {precision}, {args.workers} workers each")
        if device.type == "cpu" and args.dataset == "imagefolder":
            data.say("the defaults of imagefolder take hours on a CPU, those of small_imagefolder "
                     "minutes")
        self.sums = self.count = 0  # since the last record: of the losses, and of steps
        self.last_record, self.progress = "", Progress(self.steps, self.done)
        self.recorded_at = self.saved_at = time.monotonic()
        self.stop = Stop(self.done, device)

    def read(self, loader):
        """(step, images, labels) of the remaining steps; if reading fails, it saves first."""
        try:
            for step, (images, labels) in enumerate(loader, self.done):
                images = images.to(self.device, non_blocking=True)
                yield step, images, labels.to(self.device, non_blocking=True)
        except Exception:  # of the loader: those of the loop that reads from here do not pass here
            if self.done > self.saved:
                self.save()
            raise

    def count_step(self, losses, lr):
        """Count a step. Every LOG_EVERY steps and at the end of an epoch, write a record."""
        self.sums, self.count = self.sums + torch.stack([*losses.values()]).detach(), self.count + 1
        self.done += 1
        is_record = self.done % self.per_epoch % LOG_EVERY == 0
        is_look = is_record or self.stop.slow_steps
        stopping = is_look and self.stop.asked_anywhere(self.done)
        if is_record or stopping:
            self.record(losses, lr, stopping)
        self.progress.show(self.done, f"{self.epoch()}{self.last_record}")
        if stopping and self.done < self.steps:
            raise KeyboardInterrupt(f"saved at {self.epoch()}; the same command continues")

    def epoch(self):
        return f"epoch {self.done / self.per_epoch:.{int(self.per_epoch > 1)}f}/{self.args.epochs}"

    def record(self, losses, lr, stopping):
        """Write the mean losses since the last record, and sometimes a checkpoint."""
        means = gather((self.sums / self.count)[None]).mean(0)
        check_finite([means, *self.state["encoder"].parameters()], self.done, lr)
        average_statistics(self.state["encoder"])
        seconds = time.monotonic() - self.recorded_at
        rate = round(self.count * self.args.batch_size / seconds, 1)
        self.sums = self.count = 0
        if self.log:
            record = dict(epoch=math.ceil(self.done / self.per_epoch), step=self.done)
            record |= dict(zip(losses, means.tolist()), lr=lr, images_per_second=rate)
            print(json.dumps(record), file=self.log)
            terms = [f"{name} {record[name]:.4g}" for name in losses]
            self.last_record = "  ".join(["", *terms, f"{rate:.0f} images/s"])
            # At the end of an epoch a checkpoint is written if the last one is a minute old.
            is_end, minutes = self.done % self.per_epoch == 0, self.args.save_minutes
            old = time.monotonic() - self.saved_at >= 60 * (min(1, minutes) if is_end else minutes)
            if self.done == self.steps or stopping or old:
                os.fsync(self.log.fileno())  # first: it has every record up to the checkpoint
                self.save()
        self.recorded_at = time.monotonic()  # writing is no part of the next record's time

    def save(self):
        parts = {name: part.state_dict() for name, part in self.state.items()}
        save(self.path, dict(stage=STAGE, args=to_json(self.args), step=self.done, **parts))
        self.saved, self.saved_at = self.done, time.monotonic()


def check_finite(tensors, step, lr):
    """Raise BadInput if training has diverged, so that such weights are never saved."""
    if not torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all():  # one launch
        raise BadInput(f"loss or weights are not finite at step {step}, lr {lr:.3g}: try a smaller "
                       "--lr with another --output; the last checkpoint was left unchanged")


def lock_output(output):
    """Lock a directory for this run; BadInput if another run has it. Keep the file that it returns.

    The system ends the lock with the process. Where a file system has no locks, there is none.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = open(output / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise BadInput(f"another run is writing to {output}: wait for its end, or choose another "
                       "--output") from None
    except OSError:
        pass
    return file


def save(path, content):
    """Write a string or a dict to a new file beside `path`, which then replaces `path`."""
    beside = path.with_name(f"{path.name}.new{data.RANK or ''}")
    try:
        with open(beside, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        # torch.save raises a RuntimeError in the context of what happened, say a full disk.
        while not isinstance(error, OSError) and error.__context__:
            error = error.__context__
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        unwritten = f"{path} cannot be written ({reason}); an existing file was left unchanged"
        raise BadInput(unwritten) from None


def load(path, stage, script="train.py"):
    """Read a dict that save() wrote; BadInput if it is missing, broken or of another stage."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["stage"] != stage:
            raise ValueError
    except Exception as error:  # torch.load raises many kinds of errors on other files
        if getattr(error, "filename", None):  # the file could not be opened
            raise BadInput(f"{path} cannot be read ({error.strerror}): run {script} first, or give "
                           "a run's directory as --output") from None
        raise BadInput(f"{path} is not a file of {stage}, or is damaged: give another file, or "
                       "move it away to start anew") from None
    return content


def to_json(args):
    """Arguments as a dict that JSON and torch.load(weights_only=True) can hold."""
    return json.loads(json.dumps(vars(args), default=str))


# Arguments that may change when a run continues: of both stages, then of one of them.
MAY_CHANGE = {"output", "data_root", "index_dir", "workers", "device", "amp", "save_minutes"}
MAY_CHANGE |= {"images", "views", "checkpoint", "plots", "export", "predict", "summary", "fit_on"}
MAY_CHANGE |= {"weights"}  # eval.py looks at the hash of stage 1's weights itself


def comparable(settings, ignored=MAY_CHANGE):
    """A run's arguments without the ignored ones; those in a nested dict become "name key"."""
    flat = {}
    for name in settings.keys() - ignored:
        inner = settings[name] if isinstance(settings[name], dict) else {"": settings[name]}
        flat |= {f"{name} {key}".strip(): inner[key] for key in inner.keys() - ignored}
    return flat


OTHER_IMAGES = ("train again with another --output; or put val and test images into folders of "
                "their own, val/ and test/, and fit a classifier on the features as they are: "
                "eval.py --checkpoint RUN/checkpoint.pth --output NEW")


def difference(before, now):
    """What to print of two values: what came (+) and went (-) between lists of words, else both."""
    if isinstance(before, list) and isinstance(now, list) and {*map(type, before + now)} == {str}:
        came = [f"+ {word}" for word in now if word not in before]
        went = [f"- {word}" for word in before if word not in now]
        more = f" and {len(came + went) - 10} more" if len(came + went) > 10 else ""
        return ", ".join((came + went)[:10]) + more or "another order"
    return f"was {before!s:.70}, now {now!s:.70}"


def refuse_differences(path, before, args):
    """BadInput if the arguments of the run that wrote `path` differ from this run's.

    Results of stage 2 do not bind it to the step that stage 1 had then, if it has gone on since.
    """
    before, now = comparable(before), comparable(to_json(args))
    if before.get("stage1 step", 0) < now.get("stage1 step", 0):
        before["stage1 step"] = now["stage1 step"]
    differ = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if "steps" in differ and "epochs" in differ:
        differ.remove("epochs")  # which follow from the steps
    if differ:
        pairs = {name: difference(before.get(name), now.get(name)) for name in differ}
        differences = "; ".join(f"{name} {text}" for name, text in pairs.items())
        checkpoint = getattr(args, "checkpoint", None)  # of eval.py
        choose = f"--checkpoint {checkpoint} with another" if checkpoint else "another"
        advice = f"choose {choose} --output"
        if "training_images" in differ and not checkpoint:
            advice = OTHER_IMAGES
        raise BadInput(f"{path} belongs to another run ({differences}); {advice}")


def resume(path, stage, args, device):
    """The checkpoint at `path`, or None; BadInput if its arguments differ from this run's."""
    saved = load(path, stage) if path.exists() else None
    step = saved.get("step", saved.get("epoch")) if saved else -1
    if len(gather(torch.tensor([step], device=device)).unique()) > 1:
        raise BadInput(f"processes find different files at {path}: all hosts must share --output")
    if saved:
        refuse_differences(path, saved["args"], args)
    log = path.with_name("log.jsonl")
    if stage == STAGE and not saved and log.exists():  # a run that has not saved yet
        with contextlib.suppress(ValueError, KeyError, IndexError):
            before = json.loads(log.read_text().splitlines()[0])["arguments"]
            refuse_differences(log, before, args)
    return saved


def open_log(path, args, step):
    """Open log.jsonl for writing; a run that continues keeps the records up to its checkpoint."""
    lines = []
    with contextlib.suppress(OSError, ValueError):  # no file, or its last line is incomplete
        for line in path.read_text().splitlines(keepends=True):
            # The header has no step: it is kept unless the run starts at step 0.
            lines += [line] if json.loads(line).get("step", 1) <= step else []
    versions = {m.__name__: m.__version__ for m in (torch, torchvision)}
    header = dict(command=shlex.join(sys.argv), versions=versions, arguments=to_json(args))
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, "".join(lines) or json.dumps(header) + "\n")
    return open(path, "a", buffering=1)


# ----------------------------------------------------------------------------------------- settings

FASHION, CIFAR10, CIFAR100 = ("fashion_mnist_lt",), ("cifar10_lt",), ("cifar100_lt",)
PLACES, INATURALIST, FOLDER = ("places_lt",), ("inaturalist18",), ("imagefolder",)
CIFAR = CIFAR10 + CIFAR100
SMALL = (*FASHION, *CIFAR, "small_imagefolder")  # their own values come after those of SMALL

# One row for each setting, which is a flag: its name, its value for ImageNet-LT, its limits or
# choices, its meaning, and the data sets that differ, of which the last one counts. The values for
# ImageNet-LT are the paper's, or its published code's where the paper gives none; `penalty` is
# ours. So are all values for other data sets: those of FASHION and CIFAR were chosen on held-out
# images (tests/RESULTS.md), the others are not tuned. A tuple takes as many values as the default
# has, a list takes one or more.
VIEWS = [
    ("mean", (0.485, 0.456, 0.406), (0, 1), "mean of red, green and blue, from 0 to 1",
     {FASHION: (0.286,) * 3, CIFAR10: (0.491, 0.482, 0.447), CIFAR100: (0.507, 0.487, 0.441)}),
    ("std", (0.229, 0.224, 0.225), (0.001, 1), "standard deviation of red, green and blue",
     {FASHION: (0.353,) * 3, CIFAR10: (0.247, 0.243, 0.262), CIFAR100: (0.267, 0.256, 0.276)}),
    ("view_size", 224, (8, 4096), "side of a view in pixels; paper: 224", {SMALL: 32, FASHION: 20}),
    ("crop_scale", (0.08, 1.0), (0.001, 1), "smallest and largest fraction of the image in a view",
     {SMALL: (0.3, 1.0)}),
    ("grey_p", 0.2, (0, 1), "probability that a query view or a patch becomes grey", {}),
    ("blur_p", 0.5, (0, 1), "probability that a query view or a patch is blurred", {SMALL: 0.0}),
    ("query_jitter", (0.4, 0.4, 0.4, 0.1), (0, 1), "brightness, contrast, saturation, hue jitter",
     {FASHION: (0.2, 0.2, 0.2, 0.1)}),
    ("query_jitter_p", 0.8, (0, 1), "probability that a query view or a patch is jittered", {}),
    ("key_jitter", (0.4, 0.4, 0.4, 0.0), (0, 1), "the same for key views, which are all jittered",
     {FASHION: (0.2, 0.2, 0.2, 0.0)}),
    ("patches", 5, (1, 1024), "number L of patches of a view; paper: 5", {SMALL: 2, FASHION: 1}),
    ("patch_size", 64, (4, 4096), "side of a patch in pixels; paper: 64", {SMALL: 16, FASHION: 8}),
    ("patch_scale", (0.05, 0.6), (0.001, 1), "smallest and largest fraction of the view", {}),
]
STAGE1 = [
    ("loss", "dscl", ("dscl", "scl", *CLASSIFIERS), "dscl, or a baseline: scl has equal weights, "
     "ce is cross-entropy, la is cross-entropy with logit adjustment", {}),
    ("arch", "resnet50", ARCHS, "backbone",
     {PLACES: "resnet152", FOLDER: "resnet18", SMALL: "resnet_small", FASHION: "resnet_tiny"}),
    ("pretrained", "none", None, "weights to start from: a file, torchvision's name, or none",
     {PLACES: "IMAGENET1K_V1"}),
    ("experts", 1, (1, 16), "experts that share the first stages; their logits are averaged", {}),
    ("epochs", 200, (0, 1e6), "passes over the training set; 0: --steps says how many",
     {PLACES: 30, INATURALIST: 100, FOLDER: 0, SMALL: 0, CIFAR: 200, FASHION: 120}),
    ("steps", 2000, (1, 1e7), "steps if --epochs is 0; ce and la have twice as many",
     {FOLDER: 6000}),
    ("warmup", 0.05, (0, 1), "fraction of the run in which the learning rate rises",
     {PLACES: 0.0667, FOLDER: 0.025, SMALL: 0.025, FASHION: 0.0417}),
    ("batch_size", 256, (1, 1e6), "images in a step of all processes", {FOLDER: 128, SMALL: 128}),
    ("lr", 0.1, (1e-8, 1e3), "peak learning rate, for a batch of 256", {PLACES: 0.05, SMALL: 0.6}),
    ("weight_decay", 5e-4, (0, 1), "weight decay of SGD", {}),
    ("queue_size", 65536, (0, 1e7), "keys K in the queue; at most one for each image is useful",
     {PLACES: 32768, FOLDER: 1024, SMALL: 256, CIFAR: 4096}),
    ("momentum_encoder", 0.999, (0, 1), "momentum m of the key encoder's moving average",
     {FOLDER: 0.99, SMALL: 0.99, FASHION: 0.98}),
    ("temperature", 0.07, (1e-3, 1e3), "temperature tau of both losses; paper: 0.07", {}),
    ("alpha", 0.1, (0, 1), "weight of the anchor's own key in DSCL; paper: 0.1", {}),
    ("pbsd_weight", 1.5, (0, 1e3), "weight lambda of PBSD; 0 turns it off; paper: 1.5",
     {SMALL: 0.3, CIFAR: 1.0}),
]
STAGE2 = [
    ("classifier", "balanced", ("adjusted", "balanced"),
     "balanced: SGD with class-balanced sampling, as in the paper; adjusted: logistic regression "
     "and the class prior, no learning rate", {FOLDER: "adjusted", SMALL: "adjusted"}),
    ("prior", "balanced", ("balanced", "training"),
     "predict as if all classes were equally frequent, or as frequent as in training", {}),
    ("fit_on", "train", ("train", "all"), "all: when the accuracy has been measured, fit adjusted "
     "on all splits, for predictions", {}),
    ("penalty", 0.0, (0, 1e6), "of the squared weights, for adjusted; 0: 10 / training images. The "
     "flags below are for balanced", {}),
    ("epochs", 40, (0, 1e6),
     "passes over the training set; 0 evaluates the classifier of --loss ce or la", {SMALL: 20}),
    ("batch_size", 2048, (1, 1e6), "images in a step of all processes", {FOLDER: 256, SMALL: 256}),
    ("lr", 10.0, (1e-8, 1e4), "learning rate of SGD, not scaled with the batch size", {}),
    ("weight_decay", 0.0, (0, 1), "weight decay of SGD", {SMALL: 5e-4, CIFAR: 1e-4}),
    ("milestones", [0.5, 0.75], (0, 1), "parts of the run after which lr falls to a tenth", {}),
    ("augment", True, None, "train on random views, not on whole images", {SMALL: False}),
    ("bn", "train", ("train", "eval"), "BatchNorm by the batch, or by stage 1's statistics (eval)",
     {FOLDER: "eval", SMALL: "eval"}),
]


def values_for(dataset, rows):
    """The settings of a table for a data set: {name: value}."""
    values = {}
    for name, value, _, _, exceptions in rows:
        for datasets, other in exceptions.items():
            value = other if dataset in datasets else value
        values[name] = value
    return values


def add_settings(parser, title, dataset, rows):
    """Add a flag for every row of a table, under a title in --help."""
    group, values = parser.add_argument_group(title), values_for(dataset, rows)
    for name, _, limits, text, _ in rows:
        default = values[name]
        is_sequence = isinstance(default, (tuple, list))
        several = default if is_sequence else [default]
        options = dict(help=f"{text} (default: {' '.join(map(str, several))})")
        if isinstance(default, bool):
            options |= dict(action=argparse.BooleanOptionalAction)
        elif isinstance(default, str):
            options |= dict(choices=limits, metavar=None if limits else "NAME")
        else:
            kind = type(several[0])
            options |= dict(type=kind, metavar={int: "N", float: "X"}.get(kind, "DIR"))
        if is_sequence:
            options |= dict(nargs="+" if isinstance(default, list) else len(default))
        group.add_argument("--" + name.replace("_", "-"), default=default, **options)


def parse_within_limits(parser, rows):
    """The parsed arguments; BadInput if a number is outside the limits of its row."""
    args = parser.parse_args()
    for name, default, limits, *_ in rows:
        values, flag = getattr(args, name), "--" + name.replace("_", "-")
        values = values if isinstance(values, (tuple, list)) else [values]
        for value in values if limits and not isinstance(values[0], str) else ():
            if not limits[0] <= value <= limits[1]:
                low, high = limits
                parser.error(f"argument {flag}: must be from {low:g} to {high:g}, got {value:g}")
        if isinstance(default, tuple) and len(values) == 2 and values[0] > values[1]:
            parser.error(f"argument {flag}: the smaller value must come first")
    return args


def cores():
    """Cores for the workers of each process of this host; one is left to the process itself."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # the quota of a container; "max" if it has none
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        usable = min(usable, int(quota) // int(period))
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)


def run_settings(dataset):
    """The table of settings that are not part of the method; both stages have these."""
    workers = 0 if data.cropped_on_device(dataset) else cores()
    return [
        ("output", Path("runs") / dataset, None, "directory for all output of the run", {}),
        ("device", "auto", ("auto", "cpu", "cuda"), "auto: a GPU if there is one", {}),
        ("amp", "auto", ("auto", "off"), "auto: bfloat16 where the hardware has it", {}),
        ("workers", workers, (0, 512), "processes that decode images, for each GPU", {}),
        ("seed", 0, (0, 2**63 - 1), "seed of all random numbers", {}),
    ]


def parse_args():
    parser = data.Parser(description=__doc__)
    dataset = data.add_data_flags(parser)
    text = "draw query views, boxes, key views and patches to this PNG file instead of training"
    parser.add_argument("--views", type=Path, metavar="FILE", help=text)
    text = "minutes between checkpoints; at the end of an epoch at least one is enough"
    run_rows = run_settings(dataset) + [("save_minutes", 30.0, (0, 1e6), text, {})]
    for title, rows in (("run", run_rows), ("training", STAGE1), ("views", VIEWS)):
        add_settings(parser, title, dataset, rows)
    args = parse_within_limits(parser, run_rows + STAGE1 + VIEWS)
    defaults = values_for(dataset, STAGE1)
    if args.loss != "dscl" and args.alpha != defaults["alpha"]:
        parser.error(f"--alpha: --loss {args.loss} does not use it")
    if args.epochs and args.steps != defaults["steps"]:
        parser.error(f"--steps {args.steps}: --epochs is {args.epochs}; --epochs 0 uses --steps")
    sizes = [args.view_size, args.patch_size]
    if args.loss in CLASSIFIERS or not args.pbsd_weight:
        del sizes[1]  # no patches
    elif not args.queue_size:
        parser.error("--queue-size 0: PBSD needs a queue; --pbsd-weight 0 turns it off")
    for name, side, least in zip(("view", "patch"), sizes, smallest_sides(args.arch)):
        if side < least:
            parser.error(f"--{name}-size {side}: {args.arch} needs at least {least} pixels")
    return args


def draw_views(path, dataset, args, count=6):
    """Draw what the networks see of some images, a row each.

    These are the query view, the boxes in it, the key view and the patches; of a baseline, six
    random views.
    """
    indices = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    images = dataset.views(indices, indices, args, 2)
    draws = [Draws(args.seed + n, len(indices), slice(None), "cpu") for n in range(6)]
    side, is_baseline = max(args.view_size, 128), args.loss in CLASSIFIERS
    if is_baseline:  # it sees query views alone
        drawn = [data.query_views(images[0], stream, args)[0] for stream in draws]
    else:
        view, boxes, patches = data.query_views(images[0], draws[0], args, args.patches)
        drawn = view, view, data.key_view(images[-1], draws[1], args), *patches
    mean, std = (torch.tensor(values)[:, None, None] for values in (args.mean, args.std))
    columns = [F.interpolate((column * std + mean).clamp(0, 1), (side, side)) for column in drawn]
    colors = [("red", "lime", "cyan", "yellow", "magenta")[n % 5] for n in range(args.patches)]
    for n, image in enumerate(() if is_baseline else columns[1]):
        shown = boxes[:, n] * side / args.view_size
        image.copy_(draw_bounding_boxes(image, shown, colors=colors, width=2))
    cells = torch.stack(columns, dim=1).flatten(0, 1)
    save_image(cells, path, format="png", nrow=len(columns), pad_value=1)


if __name__ == "__main__":
    run(main)
