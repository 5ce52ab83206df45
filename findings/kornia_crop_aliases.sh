#!/usr/bin/env bash
# kornia 0.9.0, torchvision 0.29.1. Random resized crops on the GPU are often kornia's. They are not
# resized like torchvision's: kornia interpolates bilinearly without antialiasing, in both of its
# cropping modes, and its RandomResizedCrop has no parameter for it. Where a crop shrinks, a pixel of
# the view is made of at most four pixels, and the others do not count. Of noise that is independent for
# each pixel torchvision keeps only what the smaller view can show.
#
# kornia 0.9.0, torchvision 0.29.1
# standard deviation of noise (0.289 before) in views of 64 pixels, of crops of about 95 % of the image
# image of   64 pixels: kornia slice 0.218, kornia resample 0.219, torchvision 0.236
# image of  224 pixels: kornia slice 0.195, kornia resample 0.194, torchvision 0.055
# image of  500 pixels: kornia slice 0.194, kornia resample 0.195, torchvision 0.025
#
# It hurts contrastive and long-tailed training whose views are cut by kornia and whose test images are
# resized by torchvision or Pillow: fine texture turns into noise in training only, and the same image
# looks different in a view and in the test. Resize large images first, with antialias=True.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 kornia==0.9.0
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" -W ignore - <<'EOF'
import inspect

import kornia
import torch
import torchvision
from kornia.augmentation import RandomResizedCrop
from torchvision.transforms import v2

print(f"kornia {kornia.__version__}, torchvision {torchvision.__version__.partition('+')[0]}")
print("standard deviation of noise (0.289 before) in views of 64 pixels, of crops of about 95 % of "
      "the image")
assert not any("alias" in name for name in inspect.signature(RandomResizedCrop).parameters)
torch.manual_seed(0)
for size in (64, 224, 500):
    noise = torch.rand(32, 3, size, size)
    crops = {f"kornia {mode}": RandomResizedCrop((64, 64), scale=(0.9, 1.0), cropping_mode=mode)
             for mode in ("slice", "resample")}
    crops["torchvision"] = v2.RandomResizedCrop(64, scale=(0.9, 1.0))
    std = {name: crop(noise).std().item() for name, crop in crops.items()}
    print(f"image of {size:4} pixels: " + ", ".join(f"{n} {value:.3f}" for n, value in std.items()))
    if size > 64:
        assert min(std.values()) == std["torchvision"] < 0.5 * std["kornia slice"]
EOF
