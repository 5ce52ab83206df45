import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests run on the CPU; tests/gpu.py is for GPUs

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import data

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
TREE_COUNTS = {"train": [24, 12, 6, 3], "val": [2] * 4, "test": [3] * 4}


@pytest.fixture(scope="session")
def imagenet_tree(tmp_path_factory):
    """JPEGs of 64 x 48 pixels laid out like ImageNet-LT, one colour per class, with index files."""
    root = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for split, counts in TREE_COUNTS.items():
        lines = []
        for label, count in enumerate(counts):
            # As published: val images are of ImageNet's train/, test images of its val/.
            folder = root / ("val" if split == "test" else "train") / f"n0000000{label}"
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = random.integers(0, 90, (6, 8, 3)) + np.eye(4, 3)[label] * 150
                path = folder / f"{split}_{number}.JPEG"
                Image.fromarray(pixels.astype(np.uint8)).resize((64, 48)).save(path, quality=90)
                lines.append(f"{path.relative_to(root)} {label}\n")
        (root / f"ImageNet_LT_{split}.txt").write_text("".join(lines))
    return root


def folders(root, **splits):
    """Write images for each split, {class: number of images}; returns root."""
    for split, counts in splits.items():
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                Image.new("RGB", (9, 8)).save(root / split / name / f"{number}.png")
    return root


def set_argv(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a stage in this process, which saves the time of imports; returns what it printed."""

    def run(stage, *arguments):
        set_argv(monkeypatch, stage, *arguments)
        stage.main()
        return capsys.readouterr()

    return run


def command(monkeypatch, capsys, script, *arguments):
    """Run a script's main like its command; returns exit code, standard output and error."""
    set_argv(monkeypatch, script, *arguments)
    with pytest.raises(SystemExit) as end:
        data.run(script.main)
    return end.value.code, *capsys.readouterr()


def begin(*arguments, **options):
    """Start Python in the project's directory."""
    options = dict(cwd=HERE, env=ONE_THREAD, stderr=subprocess.PIPE) | options
    return subprocess.Popen([sys.executable, *map(str, arguments)], **options)


def checkpoint(output):
    """Stage 1's checkpoint without the settings that may differ between equal runs."""
    content = torch.load(output / "checkpoint.pth", weights_only=True)
    for name in ("output", "save_minutes"):
        content["args"].pop(name, None)
    return content


def records(output):
    """The header of a run's log, and its records without images_per_second."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return lines[0], [
        {k: v for k, v in line.items() if k != "images_per_second"} for line in lines[1:]
    ]


def states_equal(a, b):
    """Whether two state dicts, or parts of them, are bitwise equal."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return a == b


def pytest_configure(config):  # data.py also works without decode_jpeg
    config.addinivalue_line("filterwarnings", "ignore:The image decoding:DeprecationWarning")
