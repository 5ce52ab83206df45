"""Builds tests/fashion_mnist_lt.npz from the original IDX files, always with the same bytes.

    python tests/build_fashion_mnist_lt.py DIRECTORY

DIRECTORY holds train-images-idx3-ubyte.gz and the three other files of Fashion-MNIST (MIT licence,
beside this file), as in Debian's package dataset-fashion-mnist: /usr/share/datasets/fashion-mnist.
The training set has 1000 to 10 images per class by the usual formula, val the next 100 of each
class; the test set is complete.
"""

import gzip
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import long_tailed_counts, shuffled_by_class


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
    rows = list(zip(shuffled_by_class(labels, 10), long_tailed_counts(1000, 10, 1 / 100)))
    splits = {
        "train": [indices[:count] for indices, count in rows],
        "val": [indices[count : count + 100] for indices, count in rows],
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
