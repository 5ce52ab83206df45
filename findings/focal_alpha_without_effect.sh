#!/usr/bin/env bash
# libauc 2.0.1, a library for imbalanced data. alpha of its FocalLoss is to balance positive against
# negative images. The class weights have shape (N), the losses (N, 1): their product is a table of
# N x N, in which every image meets the weight of every image, and its mean is the unweighted loss
# times a constant. alpha has no influence on the balance, whatever its value; it scales the loss as
# a whole. (Nor would it be the paper's alpha: its first weight is that of the negative images.)
#
# libauc 2.0.1
# share of the positive images, 50 of 1000, in the gradient:
# alpha 0.05: libauc 0.115, torchvision 0.007
# alpha 0.25: libauc 0.115, torchvision 0.042
# alpha 0.50: libauc 0.115, torchvision 0.115
# alpha 0.75: libauc 0.115, torchvision 0.281
# alpha 0.95: libauc 0.115, torchvision 0.712
#
# It hurts comparisons on rare classes in which focal loss is the baseline: tuning alpha looks like
# tuning, and changes the learning rate. With a batch of 8,192 the table has 67 million numbers. Use
# torchvision.ops.sigmoid_focal_loss; to test such a loss, compare the gradients of single images.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 scikit-learn==1.9.1 \
    scipy==1.17.1 pandas==3.1.1 tqdm==4.70.1
"$tmp/venv/bin/pip" install --quiet --no-deps libauc==2.0.1
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

import torch
from libauc.losses import FocalLoss
from torchvision.ops import sigmoid_focal_loss

print("libauc", version("libauc"))
random = torch.Generator().manual_seed(0)
labels = (torch.arange(1000) < 50).float()[:, None]
logits = torch.randn(1000, 1, generator=random) - 1 + labels


def share(loss):
    """Loss, and the part of the gradient that is from the positive images."""
    x = logits.clone().requires_grad_()
    value = loss(x)
    value.backward()
    return value.item(), (x.grad[:50].abs().sum() / x.grad.abs().sum()).item()


found, plain = {}, share(lambda x: sigmoid_focal_loss(x, labels, alpha=-1, reduction="mean"))
print("share of the positive images, 50 of 1000, in the gradient:")
for alpha in (0.05, 0.25, 0.5, 0.75, 0.95):
    loss, ours = share(lambda x: FocalLoss(alpha=alpha, gamma=2.0, device="cpu")(x, labels))
    _, other = share(lambda x: sigmoid_focal_loss(x, labels, alpha=alpha, gamma=2, reduction="mean"))
    print(f"alpha {alpha:.2f}: libauc {ours:.3f}, torchvision {other:.3f}")
    found[alpha] = other
    assert abs(ours - plain[1]) < 1e-4  # as without alpha
    assert abs(loss / plain[0] - (0.95 * alpha + 0.05 * (1 - alpha))) < 1e-4  # the mean weight
assert found[0.05] < 0.02 and found[0.95] > 0.4
EOF
