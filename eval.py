"""Stage 2 of DSCL + PBSD: a linear classifier on the frozen backbone, with class-balanced sampling.

    python eval.py                                                 # after python train.py
    python eval.py --checkpoint runs/mine/checkpoint.pth           # any run of train.py
    python eval.py --checkpoint runs/{a,b,c}/checkpoint.pth --output runs/abc  # their mean
    torchrun --nproc_per_node=8 eval.py --output runs/imagenet_lt  # several GPUs

Chooses the epoch on val, reports on test by many/medium/few-shot classes; without a val split the
last epoch counts, without a test split val is reported. Writes OUTPUT/results.json and
OUTPUT/classifier.pth; the same command again goes on from there.
"""

import copy
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import train
from data import (
    BadInput,
    Batches,
    Draws,
    classifier_view,
    evaluation_view,
    identity,
    load_dataset,
    seed_from,
    shot_groups,
)
from models import Encoder
from train import (
    Parser,
    Progress,
    autocast,
    load,
    load_batches,
    only_lost_pictures,
    plain,
    precision,
    same_everywhere,
    same_settings,
    save,
    save_text,
    shard,
    start,
    with_recipe,
)

STAGE = "DSCL + PBSD, stage 2"


class LinearProbes(nn.Module):
    """Linear classifiers on frozen backbones, one for every expert of every run of stage 1.

    On the mean of the expert's last feature map. `runs` are the arguments of the runs; bn="eval"
    uses the running statistics of stage 1; "train" normalises by the batch while the classifiers
    train, and so the running statistics follow class-balanced sampling.
    """

    def __init__(self, runs, classes, bn, amp, seed):
        super().__init__()
        self.encoders = nn.ModuleList()
        for run in runs:
            torch.manual_seed(seed)  # a classifier starts as it would alone
            shape = dict(experts=run["experts"], width=run["expert_width"])
            encoder = Encoder(run["arch"], classes=classes, **shape).requires_grad_(False)
            for head in encoder.heads:
                nn.init.normal_(head.weight, std=0.01)
                nn.init.zeros_(head.bias)
                head.requires_grad_(True)
            self.encoders.append(encoder)
        self.bn, self.amp = bn, amp

    def heads(self):
        return [head for encoder in self.encoders for head in encoder.heads]

    def train(self, mode=True):
        return super().train(mode and self.bn == "train")

    def forward(self, images):
        """Logits [M, B, classes] of all M experts."""
        with torch.no_grad(), autocast(images.device, self.amp):
            maps = [encoder.features(images) for encoder in self.encoders]
        logits = [e.embed([m.float() for m in own]) for e, own in zip(self.encoders, maps)]
        return torch.cat(logits, dim=1).unflatten(1, (len(self.heads()), -1)).transpose(0, 1)


@torch.no_grad()
def count_right(model, loader, recipe, classes, device):
    """Pictures of each class, those whose label ranks first, and among the first five.

    The loader's pictures of all processes together: int64 [1 + M, 3, classes], on the CPU; by the
    mean of all logits, then by those of each of the M experts.
    """
    model.eval()
    tally = torch.zeros(1 + len(model.heads()), 3, classes, dtype=torch.long, device=device)
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = model(evaluation_view(images, recipe))
        logits = torch.cat([logits.mean(0, keepdim=True), logits])  # [1 + M, B, classes]
        hits = logits.topk(min(5, classes)).indices == labels[:, None]  # [1 + M, B, 5]
        counted = torch.stack([torch.ones_like(hits[..., 0]), hits[..., 0], hits.any(2)], dim=1)
        tally.index_add_(2, labels, counted.long())
    if dist.is_initialized():
        dist.all_reduce(tally)
    return tally.cpu()


def metrics(tally, train_counts):
    """Accuracies in percent: top1 and top5 over pictures; many, medium, few and all over classes.

    tally [3, classes] of count_right, train_counts [classes]. A group's accuracy is the mean over
    its classes' (on a balanced test set `all` is top1); None for a group or class without pictures.
    """
    total, right, _ = tally
    per_class = 100 * right.double() / total  # NaN where a class has no picture

    def mean(mask):
        values = per_class[mask & (total > 0)]
        return round(values.mean().item(), 6) if len(values) else None  # ties stay ties

    groups = shot_groups(train_counts) | {"all": total > 0}
    top1, top5 = (100 * tally[1:].sum(1).double() / total.sum()).tolist()
    return dict(
        top1=top1,
        top5=top5,
        **{name: mean(mask) for name, mask in groups.items()},
        per_class=[
            value if count else None for value, count in zip(per_class.tolist(), total.tolist())
        ],
    )


def table(results, counts):
    """The results as a person reads them."""
    rows = [f"{'shots':<8}{'classes':>8}{'training pictures':>20}{'top-1':>8}"]
    for name, mask in shot_groups(counts).items():
        if results[name] is not None:
            span = f"{int(counts[mask].max())} to {int(counts[mask].min())} each"
            rows.append(f"{name:<8}{int(mask.sum()):>8}{span:>20}{results[name]:>8.2f}")
    rows.append(f"{'all':<8}{len(counts):>8}{int(counts.sum()):>20,}{results['all']:>8.2f}")
    return "\n".join(rows)


def parse_args():
    parser = Parser(__doc__, "stage2")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="checkpoint of train.py (default: OUTPUT/checkpoint.pth); the logits of several, runs "
        "that differ in --seed for instance, are averaged",
    )
    parser.setting(
        "--bn",
        str,
        "BatchNorm of the frozen backbone while the classifier trains: running statistics "
        "of stage 1 (eval) or of the batch (train)",
        choices=("train", "eval"),
    )
    return parser.parse_args()


def main():
    args = parse_args()
    if args.checkpoint is None:
        output = args.output or Path("runs") / (args.dataset or train.DEFAULT)
        args.checkpoint = [output / "checkpoint.pth"]
    if len(args.checkpoint) > 1 and not args.output:
        raise BadInput("several checkpoints need an --output of their own")
    rank, world, device = start(args.device)
    stage1 = [load(path, train.STAGE, device) for path in args.checkpoint]
    args.stage1 = [run["args"] | {"step": run["step"]} for run in stage1]
    first = args.stage1[0]
    for path, run in zip(args.checkpoint, args.stage1):
        for name in ("dataset", "imbalance", "view_size"):
            given, trained = getattr(args, name, None), run[name]
            if given not in (None, trained) or trained != first[name]:
                other = first[name] if given is None else given
                raise BadInput(f"{path} was trained with --{name} {trained}, not {other}")
    for name in ("dataset", "imbalance", "data_root", "index_dir"):
        if getattr(args, name) is None:
            setattr(args, name, first[name])
    args.output = args.output or args.checkpoint[0].parent
    args.processes, args.amp = world, precision(args.amp, device)

    sets = load_dataset(args.dataset, args.data_root, args.index_dir, args.imbalance)
    args.data = identity(sets)
    for path, run in zip(args.checkpoint, args.stage1):
        if not only_lost_pictures(run["data"], args.data):
            raise BadInput(
                f"the pictures in {args.data_root} are not those that {path} was trained with: "
                "a test on them could be on pictures it has seen"
            )
    recipe = with_recipe(args, "stage2", len(sets["train"]))
    # No step can take more than there are, and every process takes as many.
    args.batch_size = min(args.batch_size, max(1, len(sets["train"]) // world) * world)
    recipe = recipe | dict(view_size=first["view_size"])
    counts = sets["train"].labels.bincount()
    classes = len(counts)
    reported = "test" if "test" in sets else "val"
    chosen = "val" if reported == "test" and "val" in sets else None

    model = LinearProbes(args.stage1, classes, args.bn, args.amp, args.seed)
    model = model.to(device, memory_format=torch.channels_last)
    for encoder, run in zip(model.encoders, stage1):
        backbone = {name: value for name, value in run["encoder"].items() if "head." not in name}
        encoder.load_state_dict(encoder.state_dict() | backbone)
    heads = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(heads, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)

    path, epoch, best = args.output / "classifier.pth", 0, {"accuracy": -1.0}
    args.output.mkdir(parents=True, exist_ok=True)
    if path.exists():
        checkpoint = load(path, STAGE, device)
        same_settings(path, checkpoint["args"], plain(args))
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        epoch, best = checkpoint["epoch"], checkpoint["best"]

    same_everywhere(epoch, args.output)
    share = dict(start=epoch * (len(sets["train"]) // args.batch_size), rank=rank, world=world)
    batches = Batches(
        sets["train"].labels, args.batch_size, args.epochs, seed=args.seed, balanced=True, **share
    )
    per_epoch, steps = batches.per_epoch, args.epochs * batches.per_epoch
    loading = dict(recipe=recipe, workers=args.workers, device=device)
    loader = load_batches(sets["train"], batches, crops=int(args.augment), **loading)
    shards = {
        split: load_batches(sets[split], shard(len(sets[split]), rank, world), crops=0, **loading)
        for split in {chosen, reported} - {None}
    }
    probe = DistributedDataParallel(model) if world > 1 else model
    progress = Progress(steps, batches.steps.start, enabled=rank == 0)
    began = time.monotonic()
    for step, (images, labels) in zip(batches.steps, loader):
        model.train()
        passed = sum(step >= milestone * steps for milestone in args.milestones)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * 0.1**passed
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if args.augment:
            # Not the stream that drew the classes.
            draws = Draws(seed_from(args.seed, step, 1), args.batch_size, batches.slice, device)
            views = classifier_view(images, draws, recipe)
        else:
            views = evaluation_view(images, recipe)
        # The sum: a classifier trains as it would alone.
        loss = sum(F.cross_entropy(logits, labels) for logits in probe(views))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % per_epoch:
            continue

        epoch = (step + 1) // per_epoch
        if world > 1 and args.bn == "train":  # every process has statistics of its own pictures
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        accuracy = epoch  # without val the last epoch is the best
        if chosen:
            tally = count_right(model, shards[chosen], recipe, classes, device)
            accuracy = metrics(tally[0], counts)["all"]
        if accuracy > best["accuracy"]:
            best = dict(accuracy=accuracy, epoch=epoch, model=copy.deepcopy(model.state_dict()))
        if rank == 0:
            states = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
            save(path, dict(stage=STAGE, args=plain(args), epoch=epoch, best=best, **states))
        rate = (step + 1 - batches.steps.start) * args.batch_size / (time.monotonic() - began)
        values = f"loss {loss.item() / len(model.heads()):.3f}"
        values += f"  val {accuracy:.2f}" if chosen else ""
        progress.show(
            step + 1, f"classifier, epoch {epoch}/{args.epochs}  {values}  {rate:.0f} pictures/s"
        )

    # Only now the test set, once, with the epoch that val chose.
    model.load_state_dict(best["model"])
    for encoder, run in zip(model.encoders, stage1):
        frozen = [(n, weight) for n, weight in encoder.named_parameters() if "head." not in n]
        if not all(torch.equal(weight, run["encoder"][n]) for n, weight in frozen):
            raise RuntimeError("a frozen backbone changed while the classifiers trained")
    tally = count_right(model, shards[reported], recipe, classes, device)
    results, *members = (metrics(part, counts) for part in tally)
    if rank > 0:
        return
    results |= dict(
        reported_on=reported,
        chosen_on=chosen,
        val=best["accuracy"] if chosen else None,
        epoch=best["epoch"],
        counts=counts.tolist(),
        classes=sets["train"].names,
        experts=members if len(members) > 1 else None,
        arguments=plain(args),
    )
    save_text(args.output / "results.json", json.dumps(results, indent=1) + "\n")
    print(table(results, counts))
    if len(members) > 1:
        print("its experts alone: " + ", ".join(f"{member['all']:.2f}" for member in members))
    print(
        f"on {reported}, at epoch {best['epoch']}, "
        + (f"chosen on val ({best['accuracy']:.2f})" if chosen else "the last")
        + f"; {args.output / 'results.json'}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    train.run(main)
