"""p(z+|z) of trained runs by class size, and its optimum from the paper's supplementary.

    python tests/theory.py runs/dscl-0 runs/scl-0

p(z+|z) is an anchor's softmax probability of its own key in the contrast set of dscl_loss: other
queries and all keys of its batch, and the queue. At the optimum of free embeddings it is alpha
under DSCL (1 if |P| = 0), and 1 / (|P| + 1) under SCL. It is measured on every training image, with
the networks and the queue of the checkpoint, and views and batches as in training. The column
"theory" is the mean of the optimum over the same anchors. No file is written.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from data import BadInput
from models import Encoder, Queue


def own_key(z, z_plus, labels, queue, temperature):
    """p(z_i+|z_i) [B], the mean over experts, and |P_i| [B] of queries and keys [E, B, D]."""
    size = len(labels)
    contrast = torch.cat([z, z_plus, queue.keys], dim=1)  # [E, 2B + K, D]
    logits = z @ contrast.mT / temperature  # [E, B, 2B + K]
    logits[:, range(size), range(size)] = -torch.inf  # an anchor is no contrast to itself
    p = logits.softmax(2)[:, range(size), range(size, 2 * size)].mean(0)
    mates = labels[:, None] == torch.cat([labels, labels, queue.labels])
    return p, mates.sum(1) - 2  # without the anchor and its key


@torch.no_grad()
def measure(path, data_root):
    """For every training image of a run: its class's size, p(z+|z) and its optimum, each [N]."""
    saved = train.load(path / "checkpoint.pth", train.STAGE)
    cfg = argparse.Namespace(**saved["args"] | dict(device="auto", amp="off"))
    if cfg.loss in train.CLASSIFIERS:
        raise BadInput(f"{path} is a run of --loss {cfg.loss}, which has no keys")
    _, _, device = train.start(cfg)
    root = data_root or cfg.data_root
    dataset = data.load_dataset(cfg.dataset, root, cfg.index_dir, cfg.imbalance)["train"]
    count = len(dataset)
    if count != cfg.images["train"]:
        trained = cfg.images["train"]
        raise BadInput(f"{path} was trained on {trained} images, {dataset.origin} has {count}")

    encoder = Encoder(cfg.arch, cfg.experts).to(device, memory_format=torch.channels_last)
    key_encoder = copy.deepcopy(encoder)
    queue = Queue(cfg.queue_size, cfg.experts).to(device)
    for name, part in dict(encoder=encoder, key_encoder=key_encoder, queue=queue).items():
        part.load_state_dict(saved[name])

    # The last batch is filled up with images of the first; their second result is dropped.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(cfg.seed))
    order = torch.cat([order, order[: -count % cfg.batch_size]])
    batches = [(rows.tolist(), rows.tolist()) for rows in order.split(cfg.batch_size)]
    crops = data.BatchDataset(dataset, cfg, crops=2)
    loader = data.load_batches(crops, batches, cfg.workers, device)
    measured, progress = [], data.Progress(len(batches))
    for step, (images, labels) in enumerate(loader, saved["step"]):
        images, labels = images.to(device), labels.to(device)
        batch = train.ShuffledBatch(cfg, step, slice(0, cfg.batch_size), device)
        view, _, _ = data.query_views(images[0], batch.draws(), cfg)
        key_view = data.key_view(images[-1], batch.draws(keys=True), cfg)
        z, z_plus = encoder(view)[0], key_encoder(key_view)[0]
        p, positives = own_key(z, z_plus, labels, queue, cfg.temperature)
        queue.put(z_plus, labels)  # as in training, the queue moves on
        theory = 1 / (positives + 1)
        if cfg.loss != "scl":
            theory = torch.where(positives > 0, cfg.alpha, 1.0)
        measured.append(torch.stack([p, theory]))
        progress.show(step + 1 - saved["step"], str(path))
    p, theory = torch.cat(measured, dim=1)[:, :count].cpu()
    return dataset.labels.bincount()[dataset.labels[order[:count]]], p, theory


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="--output of train.py")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="directory of moved images")
    args = parser.parse_args()
    runs = [measure(path, args.data_root) for path in args.runs]
    print(f"{'':<20}" + "".join(f"{path.name[-20:]:>24}" for path in args.runs))
    print(f"{'images of a class':<20}" + f"{'p(z+|z)':>14}{'theory':>10}" * len(runs))
    found = {size for sizes, _, _ in runs for size in sizes.unique().tolist()}
    for low in sorted({2 ** (size.bit_length() - 1) for size in found}):
        line = f"{f'{low} to {2 * low - 1}':<20}"
        for sizes, p, theory in runs:
            chosen = (sizes >= low) & (sizes < 2 * low)
            line += f"{p[chosen].mean():>14.4f}{theory[chosen].mean():>10.4f}"
        print(line)


if __name__ == "__main__":
    train.run(main)
