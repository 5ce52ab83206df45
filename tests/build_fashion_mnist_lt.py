"""Builds tests/fashion_mnist_lt.npz from the original IDX files; the same bytes every time.

    python tests/build_fashion_mnist_lt.py DIRECTORY

DIRECTORY holds train-images-idx3-ubyte.gz and the three other files of Fashion-MNIST (MIT licence,
beside this file), as in Debian's package dataset-fashion-mnist: /usr/share/datasets/fashion-mnist.
Training pictures 1000 to 10 a class by the field's formula, 100 a class of the unused ones for
validation, the full test set; and as many more as any --imbalance from 1 to 100 takes of a class.
"""

import gzip
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import long_tailed_counts, long_tailed_counts_of, long_tailed_indices


def read_idx(path):
    """An IDX file of unsigned bytes as an array: magic 0, 0, 8, rank; big-endian sizes; data."""
    content = gzip.decompress(path.read_bytes())
    rank = content[3]
    shape = np.frombuffer(content, ">i4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def main(source, target):
    arrays = {
        f"{split}_{kind}": read_idx(source / f"{name}-{kind}-idx{rank}-ubyte.gz")
        for split, name in (("train", "train"), ("test", "t10k"))
        for kind, rank in (("images", 3), ("labels", 1))
    }
    images, labels = arrays["train_images"], arrays["train_labels"]
    counts = long_tailed_counts(1000, 10, 1 / 100)
    chosen, unused = long_tailed_indices(labels, counts)
    imbalances = [long_tailed_counts_of(sum(counts), 10, 1 / factor) for factor in range(1, 101)]
    most = np.max(imbalances, axis=0) + 1  # between two whole factors, one more
    splits = {
        "train": chosen,
        "val": [rest[:100] for rest in unused],
        "more": [rest[100:][: max(0, n - count)] for rest, n, count in zip(unused, most, counts)],
    }
    for split, indices in splits.items():
        indices = np.concatenate(indices)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[indices], labels[indices]
    np.savez_compressed(target, **{name: arrays[name] for name in sorted(arrays)})
    print(target, target.stat().st_size, "bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(__file__).with_name("fashion_mnist_lt.npz"))
