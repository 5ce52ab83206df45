#!/usr/bin/env bash
# torchmetrics 1.9.0. MulticlassCalibrationError takes logits or probabilities, and decides which
# they are anew in every update(): a batch whose numbers all lie between 0 and 1 is read as
# probabilities, any other goes through softmax. For logits that are mostly small, such as cosine
# similarities of features after a ReLU or logits divided by a temperature, the error then depends
# on the batch size: small batches pass as probabilities that need not sum to 1, large ones hold a
# number outside.
#
# torchmetrics 1.9.0
# update() with 1 images at a time: 0.158
# update() with 8 images at a time: 0.309
# update() with 64 images at a time: 0.450
# update() with 4000 images at a time: 0.450
# after softmax, with any number: 0.450
#
# It hurts those who calibrate a cosine classifier, as few-shot and long-tailed recognition use
# it: one number in the validation loop with batches of 256, another in a service that gets one
# image at a time, or from the last, smaller batch. Pass probabilities: call softmax(1) yourself.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 torchmetrics==1.9.0 numpy==2.4.6
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" -W ignore - <<'EOF'
import torch
import torchmetrics
from torchmetrics.classification import MulticlassCalibrationError

print("torchmetrics", torchmetrics.__version__)
generator = torch.Generator().manual_seed(0)
cosines = torch.rand(4000, 5, generator=generator) * 1.02 - 0.02
labels = (cosines / 0.1).softmax(1).multinomial(1, generator=generator)[:, 0]


def error(numbers, size):
    metric = MulticlassCalibrationError(num_classes=5, n_bins=15)
    for batch in zip(numbers.split(size), labels.split(size)):
        metric.update(*batch)
    return metric.compute().item()


errors = {size: error(cosines, size) for size in (1, 8, 64, 4000)}
for size, value in errors.items():
    print(f"update() with {size} images at a time: {value:.3f}")
expected = {error(cosines.softmax(1), size) for size in errors}
print("after softmax, with any number:", *{f"{value:.3f}" for value in expected})
assert len({f"{value:.5f}" for value in expected}) == 1
assert errors[1] < 0.2 < errors[8] < 0.4 < errors[64]
EOF
