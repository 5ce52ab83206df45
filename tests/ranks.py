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
import data
import train

queues, pictures, others, boxes, moved, encoders = [], [], [], [], [], []
projection = torch.randn(28 * 28, 128, generator=torch.Generator().manual_seed(0))


@torch.autocast("cpu", enabled=False)
def key_of(images):
    return F.normalize(images.flatten(1).float() @ projection, dim=1)[None]


class Encoder(train.Encoder):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        encoders.append(self)

    def forward(self, view, *rest):
        if next(self.parameters()).requires_grad:
            return super().forward(view, *rest)
        return (key_of(others[-1]),)  # of the key encoder


class Queue(train.Queue):
    def put(self, keys, labels):
        super().put(keys, labels)
        queues.append((self.keys.clone(), self.labels.clone()))


def query_views(images, *rest, draw=data.query_views):
    pictures.append(images)
    views = draw(images, *rest)
    boxes.append(views[1])
    return views


def key_view(images, *rest, draw=data.key_view):
    others.append(images)
    return draw(images, *rest)


def pbsd_loss(roi, patch, key, *rest, loss=train.pbsd_loss, **options):
    torch.testing.assert_close(key, key_of(pictures[-1])[0])
    moved.append((pictures[-1] != others[-1]).flatten(1).any(1).float().mean().item())
    return loss(roi, patch, key, *rest, **options)


train.Encoder, train.Queue, train.pbsd_loss = Encoder, Queue, pbsd_loss
data.query_views, data.key_view = query_views, key_view
train.main()
output = Path(sys.argv[sys.argv.index("--output") + 1])
weights = [parameter.data for parameter in encoders[0].parameters()]
torch.save(
    dict(queues=queues, weights=weights, boxes=boxes[0], moved=moved),
    output / f"rank{dist.get_rank()}",
)
dist.destroy_process_group()
