"""Runs train.py, alone or under torchrun, and saves the final state of each process to a file.

BatchNorm stays in eval mode: in train mode it would normalise by the images of one process.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train

held, moved = [], []


def kept(kind):
    def make(*shape):
        held.append(kind(*shape).train())
        return held[-1]

    return make


def shuffle(batch, images, original=train.ShuffledBatch.shuffle):
    of_keys = original(batch, images)
    moved.append((of_keys != images).flatten(1).any(1).float().mean().item())
    return of_keys


torch.nn.BatchNorm2d.train = lambda norm, mode=True: torch.nn.Module.train(norm, False)
train.Encoder, train.Queue = kept(train.Encoder), kept(train.Queue)
train.ShuffledBatch.shuffle = shuffle
train.run(train.main)
output = Path(sys.argv[sys.argv.index("--output") + 1])
content = dict(states=[part.state_dict() for part in held], moved=moved)
torch.save(content, output / f"rank{os.environ.get('RANK', 0)}")
