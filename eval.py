"""Stage 2 of DSCL + PBSD: fit a linear classifier on the frozen backbone, and evaluate it.

    python eval.py                                                 # after python train.py
    python eval.py --output runs/mine                              # any run of train.py
    torchrun --nproc_per_node=8 eval.py --output runs/imagenet_lt  # several GPUs
    python eval.py --knn                                           # kNN, also during stage 1
    python eval.py --output RUN --predict FILES AND FOLDERS        # a JSON line for each image
    python eval.py --plots plots --export model.pth                # plots; weights for torchvision
    python eval.py --summary runs/*                                # mean and std over seeds

The classifier is chosen on val and reported on test, by many-, medium- and few-shot classes.
Without a test split nothing is chosen and val is reported. It writes OUTPUT/results.json;
OUTPUT/model.pth, the only file that --predict needs; and OUTPUT/classifier.pth, from which the same
command continues after an interruption.
"""

import argparse
import contextlib
import copy
import json
import os
import statistics
import sys
import time
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import save_image

import data
import train
from data import BadInput, BatchDataset, Batches, Draws, Parser, Progress, load_batches, shot_groups
from models import SMALL_ARCHS, Encoder, means
from train import add_run_flags, autocast, flatten, gather, load, resume, save, to_json

STAGE = "stage 2 of DSCL + PBSD"
STAGE2 = data.SETTINGS["stage2"].keys()
RESULT = "the classifier of DSCL + PBSD"
MAX_CONFUSION_CLASSES = 1000  # the confusion table is square: 8 MB for 1000 classes


def main():
    args, saved = parse_args()
    if args.summary:
        return print(summary(args.summary))
    if args.predict:
        return predict(args, saved)
    if "images" not in saved["args"]:
        raise BadInput(f"{args.checkpoint} is from an earlier version of this code: train again")
    rank, _, device = processes = train.start(args)
    args.stage1 = saved["args"] | dict(step=saved["step"])
    cfg = argparse.Namespace(**saved["args"])
    sets = data.load_dataset(cfg.dataset, args.data_root, args.index_dir, args.imbalance)
    sizes = {split: len(part) for split, part in sets.items()}
    if sizes != cfg.images:
        raise BadInput(
            f"{args.checkpoint} was trained with {cfg.images} images, these are {sizes}: some "
            "test images could have been used for training"
        )
    cfg.patches = 0  # stage 2 uses no patches
    counts = sets["train"].labels.bincount()
    names = sets["train"].names or [f"class {label}" for label in range(len(counts))]
    if args.classifier == "balanced":
        train.fit_batch(args, len(sets["train"]))
    encoder = classifier_of(cfg, saved.pop("encoder"), len(counts), args.seed, args.epochs == 0)
    encoder = encoder.to(device, memory_format=torch.channels_last)
    if args.knn:
        split = "val" if "val" in sets else "test"
        accuracy = neighbour_accuracy(encoder, sets["train"], sets[split], args, cfg, processes)
        if rank == 0:
            print(f"kNN on {split}, step {saved['step']}: {accuracy:.2f}")
        return
    for directory in filter(None, (args.output, args.plots, args.export and args.export.parent)):
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise BadInput(f"{directory} cannot be written")

    # The classifier is chosen on val if there is a test set to report on, else val is reported.
    train_set, reported = sets["train"], "test" if "test" in sets else "val"
    val_set = sets.get("val") if reported == "test" and args.classifier != "stage1" else None
    best, path = dict(accuracy=None), args.output / "results.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no results so far
        train.refuse_differences(path, json.loads(path.read_text())["arguments"], args)
    if args.classifier == "balanced":
        best = train_classifier(encoder, train_set, val_set, args, cfg, processes)
    if args.classifier == "adjusted":
        best = fit_classifier(encoder, train_set, val_set, args, cfg, processes)

    # The test set is evaluated once, with the classifier that val chose.
    loader = evaluation_loader(sets[reported], args, cfg, processes)
    tally, confusion = count_correct(encoder, loader, cfg, len(counts), device, args.amp)
    if rank > 0:
        return
    results, *experts = (metrics(part, counts) for part in tally)
    results |= dict(
        reported_on=reported, chosen_on="val" if val_set else None, val=best["accuracy"],
        classifier=args.classifier, epoch=best.get("epoch"), penalty=best.get("penalty"),
        classes=sets["train"].names, counts=counts.tolist(), reported_counts=tally[0, 0].tolist(),
        experts=experts if len(experts) > 1 else None, arguments=to_json(args),
    )
    save(path, json.dumps(results, indent=1) + "\n")
    model = dict(stage=RESULT, args=to_json(args), classes=names, model=encoder.state_dict())
    save(args.output / "model.pth", model)
    print(table(results, counts))
    if len(experts) > 1:
        print("each expert alone: " + ", ".join(f"{expert['all']:.2f}" for expert in experts))
    for line in worst_confusions(confusion, names) if confusion is not None else ():
        print(line)
    what = dict(
        balanced=f"balanced, epoch {best.get('epoch')}", stage1="of stage 1",
        adjusted=f"adjusted, penalty {best.get('penalty')}",
    )[args.classifier]
    what += f", chosen on val ({best['accuracy']:.2f})" if val_set else ""
    print(f"on {reported}; classifier {what}; {path}", file=sys.stderr)
    if args.plots:
        draw_accuracy(args.plots / "accuracy.png", results, names)
        where = args.plots / "activation.png"
        draw_activation(where, encoder, sets[reported], counts, cfg, names, device)
    if args.export:
        export(args.export, encoder, cfg, names)


# -------------------------------------------------------------------------------------- classifiers


def fit_classifier(encoder, train_set, val_set, args, cfg, processes):
    """Solve for the heads on fixed features with logit adjustment (Menon et al., 2021, section 4).

    In training the logarithm of the class frequencies is added to the logits. That corrects for
    the imbalance, as class-balanced sampling does in the paper; `regression` has the equation.
    Features are standardised by mean and deviation of the training set; in the end weight and bias
    are converted so that they apply to the original features. Each expert's classifier is fitted
    separately. The best of args.penalty by class mean on val_set is chosen, or the first if val_set
    is None. Returns {"accuracy", "penalty"}; the accuracy is on val_set.

    Every rank holds the features of all training images, and solves the same problem. They take
    1 GB for ImageNet-LT and a ResNet-50, three times that while they are gathered; L-BFGS takes 20
    times the memory of the classifier's weights.
    """
    rank, _, device = processes
    labels = train_set.labels.to(device)
    counts = labels.bincount()
    log_prior = (counts / counts.sum()).log()
    features = split_features(encoder, train_set, args, cfg, processes)  # [E, N, C]
    std, mean = torch.std_mean(features, 1)  # [E, C]
    std = std.clamp(min=1e-6)  # a feature that is always 0 keeps weight 0
    features = features.sub_(mean[:, None]).div_(std[:, None])
    if val_set:
        held_out = split_features(encoder, val_set, args, cfg, processes)
        held_out_labels = val_set.labels.to(device)
    best = None
    for penalty in args.penalty if val_set else args.penalty[:1]:
        for expert, head in enumerate(encoder.heads):
            weight, bias = regression(features[expert], labels, log_prior, penalty)
            head.weight.data = weight / std[expert]
            head.bias.data = bias - head.weight.data @ mean[expert]
        accuracy = None
        if val_set:
            right = encoder.heads(held_out).mean(0).argmax(1) == held_out_labels
            accuracy = class_mean(right, held_out_labels, len(counts))
            if rank == 0:
                print(f"classifier, penalty {penalty:g}  val {accuracy:.2f}", file=sys.stderr)
        if not best or accuracy > best["accuracy"]:
            heads = copy.deepcopy(encoder.heads.state_dict())
            best = dict(accuracy=accuracy, penalty=penalty, heads=heads)
    encoder.heads.load_state_dict(best.pop("heads"))
    for value in encoder.heads.state_dict().values() if dist.is_initialized() else ():
        dist.broadcast(value, 0)  # the same on all processes
    return best


def regression(features, labels, log_prior, penalty):
    """Logistic regression with the class prior in its logits: weight [classes, C], bias [classes].

        min over W, b of  mean_i cross_entropy(W x_i + b + log prior, y_i) + penalty |W|^2

    features [N, C] are x_i, labels [N] are y_i, log_prior [classes]. The sum goes over chunks of N,
    so that the logits [N, classes] are never held at once. The problem is convex, and L-BFGS starts
    from zero: the result is the same every time.
    """
    classes = len(log_prior)
    weight = features.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, history_size=10, tolerance_grad=1e-5,
        line_search_fn="strong_wolfe",
    )

    def objective():
        optimizer.zero_grad()
        total = penalty * weight.square().sum()
        total.backward()
        for x, y in zip(features.split(8192), labels.split(8192)):
            logits = x @ weight.T + bias + log_prior
            loss = F.cross_entropy(logits, y, reduction="sum") / len(labels)
            loss.backward()
            total = total.detach() + loss.detach()
        return total

    optimizer.step(objective)
    return weight.detach(), bias.detach()


def train_classifier(encoder, train_set, val_set, args, cfg, processes):
    """Train the heads by SGD with class-balanced sampling, as the paper does.

    The encoder ends with the weights of the best epoch on val_set; if that is None, of the last.
    Returns {"accuracy", "epoch"}; the accuracy is on val_set. Continues from classifier.pth.
    """
    rank, world, device = processes
    path, counts = args.output / "classifier.pth", train_set.labels.bincount()
    optimizer = torch.optim.SGD(
        encoder.heads.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay
    )
    epoch, best, saved = 0, None, resume(path, STAGE, args, device)
    if saved:
        encoder.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        epoch, best = saved["epoch"], saved["best"]
    per_epoch = len(train_set) // args.batch_size
    split = dict(start=epoch * per_epoch, rank=rank, world=world, balanced=True, seed=args.seed)
    batches = Batches(train_set.labels, args.batch_size, args.epochs, **split)
    loader = load_batches(train_set, batches, cfg, int(args.augment), args.workers, device)
    val_loader = evaluation_loader(val_set, args, cfg, processes) if val_set else None
    heads = encoder.heads
    if dist.is_initialized():
        heads = DistributedDataParallel(heads)
    progress, began = Progress(len(batches.steps)), time.monotonic()
    for step, (images, labels) in zip(batches.steps, loader):
        encoder.train(args.bn == "train")
        passed = sum(step >= milestone * args.epochs * per_epoch for milestone in args.milestones)
        optimizer.param_groups[0]["lr"] = args.lr * 0.1**passed
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if args.augment:
            seed = data.seed_from(args.seed, step, 1)  # not the stream that drew the classes
            draws = Draws(seed, args.batch_size, batches.rows, device)
            view, _, _ = data.query_views(images[0], draws, cfg)
        else:
            view = data.evaluation_view(images, cfg)
        # Sum over experts, so that each classifier is trained as if it were alone.
        logits = heads(features_of(encoder, view, args.amp))
        loss = sum(F.cross_entropy(of_expert, labels) for of_expert in logits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % per_epoch:
            continue

        epoch = (step + 1) // per_epoch
        train.average_statistics(encoder)
        accuracy = None
        if val_set:
            tally, _ = count_correct(encoder, val_loader, cfg, len(counts), device, args.amp)
            accuracy = metrics(tally[0], counts)["all"]
        if not (best and val_set) or accuracy > best["accuracy"]:
            state = copy.deepcopy(encoder.state_dict())
            best = dict(accuracy=accuracy, epoch=epoch, model=state)
        if rank == 0:
            state = dict(model=encoder.state_dict(), optimizer=optimizer.state_dict())
            save(path, dict(stage=STAGE, args=to_json(args), epoch=epoch, best=best, **state))
            done = step + 1 - batches.steps.start
            rate = done * args.batch_size / (time.monotonic() - began)
            text = f"classifier, epoch {epoch}/{args.epochs}  loss {loss.item() / len(logits):.3f}"
            text += f"  val {accuracy:.2f}" if val_set else ""
            progress.show(done, f"{text}  {rate:.0f} images/s")
    encoder.load_state_dict(best.pop("model"))
    return best


def classifier_of(cfg, state, classes, seed, keep_heads):
    """Stage 1's frozen encoder, with linear classifiers as heads: new ones, or stage 1's."""
    torch.manual_seed(seed)
    encoder = Encoder(cfg.arch, cfg.experts, classes).requires_grad_(False)
    for head in encoder.heads.requires_grad_(True):
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    if not keep_heads:
        state = {name: value for name, value in state.items() if not name.startswith("heads.")}
    encoder.load_state_dict(encoder.state_dict() | state)
    return encoder


@torch.no_grad()
def features_of(encoder, view, amp):
    """The features of a view, float32 [E, B, C], for classifiers and kNN."""
    with autocast(view.device, amp):
        return means([maps.float() for maps in encoder.feature_maps(view)])


def evaluation_batches(count, rank=0, world=1, batch_size=128):
    """This process's batches of a split; each image is in one batch of one process."""
    rows = torch.arange(count)[rank::world]
    return [(batch.tolist(), None) for batch in rows.split(batch_size) if len(batch)]


def evaluation_loader(dataset, args, cfg, processes):
    """A loader of this process's part of a split: process i % world loads image i."""
    rank, world, device = processes
    batches = evaluation_batches(len(dataset), rank, world)
    return load_batches(dataset, batches, cfg, 0, args.workers, device)


@torch.no_grad()
def split_features(encoder, dataset, args, cfg, processes):
    """The features of all images of a split, in their order, on all processes: [E, N, C]."""
    _, world, device = processes
    encoder.eval()
    loader = evaluation_loader(dataset, args, cfg, processes)
    views = (data.evaluation_view(images.to(device), cfg) for images, _ in loader)
    none = encoder.heads[0].weight.new_zeros(len(encoder.heads), 0, encoder.heads[0].in_features)
    features = torch.cat([none, *(features_of(encoder, view, args.amp) for view in views)], dim=1)
    size = -(-len(dataset) // world)  # some processes have one image less
    features = gather(F.pad(features, (0, 0, 0, size - features.shape[1]))[None])
    return features.permute(1, 2, 0, 3).flatten(1, 2)[:, : len(dataset)]


# ------------------------------------------------------------------------------------------ metrics


@torch.no_grad()
def count_correct(encoder, loader, cfg, classes, device, amp):
    """Count correct and wrong predictions on the loader's images, over all processes.

    Returns two int64 tensors on the CPU. The first, [1 + E, 3, classes], counts the images of each
    class, those whose label ranks first, and those whose label is among the first five; for the
    mean of the experts' logits, then for each expert. The second, [classes, classes], counts how
    often an image of a class (row) is taken for a class (column) by the mean of the logits; it is
    None for more than MAX_CONFUSION_CLASSES classes.
    """
    encoder.eval()
    tally = torch.zeros(1 + len(encoder.heads), 3, classes, dtype=torch.long, device=device)
    pairs = classes**2 if classes <= MAX_CONFUSION_CLASSES else 0
    confusion = torch.zeros(pairs, dtype=torch.long, device=device)
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        view = data.evaluation_view(images, cfg)
        logits = encoder.heads(features_of(encoder, view, amp))
        logits = torch.cat([logits.mean(0, keepdim=True), logits])  # [1 + E, B, classes]
        top = logits.topk(min(5, classes)).indices  # [1 + E, B, 5]
        hits = top == labels[:, None]
        counted = torch.stack([torch.ones_like(hits[..., 0]), hits[..., 0], hits.any(2)], dim=1)
        tally.index_add_(2, labels, counted.long())
        if len(confusion):
            confusion.index_add_(0, labels * classes + top[0, :, 0], torch.ones_like(labels))
    tally, confusion = (gather(part[None]).sum(0).cpu() for part in (tally, confusion))
    return tally, confusion.view(classes, classes) if len(confusion) else None


def metrics(tally, train_counts):
    """Accuracies in percent: top1 and top5 over images; many, medium, few and all over classes.

    tally [3, classes] is from count_correct, train_counts [classes]. The accuracy of a group is the
    mean over its classes; on a balanced test set `all` equals top1. A class without images is None
    and left out of all means; a group without images is None.
    """
    here = tally[0] > 0
    per_class = 100 * tally[1].double() / tally[0]
    groups = shot_groups(train_counts) | {"all": here}
    groups = {name: per_class[mask & here] for name, mask in groups.items()}
    means = {n: round(part.mean().item(), 6) if len(part) else None for n, part in groups.items()}
    top1, top5 = (100 * tally[1:].sum(1).double() / tally[0].sum()).tolist()
    per_class = [value if counts else None for value, counts in zip(per_class.tolist(), here)]
    return dict(top1=top1, top5=top5, **means, per_class=per_class)


def class_mean(right, labels, classes):
    """Mean accuracy over the classes that occur in `labels`, in percent."""
    counts = labels.bincount(minlength=classes)
    right = labels[right].bincount(minlength=classes)
    return 100 * (right / counts)[counts > 0].mean().item()


def table(results, counts):
    """The results as a table to print."""
    limits = dict(many="many-shot, > 100", medium="medium-shot", few="few-shot, < 20")
    rows = [("", "classes", "training images", "top-1")]
    for name, mask in shot_groups(counts).items():
        if mask.any():
            most, least = int(counts[mask].max()), int(counts[mask].min())
            span = f"{most} to {least} each" if most > least else f"{most} each"
            accuracy = "-" if results[name] is None else f"{results[name]:.2f}"
            rows.append((limits[name], int(mask.sum()), span, accuracy))
    rows.append(("all, mean of classes", len(counts), int(counts.sum()), f"{results['all']:.2f}"))
    rows.append(("top1, mean of images", "", "", f"{results['top1']:.2f}"))
    lines = ["{:<24}{:>8}{:>20}{:>8}".format(*row) for row in rows]
    missing, split = results["per_class"].count(None), results["reported_on"]
    if missing:
        verb = "have" if missing > 1 else "has"
        lines.append(
            f"{missing} of {len(counts)} classes {verb} no {split} image and "
            f"{'are' if missing > 1 else 'is'} left out"
        )
    return "\n".join(lines)


def worst_confusions(confusion, names, count=3):
    """Lines such as "Shirt predicted as T-shirt: 23 % of 1000 images", largest rates first.

    confusion [classes, classes] is from count_correct.
    """
    totals = confusion.sum(1)
    rates = confusion.double() / totals.clamp(min=1)[:, None]
    rates += 1e-9 * confusion  # if rates are equal, more images first
    values, places = rates.fill_diagonal_(0).flatten().topk(min(count, rates.numel()))
    pairs = [(value, *divmod(place, len(names))) for value, place in zip(values, places.tolist())]
    return [
        f"{names[label]} predicted as {names[other]}: {100 * value:.0f} % of {totals[label]} images"
        for value, label, other in pairs
        if value > 0
    ]


# -------------------------------------------------------------------------------------- predictions


class ReadableImages(BatchDataset):
    """Maps a batch to the images that can be read, their indices, and messages on the others."""

    def __getitem__(self, batch):
        images, indices, problems = [], [], []
        for index in batch[0]:
            try:
                images.append(self.dataset.views([index], [None], self.cfg, 0))
                indices.append(index)
            except BadInput as error:
                problems.append(str(error))
        return torch.cat(images, dim=1) if images else None, indices, problems


@torch.no_grad()
def predict(args, saved):
    """Print a JSON line for each image of args.predict, which are files and folders.

    It holds the path, the class, its probability, and the next four classes with theirs. `saved`
    is the content of model.pth. The exit code is 2 if a file could not be read.
    """
    rank, world, device = train.start(args)
    cfg, names = argparse.Namespace(**saved["args"]["stage1"]), saved["classes"]
    encoder = Encoder(cfg.arch, cfg.experts, len(names)).eval()
    encoder.load_state_dict(saved["model"])
    encoder = encoder.to(device, memory_format=torch.channels_last)
    paths, unreadable = [], 0
    for path in args.predict:
        found = [image for image, _ in data.find_images(path)] if path.is_dir() else [path]
        if not found and rank == 0:
            print(f"eval.py: {path} holds no images", file=sys.stderr)
        unreadable += not found
        paths += found
    files = data.ImageFiles(Path(), list(map(os.fsencode, paths)), [0] * len(paths), "")
    shard = evaluation_batches(len(files), rank, world)
    loader = load_batches(files, shard, cfg, 0, args.workers, device, ReadableImages)
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # names may be any bytes
    for images, indices, problems in loader:
        for problem in problems:
            print(f"eval.py: {problem}", file=sys.stderr)
        unreadable += len(problems)
        if not indices:
            continue
        view = data.evaluation_view(images.to(device), cfg)
        logits = encoder.heads(features_of(encoder, view, args.amp)).mean(0)  # [B, classes]
        top = logits.softmax(1).topk(min(5, len(names)))
        for index, values, labels in zip(indices, top.values.tolist(), top.indices.tolist()):
            first, *following = [(names[n], round(p, 6)) for n, p in zip(labels, values)]
            line = {"path": str(files.path(index)), "class": first[0], "probability": first[1]}
            print(json.dumps(line | {"next": dict(following)}, ensure_ascii=False))
    sys.stdout.flush()
    # Wait for all ranks: torchrun stops the others when one exits with an error.
    if gather(torch.tensor([unreadable], device=device)).any():
        sys.exit(2)


# ---------------------------------------------------------------------- kNN, summary, export, plots


@torch.no_grad()
def neighbour_accuracy(encoder, train_set, held_out, args, cfg, processes, k=10, temperature=0.07):
    """Balanced accuracy, in percent, of a vote of the k nearest training images.

    Nearest is by the cosine of the backbone's features; a vote has the weight
    exp(cosine / temperature) (Wu et al., 2018).
    """

    def embed(dataset):
        features = split_features(encoder, dataset, args, cfg, processes)
        features = F.normalize(torch.cat(list(features), dim=1), dim=1)
        return features, dataset.labels.to(features.device)

    (bank, bank_labels), (features, labels) = embed(train_set), embed(held_out)
    classes, right = int(bank_labels.max()) + 1, []
    for rows, of_rows in zip(features.split(256), labels.split(256)):
        cosine, nearest = (rows @ bank.T).topk(min(k, len(bank)))
        votes = rows.new_zeros(len(rows), classes)
        votes.scatter_add_(1, bank_labels[nearest], (cosine / temperature).exp())
        right.append(votes.argmax(1) == of_rows)
    return class_mean(torch.cat(right), labels, classes)


def summary(runs):
    """Mean and standard deviation over runs that differ only in their seed, one line per group."""
    names, groups = ("many", "medium", "few", "all"), {}
    ignored = train.MAY_CHANGE - {"amp"} | {"seed", "images"}
    finished = [run for run in runs if (run / "results.json").exists()] or runs
    if len(finished) < len(runs):
        print(f"{len(runs) - len(finished)} of {len(runs)} runs have no results", file=sys.stderr)
    for run in finished:
        try:
            results = json.loads((run / "results.json").read_text())
            settings = flatten(results["arguments"], ignored)
            accuracies = [results[name] for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{run}/results.json cannot be read ({error}): run eval.py") from None
        settings = {name: json.dumps(value) for name, value in settings.items()}
        groups.setdefault(tuple(sorted(settings.items())), []).append(accuracies)

    def mean_and_std(values):
        if None in values:
            return "-"
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    lines = ["".join(f"{name:>15}" for name in names) + f"{'seeds':>7}"]
    for settings, members in groups.items():
        line = "".join(f"{mean_and_std(values):>15}" for values in zip(*members))
        differ = [f"{n} {v}" for n, v in settings if any(dict(o).get(n) != v for o in groups)]
        lines.append(f"{line}{len(members):>7}  {', '.join(differ)}")
    return "\n".join(lines)


def export(path, encoder, cfg, names):
    """Write the weights under torchvision's names, for load_state_dict, and PATH.json beside them.

    PATH.json has the names of the classes, and how to resize, crop and normalise an image.
    """
    parts = encoder.shared, encoder.branches[0], nn.ModuleDict(dict(fc=encoder.heads[0]))
    state = {name: value.cpu() for part in parts for name, value in part.state_dict().items()}
    save(path, state)
    card = dict(arch=cfg.arch, classes=names, mean=cfg.mean, std=cfg.std)
    if not data.in_memory(cfg.dataset):
        card |= dict(resize=data.shorter_side(cfg.view_size), crop=cfg.view_size)
    save(path.with_name(path.name + ".json"), json.dumps(card, indent=1) + "\n")
    print(f"wrote {path} and {path}.json", file=sys.stderr)


GROUP_COLORS = {"many": (62, 110, 170), "medium": (228, 148, 48), "few": (192, 62, 104)}


def draw_accuracy(path, results, names):
    """Draw a bar for each class, sorted by training images, coloured by many, medium and few."""
    counts, font = torch.tensor(results["counts"]), load_font()
    order = counts.argsort(descending=True, stable=True).tolist()
    width, left, bottom = max(1, min(50, 1600 // len(order))), 40, 340  # 3 pixels a percent
    size = max(450, left + width * len(order) + 20), bottom + 130
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    title = f"top-1 on {results['reported_on']}, mean of classes: {results['all']:.2f}"
    draw.text((6, 4), title, "black", font)
    for percent in range(0, 101, 20):
        y = bottom - 3 * percent
        draw.line([(left, y), (image.width, y)], (220, 220, 220))
        draw.text((left - 6, y), str(percent), "black", font, "rm")
    for column, (group, mask) in enumerate(shot_groups(counts).items()):
        places = [n for n, label in enumerate(order) if mask[label]]
        for n in places:
            x, accuracy = left + n * width, results["per_class"][order[n]]
            if accuracy is not None:  # else the class has no test image
                box = x, bottom - 3 * accuracy, x + max(0, width - 2), bottom
                draw.rectangle(box, GROUP_COLORS[group])
        if places and results[group] is not None:
            text = f"{group} {results[group]:.1f}"
            draw.text((left + 130 * column, bottom - 308), text, GROUP_COLORS[group], font, "ls")
    for n, label in enumerate(order if len(order) <= 40 else ()):
        name = caption(f"{names[label]} {counts[label]}", 120).rotate(90, expand=True)
        image.paste(name, (left + n * width + width // 2 - 9, bottom + 4))
    image.save(path)


@cache
def load_font():
    """The installed font with the most letters; Pillow's default has ASCII only."""
    for name in ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "arial.ttf"):
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, 13)
    return ImageFont.load_default(13)


def caption(text, width):
    """An image of a line of text, 18 pixels high."""
    strip = Image.new("RGB", (width, 18), "white")
    ImageDraw.Draw(strip).text((2, 1), text, "black", load_font())
    return strip


@torch.no_grad()
def draw_activation(path, encoder, dataset, counts, cfg, names, device, side=160):
    """Draw class activation maps (Zhou et al., 2016) of images of the four smallest classes.

    The map is the feature map times the classifier's weights of the image's class, summed over
    experts, as colours over the image: red where the class is seen most, blue where least.
    """
    here = dataset.labels.unique()
    tail = here[counts[here].argsort(stable=True)[:4]]
    rows = torch.cat([(dataset.labels == label).nonzero()[:3, 0] for label in tail]).tolist()
    images, labels = dataset.views(rows, rows, cfg, 0), dataset.labels[rows]
    feature_maps = encoder.eval().feature_maps(data.evaluation_view(images.to(device), cfg))
    pairs = zip(encoder.heads, feature_maps)
    maps = sum(torch.einsum("bc,bchw->bhw", h.weight[labels], f.float()) for h, f in pairs).cpu()
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = ((maps - low) / (high - low).clamp(min=1e-12))[:, None]  # [B, 1, h, w]
    maps = F.interpolate(maps, (side, side), mode="bilinear")
    shown = F.interpolate(images[0].expand(-1, 3, -1, -1) / 255, (side, side))
    # Each colour's peak: blue at 1/4, green at 1/2, red at 3/4.
    peaks = torch.tensor([3.0, 2.0, 1.0]).view(3, 1, 1)
    colors = (1.5 - (4 * maps - peaks).abs()).clamp(0, 1)  # [B, 3, side, side]
    both = torch.cat([shown, (shown + colors) / 2], dim=3)
    legend = caption("red: where the class is seen most, blue: least", 2 * side)
    strips = [caption(f"{names[c]}: {counts[c]} training images", 2 * side) for c in labels]
    strips = [torch.cat([pil_to_tensor(part) / 255 for part in (s, legend)], 1) for s in strips]
    save_image(torch.cat([both, torch.stack(strips)], dim=2), path, nrow=3, pad_value=1)


# ---------------------------------------------------------------------------------------- arguments


def settle_classifier(parser, args):
    """Set the settings that no flag has set, which are None, to the data set's defaults.

    Settings of the other classifier stay None; a flag that sets one of them is an error.
    --epochs 0 selects the classifier that stage 1 has trained.
    """
    defaults = parser.entry["stage2"]
    given = {name for name in STAGE2 if getattr(args, name) is not None}
    kind = "stage1" if args.epochs == 0 else args.classifier or defaults["classifier"]
    taken = dict(adjusted={"penalty"}, stage1={"epochs"}, balanced=STAGE2 - {"penalty"})
    for name in STAGE2 - given:
        setattr(args, name, defaults[name] if name in taken[kind] else None)
    for name in sorted(given - taken[kind] - {"classifier"}):
        other = "adjusted" if name == "penalty" else "balanced"
        parser.error(f"--{name.replace('_', '-')}: this flag is for --classifier {other}")
    args.classifier = kind


def parse_args():
    """The arguments, and the content of the checkpoint or, for --predict, of model.pth."""
    where = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--checkpoint", "--output", "--dataset", "--predict", "--summary"):
        where.add_argument(flag, nargs="?")
    where = where.parse_known_args()[0]
    output = Path(where.output or Path("runs") / (where.dataset or data.DEFAULT))
    path = Path(where.checkpoint or output / "checkpoint.pth")
    of_file = (output / "model.pth", RESULT, "eval.py") if where.predict else (path, train.STAGE)
    saved, cfg = None, {}
    if of_file[0].exists() and not where.summary:
        saved = load(*of_file)
        cfg = saved["args"]["stage1"] if where.predict else saved["args"]
    parser = Parser(__doc__, cfg.get("dataset", where.dataset or data.DEFAULT), "--output RUN")
    add_run_flags(parser)
    parser.path("checkpoint", "FILE", "checkpoint of train.py (default: the one in --output)")
    parser.begin("instead of training the classifier")
    text = "print class, probability and the next four classes of images, as JSON lines"
    parser.path("predict", "PATH", text, nargs="+")
    text = "print mean and standard deviation of finished runs that differ only in their seed"
    parser.path("summary", "RUN", text, nargs="+")
    parser.switch("knn", "print the nearest-neighbour accuracy; also possible while stage 1 trains")
    parser.begin("additional output")
    parser.path("plots", "DIR", "draw accuracy by class and class activation maps")
    parser.path("export", "FILE", "write the weights under torchvision's names")
    parser.begin("classifier")
    parser.settings("stage2")
    parser.set_defaults(output=path.parent, checkpoint=path)
    parser.set_defaults(**{name: cfg.get(name) for name in ("data_root", "index_dir", "imbalance")})
    args = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(STAGE2)))
    if args.summary:
        return args, None
    settle_classifier(parser, args)
    saved = saved or load(*of_file)
    if args.predict:
        if data.in_memory(cfg["dataset"]):
            raise BadInput(
                f"--predict: {args.output} was trained on {cfg['dataset']}, whose images are held "
                "in memory; it needs a run on image files"
            )
        return args, saved
    if args.dataset != cfg["dataset"]:
        raise BadInput(f"{path} was trained on {cfg['dataset']}, not on {args.dataset}")
    if args.epochs == 0 and cfg["loss"] not in train.CLASSIFIERS:
        raise BadInput(f"--epochs 0: {path} has no classifier; --loss ce or la trains one")
    if args.export and (cfg["arch"] in SMALL_ARCHS or cfg["experts"] > 1):
        raise BadInput(f"--export: torchvision has no {cfg['arch']} of {cfg['experts']} experts")
    return args, {name: saved[name] for name in ("args", "step", "encoder")}


if __name__ == "__main__":
    train.run(main)
