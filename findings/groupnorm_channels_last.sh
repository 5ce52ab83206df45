#!/usr/bin/env bash
# torch 2.14.1, CPU. GroupNorm of a channels_last tensor computes the variance as the mean of the
# squares minus the square of the mean, in float32. If the mean of a group is a hundred times its
# deviation, two digits remain; at a thousand times the variance becomes 0 and the output is about a
# thousand times too large. The same numbers in contiguous layout are normalised correctly, and so
# they are by InstanceNorm in both layouts. The memory layout alone decides.
#
# torch 2.14.1+cu130
# mean    0, deviation 1: largest error of GroupNorm 4.6e-07, channels_last 1.6e-06; InstanceNorm 3.5e-07, channels_last 3.5e-07
# mean  100, deviation 1: largest error of GroupNorm 8.7e-06, channels_last 2.4e-02; InstanceNorm 7.0e-06, channels_last 7.0e-06
# mean 1000, deviation 1: largest error of GroupNorm 9.6e-05, channels_last 1.3e+03; InstanceNorm 5.9e-05, channels_last 5.9e-05
#
# It hurts networks that replace BatchNorm for small batches, run in channels_last for speed, and see
# inputs with a large common offset: pixels that were not centred, depth, temperature, 16-bit images.
# Subtract the mean of the data first, or call x.contiguous() before such a GroupNorm.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" - <<'EOF'
import torch
from torch.nn.functional import group_norm, instance_norm

print("torch", torch.__version__)
errors = {}
for offset in (0, 100, 1000):
    x = torch.randn(4, 32, 32, 32, generator=torch.Generator().manual_seed(0)) + offset
    layouts = x, x.to(memory_format=torch.channels_last)
    exact = group_norm(x.double(), 8)
    row = [(group_norm(y, 8).double() - exact).abs().max().item() for y in layouts]
    exact = instance_norm(x.double())
    row += [(instance_norm(y).double() - exact).abs().max().item() for y in layouts]
    errors[offset] = row
    print(f"mean {offset:4}, deviation 1: largest error of GroupNorm {row[0]:.1e}, "
          f"channels_last {row[1]:.1e}; InstanceNorm {row[2]:.1e}, channels_last {row[3]:.1e}")
assert max(errors[0]) < 1e-4
assert all(max(row[0], row[2], row[3]) < 1e-3 for row in errors.values())
assert errors[100][1] > 1e-3 and errors[1000][1] > 0.1
EOF
