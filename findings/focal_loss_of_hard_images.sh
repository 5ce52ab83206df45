#!/usr/bin/env bash
# balanced-loss 0.1.1. Its class-balanced focal loss computes log(1 + exp(-logit)) as written. Where
# exp overflows, at a logit of -12 in float16 and of -89 in float32 and bfloat16, the weight of the
# hardest images becomes 0: the loss falls from 12 to the value of an easy image, and looks like
# progress, while the gradient is NaN. torchvision's sigmoid_focal_loss is right in all types.
#
# balanced-loss 0.1.1
# float32  logit  -10 of the true class: loss  10.35, gradient -1.00; torchvision  10.35, -1.00
# float32  logit  -12 of the true class: loss  12.35, gradient -1.00; torchvision  12.35, -1.00
# float32  logit  -80 of the true class: loss  80.35, gradient -1.00; torchvision  80.35, -1.00
# float32  logit -100 of the true class: loss   0.35, gradient   nan; torchvision 100.35, -1.00
# bfloat16 logit  -10 of the true class: loss  10.35, gradient -1.00; torchvision  10.38, -1.00
# bfloat16 logit  -12 of the true class: loss  12.35, gradient -0.88; torchvision  12.38, -1.00
# bfloat16 logit  -80 of the true class: loss  80.35, gradient -1.00; torchvision  80.50, -1.00
# bfloat16 logit -100 of the true class: loss   0.35, gradient   nan; torchvision 100.50, -1.00
# float16  logit  -10 of the true class: loss  10.35, gradient -1.00; torchvision  10.34, -1.00
# float16  logit  -12 of the true class: loss   0.35, gradient   nan; torchvision  12.34, -1.00
# float16  logit  -80 of the true class: loss   0.35, gradient   nan; torchvision  80.38, -1.00
# float16  logit -100 of the true class: loss   0.35, gradient   nan; torchvision 100.38, -1.00
#
# It hurts tail classes in half precision: their logits of the true class are the most negative ones,
# and the weight of the class-balanced loss adds to it. A check of the loss for NaN finds nothing,
# since only the gradient is NaN. Call logits.float() before this loss, and check gradients.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 balanced-loss==0.1.1 numpy==2.4.6
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" -W ignore - <<'EOF'
from importlib.metadata import version

import torch
from balanced_loss import Loss
from torchvision.ops import sigmoid_focal_loss

print("balanced-loss", version("balanced-loss"))
label = torch.tensor([0])
one_hot = torch.tensor([[1.0, 0.0, 0.0]])
focal = Loss("focal_loss", fl_gamma=2)
result = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for logit in (-10, -12, -80, -100):
        logits = torch.tensor([[logit, 0, 0]], dtype=dtype, requires_grad=True)
        loss = focal(logits, label)
        loss.backward()
        same = logits.detach().clone().requires_grad_()
        other = sigmoid_focal_loss(same, one_hot.to(dtype), alpha=-1, gamma=2, reduction="sum")
        other.backward()
        pair = result[dtype, logit] = loss.item(), logits.grad[0, 0].item()
        print(f"{str(dtype)[6:]:8} logit {logit:4} of the true class: loss {pair[0]:6.2f}, gradient "
              f"{pair[1]:5.2f}; torchvision {other.item():6.2f}, {same.grad[0, 0].item():5.2f}")
        assert abs(other.item() + logit) < 1 and abs(same.grad[0, 0].item() + 1) < 0.2
for (dtype, logit), (loss, gradient) in result.items():
    if logit == -100 or dtype == torch.float16 and logit <= -12:
        assert loss < 0.5 and gradient != gradient
    else:
        assert abs(loss + logit) < 1 and abs(gradient + 1) < 0.2
EOF
