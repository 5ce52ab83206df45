"""p(z_i+|z_i) of finished or going runs by class size, beside what the supplementary proves.

python tests/theory.py runs/dscl-0 runs/scl-0

One pass over the training pictures with the checkpoint's encoders and queue: views, BatchNorm and
contrast set are those of a training step, and nothing is written. For free embeddings the optimum
of p(z_i+|z_i) is alpha under DSCL, 1 where P_i is empty, and 1 / (|P_i| + 1) under SCL.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from data import BadInput, Batches, Draws, load_batches, load_dataset
from models import Encoder, Queue
from train import STAGE, load


def own_key_share(z, z_plus, y, bank, y_bank, tau):
    """p(z_i+|z_i) [B] in an anchor's contrast set, and |P_i| [B]; arguments as of dscl_loss."""
    size = len(z)
    itself = torch.eye(size, dtype=torch.bool)
    logits = z @ torch.cat([z, z_plus, bank]).T / tau  # [B, 2 B + K]
    logits[:, :size].masked_fill_(itself, -torch.inf)
    mates = y[:, None] == torch.cat([y, y, y_bank])
    mates[:, : 2 * size] &= ~itself.repeat(1, 2)
    return logits.softmax(1)[:, size : 2 * size].diagonal(), mates.sum(1)


@torch.no_grad()
def shares_by_class(run, root):
    """Training pictures [classes]; means of p(z_i+|z_i) and of its optimum over each class's."""
    saved = load(run / "checkpoint.pth", STAGE)
    args = argparse.Namespace(**saved["args"])
    if args.loss == "ce":
        raise BadInput(f"{run} is a run of --loss ce, which has no keys: name one of dscl or scl")
    args.patches = 0
    train_set = load_dataset(args.dataset, root or args.data_root, args.index_dir, args.imbalance)
    train_set, device = train_set["train"], torch.device("cpu")
    encoder, key_encoder = Encoder(args.arch, args.experts), Encoder(args.arch, args.experts)
    queue = Queue(args.queue_size, args.experts)
    for name, part in dict(encoder=encoder, key_encoder=key_encoder, queue=queue).items():
        part.load_state_dict(saved[name])

    sums = torch.zeros(3, int(train_set.labels.max()) + 1)  # anchors, p, its optimum
    batches = Batches(train_set.labels, args.batch_size, 1, seed=args.seed)
    loader = load_batches(train_set, batches, args, 2, args.workers, device)
    for number, (images, labels) in enumerate(loader):
        draws = [Draws(2 * number + n, args.batch_size, slice(None), device) for n in (0, 1)]
        view, _, _ = data.query_views(images[0], draws[0], args)
        z, z_plus = encoder(view)[0], key_encoder(data.key_view(images[-1], draws[1], args))[0]
        for e in range(args.experts):
            bank = queue.keys[e], queue.labels
            share, mates = own_key_share(z[e], z_plus[e], labels, *bank, args.temperature)
            alpha = 1 / (mates + 1) if args.alpha is None else torch.tensor(args.alpha)
            optimum = torch.where(mates == 0, 1.0, alpha)
            sums.index_add_(1, labels, torch.stack([torch.ones_like(share), share, optimum]))
    return train_set.labels.bincount(), sums


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--data-root", type=Path, help="of the pictures (default: the run's)")
    args = parser.parse_args()
    tables = [shares_by_class(run, args.data_root) for run in args.runs]
    print(f"{'p(z+|z), theory':<18}" + "".join(f"{str(run)[-22:]:>24}" for run in args.runs))
    bins = tables[0][0].clamp(min=1).log2().long()  # from 2^n to less than 2^(n + 1) pictures
    for size in bins.unique().flip(0).tolist():
        line = f"{2**size:>7} to {2 ** (size + 1) - 1:<7}"
        for _, sums in tables:
            anchors, share, optimum = sums[:, bins == size].sum(1).tolist()
            line += f"{share / anchors:>12.4f}{optimum / anchors:>12.4f}" if anchors else 24 * " "
        print(line)


if __name__ == "__main__":
    data.run(main)
