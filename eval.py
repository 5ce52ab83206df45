"""Stage 2 of DSCL + PBSD: a linear classifier on the frozen backbone, with class-balanced sampling.

    python eval.py                                                 # after python train.py
    python eval.py --checkpoint runs/mine/checkpoint.pth           # any run of train.py

Chooses the epoch on val, reports on test by many/medium/few-shot classes. Writes
OUTPUT/results.json and OUTPUT/classifier.pth; the same command again goes on from there.
"""

import copy
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import train
from data import (
    BadInput,
    Batches,
    classifier_view,
    evaluation_view,
    load_dataset,
    seed_from,
    shot_groups,
)
from models import build_backbone
from train import (
    Parser,
    Progress,
    load,
    load_batches,
    plain,
    same_settings,
    save,
    start,
    with_recipe,
)

STAGE = "DSCL + PBSD, stage 2"


class LinearProbe(nn.Module):
    """A linear classifier on the mean of a frozen backbone's last feature map: logits [B, classes].

    bn="eval" uses the running statistics of stage 1; "train" normalises by the batch while the
    classifier trains, and so the running statistics follow class-balanced sampling.
    """

    def __init__(self, arch, classes, bn):
        super().__init__()
        self.backbone, channels = build_backbone(arch)
        self.backbone.requires_grad_(False)
        self.classifier = nn.Linear(channels, classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self.bn = bn

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and self.bn == "train")
        return self

    def forward(self, images):
        with torch.no_grad():
            features = self.backbone(images).mean((2, 3))
        return self.classifier(features)


def metrics(logits, labels, train_counts):
    """Accuracies in percent of a balanced test set; a group's is the mean over its classes'.

    logits [N, classes], labels [N], train_counts [classes]. Gives top1, top5, many, medium, few and
    per_class; None for a group or class without pictures.
    """
    top5 = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # [N, 5]
    total = labels.bincount(minlength=len(train_counts))
    right = labels[top5[:, 0]].bincount(minlength=len(train_counts))
    per_class = 100 * right.double() / total  # NaN where a class has no test picture

    def mean(mask):
        values = per_class[mask & (total > 0)]
        return values.mean().item() if len(values) else None

    groups = {name: mean(mask) for name, mask in shot_groups(train_counts).items()}
    return dict(
        top1=100 * top5[:, 0].double().mean().item(),
        top5=100 * top5.any(1).double().mean().item(),
        **groups,
        per_class=[
            value if count else None for value, count in zip(per_class.tolist(), total.tolist())
        ],
    )


@torch.no_grad()
def predict(model, pictures, recipe, device, batch_size=500):
    """Logits [N, classes] of all pictures, unaugmented, and their labels [N]; both on the CPU."""
    model.eval()
    batches = torch.arange(len(pictures)).split(batch_size)
    loader = load_batches(pictures, [batch.tolist() for batch in batches], 0, device)
    logits, labels = zip(
        *((model(evaluation_view(x.to(device), recipe)).cpu(), y) for x, y in loader)
    )
    return torch.cat(logits), torch.cat(labels)


def table(results, counts):
    """The results as a person reads them."""
    rows = [f"{'shots':<8}{'classes':>8}{'training pictures':>20}{'top-1':>8}"]
    for name, mask in shot_groups(counts).items():
        if results[name] is not None:
            span = f"{int(counts[mask].max())} to {int(counts[mask].min())} each"
            rows.append(f"{name:<8}{int(mask.sum()):>8}{span:>20}{results[name]:>8.2f}")
    rows.append(f"{'all':<8}{len(counts):>8}{int(counts.sum()):>20,}{results['top1']:>8.2f}")
    return "\n".join(rows)


def parse_args():
    parser = Parser(__doc__, "stage2")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="checkpoint of train.py (default: OUTPUT/checkpoint.pth)",
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
        args.checkpoint = (
            args.output or Path("runs") / (args.dataset or train.DEFAULT)
        ) / "checkpoint.pth"
    _, world, device = start(args.device)
    if world > 1:
        raise BadInput("stage 2 runs in one process: call python eval.py, without torchrun")
    stage1 = load(args.checkpoint, train.STAGE, device)
    trained_on = stage1["args"]["dataset"]
    if args.dataset not in (None, trained_on):
        raise BadInput(
            f"{args.checkpoint} was trained on {trained_on}, not on --dataset {args.dataset}"
        )
    args.dataset = trained_on
    args.output = args.output or args.checkpoint.parent
    recipe = with_recipe(args, "stage2")
    args.stage1 = stage1["args"] | {"step": stage1["step"]}

    sets = load_dataset(args.dataset, args.data_root)
    counts = sets["train"].counts
    torch.manual_seed(args.seed)
    model = LinearProbe(args.stage1["arch"], sets["train"].classes, args.bn)
    model = model.to(device, memory_format=torch.channels_last)
    backbone = {
        name.removeprefix("backbone."): value
        for name, value in stage1["encoder"].items()
        if name.startswith("backbone.")
    }
    model.backbone.load_state_dict(backbone)
    optimizer = torch.optim.SGD(
        model.classifier.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay
    )

    path, epoch, best = args.output / "classifier.pth", 0, {"top1": -1.0}
    args.output.mkdir(parents=True, exist_ok=True)
    if path.exists():
        checkpoint = load(path, STAGE, device)
        same_settings(path, checkpoint["args"], plain(args))
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        epoch, best = checkpoint["epoch"], checkpoint["best"]

    batch_size = min(args.batch_size, len(sets["train"]))
    per_epoch = len(sets["train"]) // batch_size
    steps = args.epochs * per_epoch
    batches = Batches(
        sets["train"].labels,
        batch_size,
        args.epochs,
        seed=args.seed,
        balanced=True,
        start=epoch * per_epoch,
    )
    view = classifier_view if args.augment else evaluation_view
    progress, began = Progress(steps, batches.steps.start), time.monotonic()
    loader = load_batches(sets["train"], batches, args.workers, device)
    for step, (images, labels) in zip(batches.steps, loader):
        torch.manual_seed(seed_from(args.seed, step, 1))  # not the stream that drew the classes
        model.train()
        passed = sum(step >= milestone * steps for milestone in args.milestones)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * 0.1**passed
        views = view(images.to(device), recipe)
        loss = F.cross_entropy(model(views), labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % per_epoch:
            continue

        epoch = (step + 1) // per_epoch
        val = metrics(*predict(model, sets["val"], recipe, device), counts)["top1"]
        if val > best["top1"]:
            best = dict(top1=val, epoch=epoch, model=copy.deepcopy(model.state_dict()))
        save(
            path,
            dict(
                stage=STAGE,
                args=plain(args),
                epoch=epoch,
                best=best,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
            ),
        )
        rate = (step + 1 - batches.steps.start) * batch_size / (time.monotonic() - began)
        progress.show(
            step + 1,
            f"classifier, epoch {epoch}/{args.epochs}  loss {loss.item():.3f}  "
            f"val {val:.2f}  {rate:.0f} pictures/s",
        )

    # Only now the test set, once, with the epoch that val chose.
    model.load_state_dict(best["model"])
    frozen = dict(model.backbone.named_parameters())
    if not all(torch.equal(frozen[name], backbone[name]) for name in frozen):
        raise RuntimeError("the frozen backbone changed while the classifier trained")
    results = metrics(*predict(model, sets["test"], recipe, device), counts)
    results |= dict(
        val_top1=best["top1"], epoch=best["epoch"], counts=counts.tolist(), arguments=plain(args)
    )
    text = json.dumps(results, indent=1) + "\n"
    save(args.output / "results.json", text.encode(), lambda content, file: file.write(content))
    print(table(results, counts))
    print(
        f"val {best['top1']:.2f} at epoch {best['epoch']}; {args.output / 'results.json'}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    train.run(main)
