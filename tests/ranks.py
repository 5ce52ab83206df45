"""train.py as test_train.py runs it under torchrun: what each process holds goes to a file."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train

queues, views, encoders = [], [], []


class Queue(train.Queue):
    def put(self, keys, labels):
        super().put(keys, labels)
        queues.append((self.keys.clone(), self.labels.clone()))


class Encoder(train.Encoder):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        encoders.append(self)


def training_views(*inputs, draw=train.training_views):
    views.append(draw(*inputs))
    return views[-1]


train.Queue, train.Encoder, train.training_views = Queue, Encoder, training_views
train.main()
rank, output = torch.distributed.get_rank(), Path(sys.argv[sys.argv.index("--output") + 1])
weights = [parameter.data for parameter in encoders[0].parameters()]
torch.save(dict(queues=queues, weights=weights, boxes=views[0][2]), output / f"rank{rank}")
torch.distributed.destroy_process_group()
