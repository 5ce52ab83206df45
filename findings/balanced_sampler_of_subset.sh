#!/usr/bin/env bash
# torchsampler 0.1.2. ImbalancedDatasetSampler(dataset, labels=..., indices=...) balances the classes
# of a subset, as long as the indices ascend. If they are in random order, as every random split of a
# data set gives them, it sorts the weights by index but not the indices: each image gets the weight
# of another one. The sampler then draws the head classes as often as no sampler at all would.
#
# torchsampler 0.1.2
# indices in sorted order: the three classes are 33.3%, 33.5%, 33.2% of the draws
# indices in random order: the three classes are 91.5%, 7.7%, 0.9% of the draws
# without sampler: 89.9%, 8.9%, 1.1%
#
# It hurts trainings on a random part of a long-tailed data set, the rest being held out: they report
# class-balanced sampling, and have none. Sort the indices first and take the labels in that order, or
# use torch.utils.data.WeightedRandomSampler on the subset.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 torchsampler==0.1.2 numpy==2.4.6
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

import torch
from torch.utils.data import TensorDataset
from torchsampler import ImbalancedDatasetSampler

print("torchsampler", version("torchsampler"))
torch.manual_seed(0)
labels = torch.arange(3).repeat_interleave(torch.tensor([1800, 180, 20]))
dataset = TensorDataset(torch.zeros(2000, 1), labels)
part = torch.randperm(2000)[:1600].tolist()  # what random_split draws
share = {}
for order, indices in (("sorted", sorted(part)), ("random", part)):
    sampler = ImbalancedDatasetSampler(
        dataset, labels=labels[indices].tolist(), indices=indices, num_samples=60000
    )
    drawn = list(sampler)
    assert set(drawn) <= set(part)
    share[order] = (labels[drawn].bincount(minlength=3) / len(drawn)).tolist()
    print(f"indices in {order} order: the three classes are "
          + ", ".join(f"{x:.1%}" for x in share[order]) + " of the draws")
print("without sampler: " + ", ".join(f"{x:.1%}" for x in labels[part].bincount() / len(part)))
assert max(abs(x - 1 / 3) for x in share["sorted"]) < 0.02
assert share["random"][0] > 0.8 and share["random"][2] < 0.05
EOF
