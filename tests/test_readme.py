"""The README is correct: its snippets run, and the code that it refers to exists."""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import eval as stage2
import train
from data import HERE

README = (HERE / "README.md").read_text()
RESULTS = (HERE / "tests" / "RESULTS.md").read_text()
LOSSES, LOAD = re.findall(r"```python\n(.*?)```", README + RESULTS, re.DOTALL)


def test_losses_snippet_runs():
    names = {}
    exec(LOSSES, names)
    assert names["query"].grad.abs().sum() > 0 and names["patch"].grad.abs().sum() > 0


def test_export_snippet_loads_a_network_with_the_accuracy_of_stage_2(tmp_path, monkeypatch, call):
    random = np.random.default_rng(0)
    for split, count in dict(train=8, val=2, test=12).items():
        for name in ("ant", "bee", "cat"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 255, (6, 7, 3), dtype=np.uint8)
                size = ((40, 90), (100, 90), (74, 111), (74, 98))[number % 4]
                path = tmp_path / split / name / f"{number}.{'jpg' if number % 3 else 'png'}"
                Image.fromarray(pixels).resize(size).save(path)
    monkeypatch.chdir(tmp_path)
    options = "--dataset imagefolder --data-root . --arch resnet18 --view-size 33 --patch-size 17"
    options += " --epochs 1 --warmup 0 --workers 0 --loss ce --output run --lr 0.01"
    call(train, *options.split())
    call(stage2, *"--output run --workers 0 --amp off --export weights.pth".split())
    results, names = json.loads(Path("run/results.json").read_text()), {}
    exec(LOAD, names)
    card, test = names["card"], data.load_dataset("imagefolder", tmp_path)["test"]
    assert card["classes"] == results["classes"] == ["ant", "bee", "cat"]
    images = test.views(range(36), None, argparse.Namespace(view_size=card["crop"]), 0)
    view = stage2.evaluation_view(images, argparse.Namespace(mean=card["mean"], std=card["std"]))
    right = (names["model"](view).argmax(1) == test.labels).view(3, 12).float()
    assert results["per_class"] == pytest.approx((100 * right.mean(1)).tolist())
    assert 0 < results["top1"] < 100


def test_flags_of_every_row_of_the_paper_are_valid(monkeypatch):
    table = README.partition("| | flags of train.py |")[2].partition("\n\n")[0]
    rows = re.findall(r"`(--.*?)`", table)
    assert len(rows) >= 6
    for flags in rows:
        monkeypatch.setattr(sys, "argv", ["train.py", "--dataset", "imagenet_lt", *flags.split()])
        train.parse_args()


def test_every_named_function_and_table_exists():
    named = re.findall(r"`(losses|models|data|train|eval)\.([A-Za-z0-9_.]+)`", README)
    named = [(module, name) for module, name in named if name != "py"]
    rows = README.partition("| paper | code |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(rows) >= 7 and all(any(f"`{m}.{n}`" in row for m, n in named) for row in rows)
    assert len(named) >= 30
    for module, name in named:
        place = importlib.import_module(module)
        for part in name.split("."):
            assert hasattr(place, part), f"README names {module}.{name}"
            place = getattr(place, part)
