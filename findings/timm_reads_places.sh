#!/usr/bin/env bash
# timm 1.0.31. Its reader of image folders names a class by the innermost folder alone, and sorts the
# names by the numbers in them. In the folders of Places365 and Places-LT, where the scene is one
# level above "indoor" or "outdoor", all indoor scenes become one class and all outdoor scenes another.
# In numbered folders like iNaturalist's no class is lost, but class 2 is folder 2 in timm and folder
# 10 in torchvision's ImageFolder. Neither gives a message.
#
# timm 1.0.31
# 8 scenes, 8 images; classes: {'airfield': 0, 'exterior': 1, 'indoor': 2, 'interior': 3, 'outdoor': 4}
# timm:        {'0': 0, '1': 1, '2': 2, '3': 3, '4': 4, '5': 5, '6': 6, '7': 7, '8': 8, '9': 9, '10': 10, '11': 11}
# torchvision: {'0': 0, '1': 1, '10': 2, '11': 3, '2': 4, '3': 5, '4': 6, '5': 7, '6': 8, '7': 9, '8': 10, '9': 11}
#
# It hurts whoever trains with one reader and evaluates with the other: the class numbers do not match,
# though on ImageNet, whose folder names all have the same length, they did. It hurts whoever gives
# timm nested folders: the classes are fewer than the scenes. Put the folders of all classes directly
# below the root, as apartment_building-outdoor, and give timm a class_map file for the order.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 pillow==13.0.0
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" -W ignore - "$tmp" <<'EOF'
import sys
from pathlib import Path

import timm
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

print("timm", timm.__version__)
root = Path(sys.argv[1])


def create(name, classes):
    for folder in classes:
        (root / name / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / folder / "0.png")
    return create_dataset("", root=str(root / name))


# The folders of Places365, and so of Places-LT: a letter, the scene, and in or outdoors.
places = """
    a/airfield a/apartment_building/outdoor a/athletic_field/outdoor b/balcony/exterior
    b/balcony/interior b/bow_window/indoor c/church/indoor c/church/outdoor""".split()
found = create("places", places)
print(len(places), "scenes,", len(found), "images; classes:", found.reader.class_to_idx)
# Numbers, like the folders of iNaturalist 2018 below each kingdom.
numbers = [str(n) for n in range(12)]
by_number = create("numbers", numbers).reader.class_to_idx
by_name = ImageFolder(root / "numbers").class_to_idx
print("timm:       ", by_number)
print("torchvision:", by_name)
assert len(found.reader.class_to_idx) == 5
assert list(by_number) == numbers and list(by_name) == sorted(numbers)
EOF
