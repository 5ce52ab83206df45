#!/usr/bin/env bash
# torch-uncertainty 0.13.0. Two of its losses inherit from torch.nn.CrossEntropyLoss and take its class
# weights, but do not weight classes. CrossEntropyMaxSupLoss multiplies one number per image, as a
# column, by the row of weights: every image meets every weight, and the sum over that table is the
# unweighted loss times the sum of weights. With max_sup=0 it calls torch's loss, and the weights work.
# MixupMPLoss does not look at the weights if the labels are soft, which its own transform makes them.
#
# torch-uncertainty 0.13.0
# weights 0.1, 1, 10: how often a medium and a tail image count as much as a head image
# torch's CrossEntropyLoss              10.0  100.0
# CrossEntropyMaxSupLoss, max_sup=0.0   10.0  100.0
# CrossEntropyMaxSupLoss, max_sup=0.1    1.0    1.0
# MixupMPLoss, class numbers            10.0  100.0
# MixupMPLoss, the same as one-hot       1.0    1.0
#
# It hurts whoever adds one of these regularisers to a class-weighted baseline on a long-tailed set:
# the class balance is lost at the same time, and the fall of the tail classes is taken for an effect
# of the regulariser. To test a weighted loss, compare the gradients of single images with and without
# weights, as below, or take the losses per image (reduction="none") and weight them yourself.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 "torch-uncertainty[cpu]==0.13.0"
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" -W ignore - <<'EOF'
from functools import partial
from importlib.metadata import version

import torch
from torch.nn import CrossEntropyLoss
from torch.nn.functional import one_hot
from torch_uncertainty.losses import CrossEntropyMaxSupLoss, MixupMPLoss

print("torch-uncertainty", version("torch-uncertainty"))
random = torch.Generator().manual_seed(0)
labels = torch.arange(3).repeat_interleave(torch.tensor([60, 30, 10]))  # head, medium, tail
labels = labels[torch.randperm(100, generator=random)]
logits = torch.randn(100, 3, generator=random)


def importance(loss, target):
    """By how much the weights enlarge the gradient of an image: medium and tail against head."""
    size = []
    for weight in (None, torch.tensor([0.1, 1, 10])):
        x = logits.clone().requires_grad_()
        loss(weight=weight, reduction="sum")(x, target).backward()
        size.append(x.grad.norm(dim=1))
    head, medium, tail = ((size[1] / size[0])[labels == c].mean().item() for c in range(3))
    return medium / head, tail / head


print("weights 0.1, 1, 10: how often a medium and a tail image count as much as a head image")
for name, loss, target, expected in (
    ("torch's CrossEntropyLoss", CrossEntropyLoss, labels, (10, 100)),
    ("CrossEntropyMaxSupLoss, max_sup=0.0", CrossEntropyMaxSupLoss, labels, (10, 100)),
    ("CrossEntropyMaxSupLoss, max_sup=0.1", partial(CrossEntropyMaxSupLoss, max_sup=0.1), labels, (1, 1)),
    ("MixupMPLoss, class numbers", MixupMPLoss, labels, (10, 100)),
    ("MixupMPLoss, the same as one-hot", MixupMPLoss, one_hot(labels, 3).float(), (1, 1)),
):
    found = importance(loss, target)
    print(f"{name:35}" + "".join(f"{x:7.1f}" for x in found))
    assert all(abs(x - y) < 0.01 * y for x, y in zip(found, expected)), found
EOF
