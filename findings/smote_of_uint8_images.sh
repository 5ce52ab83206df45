#!/usr/bin/env bash
# imbalanced-learn 0.14.2. SMOTE creates images of a rare class between two real ones, as
# a + u (b - a) with u in [0, 1]. If the images are uint8, b - a is computed in uint8 and wraps around
# modulo 256 wherever b is darker than a: the pixel jumps up, and wraps again when the result is
# converted back to uint8. SMOTE accepts the images, and its output has the right type and shape.
#
# imbalanced-learn 0.14.2
# tail class: pixels from 121 to 255, mean 199.7
# SMOTE of float32: 180 images, dtype float32, mean 199.8, 0% of pixels outside the range of the class
# SMOTE of uint8  : 180 images, dtype uint8, mean 160.0, 38% of pixels outside the range of the class
#
# It hurts whoever oversamples the tail classes of an image data set, where uint8 is the usual type:
# the head classes stay clean, the tail classes get noise that a network can recognise. Convert to
# float32 before fit_resample, then round.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet imbalanced-learn==0.14.2 scikit-learn==1.9.1 numpy==2.4.6
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" - <<'EOF'
import imblearn
import numpy as np
from imblearn.over_sampling import SMOTE

print("imbalanced-learn", imblearn.__version__)
random = np.random.default_rng(0)
head = random.normal(100, 30, (200, 64)).clip(0, 255).astype(np.uint8)  # 200 dark images
tail = random.normal(200, 20, (20, 64)).clip(0, 255).astype(np.uint8)  # 20 bright ones
images, labels = np.concatenate([head, tail]), np.repeat([0, 1], [200, 20])
print(f"tail class: pixels from {tail.min()} to {tail.max()}, mean {tail.mean():.1f}")
for kind in (np.float32, np.uint8):
    new, _ = SMOTE(random_state=0).fit_resample(images.astype(kind), labels)
    new = new[len(images) :]
    # SMOTE puts every pixel between the same pixels of two images of the class.
    outside = ((new < tail.min(0)) | (new > tail.max(0))).mean()
    print(f"SMOTE of {kind.__name__:7}: {len(new)} images, dtype {new.dtype}, mean "
          f"{new.mean():.1f}, {outside:.0%} of pixels outside the range of the class")
    if kind is np.uint8:
        assert outside > 0.15 and new.mean() < tail.mean() - 15
    else:
        assert outside == 0 and abs(new.mean() - tail.mean()) < 5
EOF
