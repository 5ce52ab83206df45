#!/usr/bin/env bash
# torchvision 0.29.1. RandomErasing(value="random") fills the box with normal noise of mean 0 and
# deviation 1, which suits a normalised image. On a uint8 image, the usual type in v2 pipelines until
# the last step, the noise is converted to uint8: two thirds of the pixels become black, and the rest
# lie within 5 of black or white, since negative numbers wrap around. The same transform accepts both.
#
# torchvision 0.29.1+cu130
# uint8 value   0:  68.1% of the erased pixels
# uint8 value   1:  13.6% of the erased pixels
# uint8 value   2:   2.1% of the erased pixels
# uint8 value   3:   0.1% of the erased pixels
# uint8 value   4:   0.0% of the erased pixels
# uint8 value 252:   0.0% of the erased pixels
# uint8 value 253:   0.1% of the erased pixels
# uint8 value 254:   2.2% of the erased pixels
# uint8 value 255:  13.8% of the erased pixels
# black: 68.1%; within 5 of black or white: 100.0%
# float32 image: mean -0.00, deviation 1.00
#
# It hurts pipelines that put RandomErasing beside the other augmentations, before ToDtype and
# Normalize: instead of noise the box has salt and pepper. Put it after Normalize.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" -W ignore - <<'EOF'
import torch
import torchvision
from torchvision.transforms.v2 import RandomErasing

print("torchvision", torchvision.__version__)
torch.manual_seed(0)
erase = RandomErasing(p=1, scale=(0.5, 0.5), ratio=(1, 1), value="random")
grey = torch.full((3, 256, 256), 128, dtype=torch.uint8)
erased = erase(grey)
inside = erased[erased != 128]
values, counts = inside.unique(return_counts=True)
for value, count in zip(values.tolist(), counts.tolist()):
    print(f"uint8 value {value:3}: {count / len(inside):6.1%} of the erased pixels")
black = (inside == 0).float().mean().item()
extreme = ((inside <= 5) | (inside >= 251)).float().mean().item()
print(f"black: {black:.1%}; within 5 of black or white: {extreme:.1%}")
assert black > 0.6 and extreme > 0.999
noise = erase(torch.full((3, 256, 256), 128.0))
noise = noise[noise != 128]
print(f"float32 image: mean {noise.mean():.2f}, deviation {noise.std():.2f}")
assert abs(noise.std() - 1) < 0.05
EOF
