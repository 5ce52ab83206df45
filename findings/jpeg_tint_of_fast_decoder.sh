#!/usr/bin/env bash
# pylibjxl 0.5.0, on x86-64. Its decode_jpeg asks libjpeg-turbo for the fast transform, without saying
# so and without an option: the pixels are those of simplejpeg with fastdct=True. The errors of this
# transform do not cancel: red and blue come out 1.2 and 1.3 of 255 too dark on average, green does
# not, at every quality. Flat pictures are exact, so that a test with a grey image finds nothing. Each
# decoding adds to the last one: after ten of them the tint is 12 levels.
#
# pylibjxl 0.5.0, simplejpeg 1.9.0, Pillow 13.0.0
# mean of red, green, blue minus the original, of 255:
# quality 75, Pillow [0.0, 0.0, 0.0]; pylibjxl [-1.2, 0.0, -1.3], as simplejpeg with fastdct: True
# quality 95, Pillow [0.0, 0.0, 0.0]; pylibjxl [-1.2, 0.0, -1.3], as simplejpeg with fastdct: True
# flat picture, pylibjxl [0.0, 0.0, 0.0]
# decoded and encoded 10 times, Pillow [0.0, 0.0, 0.0]; pylibjxl [-11.9, 0.3, -13.8]
#
# It hurts data sets whose images were decoded by different libraries, since a network can tell them
# apart by the mean of a channel, and pipelines that resize and store JPEGs several times. Decode with
# Pillow or torchvision; compare the channel means of two decoders on textured pictures.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet pylibjxl==0.5.0 simplejpeg==1.9.0 pillow==13.0.0 numpy==2.4.6
"$tmp/venv/bin/python" - <<'EOF'
import io
from importlib.metadata import version

import numpy as np
import PIL
import pylibjxl
import simplejpeg
from PIL import Image

print(f"pylibjxl {version('pylibjxl')}, simplejpeg {version('simplejpeg')}, Pillow {PIL.__version__}")
# A smooth picture: 20 x 20 random colours, none near black or white, enlarged 16 times.
colours = np.random.default_rng(0).integers(40, 216, (20, 20, 3), dtype=np.uint8)
picture = np.asarray(Image.fromarray(colours).resize((320, 320), Image.Resampling.BICUBIC))


def pillow_encode(pixels, quality):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def pillow_decode(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def tint(pixels, original=picture):
    return [round(float(x), 1) + 0.0 for x in (pixels.astype(float) - original).mean((0, 1))]


print("mean of red, green, blue minus the original, of 255:")
for quality in (75, 95):
    data = pillow_encode(picture, quality)
    one, two = tint(pillow_decode(data)), tint(pylibjxl.decode_jpeg(data))
    same = np.array_equal(simplejpeg.decode_jpeg(data, fastdct=True), pylibjxl.decode_jpeg(data))
    print(f"quality {quality}, Pillow {one}; pylibjxl {two}, as simplejpeg with fastdct: {same}")
    assert same and np.array_equal(simplejpeg.decode_jpeg(data, fastdct=False), pillow_decode(data))
    assert max(map(abs, one)) < 0.2 and two[0] < -0.9 and abs(two[1]) < 0.2 and two[2] < -0.9
flat = np.full_like(picture, (200, 100, 50))
same = tint(pylibjxl.decode_jpeg(pillow_encode(flat, 95)), flat)
print("flat picture, pylibjxl", same)
assert max(map(abs, same)) < 0.2
one = two = picture
for _ in range(10):
    one = pillow_decode(pillow_encode(one, 95))
    two = pylibjxl.decode_jpeg(pylibjxl.encode_jpeg(two, quality=95))
print(f"decoded and encoded 10 times, Pillow {tint(one)}; pylibjxl {tint(two)}")
assert max(map(abs, tint(one))) < 0.5 and tint(two)[0] < -8 and tint(two)[2] < -8
EOF
