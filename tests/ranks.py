"""train.py as test_train.py runs it under torchrun: what each process holds goes to a file.

Keys are a fixed function of pictures here, so that each can be checked against its own picture
after the way through shuffle BN.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train

queues, pictures, boxes, moved, encoders = [], [], [], [], []
projection = torch.randn(28 * 28, 128, generator=torch.Generator().manual_seed(0))


def key_of(images):
    return F.normalize(images.flatten(1).float() @ projection, dim=1)


class Encoder(train.Encoder):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        encoders.append(self)


class MomentumEncoder(train.MomentumEncoder):
    def forward(self, images):
        return key_of(pictures[-1][1])


class Queue(train.Queue):
    def put(self, keys, labels):
        super().put(keys, labels)
        queues.append((self.keys.clone(), self.labels.clone()))


def training_views(query_images, key_images, *rest, draw=train.training_views):
    pictures.append((query_images, key_images))
    views = draw(query_images, key_images, *rest)
    boxes.append(views[2])
    return views


def dscl_loss(query, key, *rest, loss=train.dscl_loss, **options):
    own, others = (key_of(images) for images in pictures[-1])
    torch.testing.assert_close(key, own)
    moved.append((own != others).any(1).float().mean().item())
    return loss(query, key, *rest, **options)


train.Encoder, train.MomentumEncoder, train.Queue = Encoder, MomentumEncoder, Queue
train.training_views, train.dscl_loss = training_views, dscl_loss
train.main()
output = Path(sys.argv[sys.argv.index("--output") + 1])
weights = [parameter.data for parameter in encoders[0].parameters()]
torch.save(
    dict(queues=queues, weights=weights, boxes=boxes[0], moved=moved),
    output / f"rank{dist.get_rank()}",
)
dist.destroy_process_group()
