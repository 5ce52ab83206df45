#!/usr/bin/env bash
# lightly 1.6.0. knn_predict weights neighbours by exp(similarity / temperature) in the type of the
# features. In float16, which KNNClassifier offers to save memory, exp(1 / 0.07) is infinite, and
# infinity times the zeros of the other classes is NaN for all of them: every prediction is wrong, and
# no message says so. At the default temperature of 0.1, exp(10) still fits, so that float16 seems
# safe. 0.07 is the usual temperature of this kind of evaluation and of many contrastive losses.
#
# lightly 1.6.0
# float32, temperature 0.1: accuracy 1.00, classes predicted [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
# float32, temperature 0.07: accuracy 1.00, classes predicted [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
# float16, temperature 0.1: accuracy 1.00, classes predicted [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
# float16, temperature 0.07: accuracy 0.00, classes predicted [0, 1]
#
# It hurts who watches pretraining by kNN: the better the features are, the more similarities come
# near 1 and overflow, so that the accuracy falls as training succeeds. Keep float32 or bfloat16, or
# subtract 1 from the similarities, which changes no ranking.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 lightly==1.6.0
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" -W ignore - <<'EOF'
import lightly
import torch
from lightly.utils.benchmarking import knn_predict
from torch.nn.functional import normalize

print("lightly", lightly.__version__)
random = torch.Generator().manual_seed(0)
centres = torch.randn(10, 32, generator=random)
target, bank_target = torch.arange(10).repeat(20), torch.arange(10).repeat(50)
features = normalize(centres[target] + 0.2 * torch.randn(200, 32, generator=random))
bank = normalize(centres[bank_target] + 0.2 * torch.randn(500, 32, generator=random))
accuracy = {}
for dtype in (torch.float32, torch.float16):
    for temperature in (0.1, 0.07):
        ranked = knn_predict(
            features.to(dtype), bank.to(dtype).T, bank_target, num_classes=10, knn_k=20,
            knn_t=temperature,
        )
        accuracy[dtype, temperature] = (ranked[:, 0] == target).float().mean().item()
        print(f"{str(dtype)[6:]}, temperature {temperature}: accuracy "
              f"{accuracy[dtype, temperature]:.2f}, classes predicted {ranked[:, 0].unique().tolist()}")
assert accuracy.pop((torch.float16, 0.07)) < 0.2 and min(accuracy.values()) == 1
EOF
