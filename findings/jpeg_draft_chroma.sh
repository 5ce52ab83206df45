#!/usr/bin/env bash
# Pillow 13.0.0 with libjpeg-turbo 3.2.0. Image.draft lets the decoder shrink a JPEG to 1/2, 1/4 or
# 1/8, as loaders of large photographs do. The result is close to the mean of the pixels, within 1 of
# 255, for colours stored at full resolution (4:4:4) and at half of it in both directions (4:2:0). For
# the format in between (4:2:2), which stores more colour than 4:2:0, it is off by 4 at 1/4 and by
# nearly 10 at 1/8. The brightness is right, but the colours are shrunk twice as far as asked in each
# row and then widened again, at 1/8 by repeating each for two pixels.
#
# Pillow 13.0.0 libjpeg-turbo 3.2.0
# 4:4:4: mean difference from the decoded and then averaged picture, of 255: 1/2 0.50, 1/4 0.47, 1/8 0.50
# 4:2:2: mean difference from the decoded and then averaged picture, of 255: 1/2 1.17, 1/4 4.07, 1/8 9.62
# 4:2:0: mean difference from the decoded and then averaged picture, of 255: 1/2 0.86, 1/4 0.79, 1/8 0.71
#
# It hurts data sets whose photographs come from many cameras, some of which write 4:2:2: the colours
# of those lose half their horizontal resolution, and a network can tell the cameras apart. Decode
# such files to at least twice the wanted size, or without draft.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet pillow==13.0.0 numpy==2.4.6
"$tmp/venv/bin/python" - <<'EOF'
import io

import numpy as np
import PIL
from PIL import Image, features

print("Pillow", PIL.__version__, "libjpeg-turbo", features.version("libjpeg_turbo"))
size = 512
# A smooth picture: 32 x 32 random colours, enlarged 16 times.
colours = np.random.default_rng(0).integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8)
picture = Image.fromarray(colours).resize((size, size), Image.Resampling.BICUBIC)
error = {}
for name, subsampling in {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}.items():
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95, subsampling=subsampling)
    whole = np.asarray(Image.open(file), dtype=np.float64)
    for shrink in (2, 4, 8):
        small = Image.open(file)
        small.draft("RGB", (size // shrink, size // shrink))
        small = np.asarray(small, dtype=np.float64)
        assert len(small) == size // shrink
        means = whole.reshape(size // shrink, shrink, size // shrink, shrink, 3).mean((1, 3))
        error[name, shrink] = np.abs(small - means).mean()
    print(f"{name}: mean difference from the decoded and then averaged picture, of 255: "
          + ", ".join(f"1/{shrink} {error[name, shrink]:.2f}" for shrink in (2, 4, 8)))
for shrink in (4, 8):
    assert error["4:2:2", shrink] > 3 * max(error["4:4:4", shrink], error["4:2:0", shrink])
EOF
