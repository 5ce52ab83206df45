"""Stage 2 of DSCL + PBSD: fit a linear classifier on the frozen backbone, and evaluate it.

    python eval.py                                                 # after python train.py
    python eval.py --output runs/mine                              # any run of train.py
    torchrun --nproc_per_node=8 eval.py --output runs/imagenet_lt  # several GPUs
    python eval.py --output RUN --predict PATH ...                 # a JSON line for each image
    python eval.py --output RUN --plots plots                      # accuracy by class, activation
    python eval.py --summary runs/*                                # mean and std over seeds

The classifier is chosen on val and reported on test, by many-, medium- and few-shot classes.
Without a test split nothing is chosen and val is reported. It writes OUTPUT/results.json;
OUTPUT/model.pth, the only file that --predict needs; and OUTPUT/classifier.pth, from which the same
command continues after an interruption. To see how good the features are while stage 1 still
trains, use --checkpoint RUN/checkpoint.pth --output ANOTHER --classifier adjusted.
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
from data import BadInput, BatchDataset, Batches, Draws, Progress, load_batches, shot_groups
from models import SMALL_ARCHS, Encoder, global_average_pool
from train import STAGE2, autocast, comparable, gather, load, resume, save, to_json

STAGE = "stage 2 of DSCL + PBSD"
RESULT = "the classifier of DSCL + PBSD"


def main():
    args, saved = parse_args()
    if args.summary:
        return print(summary(args.summary))
    if args.predict:
        return predict(args, saved)
    stage1 = argparse.Namespace(**saved["args"])  # the arguments of train.py
    rank, _, device = processes = train.start(args)
    args.stage1 = saved["args"] | dict(step=saved["step"])
    sets = data.load_dataset(stage1.dataset, args.data_root, args.index_dir, args.imbalance)
    train_set = sets["train"]
    counts, names = train_set.labels.bincount(), train_set.names
    if names != stage1.classes:
        differ = sorted(set(names) ^ set(stage1.classes)) or ["another order"]
        raise BadInput(f"{args.checkpoint}: the classes are not those of training "
                       f"({', '.join(differ[:3])}): rename their folders back, or train again")
    if train_set.fingerprint() != stage1.training_images:
        says = (f"{args.checkpoint} was trained on {stage1.training_images}, these are "
                f"{train_set.fingerprint()}")
        if train_set.origin in [part.origin for split, part in sets.items() if split != "train"]:
            raise BadInput(f"{says}: some images held out now could have been used for training; "
                           f"{train.OTHER_IMAGES}")
        data.say(f"{says}: the classifier is fitted on these, with the features of that training")
    if args.classifier == "balanced":
        train.fit_batch(args, len(train_set))
    state, of_stage1 = saved.pop("encoder"), args.classifier == "stage1"  # --epochs 0
    encoder = classifier_of(stage1, state, len(counts), args.seed, device, keep_heads=of_stage1)
    for directory in filter(None, (args.output, args.plots, args.export and args.export.parent)):
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise BadInput(f"{directory} cannot be written")

    # The classifier is chosen on val if there is a test set to report on, else val is reported.
    reported = "test" if "test" in sets else "val"
    val_set = sets.get("val") if reported == "test" and not of_stage1 else None
    chosen, path = dict(accuracy=None), args.output / "results.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no results so far
        earlier = json.loads(path.read_text())["arguments"]
        earlier["stage1"]["step"] = saved["step"]  # results of fewer steps may be replaced
        train.refuse_differences(path, earlier, args)
    # Each split is read once; the first call comes after `balanced`, which may change BatchNorm.
    features = cache(lambda part: split_features(encoder, part, args, stage1, processes))
    if args.classifier == "balanced":
        chosen = train_classifier(encoder, train_set, val_set, args, stage1, processes)
    if args.classifier == "adjusted":
        chosen = fit_classifier(encoder.heads, features, train_set, val_set, args.penalty)
    # Only plain cross-entropy answers for classes as frequent as in training.
    answers_for = "training" if of_stage1 and stage1.loss == "ce" else "balanced"
    sign = (args.prior == "training") - (answers_for == "training")
    shift = sign * (counts / counts.sum()).log()
    prior = counts.double() if args.prior == "training" else torch.ones(len(counts))
    adapt(encoder.heads, shift)
    temperature = 1.0
    if val_set:
        logits = logits_of(encoder.heads, features(val_set))[0]
        temperature = best_temperature(logits, val_set.labels, prior)

    # The test set is evaluated once, with the classifier that val chose.
    labels = sets[reported].labels
    logits = logits_of(encoder.heads, features(sets[reported]))
    top = logits.topk(min(5, len(counts))).indices
    results, *experts = (metrics(of_expert, labels, counts) for of_expert in top)
    before, after = (calibration_error(logits[0] / t, labels, prior) for t in (1, temperature))
    results |= dict(
        classes=names, counts=counts.tolist(),
        reported_counts=labels.bincount(minlength=len(counts)).tolist(),
        reported_on=reported, chosen_on="val" if val_set else None, val=chosen["accuracy"],
        classifier=args.classifier, epoch=chosen.get("epoch"), penalty=chosen.get("penalty"),
        prior=args.prior, temperature=temperature, fit_on=args.fit_on,
        calibration_error=dict(before=before, after=after if val_set else None),
        experts=experts if len(experts) > 1 else None, arguments=to_json(args),
    )
    if rank == 0:
        save(path, json.dumps(results, indent=1) + "\n")
    if args.fit_on == "all":  # for predictions; the accuracies above are of the classifier before
        everything = torch.cat([features(part) for part in sets.values()], dim=1)
        of_all = torch.cat([part.labels for part in sets.values()])
        fit_heads(encoder.heads, everything, of_all, chosen["penalty"])
        adapt(encoder.heads, shift)
        data.say(f"model.pth has a classifier of all {len(of_all)} images")
    adapt(encoder.heads, 0, temperature)
    if rank > 0:
        return
    model = dict(stage=RESULT, args=to_json(args), classes=names, model=encoder.state_dict())
    save(args.output / "model.pth", model)
    print(table(results, counts))
    if len(experts) > 1:
        print("each expert alone: " + ", ".join(f"{expert['all']:.2f}" for expert in experts))
    for line in worst_confusions(top[0, :, 0], labels, names):
        print(line)
    what = "classifier of stage 1" if of_stage1 else f"classifier {args.classifier}"
    for name in ("epoch", "penalty"):  # what was chosen
        what += f", {name} {chosen[name]}" if name in chosen else ""
    if val_set:
        what += f", chosen on val ({chosen['accuracy']:.2f})"
        print(f"probabilities: expected calibration error {after:.1f} %, before {before:.1f} %; "
              f"temperature {temperature:.2f}, chosen on val")
    data.say(f"on {reported}; {what}; {path}")
    if args.plots:
        draw_accuracy(args.plots, results, names)
        draw_activation(args.plots, encoder, sets[reported], counts, stage1, names, device)
    if args.export:
        export(args.export, encoder, stage1, names)


# -------------------------------------------------------------------------------------- classifiers


def fit_classifier(heads, features, train_set, val_set, penalties):
    """Fit the heads with the best of the penalties, or with the first of them without a val_set.

    features(split) are those of its images [E, N, C]. The best is by class mean on val_set. Returns
    {"accuracy" on val_set, "penalty"}. Every rank solves the same problem on all features, 1 GB for
    ImageNet-LT and a ResNet-50.
    """
    labels, best = train_set.labels, None
    for penalty in penalties if val_set else penalties[:1]:
        fit_heads(heads, features(train_set), labels, penalty)
        accuracy = None
        if val_set:
            top = logits_of(heads, features(val_set))[0].argmax(1, keepdim=True)
            accuracy = metrics(top, val_set.labels, labels.bincount())["all"]
            data.say(f"classifier, penalty {penalty:g}  val {accuracy:.2f}")
        if not best or accuracy > best["accuracy"]:
            best = dict(accuracy=accuracy, penalty=penalty, heads=copy.deepcopy(heads.state_dict()))
    heads.load_state_dict(best.pop("heads"))
    return best


def fit_heads(heads, features, labels, penalty):
    """Fit each head by logistic regression on its features [N, C], and take the class prior off.

    Then it answers as if all classes were equally frequent: logit adjustment (Menon et al., 2021,
    section 4). The features are standardised, and weight and bias converted so that they apply to
    the original features.
    """
    labels = labels.to(features.device)
    counts = labels.bincount()
    for head, of_expert in zip(heads, features):
        std, mean = torch.std_mean(of_expert, 0)
        std = std.clamp(min=1e-6)  # a feature that is always 0 keeps weight 0
        weight, bias = regression((of_expert - mean) / std, labels, penalty)
        head.weight.data = weight / std
        head.bias.data = bias - (counts / counts.sum()).log() - head.weight.data @ mean


def regression(features, labels, penalty):
    """Multinomial logistic regression: weight [classes, C] and bias [classes].

        min over W, b of  mean_i cross_entropy(W x_i + b, y_i) + penalty |W|^2

    features [N, C] are x_i, labels [N] are y_i. The problem is convex, and L-BFGS always starts
    from W = 0 and the logarithm of the class prior as b. The sum goes over chunks of N, so that the
    logits [N, classes] are never held at once.
    """
    prior = labels.bincount() / len(labels)
    weight = features.new_zeros(len(prior), features.shape[1], requires_grad=True)
    bias = prior.log().to(features.dtype).requires_grad_()
    options = dict(max_iter=500, history_size=10, tolerance_grad=1e-5)
    optimizer = torch.optim.LBFGS([weight, bias], **options, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        total = penalty * weight.square().sum()
        total.backward()
        for x, y in zip(features.split(8192), labels.split(8192)):
            loss = F.cross_entropy(x @ weight.T + bias, y, reduction="sum") / len(labels)
            loss.backward()
            total = total.detach() + loss.detach()
        return total

    optimizer.step(objective)
    return weight.detach(), bias.detach()


def adapt(heads, shift, temperature=1.0):
    """Make the heads answer with (logits + shift) / temperature; shift is a number or [classes]."""
    for head in heads:
        head.bias.data.add_(torch.as_tensor(shift, device=head.bias.device)).div_(temperature)
        head.weight.data.div_(temperature)


def train_classifier(encoder, train_set, val_set, args, stage1, processes):
    """Train the heads by SGD with class-balanced sampling, as the paper does.

    The encoder ends with the weights of the best epoch on val_set or, without one, of the last.
    Returns {"accuracy" on val_set, "epoch"}. Continues from classifier.pth.
    """
    rank, world, device = processes
    path, counts = args.output / "classifier.pth", train_set.labels.bincount()
    sgd = dict(lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    optimizer = torch.optim.SGD(encoder.heads.parameters(), **sgd)
    epoch, best, saved = 0, None, resume(path, STAGE, args, device)
    if saved:
        encoder.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        epoch, best = saved["epoch"], saved["best"]
    per_epoch = len(train_set) // args.batch_size
    ranks = dict(seed=args.seed, start=epoch * per_epoch, rank=rank, world=world)
    batches = Batches(train_set.labels, args.batch_size, args.epochs, balanced=True, **ranks)
    crops = BatchDataset(train_set, stage1, int(args.augment))
    loader = load_batches(crops, batches, args.workers, device)
    heads = DistributedDataParallel(encoder.heads) if dist.is_initialized() else encoder.heads
    progress, began = Progress(len(batches.steps)), time.monotonic()
    for step, (images, labels) in zip(batches.steps, loader):
        encoder.train(args.bn == "train")
        passed = sum(step >= milestone * args.epochs * per_epoch for milestone in args.milestones)
        optimizer.param_groups[0]["lr"] = args.lr * 0.1**passed
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if args.augment:
            seed = data.seed_from(args.seed, step, 1)  # not the stream that drew the classes
            draws = Draws(seed, args.batch_size, batches.rows, device)
            view, _, _ = data.query_views(images[0], draws, stage1)
        else:
            view = evaluation_view(images, stage1)
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
            held_out = split_features(encoder, val_set, args, stage1, processes)
            top = logits_of(encoder.heads, held_out)[0].argmax(1, keepdim=True)
            accuracy = metrics(top, val_set.labels, counts)["all"]
        if best is None or val_set is None or accuracy > best["accuracy"]:
            best = dict(accuracy=accuracy, epoch=epoch, model=copy.deepcopy(encoder.state_dict()))
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


def classifier_of(stage1, state, classes, seed, device, keep_heads):
    """Stage 1's frozen encoder, with linear classifiers as heads: new ones, or stage 1's."""
    torch.manual_seed(seed)
    encoder = Encoder(stage1.arch, stage1.experts, classes).requires_grad_(False)
    for head in encoder.heads.requires_grad_(True):
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    if not keep_heads:
        state = {name: value for name, value in state.items() if not name.startswith("heads.")}
    encoder.load_state_dict(encoder.state_dict() | state)
    return encoder.to(device, memory_format=torch.channels_last)


@torch.no_grad()
def features_of(encoder, view, amp):
    """The features of a view, float32 [E, B, C], for classifiers."""
    with autocast(view.device, amp):
        return global_average_pool([maps.float() for maps in encoder.feature_maps(view)])


def evaluation_view(images, cfg):
    """Normalise uint8 images [1, B, C, H, W] for evaluation: [B, 3, H, W]."""
    return data.normalize(images[0].float() / 255, cfg)


def evaluation_loader(dataset, args, stage1, processes, kind=BatchDataset):
    """A loader of this process's part of a split: process i % world loads image i."""
    rank, world, device = processes
    rows = list(range(rank, len(dataset), world))
    batches = [(rows[first : first + 128], None) for first in range(0, len(rows), 128)]
    return load_batches(kind(dataset, stage1, crops=0), batches, args.workers, device)


@torch.no_grad()
def split_features(encoder, dataset, args, stage1, processes):
    """The features of all images of a split, in order, on all processes: [E, N, C]."""
    _, world, device = processes
    encoder.eval()
    # A process may have no image of a small split.
    parts = [torch.zeros(len(encoder.heads), 0, encoder.heads[0].in_features, device=device)]
    for images, _ in evaluation_loader(dataset, args, stage1, processes):
        view = evaluation_view(images.to(device, non_blocking=True), stage1)
        parts.append(features_of(encoder, view, args.amp))
    rows = torch.cat(parts, dim=1)
    size = -(-len(dataset) // world)  # some processes have one image less
    rows = gather(F.pad(rows, (0, 0, 0, size - rows.shape[1]))[None])  # [world, E, size, C]
    return rows.permute(1, 2, 0, 3).flatten(1, 2)[:, : len(dataset)]


@torch.no_grad()
def logits_of(heads, features):
    """Logits [1 + E, N, classes] of features [E, N, C]: the mean of the experts, then each."""
    of_experts = heads(features).cpu()
    return torch.cat([of_experts.mean(0, keepdim=True), of_experts])


# ------------------------------------------------------------------------------------------ metrics


def metrics(top, labels, train_counts):
    """Accuracies in percent: top1 and top5 over images; many, medium, few and all over classes.

    top [N, 5] are the first classes of each image, labels [N] the true ones, train_counts [classes]
    the training images of each class. A class without images is None and left out of the means over
    classes; a group without images is None.
    """
    hits = top == labels[:, None]
    counts = labels.bincount(minlength=len(train_counts))
    per_class = 100 * labels[hits[:, 0]].bincount(minlength=len(train_counts)).double() / counts
    groups = shot_groups(train_counts) | {"all": counts > 0}
    groups = {name: per_class[mask & (counts > 0)] for name, mask in groups.items()}
    means = {n: round(part.mean().item(), 6) if len(part) else None for n, part in groups.items()}
    top1, top5 = (100 * of.double().mean().item() for of in (hits[:, 0], hits.any(1)))
    per_class = [value if count else None for value, count in zip(per_class.tolist(), counts)]
    return dict(top1=top1, top5=top5, **means, per_class=per_class)


def image_weights(labels, prior):
    """The weight of each image, so that classes count as `prior` [classes] says; the sum is 1."""
    weights = (prior / labels.bincount(minlength=len(prior)))[labels]
    return weights / weights.sum()


def best_temperature(logits, labels, prior):
    """T of the probabilities softmax(logits / T): temperature scaling (Guo et al., 2017).

    It minimises the cross-entropy of images with these labels, weighted so that their classes are
    as frequent as `prior` says. The square keeps it finite if all images are classified correctly.
    """
    weights, log_t = image_weights(labels, prior), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        losses = F.cross_entropy(logits / log_t.exp(), labels, reduction="none")
        loss = weights @ losses.to(weights.dtype) + log_t.square() / len(labels)
        loss.backward()
        return loss

    optimizer.step(objective)
    return log_t.exp().item()


def calibration_error(logits, labels, prior, bins=15):
    """Expected calibration error in percent (Guo et al., 2017, equation 3), weighted as above."""
    probability, predicted = logits.softmax(1).max(1)
    gaps = image_weights(labels, prior) * ((predicted == labels).double() - probability)
    place = (probability * bins).long().clamp(max=bins - 1)
    return 100 * torch.zeros(bins, dtype=gaps.dtype).index_add(0, place, gaps).abs().sum().item()


def table(results, counts):
    """The results as a table to print."""
    titles = dict(many="many-shot, > 100", medium="medium-shot", few="few-shot, < 20")
    split, images = results["reported_on"], torch.tensor(results["reported_counts"])
    accuracies = torch.tensor([right or 0.0 for right in results["per_class"]])
    rows = [("", "classes", "training images", f"{split} images", "top-1")]
    for name, mask in shot_groups(counts).items():
        if mask.any():
            span, tested = f"{counts[mask].max()} to {counts[mask].min()} each", images[mask].sum()
            accuracy = "-" if results[name] is None else f"{results[name]:.2f}"
            if 0 < tested < 20:
                accuracy = f"{accuracies[mask] @ images[mask].float() / 100:.0f} of {tested}"
            rows.append((titles[name], int(mask.sum()), span, int(tested), accuracy))
    every = len(counts), int(counts.sum()), int(images.sum()), f"{results['all']:.2f}"
    rows.append(("all, mean of classes", *every))
    rows.append(("top1, mean of images", "", "", "", f"{results['top1']:.2f}"))
    weighted = accuracies @ (counts * (images > 0)).float() / counts[images > 0].sum()
    rows.append(("if classes came as in training", "", "", "", f"{weighted:.2f}"))
    lines = ["{:<30}{:>8}{:>20}{:>14}{:>10}".format(*row) for row in rows]
    missing = results["per_class"].count(None)
    if missing:
        lines.append(f"classes without a {split} image, left out: {missing} of {len(counts)}")
    return "\n".join(lines)


def worst_confusions(predicted, labels, names, count=3):
    """Lines such as "Shirt predicted as T-shirt: 23 % of 1000 images", largest rates first.

    Classes of fewer than five images are left out.
    """
    pairs, times = torch.stack([labels, predicted]).unique(dim=1, return_counts=True)
    totals, wrong = labels.bincount().tolist(), []
    for (label, other), number in zip(pairs.T.tolist(), times.tolist()):
        if label != other and totals[label] >= 5:
            wrong.append((number / totals[label], number, label, other))
    return [
        f"{names[label]} predicted as {names[other]}: {100 * rate:.0f} % of {totals[label]} images"
        for rate, _, label, other in sorted(wrong, reverse=True)[:count]
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
    """Print path, class, probability and next four classes of images, a JSON line each.

    They are the files and folders args.predict; `saved` is the content of model.pth. The exit code
    is 2 if a file could not be read.
    """
    rank, world, device = processes = train.start(args)
    stage1, names = argparse.Namespace(**saved["args"]["stage1"]), saved["classes"]
    encoder = classifier_of(stage1, saved["model"], len(names), 0, device, keep_heads=True).eval()
    paths, unreadable = [], 0
    for path in args.predict:
        found, others = data.find_images(path) if path.is_dir() else ([path], [])
        data.say_left_out(path, others, " ".join(data.IMG_EXTENSIONS))
        if not found:
            data.say(f"eval.py: error: {path} holds no images")
        unreadable += not found
        paths += map(os.fsencode, found)
    files = data.ImageFiles(Path(), paths, [0] * len(paths), "", upright=True)
    loader = evaluation_loader(files, args, stage1, processes, ReadableImages)
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # names may be any bytes
    for images, indices, problems in loader:
        for problem in problems:
            print(f"eval.py: error: {problem}", file=sys.stderr)
        unreadable += len(problems)
        if not indices:
            continue
        view = evaluation_view(images.to(device), stage1)
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


# --------------------------------------------------------------------------- summary, export, plots


def summary(runs):
    """Mean and standard deviation over runs that differ only in their seed, one line per group."""
    names, groups = ("many", "medium", "few", "all"), {}
    ignored = train.MAY_CHANGE - {"amp"} | {"seed"}
    finished = [run for run in runs if (run / "results.json").exists()] or runs
    if len(finished) < len(runs):
        data.say(f"{len(runs) - len(finished)} of {len(runs)} runs have no results")
    for run in finished:
        try:
            results = json.loads((run / "results.json").read_text())
            settings = comparable(results["arguments"], ignored)
            accuracies = [results[name] for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{run}/results.json cannot be read ({error}): run eval.py") from None
        key = tuple((name, json.dumps(value)) for name, value in sorted(settings.items()))
        groups.setdefault(key, []).append(accuracies)

    lines = ["".join(f"{name:>15}" for name in names) + f"{'seeds':>7}"]
    for key, members in groups.items():
        line = ""
        for values in zip(*members):
            cell = "-" if None in values else f"{statistics.mean(values):.2f}"
            if len(values) > 1 and None not in values:
                cell += f" ± {statistics.stdev(values):.2f}"
            line += f"{cell:>15}"
        differ = [f"{n} {v}" for n, v in key if any(dict(other).get(n) != v for other in groups)]
        lines.append(f"{line}{len(members):>7}  {', '.join(differ)}")
    return "\n".join(lines)


def export(path, encoder, stage1, names):
    """Write the weights under torchvision's names, and PATH.json with what else a user needs."""
    parts = encoder.shared, encoder.branches[0], nn.ModuleDict(dict(fc=encoder.heads[0]))
    state = {name: value.cpu() for part in parts for name, value in part.state_dict().items()}
    save(path, state)
    card = dict(arch=stage1.arch, classes=names, mean=stage1.mean, std=stage1.std)
    if not data.in_memory(stage1.dataset):
        card |= dict(resize=data.shorter_side(stage1.view_size), crop=stage1.view_size)
    save(path.with_name(path.name + ".json"), json.dumps(card, indent=1) + "\n")
    data.say(f"wrote {path} and {path}.json")


GROUP_COLORS = {"many": (62, 110, 170), "medium": (228, 148, 48), "few": (192, 62, 104)}


def draw_accuracy(directory, results, names):
    """Draw a bar for each class, sorted by training images, coloured by many, medium and few."""
    counts, tested = torch.tensor(results["counts"]), results["reported_counts"]
    order = counts.argsort(descending=True, stable=True).tolist()
    # Bars of this height begin here; a percent has 4 pixels.
    named, top = len(order) <= 100, 64
    height, left = (18, 300) if named else (2, 40)
    image = Image.new("RGB", (left + 430, top + height * len(order) + 6), "white")
    draw, font, groups = ImageDraw.Draw(image), load_font(), shot_groups(counts)
    title = f"top-1 on {results['reported_on']}, mean of classes {results['all']:.2f}"
    title += f"; beside a name: training and {results['reported_on']} images" if named else ""
    draw.text((6, 4), title, "black", font)
    for n, name in enumerate(name for name in groups if results[name] is not None):
        draw.text((6 + 120 * n, 24), f"{name} {results[name]:.1f}", GROUP_COLORS[name], font)
    for percent in range(0, 101, 20):
        x = left + 4 * percent
        draw.line([(x, top), (x, image.height)], (220, 220, 220))
        draw.text((x, top - 6), str(percent), "black", font, "ms")
    for n, label in enumerate(order):
        y, accuracy = top + n * height, results["per_class"][label]
        if accuracy is not None:  # else the class has no test image
            color = next(GROUP_COLORS[name] for name, mask in groups.items() if mask[label])
            draw.rectangle((left, y, left + 4 * accuracy, y + height - 2), color)
        if named:
            text = f"{names[label]}: {counts[label]}, {tested[label]}"
            draw.text((left - 6, y + 8), text, "black", font, "rm")
    image.save(directory / "accuracy.png")


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
def draw_activation(directory, encoder, dataset, counts, stage1, names, device, side=160):
    """Draw class activation maps (Zhou et al., 2016) of images of the four smallest classes.

    The map is the sum over experts of the feature map times the weights of the image's class.
    """
    here = dataset.labels.unique()
    tail = here[counts[here].argsort(stable=True)[:4]]
    rows = torch.cat([(dataset.labels == label).nonzero()[:3, 0] for label in tail]).tolist()
    images, labels = dataset.views(rows, rows, stage1, 0), dataset.labels[rows]
    feature_maps = encoder.eval().feature_maps(evaluation_view(images.to(device), stage1))
    pairs = zip(encoder.heads, feature_maps)
    maps = sum(torch.einsum("bc,bchw->bhw", h.weight[labels], f.float()) for h, f in pairs).cpu()
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = ((maps - low) / (high - low).clamp(min=1e-12))[:, None]  # [B, 1, h, w]
    maps = F.interpolate(maps, (side, side), mode="bilinear")
    shown = F.interpolate(images[0].expand(-1, 3, -1, -1) / 255, (side, side))
    colors = torch.cat([maps, 0 * maps, 1 - maps], dim=1)  # [B, 3, side, side]
    both = torch.cat([shown, (shown + colors) / 2], dim=3)
    texts = [f"{names[c]}: {counts[c]} training images; its evidence is red" for c in labels]
    strips = torch.stack([pil_to_tensor(caption(text, 2 * side)) / 255 for text in texts])
    save_image(torch.cat([both, strips], dim=2), directory / "activation.png", nrow=3, pad_value=1)


# ---------------------------------------------------------------------------------------- arguments


def parse_args():
    """The arguments, and the content of the checkpoint or, for --predict, of model.pth."""
    first = data.Parser()  # of the flags that name the checkpoint, which holds the defaults
    for flag in ("--checkpoint", "--output", "--dataset", "--predict", "--summary"):
        first.add_argument(flag, nargs="?")
    first = first.parse_known_args()[0]
    beside = first.checkpoint and Path(first.checkpoint).parent
    output = Path(first.output or beside or f"runs/{first.dataset or data.DEFAULT}")
    checkpoint = Path(first.checkpoint or output / "checkpoint.pth")
    file = (output / "model.pth", RESULT, "eval.py") if first.predict else (checkpoint, train.STAGE)
    saved = load(*file) if file[0].exists() and not first.summary else None
    stage1 = saved["args"] if saved else {}
    stage1 = stage1.get("stage1", stage1)  # in model.pth it is a part of eval.py's arguments

    parser = data.Parser(description=__doc__)
    dataset = data.add_data_flags(parser, stage1.get("dataset", data.DEFAULT))
    flag = parser.add_argument_group("what to do").add_argument
    flag("--checkpoint", type=Path, default=checkpoint, metavar="FILE", help="of train.py")
    flag("--predict", type=Path, nargs="+", metavar="PATH", help="predict images, as JSON lines")
    flag("--summary", type=Path, nargs="+", metavar="RUN", help="mean and deviation over seeds")
    flag("--plots", type=Path, metavar="DIR", help="draw accuracy by class and activation maps")
    flag("--export", type=Path, metavar="FILE", help="write weights under torchvision's names")
    run_rows = train.run_settings(dataset)
    train.add_settings(parser, "run", dataset, run_rows)
    train.add_settings(parser, "classifier", dataset, STAGE2)
    images = {name: stage1[name] for name in ("data_root", "index_dir", "imbalance") if stage1}
    parser.set_defaults(output=output, **images)
    args = train.parse_within_limits(parser, run_rows + STAGE2)
    if args.summary:
        return args, None
    saved = saved or load(*file)
    if dataset != stage1["dataset"]:
        raise BadInput(f"{file[0]} was trained on {stage1['dataset']}, not on {dataset}")
    if args.predict:
        if data.in_memory(dataset):
            raise BadInput(f"--predict needs a run on image files, not on {dataset}")
        return args, saved
    if "training_images" not in stage1:
        raise BadInput(f"{checkpoint} is from an earlier version of this code: train again")

    if args.epochs == 0:
        args.classifier = "stage1"
        if stage1["loss"] not in train.CLASSIFIERS:
            raise BadInput(f"--epochs 0: {checkpoint} has no classifier; --loss ce or la have one")
    defaults = train.values_for(dataset, STAGE2)
    used = dict(adjusted={"penalty", "fit_on"}, stage1={"epochs"})
    used["balanced"] = defaults.keys() - used["adjusted"]
    for name in sorted(defaults.keys() - used[args.classifier] - {"classifier", "prior"}):
        if getattr(args, name) != defaults[name]:
            flag = name.replace("_", "-")
            parser.error(f"--{flag}: this flag is not for the classifier {args.classifier}")
    if args.export and (stage1["arch"] in SMALL_ARCHS or stage1["experts"] > 1):
        network = "networks of several experts" if stage1["experts"] > 1 else stage1["arch"]
        raise BadInput(f"--export: torchvision has no {network}")
    return args, {name: saved[name] for name in ("args", "step", "encoder")}


if __name__ == "__main__":
    train.run(main)
