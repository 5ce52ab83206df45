#!/usr/bin/env bash
# pytorch-metric-learning 2.9.0. CrossBatchMemory keeps its embeddings and labels in buffers, which
# state_dict() holds. But how far they are filled, and where to write next, are Python attributes, and
# load_state_dict() does not restore them. After a resume the memory is there and is ignored: the loss
# sees the current batch only, until 1024 new embeddings have been written. load_state_dict() says
# that all keys match.
#
# pytorch-metric-learning 2.9.0
# load_state_dict: <All keys matched successfully>
# never stopped: 1024 references, 32 of 32 anchors have a positive, loss 9.562
# resumed      :   32 references, 11 of 32 anchors have a positive, loss 4.516
#
# It hurts runs that continue from a checkpoint with a large memory: the loss halves at the seam, and
# images of rare classes have no positive until the memory is full again. Save `queue_idx` and
# `has_been_filled` beside the state dict, and set them after loading.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 pytorch-metric-learning==2.9.0 numpy==2.4.6
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" -W ignore - <<'EOF'
import pytorch_metric_learning
import torch
from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss
from torch.nn.functional import normalize

print("pytorch-metric-learning", pytorch_metric_learning.__version__)
random = torch.Generator().manual_seed(0)


def batch():
    """32 unit vectors of 100 classes."""
    return normalize(torch.randn(32, 16, generator=random)), torch.randint(100, (32,), generator=random)


memory = CrossBatchMemory(SupConLoss(), embedding_size=16, memory_size=1024)
for _ in range(40):
    memory(*batch())
resumed = CrossBatchMemory(SupConLoss(), embedding_size=16, memory_size=1024)
print("load_state_dict:", resumed.load_state_dict(memory.state_dict()))
assert resumed.embedding_memory.equal(memory.embedding_memory)

references = []
for module in (memory, resumed):  # count the references that the loss inside gets
    module.loss.register_forward_pre_hook(lambda loss, given: references.append(len(given[3])))
embeddings, labels = batch()
value = [module(embeddings, labels).item() for module in (memory, resumed)]
with_mate = [int((m.label_memory[:n, None] == labels).sum(0).gt(1).sum())
             for m, n in zip((memory, resumed), references)]
for name, n, mates, loss in zip(("never stopped", "resumed"), references, with_mate, value):
    print(f"{name:13}: {n:4} references, {mates} of 32 anchors have a positive, loss {loss:.3f}")
assert references == [1024, 32] and with_mate[0] > 2 * with_mate[1]
EOF
