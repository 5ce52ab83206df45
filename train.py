r"""Stage 1 of DSCL + PBSD: train the representation. Stage 2, eval.py, fits a classifier on it.

    python train.py                                                # the default, on a laptop
    python train.py --loss scl --pbsd-weight 0                     # the SCL baseline
    torchrun --nproc_per_node=8 train.py --dataset imagenet_lt --data-root DIR       # 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \
        --rdzv-id=1 train.py --dataset imagenet_lt --data-root DIR     # on each of two hosts

It writes OUTPUT/checkpoint.pth and OUTPUT/log.jsonl. After an interruption the same command
continues from them.
"""

import contextlib
import copy
import json
import math
import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel

import data
from data import BadInput, Batches, Draws, Parser, Progress, load_batches, load_dataset, seed_from
from losses import dscl_loss, pbsd_loss
from models import ARCHS, Encoder, Queue, load_pretrained, moving_average, smallest_sides

STAGE = "stage 1 of DSCL + PBSD"
CLASSIFIERS = ("ce", "la")  # the baselines of --loss that train a classifier
LOG_EVERY = 10  # steps; there is a record at the end of every epoch as well

# ----------------------------------------------------------------------------------------- the step


def dscl_pbsd_step(model, key_encoder, queue, images, labels, batch, args):
    """DSCL + PBSD on one batch: a dict of the total `loss`, of `dscl` and, with patches, of `pbsd`.

    If args.alpha is None (--loss scl), `dscl` is the plain SCL.
    This rank has B images, all ranks together have N. `images` (uint8) is [2, B, C, H, W]: two
    random crops of each image, one for each view. If the data set is held in memory, it is
    [1, B, C, H, W]: the whole images, from which both views are cropped here. labels is [B].
    `batch` (ShuffledBatch) knows which images of the global batch are this rank's, and has the
    random numbers of this step.
    The contrast set is the other queries, all keys and the queue, as in the published code. But the
    published code takes the queries and keys of the local rank, and we take those of all ranks.
    """
    # view: the query view of x_i, [B, 3, V, V].
    # boxes: L boxes in it, B_i[j] in the paper, [L, B, 4].
    # patches: the view inside these boxes, before its colours are changed, [L, B, 3, S, S]. Each is
    # flipped, changed in colour and blurred independently. Without PBSD boxes and patches are None.
    view, boxes, patches = data.query_views(images[0], batch.draws(), args)
    # The key view is of B images as well, but of a random permutation of the images of all ranks:
    # otherwise the BatchNorm statistics could leak which key matches a query (shuffle BN).
    shuffled = batch.shuffle(images[-1])  # the second crops, or the whole images
    key_view = data.key_view(shuffled, batch.draws(keys=True), args)

    # All embeddings are float32 vectors of length 1 and D numbers, from each of the E experts:
    # z: queries z_i [E, B, D]; c: teachers c_i[j], and s: students s_i[j], both [E, L, B, D];
    # all_keys: keys z_i+ of all ranks in the original order [E, N, D]. Teachers and keys are
    # constants: no gradient flows into them.
    with autocast(view.device, args.amp):
        z, c, s = model(view, boxes, patches)
        with torch.no_grad():
            moving_average(key_encoder, model, args.momentum_encoder)
            shuffled_keys, _, _ = key_encoder(key_view)
            all_keys = batch.gather_unshuffled(shuffled_keys)

    # Row i of all_queries, all_keys and all_labels belongs to image i of the global batch. Every
    # rank computes DSCL for all N anchors, with gradient for its own queries; gather_queries scales
    # it so that DDP's mean over ranks is the gradient of the whole loss. PBSD is of its B images.
    all_queries, all_labels = gather_queries(z, batch.rank_rows), gather(labels)
    keys, tau = all_keys[:, batch.rank_rows], args.temperature
    dscl, pbsd = [], []
    for e in range(args.experts):  # each expert has its own embeddings, queue and losses
        M = queue.keys[e]
        of_batch, of_queue = (all_queries[e], all_keys[e], all_labels), (M, queue.labels)
        dscl.append(dscl_loss(*of_batch, *of_queue, alpha=args.alpha, temperature=tau))
        if args.pbsd_weight:
            pbsd.append(pbsd_loss(c[e], s[e], keys[e], M, temperature=tau))
    # It is safe to change the queue before backward(), which reads no tensor of the queue.
    queue.put(all_keys, all_labels)
    dscl = torch.stack(dscl).mean()
    if not pbsd:
        return dict(loss=dscl, dscl=dscl)
    pbsd = torch.stack(pbsd).mean()
    return dict(loss=dscl + args.pbsd_weight * pbsd, dscl=dscl, pbsd=pbsd)


def cross_entropy_step(model, key_encoder, queue, images, labels, batch, args, log_prior):
    """The baselines ce and la on one batch: linear classifiers on the query view; no key, no queue.

    log_prior [classes] is added to the logits, in training only. For logit adjustment it is the
    logarithm of the class frequencies (Menon et al., 2021), for plain cross-entropy it is 0.
    """
    view, _, _ = data.query_views(images[0], batch.draws(), args)
    with autocast(view.device, args.amp):
        logits, _, _ = model(view)  # [E, B, classes]
    losses = [F.cross_entropy(of_expert + log_prior, labels) for of_expert in logits]
    return dict(loss=torch.stack(losses).mean())


def learning_rate(step, per_epoch, args):
    """The rate at a step, from 0: linear warm-up, then cosine to 0; peak scaled by the batch."""
    peak = args.lr * args.batch_size / 256
    steps = args.epochs * per_epoch
    warmup = round(args.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak / 2 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def main():
    args = parse_args()
    rank, world, device = start(args)
    sets = load_dataset(args.dataset, args.data_root, args.index_dir, args.imbalance)
    args.images = {split: len(part) for split, part in sets.items()}  # resume() compares them
    train_set, path = sets["train"], args.output / "checkpoint.pth"
    fit_batch(args, len(train_set))
    saved = resume(path, STAGE, args, device)

    torch.manual_seed(args.seed)  # every process starts with the same weights
    counts = train_set.labels.bincount().to(device)
    classes = len(counts) if args.loss in CLASSIFIERS else None
    encoder = Encoder(args.arch, args.experts, classes)
    if args.pretrained != "none" and not saved:
        try:
            load_pretrained(encoder, args.arch, args.pretrained)
        except ValueError as error:
            raise BadInput(f"--pretrained {args.pretrained}: {error}") from None
    encoder = encoder.to(device, memory_format=torch.channels_last)
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    queue = Queue(args.queue_size, args.experts).to(device)
    optimizer = torch.optim.SGD(
        encoder.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True
    )
    # The state that a checkpoint holds. The random numbers of a step follow from (seed, step).
    state = dict(encoder=encoder, key_encoder=key_encoder, queue=queue, optimizer=optimizer)
    first = saved["step"] if saved else 0
    if saved:
        for name, part in state.items():
            part.load_state_dict(saved.pop(name))

    train_step, crops = dscl_pbsd_step, 2
    if classes:
        frequencies = counts / counts.sum()
        log_prior = frequencies.log() if args.loss == "la" else torch.zeros_like(frequencies)
        train_step, crops = partial(cross_entropy_step, log_prior=log_prior), 1
    ranks = dict(seed=args.seed, start=first, rank=rank, world=world)
    batches = Batches(train_set.labels, args.batch_size, args.epochs, **ranks)
    loader = load_batches(train_set, batches, args, crops, args.workers, device)
    per_epoch, steps = batches.per_epoch, args.epochs * batches.per_epoch
    model = encoder
    if dist.is_initialized():
        model = DistributedDataParallel(encoder, gradient_as_bucket_view=True, static_graph=True)
        # Do not broadcast BatchNorm's buffers: they are averaged at every record. This is set here
        # because since torch 2.14 the argument of the constructor gives a warning.
        model.broadcast_buffers = False
    if rank == 0:
        log, progress = open_log(args.output / "log.jsonl", args, first), Progress(steps, first)
        print(
            f"{args.arch} on {args.dataset}, {len(train_set)} images, from step {first} of "
            f"{steps}, {per_epoch} per epoch; {world} x {device.type}, "
            f"{'bfloat16' if args.amp == 'bf16' else 'float32'}", file=sys.stderr,
        )

    sums = summed = 0  # since the last record: sums of the loss and its terms, and steps
    logged_at = saved_at = time.monotonic()
    for step, (images, labels) in enumerate(loader, first + 1):  # step - 1 steps are done
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step - 1, per_epoch, args)
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        batch = ShuffledBatch(args, step - 1, batches.rows, device)
        values = train_step(model, key_encoder, queue, images, labels, batch, args)
        values["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        sums, summed = sums + torch.stack(list(values.values())).detach(), summed + 1
        if step % per_epoch % LOG_EVERY:  # the last step of an epoch has remainder 0, too
            continue

        means = gather((sums / summed)[None]).mean(0)
        check_finite([means, *encoder.parameters()], step, lr)
        average_statistics(encoder)
        if rank == 0:
            now = time.monotonic()
            rate, logged_at = round(summed * args.batch_size / (now - logged_at), 1), now
            record = dict(epoch=math.ceil(step / per_epoch), step=step)
            record |= dict(zip(values, means.tolist()), lr=lr, images_per_second=rate)
            print(json.dumps(record), file=log)
            terms = "  ".join(f"{name} {record[name]:.4g}" for name in values)
            epoch = f"epoch {step / per_epoch:.{int(per_epoch > 1)}f}/{args.epochs}"
            progress.show(step, f"{epoch}  {terms}  {rate:.0f} images/s")
            due = min(1, args.save_minutes) if step % per_epoch == 0 else args.save_minutes
            if step == steps or now - saved_at >= 60 * due:
                os.fsync(log.fileno())  # on disk first: it has every record up to the checkpoint
                parts = {name: part.state_dict() for name, part in state.items()}
                save(path, dict(stage=STAGE, args=to_json(args), step=step, **parts))
                logged_at = saved_at = time.monotonic()
        sums = summed = 0
    if rank == 0:
        print(f"done: {path}; stage 2: python eval.py --output {args.output}", file=sys.stderr)


# ---------------------------------------------------------------------------------------- processes


def start(args):
    """Join torchrun's process group, if there is one; returns (rank, world size, device).

    Sets args.amp to "bf16" or "off".
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch finds no usable GPU; use --device cpu")
    if args.device != "cpu" and torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > gpus:
            raise BadInput(f"{here} processes, but {gpus} GPUs on this host: start one per GPU")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes are the same in every step
        able = torch.cuda.get_device_capability(device) >= (8, 0)
    else:  # without these instructions bfloat16 is slower than float32; torch < 2.6 cannot tell
        device, can = torch.device("cpu"), getattr(torch.cpu, "get_capabilities", dict)()
        able = can.get("avx512_bf16") or can.get("amx_bf16")
    args.amp = "bf16" if args.amp == "auto" and able else "off"
    if "RANK" in os.environ:
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    return data.RANK, world, device


def autocast(device, amp):
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def explain(error):
    """Exit code and message for errors of torch that are not bugs here; no message for others."""
    text = str(error)
    first = text.partition("\n")[0]
    full = "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
    if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in full):
        return 2, (
            f"the GPU is out of memory ({first}); use a smaller --batch-size or more GPUs, leave "
            "--amp at auto, and in stage 2 use --classifier balanced"
        )
    # A worker was killed, or could not create a file in shared memory.
    if "DataLoader worker (pid" in text or "</torch_" in text:
        return 2, (
            f"a process that decodes images failed ({first}); often shared memory is too small: "
            "start docker with --ipc=host or --shm-size=8g, or use --workers 0"
        )
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


def gather_queries(z, rank_rows):
    """The queries of all ranks [E, N, D]; this rank's are z [E, B, D], at the rows `rank_rows`.

    Every rank differentiates the loss of all N anchors with respect to its own rows only.
    """
    everyone = gather(z, dim=1)
    world = everyone.shape[1] // z.shape[1]
    # DDP averages gradients over ranks; multiply by world size to get the sum.
    z.register_hook(lambda gradient: gradient * world)
    return torch.cat([everyone[:, : rank_rows.start], z, everyone[:, rank_rows.stop :]], dim=1)


@torch.no_grad()
def average_statistics(encoder):
    """Replace the running statistics of BatchNorm by their mean over the ranks.

    Each rank has those of its own images only. Training does not use them, but stage 2 may.
    """
    if dist.is_initialized():
        statistics = [buffer for buffer in encoder.buffers() if buffer.is_floating_point()]
        means = gather(torch.cat(statistics)[None]).mean(0)
        torch._foreach_copy_(statistics, means.split([len(part) for part in statistics]))


class ShuffledBatch:
    """The images of the global batch of N that this rank embeds in a step, and its random numbers.

    Its queries are those of the rows `rank_rows`, its keys those of other, randomly chosen images
    (shuffle BN). Everything depends only on (seed, step). A single process embeds all images and
    shuffles nothing.
    """

    def __init__(self, args, step, rank_rows, device):
        self.seeds = [seed_from(args.seed, step, stream) for stream in (1, 2, 3)]
        self.rank_rows = self.key_rows = rank_rows
        self.batch_size, self.device, self.order = args.batch_size, device, None
        if dist.is_initialized():
            generator = torch.Generator().manual_seed(self.seeds[0])
            order = torch.randperm(args.batch_size, generator=generator)
            self.order = order.to(device, non_blocking=True)
            self.key_rows = self.order[rank_rows]

    def draws(self, keys=False):
        """The random numbers of this rank's query views, or of its key views."""
        rows = self.key_rows if keys else self.rank_rows
        return Draws(self.seeds[1 + keys], self.batch_size, rows, self.device)

    def shuffle(self, images):
        """Exchange this rank's uint8 images [B, C, H, W] for those whose keys it embeds."""
        return images if self.order is None else gather(images)[self.key_rows]

    def gather_unshuffled(self, keys):
        """Gather the keys [E, B, D] of all ranks, in the order of the images: [E, N, D]."""
        return keys if self.order is None else gather(keys, dim=1)[:, self.order.argsort()]


# --------------------------------------------------------------------------------- saving, resuming


def check_finite(tensors, step, lr):
    """Raise BadInput if training has diverged, so that such weights are never saved."""
    # One launch computes the largest absolute values; it preserves NaN and infinity.
    if not torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all():
        raise BadInput(
            f"loss or weights are not finite at step {step}, lr {lr:.3g}: try a smaller --lr "
            "with another --output; the last checkpoint, if there is one, was left unchanged"
        )


def save(path, content):
    """Write a string or a dict to a new file beside `path`, which then replaces `path`.

    Raises BadInput if that fails; an existing file is then left unchanged.
    """
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter
        with contextlib.suppress(OSError):
            beside.unlink()
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        if not path.parent.is_dir():
            raise BadInput(f"{path.parent} has been deleted with all its files") from None
        raise BadInput(
            f"{path} cannot be written ({reason}); an existing file was left unchanged"
        ) from None


def load(path, stage, script="train.py"):
    """Read a dict that save() wrote; BadInput if it is missing, broken or of another stage."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["stage"] != stage:
            raise ValueError
    except Exception as error:  # torch.load raises many kinds of errors on other files
        if getattr(error, "filename", None):  # the file could not be opened
            raise BadInput(
                f"{path} cannot be read ({error.strerror}): run {script} first, or give a run's "
                "directory as --output"
            ) from None
        raise BadInput(f"{path} is not a file of {stage}: move it to another place") from None
    return content


def to_json(args):
    """Arguments as a dict that JSON and torch.load(weights_only=True) can hold."""
    return json.loads(json.dumps(vars(args), default=str))


# Arguments that may change when a run continues; the last five are eval.py's.
MAY_CHANGE = {"output", "data_root", "index_dir", "workers", "device", "amp", "save_minutes"} | {
    "checkpoint", "plots", "export", "knn", "predict"
}


def flatten(settings, ignored=MAY_CHANGE, prefix=""):
    """A run's arguments without the ignored ones; those in a nested dict become "name key"."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name not in ignored:
            flat |= flatten(value, ignored, f"{prefix}{name} ")
        elif name not in ignored:
            flat[prefix + name] = value
    return flat


def refuse_differences(path, before, args):
    """BadInput if the arguments of the run that wrote `path` differ from this run's."""
    before, now = flatten(before), flatten(to_json(args))
    differ = [
        f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name)
    ]
    if differ:
        differences = "; ".join(differ)
        raise BadInput(f"{path} belongs to another run ({differences}); choose another --output")


def resume(path, stage, args, device):
    """The checkpoint at `path`, or None; BadInput if its arguments differ from this run's."""
    saved = load(path, stage) if path.exists() else None
    step = saved.get("step", saved.get("epoch")) if saved else -1
    if len(gather(torch.tensor([step], device=device)).unique()) > 1:
        raise BadInput(f"processes find different files at {path}: all hosts must share --output")
    if saved:
        refuse_differences(path, saved["args"], args)
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


# ---------------------------------------------------------------------------------------- arguments


def parse_args():
    parser = Parser(__doc__)
    add_run_flags(parser)
    text = "minutes between checkpoints; one minute is enough at the end of an epoch"
    parser.flag("save_minutes", 30.0, (0, 1e6), text)
    parser.begin("training")
    losses = "dscl, or a baseline: scl gives all positives equal weights; ce is "
    losses += "cross-entropy; la is cross-entropy with logit adjustment"
    parser.flag("loss", "dscl", ("dscl", "scl", *CLASSIFIERS), losses)
    parser.settings("stage1", arch=ARCHS)
    parser.begin("views")
    parser.settings("views")
    args = parser.parse_args()
    if args.loss == "scl":
        args.alpha = None  # means 1 / (|P_i| + 1)
    if args.loss in CLASSIFIERS:
        args.queue_size = args.pbsd_weight = 0
    if not args.pbsd_weight:
        args.patches = 0
    view, patch = smallest_sides(args.arch)
    for flag, side, least in (("view", args.view_size, view), ("patch", args.patch_size, patch)):
        if side < least and (flag == "view" or args.patches):
            parser.error(f"--{flag}-size {side}: {args.arch} needs at least {least} pixels")
    return args


def fit_batch(args, count):
    """Lower a batch size above the training set's size to the largest power of two that fits."""
    if args.batch_size > count:
        fitting = 2 ** (count.bit_length() - 1)
        if data.RANK == 0:
            print(f"--batch-size {args.batch_size} is lowered to {fitting}: the training set has "
                  f"{count} images", file=sys.stderr)
        args.batch_size = fitting


def add_run_flags(parser):
    """The flags that both stages have."""
    parser.begin("run")
    default = Path("runs") / parser.dataset
    text = f"directory for all output of the run (default: {default})"
    parser.path("output", "DIR", text, default=default)
    parser.flag("device", "auto", ("auto", "cpu", "cuda"), "auto: a GPU if there is one")
    text = "auto: networks run in bfloat16 if the hardware supports it; losses stay in float32"
    parser.flag("amp", "auto", ("auto", "off"), text)
    parser.run_flags()


if __name__ == "__main__":
    run(main)
