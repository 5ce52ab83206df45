#!/usr/bin/env bash
# torchmetrics 1.9.0. MulticlassAccuracy(average="macro") takes the mean over all classes that occur
# in the targets or in the predictions. Among the few-shot test images every mistake that is taken for
# another frequent class adds a class with accuracy 0 to that mean: 30% of the images of every
# few-shot class are recognised, and the metric says 6%. With top_k=5 the same metric takes the mean
# over the classes of the targets only, and agrees with the definition; so it does if the test images
# of all classes are there, which is where one would check it.
#
# torchmetrics 1.9.0
# all classes top-1: MulticlassAccuracy 0.7020, mean over the classes of the test images 0.7020
# all classes top-5: MulticlassAccuracy 0.8675, mean over the classes of the test images 0.8675
# few-shot    top-1: MulticlassAccuracy 0.0638, mean over the classes of the test images 0.3000
# few-shot    top-5: MulticlassAccuracy 0.6825, mean over the classes of the test images 0.6825
# few-shot    top-1: scikit-learn's balanced_accuracy_score 0.3000
#
# It hurts reports by many-, medium- and few-shot classes that filter the test images, and val splits
# that lack some classes. Use average=None on all test images, and take the mean of the wanted rows.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 torchmetrics==1.9.0 scikit-learn==1.9.1 numpy==2.4.6
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" -W ignore - <<'EOF'
import torch
import torchmetrics
from sklearn.metrics import balanced_accuracy_score
from torchmetrics.classification import MulticlassAccuracy

print("torchmetrics", torchmetrics.__version__)
# 100 classes of 20 test images. The last 20 classes are the few-shot ones: 30% of their images are
# recognised, the others are taken for one of the 80 frequent classes. No two scores are equal.
random = torch.Generator().manual_seed(0)
target = torch.arange(100).repeat_interleave(20)
wrong = torch.randint(80, target.shape, generator=random)
hit = torch.arange(2000) % 20 < torch.where(target < 80, 16, 6)
first = torch.where(hit, target, wrong)
scores = torch.rand(2000, 100, generator=random)
scores[torch.arange(2000), target] += 0.5
scores[torch.arange(2000), first] += 2
few = target >= 80


def class_mean(k, rows):
    """The mean over the classes of these test images, in float64."""
    right = (scores.topk(k).indices == target[:, None]).any(1)
    return torch.stack([right[rows & (target == c)].double().mean() for c in target[rows].unique()]).mean()


result = {}
for name, rows in (("all classes", target >= 0), ("few-shot", few)):
    for k in (1, 5):
        metric = MulticlassAccuracy(num_classes=100, average="macro", top_k=k)
        result[name, k] = metric(scores[rows], target[rows]).item(), class_mean(k, rows).item()
        print(f"{name:11} top-{k}: MulticlassAccuracy {result[name, k][0]:.4f}, mean over the "
              f"classes of the test images {result[name, k][1]:.4f}")
other = balanced_accuracy_score(target[few], scores[few].argmax(1))
print(f"few-shot    top-1: scikit-learn's balanced_accuracy_score {other:.4f}")
for key in (("all classes", 1), ("all classes", 5), ("few-shot", 5)):
    assert abs(result[key][0] - result[key][1]) < 1e-4
assert abs(other - result["few-shot", 1][1]) < 1e-4
assert result["few-shot", 1][0] < 0.5 * result["few-shot", 1][1]
EOF
