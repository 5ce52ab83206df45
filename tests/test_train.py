"""Both stages as a user runs them: output, resuming, reproducibility and errors."""

import argparse
import itertools
import contextlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import benchmark
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from conftest import (
    LAUNCH,
    ONE_THREAD,
    TREE_COUNTS,
    begin,
    checkpoint,
    command,
    folders,
    records,
    set_argv,
    states_equal,
)
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval as stage2
import train
from data import HERE, BadInput, Batches, load_dataset
from models import Encoder

TINY = ["--epochs", "2", "--warmup", "0", "--batch-size", "64", "--patches", "1"]
TINY += ["--queue-size", "100", "--save-minutes", "0"]  # a checkpoint at every record
BALANCED = ["--classifier", "balanced"]
LARGE = ["--view-size", "33", "--patch-size", "17"]
# What makes training on the JPEGs of imagenet_tree affordable.
FILES = ["--dataset", "imagenet_lt", "--workers", "1", "--view-size", "64", "--patch-size", "32"]
FILES += ["--patches", "1", "--queue-size", "20", "--batch-size", "16", "--warmup", "0"]
FILES += ["--save-minutes", "0", "--arch", "resnet18"]


def python(*arguments, **options):
    options = dict(cwd=HERE, capture_output=True, text=True, timeout=200) | options
    return subprocess.run([sys.executable, *map(str, arguments)], **options)


@pytest.fixture(scope="module")
def small_root(tmp_path_factory):
    """A part of every class of the shipped set: 1/4 of train and val, 1/10 of test."""
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
    """One uninterrupted run of both stages: its directory, and what stage 2 printed."""
    output, printed = tmp_path_factory.mktemp("trained"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        for stage, *options in (
            (train, *TINY, "--data-root", small_root), (stage2, *BALANCED, "--epochs", 2)
        ):
            set_argv(patch, stage, *options, "--output", output)
            stage.main()
    return output, printed.getvalue()


# ------------------------------------------------------------------------ output of a run


def test_stage_1_writes_its_log_and_checkpoint(trained):
    output, _ = trained
    header, steps = records(output)
    assert header["command"].startswith("train.py") and header["versions"]["torch"]
    assert header["arguments"]["epochs"] == 2 and header["arguments"]["alpha"] == 0.1
    assert [r["epoch"] for r in steps] == [1, 2] and steps[-1]["step"] == 18
    for record in steps:
        assert record.keys() == {"epoch", "step", "loss", "dscl", "pbsd", "lr"}
        total = record["dscl"] + header["arguments"]["pbsd_weight"] * record["pbsd"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)
    saved = checkpoint(output)
    assert saved["step"] == 18 and saved["args"]["dataset"] == "fashion_mnist_lt"
    assert saved["queue"]["key_slots"].shape == (1, 100, 128)


def test_stage_2_reports_many_medium_and_few_on_test(trained):
    output, printed = trained
    results = json.loads((output / "results.json").read_text())
    assert results["counts"][0] == 250 and results["classes"][0] == "T-shirt"
    counts, per_class = np.array(results["counts"]), np.array(results["per_class"])
    groups = {"many": counts > 100, "few": counts < 20, "medium": (counts >= 20) & (counts <= 100)}
    for name, mask in groups.items():
        assert results[name] == pytest.approx(per_class[mask].mean())
    assert results["top1"] == pytest.approx(per_class.mean())  # a balanced test set
    assert results["top1"] <= results["top5"] <= 100 and results["top5"] > 50
    assert results["arguments"]["stage1"]["epochs"] == 2
    assert f"{results['top1']:.2f}" in printed and "many" in printed


def test_equal_seeds_give_bitwise_equal_results_and_others_do_not(
    trained, small_root, tmp_path, call
):
    output, _ = trained
    for seed in (0, 1):
        again = tmp_path / str(seed)
        options = ["--data-root", small_root, "--seed", seed, "--output", again]
        call(train, *TINY, *options)
        call(stage2, *options, *BALANCED, "--epochs", 2)
        results = [json.loads((o / "results.json").read_text()) for o in (output, again)]
        same = [
            records(output)[1] == records(again)[1],
            states_equal(checkpoint(output), checkpoint(again)),
            results[0]["per_class"] == results[1]["per_class"],
        ]
        assert same == ([True] * 3 if seed == 0 else [False] * 3)


def test_help_of_stage_2_shows_the_defaults_of_the_run(tmp_path, monkeypatch, capsys):
    args = dict(dataset="places_lt", data_root=None, index_dir=None, imbalance=None)
    train.save(tmp_path / "checkpoint.pth", dict(stage=train.STAGE, args=args))
    monkeypatch.setattr(sys, "argv", ["eval.py", "--output", str(tmp_path), "--help"])
    with pytest.raises(SystemExit):
        stage2.main()
    shown = capsys.readouterr().out
    assert "(default: places_lt)" in " ".join(shown.split()) and "(default: balanced)" in shown
    assert shown.startswith("usage: ") and shown.splitlines()[1] == ""  # one line


def test_progress_line_shows_the_remaining_time_in_80_columns(monkeypatch, capsys):
    monkeypatch.setattr(data, "CLEAR", "\r\x1b[K")
    monkeypatch.setattr("os.get_terminal_size", lambda _: os.terminal_size((80, 24)))
    progress = data.Progress(2280)
    progress.show(10, "epoch 119.5/120  loss 6.408  dscl 4.980  pbsd 4.761  1622 images/s")
    said = capsys.readouterr().err.replace(data.CLEAR, "")
    assert re.match(r"ETA \d:\d\d:\d\d  epoch", said) and len(said) < 80


@pytest.mark.parametrize("loss", ["scl", "ce", "la"])
def test_the_baselines_train_and_evaluate(loss, small_root, tmp_path, call):
    options = ["--data-root", small_root, "--output", tmp_path, "--epochs", 1]
    call(train, *options, *TINY[2:], "--loss", loss, "--pbsd-weight", 0)
    header, steps = records(tmp_path)
    assert "pbsd" not in steps[0] and ("dscl" in steps[0]) == (loss == "scl")
    assert header["arguments"]["loss"] == loss
    assert "all" in call(stage2, *options, *BALANCED).out
    alone = ["--checkpoint", tmp_path / "checkpoint.pth", "--output", tmp_path / "alone"]
    if loss == "scl":
        with pytest.raises(BadInput, match="--epochs 0: .* has no classifier"):
            call(stage2, *alone, "--epochs", 0)
        return
    own = ["--epochs", 0, "--prior", "training" if loss == "ce" else "balanced"]
    assert "classifier of stage 1" in call(stage2, *alone, *own).err
    results = json.loads((tmp_path / "alone" / "results.json").read_text())
    test = load_dataset("fashion_mnist_lt", small_root)["test"]
    encoder = Encoder("resnet_tiny", classes=10).eval()
    encoder.load_state_dict(checkpoint(tmp_path)["encoder"])
    cfg = benchmark.cfg_of("fashion_mnist_lt", train.VIEWS)
    view = stage2.evaluation_view(test.images[None], cfg)
    with torch.no_grad(), train.autocast(torch.device("cpu"), results["arguments"]["amp"]):
        right = encoder(view)[0][0].argmax(1) == test.labels
    assert results["top1"] == pytest.approx(100 * right.float().mean().item(), abs=0.3)
    assert results["val"] is None and not (tmp_path / "alone" / "classifier.pth").exists()
    with pytest.raises(BadInput, match="epochs was 1, now 0"):  # and earlier results are kept
        call(stage2, "--output", tmp_path, "--epochs", 0)


def test_logit_adjustment_adds_the_log_of_class_frequencies(
    small_root, tmp_path, call, monkeypatch
):
    checked, original = [], train.cross_entropy_step
    counts = load_dataset("fashion_mnist_lt", small_root)["train"].labels.bincount()

    def watched(model, **given):
        logits, labels = torch.randn(1, 64, 10), given["labels"]
        loss = original(lambda view: (logits, None, None), **given)["loss"]
        checked.append(F.cross_entropy(logits[0] + (counts / counts.sum()).log(), labels) - loss)
        return original(model, **given)

    monkeypatch.setattr(train, "cross_entropy_step", watched)
    call(train, "--data-root", small_root, "--output", tmp_path, *TINY, "--loss", "la")
    assert len(checked) == 18 and torch.stack(checked).abs().max() < 1e-5


@pytest.mark.parametrize("loss", ["dscl", "ce"])
def test_experts_are_trained_and_reported_separately(loss, small_root, tmp_path, call):
    options = ["--data-root", small_root, "--output", tmp_path, "--epochs", 1]
    call(train, *options, *TINY[2:], "--loss", loss, "--experts", 2)
    printed = call(stage2, *options[:4], "--penalty", 0.1).out
    results = json.loads((tmp_path / "results.json").read_text())
    first, second = results["experts"]
    assert first["per_class"] != second["per_class"]
    alone = [f"{e['all']:.2f} ± {e['standard_errors']['all']:.2f}" for e in (first, second)]
    assert f"each expert alone: {', '.join(alone)}\n" in printed
    with pytest.raises(BadInput, match="--export: torchvision has no networks of several experts"):
        call(stage2, *options[:4], "--export", tmp_path / "whole.pth")


def test_loss_is_the_mean_over_experts(monkeypatch):
    seen = {"dscl_loss": [], "pbsd_loss": []}
    for name, calls in seen.items():

        def watched(*rows, calls=calls, loss=getattr(train, name), **options):
            calls.append((loss(*rows, **options), rows))
            return calls[-1][0]

        monkeypatch.setattr(train, name, watched)
    args = benchmark.train_args("fashion_mnist_lt", experts=3, queue_size=200)
    part = benchmark.Ours(args, torch.device("cpu"))
    total = part.loss(*part.inputs())
    dscl, pbsd = (torch.stack([value for value, _ in calls]) for calls in seen.values())
    assert len(dscl) == len(pbsd) == 3 and dscl.unique().numel() == 3
    torch.testing.assert_close(total, dscl.mean() + args.pbsd_weight * pbsd.mean())
    for (_, rows), (_, of_pbsd) in zip(*seen.values()):  # query, key, labels, bank, its labels
        assert rows[0].shape == rows[1].shape == (128, 128) and rows[3].shape == (200, 128)
        assert torch.equal(of_pbsd[3], rows[3])
    # The queue holds the keys of each expert.
    keys = torch.stack([rows[1] for _, rows in seen["dscl_loss"]])
    newest = torch.arange(200, 328) % 200
    assert torch.equal(part.queue.keys[:, newest], keys)


def test_adjusted_classifier_is_measured_on_val_and_reproducible(
    trained, small_root, tmp_path, call
):
    options = ["--checkpoint", trained[0] / "checkpoint.pth", "--output"]
    results = []
    for name in "ab":
        said = call(stage2, *options, tmp_path / name).err
        results.append(json.loads((tmp_path / name / "results.json").read_text()))
        penalty = 10 / len(load_dataset("fashion_mnist_lt", small_root)["train"])
        assert results[-1]["penalty"] == penalty
        says = f"classifier adjusted, penalty {penalty:.3g}; val {results[-1]['val']:.2f} ± "
        assert says in said
        assert results[-1]["epoch"] is None and results[-1]["classifier"] == "adjusted"
    assert results[0]["per_class"] == results[1]["per_class"]
    model = torch.load(tmp_path / "a" / "model.pth", weights_only=True)["model"]
    encoder = Encoder("resnet_tiny", classes=10)
    encoder.load_state_dict(model)
    before = checkpoint(trained[0])["encoder"]
    for name, value in model.items():  # only the classifier has changed
        assert name.startswith("heads.") or torch.equal(value, before[name])
    for flags, says in (
        (["--lr", 1], "--lr: this flag is not for the classifier adjusted"),
        ([*BALANCED, "--penalty", 1], "--penalty: this flag is not for the classifier balanced"),
    ):
        with pytest.raises(BadInput, match=says):
            call(stage2, *options, tmp_path / "d", *flags)
    others = (trained[0], []), (tmp_path / "a", BALANCED), (tmp_path / "b", ["--penalty", 1])
    for place, flags in others:
        before = (place / "results.json").read_bytes()  # is never overwritten by another stage 2
        says = "results.json belongs to another run .*choose --checkpoint .* with another --output"
        with pytest.raises(BadInput, match=says):
            call(stage2, *options[:2], "--output", place, *flags)
        assert (place / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    "dataset, splits, reported, chosen",
    [
        ("inaturalist18", ("train", "val"), "val", None),
        ("imagefolder", ("train", "test"), "test", "val"),
    ],
)
def test_results_name_their_split_and_plots_and_weights_are_written(
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
    call(train, *output, *options, "--loss", "ce")
    writes = ["--plots", tmp_path / "plots", "--export", tmp_path / "new" / "whole.pth"]
    said = call(stage2, *output, *BALANCED, *writes).err
    whole = torch.load(tmp_path / "new" / "whole.pth", weights_only=True)
    torchvision.models.resnet18(num_classes=4).load_state_dict(whole)
    for name in ("accuracy", "activation"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as image:
            assert min(image.size) > 100 and len(image.convert("L").getcolors()) > 20
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["reported_on"], results["chosen_on"]) == (reported, chosen)
    assert (results["val"] is None) == (chosen is None) and results["epoch"] == 1
    names = ["n0000000%d", "class %d"][dataset == "imagefolder"]
    assert results["classes"] == [names % label for label in range(4)]
    assert f"on {reported}; classifier balanced, epoch 1" in said
    test = imagenet_tree / "val" / "n00000002"
    lines = call(stage2, *output[:2], "--workers", 0, "--predict", test).out.splitlines()
    assert len(lines) == 3 and json.loads(lines[0])["class"] in results["classes"]


@pytest.mark.parametrize("loss", ["dscl", "la"])
def test_predictions_match_the_accuracy_of_stage_2(loss, imagenet_tree, tmp_path, call, capsys):
    for path in imagenet_tree.glob("*/*/*.JPEG"):  # test images are in val/
        split = "train" if path.parts[-3] == "train" else "test"
        target = tmp_path / "data" / split / f"class {path.parent.name[-1]}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    lone = tmp_path / "data" / "train" / "class 9" / "alone.JPEG"  # a class without a test image
    lone.parent.mkdir()
    shutil.copy(path, lone)
    run, stages = tmp_path / "run", dict(dscl=["--penalty", 0.1], la=["--epochs", 0])
    options = ["--dataset", "small_imagefolder", "--data-root", tmp_path / "data", *TINY[2:-2]]
    options += ["--queue-size", 20, "--batch-size", 16, "--loss", loss]
    options += ["--experts", 2, "--lr", 0.02]
    call(train, *options, "--epochs", 2, "--output", run, "--workers", 0)
    printed = call(stage2, "--output", run, "--workers", 0, *stages[loss]).out
    assert "classes without a test image, left out: 1 of 5\n" in printed
    results = json.loads((run / "results.json").read_text())
    assert results["per_class"][4] is None and results["counts"][4] == 1
    assert results["val"] is None or results["val"] > 0  # chosen on the classes that val has

    # Prediction needs only the run's directory, which may be moved.
    run = run.rename(tmp_path / "moved")
    (run / "checkpoint.pth").unlink()
    files = (tmp_path / "data" / "test").rename(tmp_path / "images")
    shutil.rmtree(tmp_path / "data")
    printed = call(stage2, "--output", run, "--workers", 2, "--predict", files).out
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [Path(line["path"]) for line in lines] == sorted(files.glob("*/*"))
    for name, accuracy in zip(results["classes"][:4], results["per_class"]):
        of_class = [line for line in lines if Path(line["path"]).parent.name == name]
        right = sum(line["class"] == name for line in of_class)
        assert len(of_class) == 3 and accuracy == pytest.approx(100 * right / 3)
    for line in lines:
        values = [line["probability"], *line["next"].values()]
        assert len(values) == 5 and values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)  # of five classes
        assert {line["class"], *line["next"]} == set(results["classes"])

    said = call(stage2, "--checkpoint", run / "checkpoint.pth", "--workers", 0, "--predict", files)
    assert said.out == printed
    with pytest.raises(BadInput, match="model.pth was trained on small_imagefolder, not on places"):
        call(stage2, "--output", run, "--dataset", "places_lt", "--predict", files)

    # Files that cannot be read are named, and the others are predicted.
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    given = tmp_path / "broken.jpg", files / "class 0", tmp_path / "gone.jpg", files / "class 1"
    with pytest.raises(SystemExit) as end:
        call(stage2, "--output", run, "--workers", 0, "--predict", *given)
    out, said = capsys.readouterr()
    assert end.value.code == 2
    assert out.splitlines() == printed.splitlines()[:6] and said.count("\n") == 3
    assert f"{tmp_path}/broken.jpg cannot be read as an image" in said
    assert f"{tmp_path}/gone.jpg cannot be read as an image (No such file" in said
    (files / "class 0" / "a.heic").write_bytes(b"")
    said = call(stage2, "--output", run, "--workers", 0, "--predict", files / "class 0").err
    assert "class 0: 1 files are left out (1 .heic; first a.heic); only .jpg" in said
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as end:
        call(stage2, "--output", run, "--workers", 0, "--predict", tmp_path / "empty")
    assert end.value.code == 2 and "/empty holds no images" in capsys.readouterr().err


# ------------------------------------------------------------------------ resuming


def test_killed_run_resumes_and_ends_like_an_undisturbed_run(
    small_root, tmp_path, call, monkeypatch
):
    # A checkpoint at every second step, so that the kill comes within an epoch.
    code = "import train; train.LOG_EVERY = 2; train.run(train.main)"
    options = [*TINY[2:-2], "--epochs", 4, "--data-root", small_root, "--output"]
    saving = ["--save-minutes", 0]
    process = begin(
        "-c", code, *options, tmp_path, *saving, env=os.environ, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "checkpoint.pth").exists() or checkpoint(tmp_path)["step"] < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = checkpoint(tmp_path)["step"]
    assert 4 <= step < 36
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"epoch": 1, "st')  # a line cut off by a kill
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    assert f"from step {step} of 36" in call(train, *options, tmp_path).err
    call(train, *options, tmp_path / "calm")
    assert records(tmp_path)[1] == records(tmp_path / "calm")[1]
    assert states_equal(checkpoint(tmp_path), checkpoint(tmp_path / "calm"))


def test_two_processes_continue_a_run_of_one_and_torchrun_replaces_a_dead_one(
    small_root, tmp_path, call, monkeypatch
):
    arguments = [*TINY[2:-2], "--epochs", 8, "--data-root", small_root, "--output", tmp_path]
    monkeypatch.setattr(train, "check_finite", lambda tensors, step, lr: 1 / (step < 18))
    with pytest.raises(ZeroDivisionError):
        call(train, *arguments, "--save-minutes", 0)
    assert checkpoint(tmp_path)["step"] == 9
    code = "import train; train.LOG_EVERY = 1; train.run(train.main)"
    command = [*LAUNCH, "--max-restarts=1", "--no-python", sys.executable, "-c", code]
    # Otherwise restarted processes may find the addresses of the dead ones; see RESULTS.md.
    env = ONE_THREAD | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    # Checkpoints are 0.6 seconds apart, so that the kill finds the other process training.
    process = begin(*command, *arguments, "--save-minutes", 0.01, env=env)
    while checkpoint(tmp_path)["step"] == 9:
        assert process.poll() is None
        time.sleep(0.02)
    ranks = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, said
    assert re.search(r"-c \(rank .\): error: the connection to another process failed", said)
    assert "continues from the last checkpoint" in said
    assert said.count("from step") == 2 and checkpoint(tmp_path)["step"] == 72
    assert [record["step"] for record in records(tmp_path)[1]] == [9, *range(10, 73)]


def test_loaded_checkpoint_is_freed_before_training(
    trained, small_root, tmp_path, call, monkeypatch
):
    content, loaded, rates = checkpoint(trained[0]), [], []
    torch.save(content | dict(step=9), tmp_path / "checkpoint.pth")  # of 18

    def load(*arguments, keep=train.load):
        saved = keep(*arguments)
        parts = [*saved["encoder"].values(), saved["queue"]["key_slots"]]
        loaded.extend(map(weakref.ref, parts))
        return saved

    def learning_rate(*arguments, keep=train.learning_rate):
        assert loaded and all(tensor() is None for tensor in loaded)
        rates.append(keep(*arguments))
        return rates[-1]

    monkeypatch.setattr(train, "load", load)
    monkeypatch.setattr(train, "learning_rate", learning_rate)
    call(train, *TINY, "--data-root", small_root, "--output", tmp_path)
    assert len(rates) == 9


def test_stage_2_resumes_from_its_last_epoch(trained, tmp_path, call, monkeypatch):
    options = ["--checkpoint", trained[0] / "checkpoint.pth", *BALANCED, "--epochs", 4, "--output"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    call(stage2, *options, whole)

    def cut_short(path, content, keep=train.save):
        keep(path, content)
        assert content["epoch"] < 2, "cut"

    with monkeypatch.context() as cut, pytest.raises(AssertionError, match="cut"):
        cut.setattr(stage2, "save", cut_short)
        call(stage2, *options, halves)
    call(stage2, *options, halves)
    contents = [torch.load(o / "classifier.pth", weights_only=True) for o in (whole, halves)]
    for content in contents:
        content["args"].pop("output")
    assert states_equal(*contents)


def test_epochs_that_follow_from_other_steps_are_not_named():
    now = argparse.Namespace(steps=120, epochs=30)
    with pytest.raises(BadInput, match=r"another run \(steps was 60, now 120\)"):
        train.refuse_differences("log.jsonl", dict(steps=60, epochs=15), now)
    with pytest.raises(BadInput, match=r"another run \(epochs was 15, now 30\)"):
        train.refuse_differences("log.jsonl", dict(steps=120, epochs=15), now)


def test_different_settings_in_the_same_output_are_refused_and_listed(
    trained, small_root, tmp_path, call
):
    shutil.copytree(trained[0], tmp_path / "moved")
    output = tmp_path / "moved"  # a run may move
    options = ["--data-root", small_root, "--output", output]
    before = (output / "checkpoint.pth").read_bytes()
    with pytest.raises(BadInput, match="another run .alpha was 0.1, now 0.2.; choose another"):
        call(train, *TINY, *options, "--alpha", "0.2")
    assert (output / "checkpoint.pth").read_bytes() == before
    with pytest.raises(BadInput, match="epochs was 2, now 3"):
        call(stage2, *options, *BALANCED, "--epochs", 3)
    content = torch.load(output / "checkpoint.pth", weights_only=True)
    torch.save(content | dict(step=17), output / "checkpoint.pth")
    with pytest.raises(BadInput, match="stage1 step was 18, now 17"):
        call(stage2, *options, *BALANCED, "--epochs", 2)
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    with np.load(small_root / "fashion_mnist_lt.npz") as arrays:
        small = {name: array[1:] for name, array in arrays.items()}
    np.savez(fewer / "fashion_mnist_lt.npz", **small)
    with pytest.raises(BadInput, match="training_images was 620 images, hash .*, now 619 images"):
        call(train, *TINY, "--data-root", fewer, "--output", output)
    with pytest.raises(BadInput, match="checkpoint.pth was trained on 620 .* these are 619"):
        call(stage2, "--data-root", fewer, "--output", output)


def test_second_run_in_one_output_is_refused_before_the_first_has_saved(small_root, tmp_path, call):
    options = ["--epochs", 1, *TINY[2:-2], "--data-root", small_root, "--output", tmp_path]
    call(train, *options)
    (tmp_path / "checkpoint.pth").unlink()
    with pytest.raises(BadInput, match="log.jsonl belongs to another run .alpha was 0.1, now 0.2"):
        call(train, *options, "--alpha", "0.2")
    call(train, *options)
    assert checkpoint(tmp_path)["step"] == 9


def test_stage_2_compares_classes_and_training_images_but_not_val_and_test(tmp_path, call):
    of_test = dict(ant=3, bee=2)
    root = folders(tmp_path / "a", train=dict(ant=9, bee=9), val=dict(ant=3), test=of_test)
    options = ["--dataset", "small_imagefolder", "--data-root", root, "--workers", 0]
    options += ["--output", tmp_path / "run", "--epochs", 1, "--batch-size", 8, "--warmup", 0]
    call(train, *options)
    stage2s = ["--output", tmp_path / "run", "--workers", 0, "--penalty", 0.1]
    (root / "test" / "ant" / "0.png").unlink()
    shutil.copy(root / "val" / "ant" / "0.png", root / "val" / "ant" / "new.png")
    assert "4 images" not in call(stage2, *stage2s).out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["reported_counts"] == [2, 2]
    (root / "train" / "bee").rename(root / "train" / "angelshark")
    (root / "test" / "bee").rename(root / "test" / "angelshark")
    with pytest.raises(BadInput, match=r"are not those of training .\+ angelshark, - bee.: rename"):
        call(stage2, *stage2s)
    with pytest.raises(BadInput, match=r"another run .classes \+ angelshark, - bee."):
        call(train, *options)
    shutil.copytree(root / "train" / "ant", root / "train" / "bee")  # a third class
    with pytest.raises(BadInput, match=r"are not those of training .\+ angelshark.: rename"):
        call(stage2, *stage2s)
    shutil.rmtree(root / "train" / "bee")
    (root / "train" / "angelshark").rename(root / "train" / "bee")
    (root / "test" / "angelshark").rename(root / "test" / "bee")
    (root / "train" / "bee" / "8.png").rename(root / "train" / "bee" / "9.png")
    # Other training images: train again, or fit a classifier if nothing was held out of them.
    says = r"trained on 18 images, hash .* these are \d+ images, hash "
    given = "--checkpoint", tmp_path / "run" / "checkpoint.pth", *stage2s[2:]
    said = call(stage2, *given, "--output", tmp_path / "new").err
    assert re.search(says + ".*: the classifier is fitted on these, with the features of", said)
    ways = "train again with another --output; or put val and test images into folders"
    with pytest.raises(BadInput, match=f"training_images was .*, now .*; {ways}"):
        call(train, *options)
    shutil.rmtree(root / "val")
    with pytest.raises(BadInput, match=f"{says}.* could have been used for training; {ways}"):
        call(stage2, *stage2s)


@pytest.mark.parametrize("loss", ["dscl", "ce"])
def test_prior_of_training_multiplies_the_probabilities_by_the_frequencies(
    loss, small_root, tmp_path, call
):
    options = ["--data-root", small_root, "--output", tmp_path, "--epochs", 1, *TINY[2:]]
    call(train, *options, "--loss", loss, "--experts", 2)
    models, tables, temperatures = [], [], []
    for prior in ("balanced", "training"):
        own = ["--epochs", 0] if loss == "ce" else ["--penalty", 0.1]
        given = ["--checkpoint", tmp_path / "checkpoint.pth", "--output", tmp_path / prior]
        tables.append(call(stage2, *given, *own, "--prior", prior).out)
        results = json.loads((tmp_path / prior / "results.json").read_text())
        assert results["prior"] == prior
        temperatures.append(results["temperature"])
        state = torch.load(tmp_path / prior / "model.pth", weights_only=True)["model"]
        encoder = Encoder("resnet_tiny", experts=2, classes=10)
        encoder.load_state_dict(state)
        models.append(encoder.heads)
    frequencies = load_dataset("fashion_mnist_lt", small_root)["train"].labels.bincount().double()
    features = torch.randn(2, 5, 96)
    # Each model's probabilities are calibrated by a temperature of its own.
    logits = [t * heads(features).mean(0).double() for t, heads in zip(temperatures, models)]
    balanced, training = (of_model.softmax(1) for of_model in logits)
    expected = balanced * frequencies
    expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(training, expected, rtol=1e-5, atol=0)
    weighted = [float(table.partition("as in training")[2].split()[0]) for table in tables]
    assert weighted[1] > weighted[0]
    if loss == "ce":  # plain cross-entropy answers for the frequencies of training
        assert torch.equal(models[1][0].bias, checkpoint(tmp_path)["encoder"]["heads.0.bias"])


def test_probabilities_are_calibrated_on_val_and_predictions_stay(trained, tmp_path, call):
    given = ["--checkpoint", trained[0] / "checkpoint.pth", "--penalty", 0.1, "--output"]
    printed = call(stage2, *given, tmp_path / "a").out
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["temperature"] != 1 and results["classes"][0] == "T-shirt"
    before, after = results["calibration_error"].values()
    assert f"calibration error {after:.1f} %, before {before:.1f} %" in printed and after < before
    call(stage2, *given[:2], "--output", tmp_path / "b", *BALANCED, "--epochs", 1)
    assert json.loads((tmp_path / "b" / "results.json").read_text())["temperature"] > 0

    # The final classifier may see all images; the accuracies are those of the honest one.
    heads = torch.load(tmp_path / "a" / "model.pth", weights_only=True)["model"]["heads.0.weight"]
    said = call(stage2, *given, tmp_path / "a", "--fit-on", "all").err
    assert re.search("classifier of all [0-9]+ images for model.pth", said)
    again = json.loads((tmp_path / "a" / "results.json").read_text())
    assert again["fit_on"] == "all" and results["fit_on"] == "train"
    assert again["per_class"] == results["per_class"]
    model = torch.load(tmp_path / "a" / "model.pth", weights_only=True)["model"]
    assert 0.01 < (model["heads.0.weight"] - heads).abs().max() / heads.abs().max() < 1
    with pytest.raises(BadInput, match="--fit-on: this flag is not for the classifier balanced"):
        call(stage2, *given[:2], "--output", tmp_path / "b", *BALANCED, "--fit-on", "all")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_saved_at_its_next_record_and_goes_on(
    number, small_root, tmp_path, call, monkeypatch, capsys
):
    options = ["--data-root", small_root, *TINY[:-2], "--output"]
    call(train, *options, tmp_path / "whole")
    rate, default = train.learning_rate, signal.getsignal(signal.SIGINT)
    ticks = itertools.count()  # steps are fast, on any machine
    fast = argparse.Namespace(monotonic=lambda: next(ticks) / 1000)

    def stop(step, *given):
        if step in (3, 17):
            os.kill(os.getpid(), number)
        return rate(step, *given)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", stop)
        patch.setattr(train, "time", fast)
        code, _, said = command(patch, capsys, train, *options, tmp_path / "stopped")
        assert code == 130 and "saving a checkpoint at the next record" in said
        assert checkpoint(tmp_path / "stopped")["step"] == 9
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # the next: at once
        call(train, *options, tmp_path / "stopped")  # stopped at its last record, it is complete
    signal.signal(signal.SIGINT, default)
    assert states_equal(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "stopped"))
    assert records(tmp_path / "whole")[1] == records(tmp_path / "stopped")[1]


def test_slow_steps_are_saved_at_once_after_a_stop(small_root, tmp_path, call, monkeypatch):
    rate, clock = train.learning_rate, [0]

    def learning_rate(step, *given):
        clock[0] += 20  # seconds a step: torchrun would not wait for nine
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, *given)

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    monkeypatch.setattr(train, "time", argparse.Namespace(monotonic=lambda: clock[0]))
    with pytest.raises(KeyboardInterrupt, match="saved at epoch 0.4/2; the same command continues"):
        call(train, *TINY[:-2], "--data-root", small_root, "--output", tmp_path)
    assert checkpoint(tmp_path)["step"] == 4


def test_a_run_that_can_no_longer_read_its_images_saves_first(
    small_root, tmp_path, call, monkeypatch, capsys
):
    options, views = ["--data-root", small_root, *TINY[:-2], "--output"], data.ImageArrays.views
    call(train, *options, tmp_path / "whole")

    def fail(dataset, *given, reads=[]):
        reads.append(None)
        if len(reads) == 6:
            raise BadInput("a.jpg cannot be read as an image")
        return views(dataset, *given)

    with monkeypatch.context() as patch:
        patch.setattr(data.ImageArrays, "views", fail)
        code, _, said = command(patch, capsys, train, *options, tmp_path / "broken")
    assert code == 2 and said.endswith("error: a.jpg cannot be read as an image\n")
    assert checkpoint(tmp_path / "broken")["step"] == 5
    call(train, *options, tmp_path / "broken")
    assert states_equal(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "broken"))


def test_messages_that_nobody_can_read_are_dropped(small_root, tmp_path, call, monkeypatch):
    class Gone:  # a closed terminal; a pipe whose reader has gone
        def write(self, text):
            raise error

        def flush(self):
            raise error

        def isatty(self):
            return False

    options = [*TINY, "--data-root", small_root, "--output"]
    for n, error in enumerate((OSError(5, "Input/output error"), BrokenPipeError(32, "Broken"))):
        monkeypatch.setattr(sys, "stderr", Gone())
        set_argv(monkeypatch, train, *options, tmp_path / str(n))
        train.run(train.main)
        assert checkpoint(tmp_path / str(n))["step"] == 18


def test_a_notebook_and_closed_streams_are_no_errors():
    code = "import io, sys\nclass Stream(io.TextIOBase):\n    def write(self, text): pass\n"
    code += "sys.stdout = Stream()\nimport data\ndata.run(lambda: print('all is well'))"
    assert python("-c", code).stderr == ""
    code = "import data; data.run(lambda: (print('x'), data.say('heard')))"
    for stream, heard in ((1, "heard\n"), (2, "")):  # closed before Python starts
        shell = ["bash", "-c", f'"$0" -c "$1" {stream}>&-', sys.executable, code]
        done = subprocess.run(shell, cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == heard


def test_two_runs_in_one_output_at_the_same_time_are_refused(small_root, tmp_path):
    arguments = ["train.py", *TINY[2:-2], "--data-root", small_root, "--output", tmp_path]
    first = begin(*arguments, "--epochs", 400, text=True)
    next(line for line in first.stderr if "from step" in line)
    second = python(*arguments, "--epochs", 400)
    assert second.returncode == 2
    assert f"error: another run is writing to {tmp_path}: wait for its end" in second.stderr
    first.kill()
    first.communicate()
    assert train.lock_output(tmp_path)  # a dead process has no lock


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_several_processes_without_torchrun_are_refused(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "4")
    says = f"the environment has {name}=4: every process would be a run of its own; let srun or"
    assert says in fails(capsys, monkeypatch, train, "--output", tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(name, "1")  # an interactive shell of Slurm
    assert train.start(benchmark.cfg_of("fashion_mnist_lt", device="cpu", amp="off"))[1] == 1


def test_float32_is_not_bfloat16_where_the_environment_asks_for_it():
    # oneDNN reads it when torch is loaded.
    code = ("import os, sys\nclass Watch:\n    def find_spec(self, name, *given):\n"
            "        if name == 'torch': print([n for n in os.environ if 'FPMATH' in n])\n"
            "sys.meta_path.insert(0, Watch())\nimport %s")
    env = os.environ | dict(DNNL_DEFAULT_FPMATH_MODE="BF16", ONEDNN_DEFAULT_FPMATH_MODE="BF16")
    for script in ("data", "train", "eval"):
        assert python("-c", code % script, env=env).stdout == "[]\n"


def test_a_full_disk_is_named_as_such(tmp_path, monkeypatch):
    def fail(content, file):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 1 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(BadInput, match="a.pth cannot be written .No space left on device.; an"):
        train.save(tmp_path / "a.pth", {})


def test_runs_on_class_folders_have_steps_instead_of_epochs(tmp_path, call):
    folders(tmp_path, train=dict(ant=20, bee=20))
    options = ["--dataset", "small_imagefolder", "--data-root", tmp_path, "--batch-size", 8]
    options += ["--steps", 3]
    for loss, epochs in (("dscl", 1), ("la", 2)):  # 3 batches an epoch; la has twice the steps
        call(train, *options, "--workers", 0, "--loss", loss, "--output", tmp_path / loss)
        assert checkpoint(tmp_path / loss)["args"]["epochs"] == epochs
        assert checkpoint(tmp_path / loss)["step"] == 3 * epochs


def test_diverging_run_stops_and_keeps_its_last_good_checkpoint(
    small_root, tmp_path, call, monkeypatch
):
    arguments, rate = [*TINY, "--data-root", small_root, "--output", tmp_path], train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda s, *a: 1e30 if s == 12 else rate(s, *a))
    with pytest.raises(BadInput, match="not finite at step 18.* was left unchanged"):
        call(train, *arguments)
    assert checkpoint(tmp_path)["step"] == 9
    assert all(v.isfinite().all() for v in checkpoint(tmp_path)["encoder"].values())


def test_full_disk_does_not_damage_the_last_good_checkpoint(small_root, tmp_path, call):
    arguments = ["--data-root", small_root, "--output", tmp_path]
    call(train, *TINY, *arguments)
    good = (tmp_path / "checkpoint.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for stage in (train, stage2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(BadInput, match=r"\.pth cannot be written"):
                if stage is train:
                    train.save(tmp_path / "checkpoint.pth", checkpoint(tmp_path))
                else:
                    call(stage2, *arguments, *BALANCED, "--epochs", 1)
            with pytest.raises(BadInput, match="whole.pth cannot be written"):
                stage2.export(tmp_path / "whole.pth", Encoder("resnet_tiny", classes=10), None, [])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "checkpoint.pth").read_bytes() == good
        assert not list(tmp_path.glob("*.new")) and not (tmp_path / "classifier.pth").exists()


# ------------------------------------------------------------------------ several processes


def test_two_hosts_and_four_processes_match_one_process_and_shuffle_keys(small_root, tmp_path):
    options = ["--data-root", small_root, "--epochs", 1, *TINY[2:], "--amp", "off"]
    options += ["--arch", "resnet_small", "--momentum-encoder", "0.99", "--output"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-id=1"]
    hosts += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    runs, four = [], [*LAUNCH[:-1], "--nproc_per_node=4"]
    for name, commands in dict(one=[[]], two=[hosts] * 2, four=[four]).items():
        output = tmp_path / name
        started = [begin(*command, "tests/ranks.py", *options, output) for command in commands]
        said = [process.communicate(timeout=150)[1].decode() for process in started]
        assert not any(process.returncode for process in started), said
        speakers = sum(f"{dict(one=1, two=2, four=4)[name]} x cpu" in text for text in said)
        assert speakers == 1  # rank 0
        runs.append((checkpoint(output), records(output)[1]))
    (one, log), *others = runs
    assert log[0]["step"] == 9
    for state, log_of_several in others:
        assert state["queue"]["_extra_state"] == 9 * 64  # the keys of all ranks
        assert log_of_several[0] == pytest.approx(log[0], rel=1e-4)
        for name in ("encoder", "key_encoder", "queue"):
            torch.testing.assert_close(state[name], one[name], rtol=1e-3, atol=1e-4)
    for name, world in (("two", 2), ("four", 4)):
        first, *ranks = (
            torch.load(tmp_path / name / f"rank{r}", weights_only=True) for r in range(world)
        )
        assert len(first["states"]) == 2 and len(first["moved"]) == 9
        assert all(states_equal(first["states"], rank["states"]) for rank in ranks)
        # Shuffle BN: in most rows the key is of another image than the query.
        assert min(first["moved"] + sum((rank["moved"] for rank in ranks), [])) > 0.5


def test_port_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        first = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
        first |= dict(LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
        done = python("train.py", "--output", tmp_path, env=os.environ | first)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"port: {port}" in done.stderr and "address already in use" in done.stderr


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(BadInput, match="8 processes, but 2 GPUs on this host"):
        train.start(benchmark.cfg_of("fashion_mnist_lt", device="auto", amp="auto"))


@pytest.mark.parametrize("variables", [["WORLD_SIZE"], ["RANK", "WORLD_SIZE", "LOCAL_RANK"]])
def test_half_of_the_variables_of_torchrun_are_refused(variables, capsys, monkeypatch, tmp_path):
    for name in variables:  # as set by some Slurm scripts
        monkeypatch.setenv(name, "1")
    says = f"has {', '.join(variables)}, but not "
    assert says in fails(capsys, monkeypatch, train, "--output", tmp_path)
    assert not list(tmp_path.iterdir())


def test_float32_stays_float32_where_the_environment_asks_for_tf32(monkeypatch):
    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    train.start(benchmark.cfg_of("fashion_mnist_lt", device="cpu", amp="off"))
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


def test_tests_do_not_use_gpus():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ONE_THREAD["CUDA_VISIBLE_DEVICES"] == ""


def test_gather_makes_tensors_contiguous_and_concatenates_them(monkeypatch):
    def all_gather(parts, tensor):
        assert all(part.is_contiguous() for part in [*parts, tensor])
        for rank, part in enumerate(parts):
            part.copy_(tensor + rank)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    images = torch.randint(200, (4, 6, 5, 3)).byte().permute(0, 3, 1, 2)  # channels last
    assert torch.equal(train.gather(images), torch.cat([images, images + 1]))


def test_running_statistics_are_averaged_over_processes(monkeypatch):
    encoder = Encoder("resnet_small")
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    train.average_statistics(encoder)  # unchanged with one process
    assert states_equal(before, dict(encoder.named_buffers()))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train, "gather", lambda rows: torch.cat([rows, rows + 2]))
    train.average_statistics(encoder)
    for name, value in encoder.named_buffers():
        torch.testing.assert_close(value, before[name] + value.is_floating_point())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_check_finite_finds_bad_weights_in_a_few_launches(wrong):
    tensors = [torch.full((3, 2), 1e30), *(torch.randn(7) for _ in range(50))]
    with benchmark.Launches() as launches:
        train.check_finite(tensors, 1, 0.1)
    assert launches.count < 10
    tensors[30][2] = wrong
    with pytest.raises(BadInput, match="not finite at step 7"):
        train.check_finite(tensors, 7, 0.1)


@pytest.mark.parametrize("minutes, steps", [(0.9, [18]), (1.1, [9, 18])])
def test_end_of_an_epoch_is_saved_if_a_minute_has_passed(
    minutes, steps, small_root, tmp_path, call, monkeypatch
):
    clock, saved, save, rate = [0], [], train.save, train.learning_rate

    def learning_rate(step, *given):
        clock[0] = 60 * minutes * (step + 1) // 9  # 9 steps an epoch
        return rate(step, *given)

    monkeypatch.setattr(train, "time", argparse.Namespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(train, "learning_rate", learning_rate)
    monkeypatch.setattr(
        train, "save", lambda path, content: (saved.append(content), save(path, content))
    )
    averaged = []  # before every record, and so before every checkpoint
    monkeypatch.setattr(train, "average_statistics", lambda encoder: averaged.append(len(saved)))
    call(train, *TINY[:-2], "--data-root", small_root, "--output", tmp_path)
    assert [content["step"] for content in saved if isinstance(content, dict)] == steps
    assert len(averaged) == 2 and averaged[-1] == len(saved) - 1


def test_imagenet_lt_trains_and_evaluates_in_two_processes(imagenet_tree, tmp_path):
    options = ["--data-root", imagenet_tree, "--output", tmp_path, "--epochs", 1]
    done = python(*LAUNCH, "train.py", *FILES, *options, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert "Grad strides" not in done.stderr and "2 x cpu" in done.stderr
    saved, (header, steps) = checkpoint(tmp_path), records(tmp_path)
    assert saved["step"] == 2 and saved["queue"]["_extra_state"] == 2 * 16
    assert [record["step"] for record in steps] == [2]
    assert header["arguments"]["images"] == {s: sum(c) for s, c in TREE_COUNTS.items()}
    stage2 = ["eval.py", "--output", tmp_path, "--epochs", 1, "--batch-size", 16, "--workers", 1]
    done = python(*LAUNCH, *stage2, "--bn", "train", env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["counts"] == TREE_COUNTS["train"] and results["many"] is None
    assert (results["reported_on"], results["chosen_on"]) == ("test", "val")
    rights = np.array(results["per_class"]) * 3 / 100  # of three test images a class
    assert np.allclose(rights, rights.round()) and results["top5"] == 100  # none counted twice


def test_headline_command_needs_no_flag_for_images_in_datasets(imagenet_tree, tmp_path):
    for script in HERE.glob("*.py"):
        (tmp_path / script.name).symlink_to(script)
    where = tmp_path / "datasets" / "imagenet_lt"  # as in the README: links and copied index files
    where.mkdir(parents=True)
    for split in ("train", "val"):
        (where / split).symlink_to(imagenet_tree / split)
    for index in imagenet_tree.glob("*.txt"):
        shutil.copy(index, where)
    # Its steps would take minutes here: stop it when it has begun.
    command = [*LAUNCH, "train.py", "--dataset", "imagenet_lt"]
    process = begin(*command, cwd=tmp_path, text=True)
    said = []
    for line in process.stderr:
        said.append(line)
        if "from step" in line or "error" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert "resnet50 on imagenet_lt, 45 images, from step 0 of 200, 1 per epoch; 2 x" in said[-1]
    assert (tmp_path / "runs" / "imagenet_lt" / "log.jsonl").exists()
    shutil.rmtree(where)
    done = python("train.py", "--dataset", "imagenet_lt", cwd=tmp_path)
    says = "train.py: error: datasets/imagenet_lt is not a directory: put or link the images of "
    assert done.returncode == 2 and done.stderr.startswith(says)


def test_sigterm_to_all_processes_of_a_job_saves_a_checkpoint(imagenet_tree, tmp_path):
    command = ["train.py", *FILES, "--data-root", imagenet_tree, "--output", tmp_path]
    process = begin(*command, "--epochs", 99, text=True, start_new_session=True)
    next(line for line in process.stderr if "epoch" in line and "ETA" in line)
    os.killpg(process.pid, signal.SIGTERM)  # the worker gets it, too
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and said.startswith("saving a checkpoint at the next record")
    assert 0 < checkpoint(tmp_path)["step"] < 99


def test_a_bug_ends_the_process_though_its_workers_ignore_sigterm(imagenet_tree, tmp_path):
    arguments = ["train.py", *FILES, "--data-root", imagenet_tree, "--output", tmp_path]
    code = f"import sys, train\nsys.argv = {list(map(str, arguments))}\n"
    code += "train.learning_rate = lambda *given: 1 / 0\ntrain.run(train.main)"
    done = python("-c", code)  # it would wait for them forever
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_unreadable_image_stops_both_stages_and_is_named(imagenet_tree, tmp_path, call):
    root, output = tmp_path / "data", ["--output", tmp_path / "run", "--epochs", 1]
    shutil.copytree(imagenet_tree, root)
    of_stage1 = [*FILES, "--data-root", root, *output]
    for stage, arguments, name in ((train, of_stage1, "train_7"), (stage2, output, "val_1")):
        broken, script = root / "train" / "n00000001" / f"{name}.JPEG", f"{stage.__name__}.py"
        whole = broken.read_bytes()
        broken.write_bytes(b"no image")
        command, says = [script, *arguments, "--workers", 1], f"{broken} cannot be read as an image"
        alone = begin(*command, text=True)
        other = ["--output", tmp_path / "two"] if stage is train else []
        two = begin(*LAUNCH, *command, *other, text=True)
        said = alone.communicate(timeout=100)[1]  # a worker process decodes
        assert alone.returncode == 2 and f"{script}: error: {says}" in said, said
        assert "Traceback" not in said
        said = two.communicate(timeout=100)[1]
        assert two.returncode == 1, said  # torchrun's own
        assert re.search(rf"{script} \(rank [01]\): error: {re.escape(says)}", said)
        broken.write_bytes(whole)
        call(stage, *arguments, "--workers", 0)  # with the file as it was the command succeeds


# ------------------------------------------------------------------------ the step


class HostReads(TorchDispatchMode):
    """Records how many steps have begun each time the host waits for a tensor's value."""

    def __init__(self, begun):
        super().__init__()
        self.begun, self.seen = begun, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indexed = function.overloadpacket.__name__ in ("index", "index_put_", "_index_put_impl_")
        if indexed:  # a mask's values decide the result's size, integers do not
            waits = any(i is not None and i.dtype == torch.bool for i in args[1])
        else:
            tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
            waits = tags & set(function.tags)
        if waits:
            self.seen.append(len(self.begun))
        return function(*args, **(kwargs or {}))


def test_steps_never_read_values_back_and_images_are_channels_last(
    small_root, tmp_path, call, monkeypatch
):
    views, conv, begun, layouts = data.query_views, torch.nn.Conv2d.forward, [], set()

    def beginning(*inputs):
        begun.append(None)
        return views(*inputs)

    def watched(module, images):
        layouts.add(images.is_contiguous(memory_format=torch.channels_last))
        return conv(module, images)

    monkeypatch.setattr(data, "query_views", beginning)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    with HostReads(begun) as reads:
        call(train, *TINY, "--data-root", small_root, "--output", tmp_path)
    assert len(begun) == 18 and layouts == {True}
    assert {9, 18} <= set(reads.seen) <= {0, 9, 18}  # set-up, and the log at the epochs' ends


def test_bfloat16_is_chosen_if_the_processor_supports_it(monkeypatch):
    def precision(amp, **able):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
        args = benchmark.cfg_of("fashion_mnist_lt", device="cpu", amp=amp)
        train.start(args)
        return args.amp

    assert precision("auto", avx512_bf16=True) == precision("auto", amx_bf16=True) == "bf16"
    assert precision("off", amx_bf16=True) == precision("auto", avx2=True) == "off"


def test_losses_in_bfloat16_match_float32_up_to_rounding():
    values = []
    for amp in ("off", "bf16"):
        args = benchmark.train_args("fashion_mnist_lt", amp=amp)
        part = benchmark.Ours(args, torch.device("cpu"))
        values.append(part.loss(*part.inputs()))
        values[-1].backward()
        assert all(p.grad.dtype == torch.float32 for p in part.encoder.parameters())
    assert values[0] != values[1] and values[1].dtype == torch.float32
    torch.testing.assert_close(values[1], values[0], rtol=0.01, atol=0)


def test_memory_of_a_step_does_not_grow_with_the_queue():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import benchmark\n"
        "args = benchmark.train_args('imagenet_lt', queue_size=int(sys.argv[1]), view_size=64)\n"
        "print(benchmark.peak_megabytes(lambda: benchmark.step_of('ours', args, 'cpu'), 'cpu'))"
    )
    sizes = (65536, 2**20)
    both = [begin("-c", code, size, stdout=subprocess.PIPE) for size in sizes]
    small, large = (float(process.communicate()[0]) for process in both)
    # Without the queue itself (512 MB), which exists before; one [88, K] matrix has 352 MB.
    assert large - small < 100


def test_training_batches_do_not_depend_on_workers_and_processes(imagenet_tree):
    train_set = load_dataset("imagenet_lt", imagenet_tree)["train"]
    cfg = benchmark.cfg_of("imagenet_lt", train.VIEWS, view_size=32)

    def batches(workers, rank=0, world=1):
        sampler = Batches(train_set.labels, 16, 2, seed=0, rank=rank, world=world)
        crops = data.BatchDataset(train_set, cfg, 2)
        return data.load_batches(crops, sampler, workers, torch.device("cpu"))

    shares = zip(batches(0, 0, 2), batches(0, 1, 2))
    for (images, labels), (more, more_labels), share in zip(batches(0), batches(2), shares):
        assert torch.equal(images, more) and torch.equal(labels, more_labels)
        assert torch.equal(images, torch.cat([images for images, _ in share], dim=1))
        assert images.dtype == torch.uint8 and images.shape == (2, 16, 3, 32, 32)


def arguments_of(monkeypatch, *flags):
    set_argv(monkeypatch, train, *flags)
    return train.parse_args()


def test_flags_override_the_settings_of_the_data_set(monkeypatch):
    args = arguments_of(monkeypatch, "--dataset", "places_lt", "--lr", "0.025", "--alpha", "0")
    assert args.lr == 0.025 and args.alpha == 0 and args.output == Path("runs/places_lt")
    cfg = vars(benchmark.cfg_of("places_lt", train.VIEWS, train.STAGE1))
    rest = cfg.keys() - {"lr", "alpha"}
    assert {name: getattr(args, name) for name in rest} == {name: cfg[name] for name in rest}


def test_learning_rate_scales_with_batch_warms_up_and_falls_to_zero(monkeypatch):
    flags = ["--lr", "0.4", "--epochs", "20", "--warmup", "0.1", "--batch-size", "512"]
    args = arguments_of(monkeypatch, *flags)
    rates = [train.learning_rate(step, 10, args) for step in range(200)]
    assert rates[0] == pytest.approx(0.04) and max(rates) == pytest.approx(0.8)
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[110] == pytest.approx(0.4, rel=1e-6) and rates[-1] < 1e-4


# ------------------------------------------------------------------------ errors


def fails(capsys, monkeypatch, stage, *arguments):
    """The one line that a stage prints when it refuses to run."""
    code, out, said = command(monkeypatch, capsys, stage, *arguments)
    assert code == 2 and not out
    said = re.sub(r"^\d+ classes: .*\n", "", said)  # said before the error
    assert said.count("\n") == 1 and ": error: " in said
    return said


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--alpha", "2"], "--alpha: must be from 0 to 1, got 2"),
        (["--steps", "500"], "--steps 500: --epochs is 120; --epochs 0 uses --steps"),
        (["--temperature", "nan"], "--temperature: must be from 0.001 to 1000"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--warmup", "2"], "--warmup: must be from 0 to 1, got 2"),
        (["--seed", "1" + 23 * "0"], "--seed: must be from 0 to"),
        (["--experts", "99999"], "--experts: must be from 1 to 16, got 99999"),
        (["--queue-size", "100000000000"], "--queue-size: must be from 0 to 1e+07"),
        (["--patch-scale", "0.6", "0.05"], "--patch-scale: the smaller value must come first"),
        (["--loss", "triplet"], "--loss: invalid choice"),
        (["--data-root", "nowhere"], "nowhere is not a directory: put or link the images of"),
        (["--views", "nowhere/views.png"], "nowhere/views.png: No such file or directory"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--local-rank=0"], "distributed.launch is not supported: start processes by torchrun"),
        (["--imbalance", "10"], "--imbalance and --download are for cifar10_lt"),
        (["--pretrained", "none.pth", "--arch", "resnet18", *LARGE], "a file of resnet18 weights"),
        (["--arch", "resnet18"], "--view-size 20: resnet18 needs at least 33 pixels"),
        (["--batch-size", "1"], "--batch-size 1: BatchNorm needs two images a process"),
        (["--arch", "resnet18", *LARGE[:2]], "--patch-size 8: resnet18 needs at least 17 pixels"),
        (["--output", HERE / "README.md" / "run"], "README.md/run: Not a directory"),
    ],
)
def test_stage_1_refuses_bad_flags_in_one_line(arguments, says, capsys, monkeypatch, tmp_path):
    assert says in fails(capsys, monkeypatch, train, "--output", tmp_path, *arguments)


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_unusable_checkpoint_is_named_and_kept(capsys, monkeypatch, trained, tmp_path):
    whole = (trained[0] / "checkpoint.pth").read_bytes()
    (tmp_path / "truncated.pth").write_bytes(whole[:5000])
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save(
        {"stage": train.STAGE, "code": Bomb(tmp_path / "exploded")}, tmp_path / "pickle.pth"
    )
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("truncated.pth", "text.pth", "pickle.pth", "other.pth", "nothing.pth"):
        path = tmp_path / name
        before = path.read_bytes() if path.exists() else None
        line = fails(capsys, monkeypatch, stage2, "--checkpoint", path)
        says = "cannot be read (No such file" if before is None else "is not a file of stage 1"
        assert f"{path} {says}" in line
        assert (path.read_bytes() if path.exists() else None) == before
    line = fails(capsys, monkeypatch, stage2, "--checkpoint", tmp_path)  # a run's directory
    assert f"{tmp_path} cannot be read (Is a directory)" in line
    assert not (tmp_path / "exploded").exists()
    # If its checkpoint is another file, stage 1 neither starts over nor overwrites it.
    broken = tmp_path / "run" / "checkpoint.pth"
    broken.parent.mkdir()
    broken.write_bytes(b"not a checkpoint")
    line = fails(capsys, monkeypatch, train, "--output", broken.parent)
    assert "is not a file of stage 1" in line
    assert broken.read_bytes() == b"not a checkpoint"


NCCL = "NCCL error in: a.cpp:1, unhandled system error\nncclSystemError: failed.\nLast error:\n"
WORKER = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"


@pytest.mark.parametrize(
    "error, code, says, goes_on",
    [
        (KeyboardInterrupt(), 130, "interrupted", True),
        (torch.OutOfMemoryError("CUDA is full.\nx"), 2, "CUDA is full..; use a smaller --b", False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), 2, "GPU is out of memory", False),
        (RuntimeError("unable to find an engine to execute this computation"), 2, "memory", False),
        (RuntimeError(WORKER), 2, "Bus error.* --ipc=host .* or use --workers 0", False),
        (RuntimeError("unable to write to </torch_7>: No space left"), 2, "--workers 0", False),
        (dist.DistBackendError(NCCL + "connect to a failed\n"), 1, "connect to a failed", False),
        (dist.DistBackendError(NCCL + "remote process exited"), 1, "remote process exited", True),
        (RuntimeError("[gloo/pair.cc] Connection closed by peer"), 1, "closed by peer", True),
        (dist.DistNetworkError("port: 29500, address already in use"), 1, "port: 29500", False),
    ],
    ids="ctrl-c memory cudnn engine worker shared network lost lost-by-gloo port".split(),
)
def test_errors_that_are_not_bugs_print_one_line(error, code, says, goes_on, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        train.run(main)
    said = capsys.readouterr().err
    assert end.value.code == code and said.count("\n") == 1
    assert re.search(says, said)
    assert ("the same command continues from the last checkpoint" in said) == goes_on


@pytest.mark.parametrize(
    "text", ["a bug", "Caught RuntimeError in DataLoader worker process 0.", "in /torch_a/b.py"]
)
def test_bugs_are_shown_with_their_traceback(text):
    def main():
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=text):
        train.run(main)


def test_unwritable_output_is_refused_before_stage_2_and_deleted_output_is_named(
    capsys, monkeypatch, trained, tmp_path
):
    monkeypatch.setattr(stage2, "train_classifier", None)  # must not be reached
    for flag in ("--plots", "--output"):
        path, checkpoint = HERE / "README.md" / "a", trained[0] / "checkpoint.pth"
        says = fails(capsys, monkeypatch, stage2, "--checkpoint", checkpoint, flag, path)
        assert says.startswith(f"eval.py: error: {HERE}/README.md") and "Not a directory" in says
    with pytest.raises(BadInput, match="/deleted/checkpoint.pth cannot be written .No such file"):
        train.save(tmp_path / "deleted" / "checkpoint.pth", {})


def test_batch_size_is_lowered_to_fit_a_small_training_set(tmp_path, call):
    folders(tmp_path, train=dict(ant=20, bee=20))
    options = ["--dataset", "small_imagefolder", "--data-root", tmp_path, "--epochs", 1]
    options += ["--output", tmp_path / "run", "--workers", 0, "--warmup", 0]
    lowered = "--batch-size 128 is lowered to 16: the training set has 28 images\n"
    assert re.search("^" + lowered, call(train, *options).err, re.MULTILINE)
    assert checkpoint(tmp_path / "run")["args"]["batch_size"] == 16
    call(stage2, *options[4:8], "--workers", 0, *BALANCED)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["arguments"]["batch_size"] == 16 and results["counts"] == [14, 14]
    assert results["reported_counts"] == [4, 4]
