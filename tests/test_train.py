"""Both stages as a user runs them: what they write, resume, repeat, and how they fail."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import TREE_COUNTS, records, states_equal
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import benchmark
import eval as stage2
import train
from data import DATASETS, HERE, Batches, evaluation_view, load_dataset
from models import Encoder, build_backbone

TINY = ["--epochs", "2", "--batch-size", "64", "--patches", "1", "--queue-size", "100"]

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def python(*arguments, **options):
    options = dict(cwd=HERE, capture_output=True, text=True, timeout=200) | options
    return subprocess.run([sys.executable, *map(str, arguments)], **options)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a stage in this process, which saves the seconds of its imports: what it printed."""

    def run(stage, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", *map(str, arguments)])
        stage.main()
        return capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def small_root(tmp_path_factory):
    """The shipped set thinned out class by class: 1/4 of train and val, 1/10 of test."""
    root, small = tmp_path_factory.mktemp("data"), {}
    with np.load(HERE / "tests" / "fashion_mnist_lt.npz") as arrays:
        for split, step in (("train", 4), ("val", 4), ("test", 10)):
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            kept = labels.argsort(kind="stable")[::step]
            small |= {f"{split}_images": images[kept], f"{split}_labels": labels[kept]}
    np.savez(root / "fashion_mnist_lt.npz", **small)
    return root


@pytest.fixture(scope="module")
def trained(small_root, tmp_path_factory):
    """One uninterrupted run of both stages."""
    output = tmp_path_factory.mktemp("trained")
    done = python("train.py", *TINY, "--data-root", small_root, "--output", output)
    assert done.returncode == 0, done.stderr
    done = python("eval.py", "--output", output, "--data-root", small_root, "--epochs", 2)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def checkpoint(output):
    content = torch.load(output / "checkpoint.pth", weights_only=True)
    for name in ("output", "save_minutes", "plots"):
        content["args"].pop(name, None)
    return content


def test_stage_1_writes_its_log_and_a_plain_checkpoint(trained):
    output, _ = trained
    header, steps = records(output)
    assert header["command"].startswith("train.py") and header["versions"]["torch"]
    assert header["arguments"]["epochs"] == 2 and header["arguments"]["alpha"] == 0.1
    assert [r["epoch"] for r in steps] == [1, 2] and steps[-1]["step"] == 18
    for record in steps:
        keys = {"epoch", "step", "loss", "dscl", "pbsd", "lr", "own_key"}
        assert record.keys() - {"knn"} == keys
        assert ("knn" in record) == (record["step"] == 18)  # every tenth epoch, and the last
        total = record["dscl"] + header["arguments"]["pbsd_weight"] * record["pbsd"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)
    saved = checkpoint(output)
    assert saved["step"] == 18 and saved["args"]["dataset"] == "fashion_mnist_lt"
    assert len(saved["queue"]["key_slots"]) == 100


def test_stage_2_reports_on_test_by_shots(trained):
    output, printed = trained
    results = json.loads((output / "results.json").read_text())
    assert results["counts"][0] == 250 and len(results["per_class"]) == 10
    counts, per_class = np.array(results["counts"]), np.array(results["per_class"])
    groups = {"many": counts > 100, "few": counts < 20, "medium": (counts >= 20) & (counts <= 100)}
    for name, mask in groups.items():
        assert results[name] == pytest.approx(per_class[mask].mean())
    assert results["top1"] == pytest.approx(per_class.mean())  # a balanced test set
    assert results["top1"] <= results["top5"] <= 100 and results["top5"] > 50
    assert results["arguments"]["stage1"][0]["epochs"] == 2
    assert f"{results['top1']:.2f}" in printed and "many" in printed


def test_the_same_seed_gives_the_same_to_the_bit_and_another_does_not(
    trained, small_root, tmp_path
):
    output, _ = trained
    for seed in (0, 1):
        again = tmp_path / str(seed)
        options = ["--data-root", small_root, "--seed", seed, "--output", again]
        assert python("train.py", *TINY, *options).returncode == 0
        assert python("eval.py", *options, "--epochs", 2).returncode == 0
        results = [json.loads((o / "results.json").read_text()) for o in (output, again)]
        same = [
            records(output)[1] == records(again)[1],
            states_equal(checkpoint(output), checkpoint(again)),
            results[0]["per_class"] == results[1]["per_class"],
        ]
        assert same == ([True] * 3 if seed == 0 else [False] * 3)


def test_stage_2_may_move_and_names_what_changed_in_stage_1(trained, small_root, tmp_path, call):
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(trained[0], run)
    run.rename(moved)
    options = ["--output", moved, "--data-root", small_root, "--epochs", 2]
    (moved / "log.jsonl").unlink()
    said = call(stage2, *options, "--plots", tmp_path).err
    assert "own_key.png is left out" in said and "holds no records" in said
    content = torch.load(moved / "checkpoint.pth", weights_only=True)
    torch.save(content | dict(step=17), moved / "checkpoint.pth")
    with pytest.raises(train.BadInput, match=r"another run \(stage 1 is another in step\)"):
        call(stage2, *options)


def test_with_local_contrast_the_number_of_processes_must_stay():
    before, now = ({"contrast": "local", "processes": n} for n in (1, 2))
    with pytest.raises(train.BadInput, match="processes was 1, now 2"):
        train.same_settings("checkpoint.pth", before, now)
    before, now = ({"contrast": "global", "processes": n} for n in (1, 2))
    assert train.same_settings("checkpoint.pth", before, now) == ["processes was 1, now 2"]


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(
    trained, small_root, tmp_path, call
):
    # --save-minutes 0: a checkpoint before every step, so that the kill comes amid an epoch.
    arguments = [*TINY, "--data-root", small_root, "--output", tmp_path, "--save-minutes"]
    command = [sys.executable, "train.py", *arguments, 0]
    process = subprocess.Popen(list(map(str, command)), cwd=HERE, stderr=subprocess.DEVNULL)
    while not (tmp_path / "checkpoint.pth").exists() or checkpoint(tmp_path)["step"] < 3:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= checkpoint(tmp_path)["step"] < 18
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"epoch": 1, "st')  # what a kill amid a line leaves
    said = call(train, *arguments, 30)
    assert "going on from epoch" in said.err and "save_minutes was 0.0, now 30.0" in said.err
    _, steps = records(tmp_path)
    notes = [record for record in steps if "resumed" in record]
    assert [record for record in steps if record not in notes] == records(trained[0])[1]
    assert [note["changes"] for note in notes] == [["save_minutes was 0.0, now 30.0"]]
    assert states_equal(checkpoint(tmp_path), checkpoint(trained[0]))


@pytest.fixture
def stop_at(monkeypatch):
    """Have this process, amid the step of that number, send itself a signal; returns the calls."""

    def arrange(step, number):
        views, calls = train.query_views, []

        def interrupted(*inputs):
            calls.append(None)
            if len(calls) == step:
                os.kill(os.getpid(), number)
            return views(*inputs)

        monkeypatch.setattr(train, "query_views", interrupted)
        return calls

    return arrange


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_run_with_a_checkpoint_of_that_step(
    number, trained, small_root, tmp_path, call, stop_at
):
    arguments = [*TINY, "--data-root", small_root, "--output", tmp_path]
    calls = stop_at(13, number)
    with pytest.raises(train.Stopped):
        call(train, *arguments)
    assert checkpoint(tmp_path)["step"] == 13
    if number == signal.SIGUSR1:
        (tmp_path / "log.jsonl").unlink()
    call(train, *arguments)
    assert len(calls) == 18  # no step was done twice
    header, steps = records(tmp_path)
    assert header["arguments"]["epochs"] == 2  # a log that is gone gets a header as well
    assert steps == records(trained[0])[1][-len(steps) :]
    assert states_equal(checkpoint(tmp_path), checkpoint(trained[0]))


def test_two_processes_go_on_where_one_stopped_and_torchrun_brings_a_dead_one_back(
    small_root, tmp_path, call, stop_at
):
    arguments = [*TINY, "--data-root", small_root, "--output", tmp_path]
    stop_at(3, signal.SIGTERM)
    with pytest.raises(train.Stopped):
        call(train, *arguments)
    command = [*LAUNCH, "--max-restarts=1", "train.py", *arguments, "--save-minutes", 0]
    # torchrun's restarted processes otherwise find the addresses of the dead ones, as README says.
    env = ONE_THREAD | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=HERE, env=env, stderr=subprocess.PIPE
    )
    while checkpoint(tmp_path)["step"] == 3:
        assert process.poll() is None
    ranks = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, said
    assert said.count("going on from epoch") == 2 and checkpoint(tmp_path)["step"] == 18
    steps = records(tmp_path)[1]
    notes = [record["changes"] for record in steps if "resumed" in record]
    assert notes[0] == ["processes was 1, now 2", "save_minutes was 30, now 0.0"]
    assert [record["step"] for record in steps if "loss" in record] == [9, 18]


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(
    small_root, tmp_path, call, monkeypatch
):
    arguments = [*TINY, "--data-root", small_root, "--output", tmp_path]
    rate = train.learning_rate
    monkeypatch.setattr(
        train, "learning_rate", lambda step, *rest: 1e30 if step == 12 else rate(step, *rest)
    )
    with pytest.raises(train.BadInput, match="not finite at step 18.*checkpoint.pth is good"):
        call(train, *arguments)
    assert checkpoint(tmp_path)["step"] == 9
    assert all(v.isfinite().all() for v in checkpoint(tmp_path)["encoder"].values())


def test_a_full_disk_leaves_the_last_good_checkpoint(small_root, tmp_path, call):
    arguments = ["--data-root", small_root, "--output", tmp_path]
    call(train, *TINY, *arguments)
    good = (tmp_path / "checkpoint.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for stage in (train, stage2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(train.BadInput, match=r"\.pth cannot be written .*make room"):
                if stage is train:
                    train.save(tmp_path / "checkpoint.pth", checkpoint(tmp_path))
                else:
                    call(stage2, *arguments, "--epochs", 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "checkpoint.pth").read_bytes() == good
        assert not list(tmp_path.glob("*.new")) and not (tmp_path / "classifier.pth").exists()


def test_stage_2_goes_on_from_its_last_epoch(trained, small_root, tmp_path, call):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = ["--checkpoint", trained[0] / "checkpoint.pth", "--data-root", small_root]
    call(stage2, *options, "--epochs", 4, "--output", whole)
    halves.mkdir()
    content = torch.load(whole / "classifier.pth", weights_only=True)
    # The state after two of four epochs is not kept, so it is made by a run that is cut short.
    code = (
        "import sys, train, eval as stage2\n"
        "keep, stage2.save = stage2.save, lambda path, content: (\n"
        "    keep(path, content), content['epoch'] == 2 and sys.exit(7))\n"
        "train.run(stage2.main)"
    )
    cut = python("-c", code, *options, "--epochs", 4, "--output", halves)
    assert cut.returncode == 7, cut.stderr
    call(stage2, *options, "--epochs", 4, "--output", halves)
    again = torch.load(halves / "classifier.pth", weights_only=True)
    for saved in (content, again):
        saved["args"].pop("output")
    assert states_equal(content, again)


def test_processes_hold_the_same_weights_and_queue_and_their_own_keys_and_views(
    small_root, tmp_path
):
    options = ["--data-root", small_root, "--output", tmp_path, "--epochs", 1, *TINY[2:]]
    done = python(*LAUNCH, "tests/ranks.py", *options, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    assert len(first["queues"]) == 9 and states_equal(first["queues"], second["queues"])
    assert states_equal([w.data for w in first["weights"]], [w.data for w in second["weights"]])
    assert not torch.equal(first["boxes"], second["boxes"])
    # Shuffle BN: ranks.py has checked that keys came back; most were made with other pictures.
    assert len(first["moved"]) == 9 and min(first["moved"] + second["moved"]) > 0.5
    saved = checkpoint(tmp_path)
    assert saved["queue"]["_extra_state"] == 9 * 64 and saved["step"] == 9  # the keys of both


def test_the_log_tells_the_own_keys_probability_by_class_size(small_root, tmp_path, call):
    # At temperature 1000 all of an anchor's contrast is equally likely: 63 queries, 64 keys and
    # what the queue held at each of nine steps.
    options = ["--data-root", small_root, "--output", tmp_path, "--epochs", 1, *TINY[2:]]
    call(train, *options, "--temperature", 1000)
    (record,) = records(tmp_path)[1]
    counts = load_dataset("fashion_mnist_lt", small_root)["train"].labels.bincount().tolist()
    assert {int(size) for size in record["own_key"]} == {
        2 ** (count.bit_length() - 1) for count in counts
    }
    held = [min(64 * step, 100) for step in range(9)]
    expected = np.mean([1 / (127 + slots) for slots in held])
    # The largest class is in every batch as often as in any other, nearly.
    assert record["own_key"]["128"] == pytest.approx(expected, rel=0.02)


def test_nearest_neighbours_vote_by_their_cosine_and_classes_count_alike():
    bank, bank_labels = torch.eye(4), torch.tensor([0, 1, 1, 2])
    features = torch.nn.functional.normalize(bank[[0, 0, 1, 2, 3, 3]] + 0.5 * bank[1])
    labels = torch.tensor([0, 1, 1, 1, 2, 0])
    for neighbours in (1, 3):  # the nearest weighs more than two others of another class
        accuracy = train.neighbour_accuracy(bank, bank_labels, features, labels, neighbours)
        assert accuracy.item() == pytest.approx(100 * (1 / 2 + 2 / 3 + 1) / 3)


class HostReads(TorchDispatchMode):
    """Notes how many steps had begun whenever the host waits for a tensor's value."""

    def __init__(self, begun):
        super().__init__()
        self.begun, self.seen = begun, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indexed = function.overloadpacket.__name__ in ("index", "index_put_", "_index_put_impl_")
        if indexed:  # by a mask it depends on how much that has, by numbers it does not
            waits = any(i is not None and i.dtype == torch.bool for i in args[1])
        else:
            tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
            waits = tags & set(function.tags)
        if waits:
            self.seen.append(len(self.begun))
        return function(*args, **(kwargs or {}))


def test_no_step_reads_a_value_back_and_all_pictures_are_channels_last(
    small_root, tmp_path, call, monkeypatch
):
    views, conv, begun, layouts = train.query_views, torch.nn.Conv2d.forward, [], set()

    def beginning(*inputs):
        begun.append(None)
        return views(*inputs)

    def watched(module, images):
        layouts.add(images.is_contiguous(memory_format=torch.channels_last))
        return conv(module, images)

    monkeypatch.setattr(train, "query_views", beginning)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    with HostReads(begun) as reads:
        call(train, *TINY, "--data-root", small_root, "--output", tmp_path)
    assert len(begun) == 18 and layouts == {True}
    assert {9, 18} <= set(reads.seen) <= {0, 9, 18}  # set-up, and the log at the epochs' ends


def test_bfloat16_is_chosen_where_the_processor_computes_in_it(monkeypatch):
    cpu = torch.device("cpu")
    for able in ("avx512_bf16", "amx_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
        assert train.precision("auto", cpu) == "bf16" and train.precision("off", cpu) == "off"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert train.precision("auto", cpu) == "off"


def test_in_bfloat16_the_losses_are_those_of_float32_but_for_its_rounding():
    values = []
    for amp in ("off", "bf16"):
        part = benchmark.Ours(benchmark.settings_of("fashion_mnist_lt"), torch.device("cpu"))
        with train.autocast(torch.device("cpu"), amp):
            values.append(part.loss(*part.inputs()))
        values[-1].backward()
        assert all(p.grad.dtype == torch.float32 for p in part.encoder.parameters())
    assert values[0] != values[1] and values[1].dtype == torch.float32
    torch.testing.assert_close(values[1], values[0], rtol=0.01, atol=0)


def test_the_loss_of_experts_is_the_mean_of_each_ones_own(monkeypatch):
    seen = {"dscl_and_own_key": [], "pbsd_loss": []}
    for name, calls in seen.items():

        def watched(*rows, calls=calls, loss=getattr(train, name), **options):
            value = loss(*rows, **options)
            calls.append((value[0] if isinstance(value, tuple) else value, rows))
            return value

        monkeypatch.setattr(train, name, watched)
    args = benchmark.settings_of("fashion_mnist_lt", experts=3, queue_size=200)
    part = benchmark.Ours(args, torch.device("cpu"))
    total = part.loss(*part.inputs())
    dscl, pbsd = (torch.stack([value for value, _ in calls]) for calls in seen.values())
    assert len(dscl) == len(pbsd) == 3 and dscl.unique().numel() == 3
    torch.testing.assert_close(total, dscl.mean() + args.pbsd_weight * pbsd.mean())
    for number, (_, rows) in enumerate(
        seen["dscl_and_own_key"]
    ):  # query, key, labels, bank, its labels
        assert rows[0].shape == rows[1].shape == (128, 128) and rows[3].shape == (200, 128)
        assert seen["pbsd_loss"][number][1][3] is rows[3]
    # The queue has taken each expert's own keys.
    keys = torch.cat([rows[1] for _, rows in seen["dscl_and_own_key"]], dim=1)
    newest = torch.arange(200, 328) % 200
    assert torch.equal(part.queue.keys[newest], keys)


def test_the_memory_of_a_step_does_not_grow_with_the_queue():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import benchmark\n"
        "args = benchmark.settings_of('imagenet_lt', queue_size=int(sys.argv[1]), view_size=64)\n"
        "print(benchmark.peak_megabytes(lambda: benchmark.step_of('ours', args, 'cpu'), 'cpu'))"
    )
    small, large = (float(python("-c", code, size).stdout) for size in (65536, 2**20))
    # Above the queue itself, 512 MB, which is there before; one [88, K] matrix has 352 MB.
    assert large - small < 100


# BatchNorm in eval mode: in train mode its batches are those of a process.
FROZEN_NORMS = """
import torch, train
torch.nn.BatchNorm2d.train = lambda norm, mode=True: torch.nn.Module.train(norm, False)
train.run(train.main)
"""


def test_two_processes_compute_what_one_does(small_root, tmp_path):
    options = ["--data-root", small_root, "--epochs", 1, *TINY[2:], "--amp", "off"]
    launchers = {
        "one": [],
        "two": [*LAUNCH, "--no-python", sys.executable],
        "local": [*LAUNCH, "--no-python", sys.executable],
    }
    runs = {}
    for name, launcher in launchers.items():
        contrast = "local" if name == "local" else "global"
        rest = ["-c", FROZEN_NORMS, *options, "--output", tmp_path / name, "--contrast", contrast]
        done = python(*launcher, *rest, env=ONE_THREAD)
        assert done.returncode == 0, done.stderr
        runs[name] = checkpoint(tmp_path / name), records(tmp_path / name)[1]
    (one, log), (two, log_of_two), (_, log_of_local) = runs.values()
    own_key = log[0].pop("own_key")
    assert log_of_two[0].pop("own_key") == pytest.approx(own_key, rel=1e-3)
    assert log[0]["step"] == 9 and log_of_two[0] == pytest.approx(log[0], rel=1e-4)
    for name in ("encoder", "momentum_encoder", "queue"):
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
    assert abs(log_of_local[0]["dscl"] - log[0]["dscl"]) > 0.01


def test_when_a_process_dies_the_other_says_so_and_ends(small_root, tmp_path):
    command = [*LAUNCH, "train.py"]
    command += ["--data-root", small_root, "--output", tmp_path, *TINY[2:]]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=HERE,
        env=ONE_THREAD,
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / "checkpoint.pth").exists():
        assert process.poll() is None
    ranks = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode != 0
    assert "train.py: error: the connection to another process failed" in said
    assert "goes on from the last checkpoint" in said and checkpoint(tmp_path)["step"] % 9 == 0


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        first = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
        done = python("train.py", "--output", tmp_path, env=os.environ | first)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"port: {port}" in done.stderr and "address already in use" in done.stderr


def test_two_hosts_meet_at_a_rendezvous(small_root, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-id=1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "train.py"]
    command += ["--data-root", small_root, "--output", tmp_path, "--epochs", 1, *TINY[2:]]
    hosts = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=HERE,
            env=ONE_THREAD,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    said = [host.communicate(timeout=150)[1].decode() for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert sum("2 x cpu" in text for text in said) == 1  # rank 0 speaks
    assert checkpoint(tmp_path)["queue"]["_extra_state"] == 9 * 64


# What makes a resnet50 on the JPEGs of imagenet_tree affordable.
FILES = ["--dataset", "imagenet_lt", "--workers", "1", "--view-size", "64", "--patch-size", "32"]
FILES += ["--patches", "1", "--queue-size", "20", "--batch-size", "16"]


def test_the_benchmark_trains_resumes_and_evaluates_in_two_processes(imagenet_tree, tmp_path):
    options = ["--data-root", imagenet_tree, "--output", tmp_path]
    command = [*LAUNCH, "train.py", *FILES, *options, "--epochs", 2]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=HERE, env=ONE_THREAD, stderr=subprocess.PIPE
    )
    while not (tmp_path / "checkpoint.pth").exists():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    process.terminate()  # torchrun ends its processes
    process.communicate()
    saved = checkpoint(tmp_path)
    assert 2 <= saved["step"] < 4 and saved["args"]["arch"] == "resnet50"  # 2 steps an epoch
    assert saved["queue"]["_extra_state"] == 16 * saved["step"]
    assert len(saved["queue"]["key_slots"]) == 20
    done = python(*command, env=ONE_THREAD)
    assert done.returncode == 0 and "going on from epoch 1" in done.stderr, done.stderr
    header, steps = records(tmp_path)
    assert [record["step"] for record in steps] == [2, 4]
    assert header["splits"]["val"] == f"8 pictures of {imagenet_tree / 'ImageNet_LT_val.txt'}"
    stage2 = ["eval.py", "--output", tmp_path, "--epochs", 1, "--batch-size", 16, "--workers", 1]
    done = python(*LAUNCH, *stage2, env=ONE_THREAD)  # the data root is the checkpoint's
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["counts"] == TREE_COUNTS["train"] and results["many"] is None
    assert (results["reported_on"], results["chosen_on"]) == ("test", "val")
    rights = np.array(results["per_class"]) * 3 / 100  # of three test pictures a class
    assert np.allclose(rights, rights.round()) and results["top5"] == 100  # none counted twice


def test_a_picture_that_cannot_be_read_ends_training_with_its_name(imagenet_tree, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(imagenet_tree, root)
    broken = root / "train" / "n00000001" / "train_7.JPEG"
    whole = broken.read_bytes()
    options = [*FILES, "--arch", "resnet18", "--data-root", root, "--epochs", 2]
    assert (
        python(*LAUNCH, "train.py", *options, "--output", tmp_path / "a", env=ONE_THREAD).returncode
        == 0
    )
    broken.write_bytes(b"no picture")
    done = python(*LAUNCH, "train.py", *options, "--output", tmp_path / "b", env=ONE_THREAD)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if f"error: {broken} cannot be read" in line]
    assert len(said) == 2  # each process says so
    broken.write_bytes(whole)
    stopped_at = checkpoint(tmp_path / "b")["step"]
    assert stopped_at < 4
    assert (
        python(*LAUNCH, "train.py", *options, "--output", tmp_path / "b", env=ONE_THREAD).returncode
        == 0
    )
    assert records(tmp_path / "a")[1] == records(tmp_path / "b")[1]
    assert states_equal(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))


def test_a_broken_picture_of_val_ends_training_after_a_checkpoint(imagenet_tree, tmp_path, call):
    root = tmp_path / "data"
    shutil.copytree(imagenet_tree, root)
    broken = root / "train" / "n00000001" / "val_1.JPEG"
    broken.write_bytes(b"no picture")
    options = [*FILES[:2], "--workers", 0, *FILES[4:], "--arch", "resnet18", "--data-root", root]
    with pytest.raises(train.BadInput, match=f"{broken} cannot be read"):
        call(train, *options, "--output", tmp_path / "run", "--epochs", 2, "--knn-epochs", 1)
    assert checkpoint(tmp_path / "run")["step"] == 2
    (record,) = records(tmp_path / "run")[1]
    assert record["step"] == 2 and "knn" not in record


def test_every_expert_starts_from_the_pretrained_weights(tmp_path, call, monkeypatch, small_root):
    torch.manual_seed(3)
    backbone, _ = build_backbone("resnet18")
    torch.save(backbone.state_dict(), tmp_path / "resnet18.pth")
    started = []
    monkeypatch.setattr(
        train, "MomentumEncoder", lambda encoder, m: started.append(encoder) or sys.exit(0)
    )
    options = ["--arch", "resnet18", "--experts", 3, "--pretrained", tmp_path / "resnet18.pth"]
    with pytest.raises(SystemExit):
        call(train, *TINY, *options, "--data-root", small_root, "--output", tmp_path / "run")
    (encoder,) = started
    assert len(encoder.experts) == 2
    for expert in encoder.experts:
        for layer, trained in backbone.state_dict().items():
            if layer.startswith(("layer3", "layer4")):
                assert torch.equal(expert["layers"].state_dict()[layer], trained)


def test_a_run_goes_on_with_fewer_pictures_but_not_with_others(imagenet_tree, tmp_path, call):
    folders = tmp_path / "data"
    for split, folder in (("train", "train"), ("val", "val"), ("test", "val")):
        shutil.copytree(imagenet_tree / folder, folders / split)
    options = ["--dataset", "imagefolder", *FILES[4:], "--workers", 0, "--data-root", folders]
    options += ["--loss", "ce", "--arch", "resnet18", "--output", tmp_path / "run"]
    new = folders / "train" / "n00000000" / "train_0.JPEG"
    content = new.read_bytes()
    new.unlink()
    call(train, *options, "--epochs", 1)
    new.write_bytes(content)
    with pytest.raises(train.BadInput, match="pictures were .'train': 52.* now .'train': 53"):
        call(train, *options, "--epochs", 1)
    with pytest.raises(train.BadInput, match="not those that .*checkpoint.pth was trained with"):
        call(stage2, "--output", tmp_path / "run", "--workers", 0)
    new.unlink()
    new.with_name("train_1.JPEG").unlink()
    assert "now {'train': 51" in call(train, *options, "--epochs", 1).err
    call(stage2, "--output", tmp_path / "run", "--workers", 0, "--epochs", 1)


def test_a_schedulers_signal_to_all_processes_leaves_a_checkpoint(imagenet_tree, tmp_path):
    options = ["--arch", "resnet18", "--data-root", imagenet_tree, "--output", tmp_path]
    command = [sys.executable, "train.py", *FILES, *options, "--epochs", 50, "--workers", 2]
    process = subprocess.Popen(
        list(map(str, command)), cwd=HERE, start_new_session=True, stderr=subprocess.PIPE
    )
    while not (tmp_path / "checkpoint.pth").exists():
        assert process.poll() is None
    before = checkpoint(tmp_path)["step"]
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate()[1].decode()
    assert process.returncode == 75, said
    assert "train.py: stopped by a signal" in said and checkpoint(tmp_path)["step"] >= before


def test_what_is_trained_on_does_not_depend_on_workers_and_processes(imagenet_tree):
    train_set = load_dataset("imagenet_lt", imagenet_tree)["train"]
    recipe = DATASETS["imagenet_lt"] | dict(view_size=32)

    def batches(workers, rank=0, world=1):
        sampler = Batches(train_set.labels, 16, 2, seed=0, rank=rank, world=world)
        return train.load_batches(train_set, sampler, recipe, 2, workers, torch.device("cpu"))

    shares = zip(batches(0, 0, 2), batches(0, 1, 2))
    for (images, labels), (more, more_labels), share in zip(batches(0), batches(2), shares):
        assert torch.equal(images, more) and torch.equal(labels, more_labels)
        assert torch.equal(images, torch.cat([images for images, _ in share], dim=1))
        assert images.dtype == torch.uint8 and images.shape == (2, 16, 3, 32, 32)


@pytest.mark.parametrize(
    "dataset, splits, reported, chosen",
    [
        ("inaturalist18", ("train", "val"), "val", None),
        ("imagefolder", ("train", "test"), "test", "val"),
    ],
)
def test_results_say_which_split_they_are_of(
    dataset, splits, reported, chosen, imagenet_tree, tmp_path, call
):
    for split in splits:
        lines = (imagenet_tree / f"ImageNet_LT_{split}.txt").read_text().splitlines()
        (tmp_path / f"iNaturalist18_{split}.txt").write_text("\n".join(lines))
        for number, (path, label) in enumerate(line.split() for line in lines):
            folder = tmp_path / split / f"class {label}"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(imagenet_tree / path, folder / f"{number}.jpg")
    root = imagenet_tree if dataset == "inaturalist18" else tmp_path
    output = ["--output", tmp_path / "run", "--epochs", 1, "--workers", 0]
    options = ["--dataset", dataset, "--data-root", root, "--index-dir", tmp_path, *FILES[4:]]
    said = call(train, *output, *options, "--arch", "resnet18", "--loss", "ce").err
    assert ("held out" in said) == (dataset == "imagefolder")
    said = call(stage2, *output, "--plots", tmp_path, "--export", tmp_path / "whole.pth").err
    whole = torch.load(tmp_path / "whole.pth", weights_only=True)
    torchvision.models.resnet18(num_classes=4).load_state_dict(whole)
    for name in ("accuracy", "confusion", "activation", "neighbours"):
        assert (tmp_path / f"{name}.png").exists()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["reported_on"], results["chosen_on"]) == (reported, chosen)
    assert (results["val"] is None) == (chosen is None) and results["epoch"] == 1
    names = None if dataset == "inaturalist18" else [f"class {label}" for label in range(4)]
    assert results["classes"] == names
    assert f"on {reported}, at epoch 1" in said


@pytest.mark.parametrize("loss", ["dscl", "ce"])
def test_experts_train_and_each_is_reported(loss, small_root, tmp_path, call):
    options = ["--data-root", small_root, "--output", tmp_path, "--epochs", 1]
    call(train, *options, *TINY[2:], "--loss", loss, "--experts", 2, "--expert-width", 0.75)
    printed = call(stage2, *options).out
    results = json.loads((tmp_path / "results.json").read_text())
    first, second = (expert["all"] for expert in results["experts"])
    assert first != second and f"its experts alone: {first:.2f}, {second:.2f}" in printed
    content = checkpoint(tmp_path)
    assert content["queue"]["key_slots"].shape == ((100, 2 * 128) if loss == "dscl" else (0, 20))


def test_several_runs_are_averaged_and_each_is_what_it_is_alone(
    trained, small_root, tmp_path, call, capsys, monkeypatch
):
    options, alone = ["--data-root", small_root, "--epochs", 1, "--lr", 0.5], []
    call(train, *TINY, *options[:2], "--seed", 1, "--output", tmp_path / "run")
    checkpoints = [output / "checkpoint.pth" for output in (trained[0], tmp_path / "run")]
    for number, path in enumerate(checkpoints):
        call(stage2, *options, "--checkpoint", path, "--output", tmp_path / str(number))
        alone.append(json.loads((tmp_path / str(number) / "results.json").read_text()))
    together = ["--checkpoint", *checkpoints, *options]
    call(stage2, *together, "--output", tmp_path / "both")
    both = json.loads((tmp_path / "both" / "results.json").read_text())
    for own, member in zip(alone, both["experts"]):
        # 100 pictures a class; a sum in another order may turn one that stands on the edge.
        assert member["per_class"] == pytest.approx(own["per_class"], abs=2)
        assert own["experts"] is None and both["per_class"] != own["per_class"]
    assert alone[0]["per_class"] != pytest.approx(alone[1]["per_class"], abs=2)
    assert "need an --output" in fails(capsys, monkeypatch, stage2, *together)


@pytest.mark.parametrize("loss", ["scl", "ce"])
def test_the_baselines_train_and_evaluate(loss, small_root, tmp_path, call):
    options = ["--data-root", small_root, "--output", tmp_path, "--epochs", 1]
    call(train, *options, *TINY[2:], "--loss", loss, "--pbsd-weight", 0)
    header, steps = records(tmp_path)
    assert "pbsd" not in steps[0] and ("dscl" in steps[0]) == (loss == "scl")
    assert (header["arguments"]["alpha"] is None) == (loss == "scl")
    assert "all" in call(stage2, *options).out
    alone = ["--checkpoint", tmp_path / "checkpoint.pth", "--output", tmp_path / "alone"]
    alone += [*options[:2], "--epochs", 0]
    if loss == "scl":
        with pytest.raises(train.BadInput, match="--epochs 0: .* has no classifier"):
            call(stage2, *alone)
        return
    assert "the classifier of stage 1" in call(stage2, *alone).err
    results = json.loads((tmp_path / "alone" / "results.json").read_text())
    sets = load_dataset("fashion_mnist_lt", small_root)
    encoder = Encoder("resnet_small", classes=10)
    encoder.load_state_dict(checkpoint(tmp_path)["encoder"])
    view = evaluation_view(sets["test"].images[None], DATASETS["fashion_mnist_lt"])
    with torch.no_grad(), train.autocast(torch.device("cpu"), results["arguments"]["amp"]):
        right = encoder.eval()(view)[0].argmax(1) == sets["test"].labels
    assert results["top1"] == pytest.approx(100 * right.float().mean().item(), abs=0.3)
    assert results["val"] is None and not (tmp_path / "alone" / "classifier.pth").exists()


def test_both_stages_draw_their_pictures_and_change_nothing(trained, small_root, tmp_path, call):
    options = ["--data-root", small_root, "--output", tmp_path / "run"]
    call(train, *TINY, *options, "--plots", tmp_path)
    assert states_equal(checkpoint(tmp_path / "run"), checkpoint(trained[0]))
    before = (trained[0] / "results.json").read_text()
    again = ["--output", trained[0], "--epochs", 2, "--plots", tmp_path]
    call(stage2, *again, "--compare", trained[0], "--export", tmp_path / "small.pt2")
    after = (trained[0] / "results.json").read_text()
    assert json.loads(after)["per_class"] == json.loads(before)["per_class"]
    names = "views curves accuracy confusion activation neighbours own_key".split()
    for name in names:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 300 and len(image.convert("L").getcolors()) > 20


# ------------------------------------------------------------------------------- how they fail


def fails(capsys, monkeypatch, stage, *arguments):
    """The one line that a stage prints when it refuses to run."""
    monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as error:
        train.run(stage.main)
    captured = capsys.readouterr()
    assert error.value.code == 2 and not captured.out
    assert captured.err.count("\n") == 1 and ": error: " in captured.err
    return captured.err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--alpha", "2"], "--alpha: must be at least 0 and at most 1"),
        (["--temperature", "0"], "--temperature: must be above 0"),
        (["--temperature", "nan"], "--temperature: must be above 0"),
        (["--epochs", "many"], "--epochs: 'many' is not a number of type int"),
        (["--batch-size", "5000"], "--batch-size 5000 is larger than the 2478"),
        (["--loss", "triplet"], "--loss: invalid choice"),
        (["--device", "abacus"], "--device must be cpu, cuda or auto"),
        (["--data-root", "nowhere"], "nowhere is not a directory: --data-root"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--output", HERE / "README.md" / "run"], "README.md/run: Not a directory"),
    ],
)
def test_stage_1_refuses_bad_flags_in_one_line(arguments, says, capsys, monkeypatch, tmp_path):
    assert says in fails(capsys, monkeypatch, train, "--output", tmp_path, *arguments)


class Bomb:
    """What unpickling would run: it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_cannot_be_used_is_named_and_kept(capsys, monkeypatch, trained, tmp_path):
    output, _ = trained
    for name in ("nothing.pth", "truncated.pth", "pickle.pth", "other.pth"):
        path = tmp_path / name
        if name == "truncated.pth":
            path.write_bytes((output / "checkpoint.pth").read_bytes()[:5000])
        elif name == "pickle.pth":
            torch.save({"stage": train.STAGE, "code": Bomb(tmp_path / "exploded")}, path)
        elif name == "other.pth":
            torch.save({"weights": torch.zeros(1)}, path)
        before = path.read_bytes() if path.exists() else None
        line = fails(capsys, monkeypatch, stage2, "--checkpoint", path)
        assert name in line
        assert (path.read_bytes() if path.exists() else None) == before
    assert not (tmp_path / "exploded").exists()
    # A stage 1 that finds something else in its place neither starts over nor overwrites it.
    broken = tmp_path / "run" / "checkpoint.pth"
    broken.parent.mkdir()
    broken.write_bytes(b"not a checkpoint")
    assert "cannot be read" in fails(capsys, monkeypatch, train, "--output", broken.parent)
    assert broken.read_bytes() == b"not a checkpoint"


def test_other_settings_in_the_same_output_are_refused_with_the_differences(
    capsys, monkeypatch, trained, small_root
):
    output, _ = trained
    before = (output / "checkpoint.pth").read_bytes()
    options = [*TINY, "--data-root", small_root, "--output", output, "--alpha", "0.2"]
    assert "alpha was 0.1, now 0.2" in fails(capsys, monkeypatch, train, *options)
    assert (output / "checkpoint.pth").read_bytes() == before
    assert "epochs was 2, now 3" in fails(
        capsys, monkeypatch, stage2, "--output", output, "--data-root", small_root, "--epochs", 3
    )


def test_ctrl_c_ends_in_one_line(capsys, monkeypatch):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as error:
        train.run(main)
    assert error.value.code == 130 and capsys.readouterr().err.count("\n") == 1


def test_a_flag_wins_over_the_recipe_and_the_rest_is_the_recipes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "0.025", "--alpha", "0"])
    args = train.parse_args()
    train.with_recipe(args, "stage1", 2478)
    recipe = DATASETS["fashion_mnist_lt"]["stage1"]
    assert args.lr == 0.025 and args.alpha == 0
    rest = recipe.keys() - {"lr", "alpha"}
    assert {name: getattr(args, name) for name in rest} == {name: recipe[name] for name in rest}


def test_the_learning_rate_is_in_proportion_to_the_batch_if_not_given(monkeypatch):
    for flags, lr in ((["--batch-size", "1024"], 0.4), (["--batch-size", "64", "--lr", "1"], 1)):
        monkeypatch.setattr(sys, "argv", ["train.py", "--dataset", "imagenet_lt", *flags])
        args = train.parse_args()
        train.with_recipe(args, "stage1", 115_846)
        assert args.lr == lr and args.queue_size == 65536


def test_learning_rate_warms_up_to_its_peak_and_falls_to_zero(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "0.4", "--epochs", "20"])
    args = train.parse_args()
    train.with_recipe(args, "stage1", 2478)
    args.warmup_epochs = 2
    rates = [train.learning_rate(step, args, 10) for step in range(200)]
    assert rates[0] == pytest.approx(0.02) and max(rates) == pytest.approx(0.4)
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[110] == pytest.approx(0.2, rel=1e-6) and rates[-1] < 1e-4
