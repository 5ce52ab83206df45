#!/usr/bin/env bash
# torchvision 0.29.1. Given a list of boxes for each image, roi_align writes the number of the image
# into the same tensor as the coordinates, in their type. In bfloat16 whole numbers end at 256, in
# float16 at 2048: from then on a number is rounded, and the box is cut from a neighbouring image.
# Image 257 gets the crop of image 256, and so on. Under autocast roi_align computes in float32, but
# that is too late: the number is already rounded.
#
# torchvision 0.29.1+cu130
# float32: 0 of 3000 crops are of another image, the first []
# float16: 476 of 3000 crops are of another image, the first [2049, 2051, 2053, 2055, 2057]
# bfloat16 under autocast: 2181 of 3000 crops are of another image, the first [257, 259, 261, 263, 265]
#
# It hurts patches of large contrastive batches, and frames of videos, whose boxes were computed under
# autocast. (Some wrong crops look right here, since every fifth image is the same.) Convert boxes to
# float32 before roi_align, even where the images are in half precision.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" -W ignore - <<'EOF'
import torch
import torchvision
from torchvision.ops import roi_align

print("torchvision", torchvision.__version__)
# 3000 maps of 4 x 4 cells. Map i has the value i mod 5 in all cells; its box is the whole map.
maps = (torch.arange(3000) % 5)[:, None, None, None].expand(3000, 1, 4, 4).float()
wrong = {}
for name, dtype, autocast in (
    ("float32", torch.float32, False),
    ("float16", torch.float16, False),
    ("bfloat16 under autocast", torch.bfloat16, True),
):
    boxes = [torch.tensor([[0, 0, 4, 4]], dtype=dtype) for _ in maps]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        crops = roi_align(maps.to(dtype), boxes, 1, aligned=True)
    bad = ((crops - maps[:, :, :1, :1]).abs() > 0.5).flatten().nonzero().flatten()
    wrong[name] = len(bad), bad[:1].tolist()
    print(f"{name}: {len(bad)} of 3000 crops are of another image, the first {bad[:5].tolist()}")
assert wrong["float32"][0] == 0
assert wrong["float16"][0] > 300 and wrong["float16"][1] == [2049]
assert wrong["bfloat16 under autocast"][0] > 1500 and wrong["bfloat16 under autocast"][1] == [257]
EOF
