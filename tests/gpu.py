"""Checks of a machine with a GPU, to run before training for days: one verdict per line.

    python tests/gpu.py            # about a minute; exit code 1 if a check fails

Losses, a training step, the distributed path, host synchronisations, a killed run and a full GPU
are checked on the GPU against the CPU, or against an undisturbed run. With two GPUs, two processes
train through NCCL. With one, NCCL runs with one process, and two processes share the GPU through
gloo. Without a GPU only the checks that a CPU can run are made, and the memory that a step of
ImageNet-LT saves for its backward pass is counted.
"""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

try:
    from torch._subclasses.fake_tensor import FakeTensorMode
except ImportError:  # it is not part of torch's public interface
    FakeTensorMode = None

import benchmark
import data
import train
from losses import BLOCK
from models import Encoder, Queue

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LAUNCH = ["-m", "torch.distributed.run", "--standalone"]
# Runs train.py so that one and two processes must agree: BatchNorm stays in eval mode, since in
# train mode it normalises by the images of a process.
ONE_BATCH = """
import torch, train
torch.nn.BatchNorm2d.train = lambda norm, mode=True: torch.nn.Module.train(norm, False)
encoder = train.Encoder
train.Encoder = lambda *arguments: encoder(*arguments).train()
train.run(train.main)
"""
# Added in front unless there are two GPUs: both processes use the first one. NCCL would refuse.
THROUGH_GLOO = """
import os, torch.distributed as dist
os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
join = dist.init_process_group
dist.init_process_group = lambda backend: join("gloo")
"""
failed = []


def verdict(name, passed, text):
    print(f"{'ok  ' if passed else 'FAIL'}  {name}: {text}", flush=True)
    failed.extend([] if passed else [name])


def differ(ours, reference):
    """The largest difference of two lists of tensors, relative to each one's largest entry."""
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(ours, reference)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def begin(*arguments):
    """Start Python in the project's directory, with one thread."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    options |= dict(cwd=data.HERE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return subprocess.Popen([sys.executable, *map(str, arguments)], **options)


def loss_of(output, record):
    """The loss in a record of a run's log: 1 is the first, -1 the last."""
    return json.loads((output / "log.jsonl").read_text().splitlines()[record])["loss"]


# ------------------------------------------------------------------------------------- one process


def check_losses(_):
    batch, size, dim = benchmark.BATCH, benchmark.QUEUE, benchmark.DIM
    torch.manual_seed(0)
    shapes = (batch, dim), (batch, dim), (size, dim), *[(benchmark.PATCHES, batch, dim)] * 2
    rows = [F.normalize(torch.randn(shape), dim=-1) for shape in shapes]
    labels = torch.randint(1000, (batch,)), torch.randint(1000, (size,))

    def losses(device, dtype):
        query, key, queue, roi, patch = (part.to(device, dtype, copy=True) for part in rows)
        learned = query.requires_grad_(), patch.requires_grad_()
        of = [part.to(device) for part in labels]
        values = benchmark.our_losses(query, key, of[0], queue, of[1], roi, patch)
        sum(values).backward()
        return [value.detach() for value in values] + [part.grad for part in learned]

    error = differ(losses(DEVICE, torch.float32), losses("cpu", torch.float64))
    verdict("losses", error < 1e-4, f"B {batch}, K {size}: {error:.0e} from float64 with gradients")

    def make(factor):
        with mock.patch.object(benchmark, "QUEUE", factor * size):
            return benchmark.losses_of("ours", DEVICE)

    once, often = (benchmark.peak_megabytes(partial(make, n), DEVICE.type) for n in (1, 8))
    flat = often - once < 0.1 * 7 * batch * size * 4 / 2**20  # 10% of seven [B, K] matrices
    verdict("memory", flat, f"losses add {once:.0f} MB at K {size}, {often:.0f} MB at {8 * size}")


def check_queue(_):
    torch.manual_seed(0)
    queues = [Queue(100, 2), Queue(100, 2).to(DEVICE)]
    for count in (64, 64, 30):
        keys, labels = torch.randn(2, count, 128), torch.randint(9, (count,))
        for queue in queues:
            queue.put(keys.to(queue.keys.device), labels.to(queue.keys.device))
    pairs = [(q.keys.cpu(), q.labels.cpu()) for q in queues]
    same = all(torch.equal(a, b) for a, b in zip(*pairs))
    verdict("queue", same, "the keys and labels of three batches, as on the CPU")


def check_gather(_):
    backend = "nccl" if GPU else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    images = torch.randint(0, 255, (4, 2, 6, 5, 3), dtype=torch.uint8, device=DEVICE)
    images = images.permute(1, 0, 4, 2, 3)[-1]  # channels last, as the loader gives them
    verdict("gather", torch.equal(train.gather(images), images), f"channels-last images, {backend}")
    dist.destroy_process_group()


def check_step(_):
    """A step of a resnet18 on equal weights and views: loss and gradients."""
    made = dict(arch="resnet18", batch_size=16, queue_size=4096)

    def gradients(device, amp):
        part = benchmark.Ours(benchmark.train_args("imagenet_lt", **made, amp=amp), device)
        loss = part.loss(*(value.to(device) for value in inputs))
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten().cpu() for p in part.encoder.parameters()])

    cpu = torch.device("cpu")
    inputs = benchmark.Ours(benchmark.train_args("imagenet_lt", **made), cpu).inputs()
    # oneDNN's gradient of conv1 is 1e-3 away from float64, torch's own convolution 2e-6.
    torch.backends.mkldnn.enabled = False
    loss, gradient = gradients(cpu, "off")
    torch.backends.mkldnn.enabled = True
    limits = [("float32", "off", 1e-4, 1e-3)] * GPU + [("bfloat16", "bf16", 0.02, 0.2)]
    for name, amp, of_loss, of_gradient in limits:
        value, other = gradients(DEVICE, amp)
        error, length = abs(value / loss - 1), ((other - gradient).norm() / gradient.norm()).item()
        text = f"differs from the CPU in float32: loss {error:.0e}, gradient {length:.0e}"
        verdict(f"step in {name}", error < of_loss and length < of_gradient, text)


def saved_gibibytes(size):
    """What a step of ImageNet-LT with `size` images keeps for its backward pass, in bfloat16.

    Each storage that autograd saves is counted once, without the parameters and the queue.
    """
    args, saved = benchmark.train_args("imagenet_lt", batch_size=size, amp="bf16"), {}
    encoder, key_encoder = Encoder(args.arch), Encoder(args.arch).requires_grad_(False)
    queue = Queue(args.queue_size)
    queue.written = args.queue_size  # it is full
    images = torch.empty(2, size, 3, args.view_size, args.view_size, dtype=torch.uint8)
    labels = torch.zeros(size, dtype=torch.long)
    batch = train.ShuffledBatch(args, 0, slice(0, size), images.device)

    def save(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        train.dscl_pbsd_step(encoder, key_encoder, queue, images, labels, batch, args)
    for tensor in (*encoder.parameters(), *queue.buffers()):
        saved.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in saved.values()) / 2**30


def check_saved_memory(_):
    """The memory that a step saves, counted on tensors that have shapes but no data."""
    if not FakeTensorMode:
        return print("skip  saved memory: this torch has no FakeTensorMode")
    no_generator = mock.Mock()  # fake tensors cannot draw from a real one
    no_generator.return_value.manual_seed.return_value = None
    for size in benchmark.SIZES["cuda"]["imagenet_lt"]:
        data.constant.cache_clear()  # it would mix fake and real tensors
        with (
            FakeTensorMode(),
            mock.patch.object(torch, "Generator", no_generator),
            mock.patch.dict(BLOCK, clear=True),  # the blocks of a GPU
        ):
            saved = saved_gibibytes(size)
        text = f"{saved:.1f} GiB for backward with {size} images a GPU, ImageNet-LT in bfloat16"
        verdict("saved memory", saved < size / 16, text)  # 64 MiB an image
    data.constant.cache_clear()


def waits_of(directory, *options):
    """How often the host waits for the GPU in the steps of a run: those with a record, and others.

    The first epoch, in which code is loaded, and the last step are left out.
    """
    epochs, seen, began, rate = 3, [], [], train.learning_rate

    def learning_rate(*arguments):  # every step starts with it
        began.append(len(seen))
        return rate(*arguments)

    def note(message, *_):
        if "synchronizing CUDA operation" in str(message):
            seen.append(message)

    command = ["train.py", "--epochs", epochs, "--output", directory, *options]
    with (
        warnings.catch_warnings(),
        mock.patch.object(warnings, "showwarning", note),
        mock.patch.object(sys, "argv", list(map(str, command))),
        mock.patch.object(train, "learning_rate", learning_rate),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train.main()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    log = (directory / "log.jsonl").read_text().splitlines()
    recorded = {json.loads(line)["step"] for line in log[1:]}  # the first line is the header
    at_records, others = [], []
    for step in range(len(began) // epochs + 1, len(began)):
        waits = began[step] - began[step - 1]  # steps count from 1
        (at_records if step in recorded else others).append(waits)
    return at_records, others


def check_synchronisations(directory):
    """A step never waits for the GPU, with images in memory and with images from two workers."""
    images = directory / "images"
    for count in range(64):
        path = images / f"class {count % 4}" / f"{count}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (375, 500, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    files = ["--dataset", "imagefolder", "--data-root", images, "--workers", 2, "--batch-size", 4]
    for name, options in (("images in memory", []), ("JPEGs, two workers", files)):
        at_records, others = waits_of(directory / name, *options)
        # A record reads the loss: without a wait there, waits are not counted.
        passed = max(others) == 0 and 1 <= min(at_records) and max(at_records) <= 10
        text = f"{name}: {max(others)} in a step, {max(at_records)} at a record"
        verdict("waits for the GPU", passed, text)


# ------------------------------------------------------------------------------- whole commands


def check_distributed(directory):
    """Runs of an epoch by one process and several: their logs must agree."""
    options = ["--epochs", 1, "--amp", "off", "--output"]
    two_gpus = torch.cuda.device_count() >= 2
    how = "GPUs through NCCL" if two_gpus else "processes through gloo" + " on one GPU" * GPU
    two = [*LAUNCH, "--nproc_per_node=2", "--no-python", sys.executable, "-c"]
    commands = dict(
        one=["train.py"],
        alone=[*LAUNCH, "--nproc_per_node=1", "train.py"],
        whole=["-c", ONE_BATCH],
        shared=two + [ONE_BATCH if two_gpus else THROUGH_GLOO + ONE_BATCH],
    )
    runs = {name: begin(*of, *options, directory / name) for name, of in commands.items()}
    said = {name: run.communicate()[0] for name, run in runs.items()}
    for name, reference, text in (
        ("alone", "one", f"{'NCCL' if GPU else 'gloo'} with one process, DDP and shuffle BN"),
        ("shared", "whole", f"two {how}"),
    ):
        if any(runs[run].returncode for run in (name, reference)):
            verdict("distributed", False, f"{text}: {said[name][-300:]} {said[reference][-300:]}")
            continue
        losses = [loss_of(directory / run, 1) for run in (name, reference)]  # the first ten steps
        error = abs(losses[0] / losses[1] - 1)
        verdict("distributed", error < 1e-3, f"{text}: loss within {error:.0e} of one process's")


def check_resume(directory):
    """A killed run continues; eval.py evaluates it."""
    options = ["train.py", "--epochs", 12, "--save-minutes", 0, "--output"]
    calm, killed = begin(*options, directory / "calm"), begin(*options, directory / "killed")
    while not (directory / "killed" / "checkpoint.pth").exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    said = begin(*options, directory / "killed").communicate()[0]
    calm.communicate()
    step = re.search(r"from step (\d+) of", said)
    losses = [loss_of(directory / run, -1) for run in ("killed", "calm")]
    error = abs(losses[0] / losses[1] - 1)
    text = f"continued from step {step and step[1]}, loss within {error:.0e} of a calm run's"
    verdict("resume", step and int(step[1]) > 0 and error < 0.02, text)
    evaluation = begin("eval.py", "--output", directory / "killed")
    said = evaluation.communicate()[0]
    text = re.search(r"all, mean of classes.*", said)
    verdict("eval.py", evaluation.returncode == 0, text[0] if text else said[-300:])


def check_out_of_memory(directory):
    code = "import torch; torch.cuda.set_per_process_memory_fraction(0.02); import train; "
    options = "--arch resnet50 --view-size 224 --batch-size 512 --patch-size 64 --output"
    run = begin("-c", code + "train.run(train.main)", *options.split(), directory / "full")
    said = run.communicate()[0]
    lines = [line for line in said.splitlines() if "error" in line]
    passed = run.returncode == 2 and len(lines) == 1 and "out of memory" in lines[0]
    verdict("out of memory", passed, (lines or [said[-300:]])[0][:100])


def main():
    began = time.monotonic()
    # Float32 must not be TF32, even where the environment asks for it; train.start does the same.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    name = torch.cuda.get_device_name() if GPU else "no GPU: what a CPU can check"
    print(f"{name}, torch {torch.__version__}")
    checks = [check_losses, check_queue, check_gather, check_step]
    checks += [check_synchronisations if GPU else check_saved_memory]
    checks += [check_distributed, check_resume] + [check_out_of_memory] * GPU
    for check in checks:
        with tempfile.TemporaryDirectory() as directory:
            try:
                check(Path(directory))
            except Exception as error:  # the other checks still run
                verdict(check.__name__, False, f"{type(error).__name__}: {error}")
    print(f"{len(failed)} failed; {time.monotonic() - began:.0f} seconds")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
