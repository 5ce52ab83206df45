#!/usr/bin/env bash
# datasets 5.2.0. A stratified split wants a ClassLabel column, and class_encode_column makes one. But
# it turns integer labels into strings and sorts those: label 10 becomes 2 and label 2 becomes 12. With
# up to ten classes nothing changes, with a hundred 12 keep their number. The numbers stay a
# permutation of 0 to 99, so that nothing fails and training on them works.
#
# datasets 5.2.0
# stratified split: Stratifying by column is only supported for ClassLabel column, and column label is Value.
# integers before: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11] ...
# names after:     ['0', '1', '10', '11', '12', '13', '14', '15', '16', '17', '18', '19'] ...
# old label to new: {0: 0, 1: 1, 2: 12, 3: 23, 9: 89, 10: 2, 11: 3, 99: 99}
# 12 of 100 classes keep their number
# with cast_column all keep it: True - parts {'train': 559, 'test': 559}
#
# It hurts whoever splits CIFAR-100 or iNaturalist by integer labels and then uses a list of class
# sizes or names, a test set or a checkpoint with the original numbers: many- and few-shot classes get
# mixed. Use cast_column("label", ClassLabel(num_classes=100)), which keeps the numbers.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet datasets==5.2.0
export HF_HOME="$tmp/home" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
"$tmp/venv/bin/python" - <<'EOF'
import datasets

print("datasets", datasets.__version__)
labels = [label for label in range(100) for _ in range(2 if label > 50 else 20)]
data = datasets.Dataset.from_dict(dict(label=labels))
try:
    data.train_test_split(test_size=0.5, stratify_by_column="label")
except ValueError as error:
    print("stratified split:", error)
encoded = data.class_encode_column("label")
print("integers before:", sorted(set(data["label"]))[:12], "...")
print("names after:    ", encoded.features["label"].names[:12], "...")
table = dict(zip(data["label"], encoded["label"]))
print("old label to new:", {label: table[label] for label in (0, 1, 2, 3, 9, 10, 11, 99)})
kept = sum(old == new for old, new in table.items())
print(f"{kept} of {len(table)} classes keep their number")
assert set(table) == set(table.values()) == set(range(100))
assert table[2] == 12 and table[10] == 2 and kept < 20

fixed = data.cast_column("label", datasets.ClassLabel(num_classes=100))
split = fixed.train_test_split(test_size=0.5, stratify_by_column="label", seed=0)
print("with cast_column all keep it:", fixed["label"] == data["label"], "- parts", split.num_rows)
assert list(fixed["label"]) == labels
EOF
