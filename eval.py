"""Stage 2 of DSCL + PBSD: fit a linear classifier on the frozen backbone, and evaluate it.

    python eval.py                                                 # after python train.py
    python eval.py --output runs/mine                              # any run of train.py
    torchrun --nproc_per_node=8 eval.py --output runs/imagenet_lt  # several GPUs
    python eval.py --output RUN --predict PATH ...                 # a JSON line for each image
    python eval.py --output RUN --plots plots                      # accuracy by class, activation
    python eval.py --summary runs/*                                # mean and std over seeds

The classifier is chosen on val and reported on test, by many-, medium- and few-shot classes, with
standard errors. Without a test split nothing is chosen and val is reported. It writes
OUTPUT/results.json; OUTPUT/predictions.jsonl, a line for each reported image; OUTPUT/model.pth, the
only file that --predict needs; and OUTPUT/classifier.pth, from which the same command continues
after an interruption. To see how good the features are while stage 1 still trains, use
--checkpoint RUN/checkpoint.pth --output ANOTHER --classifier adjusted.
"""

import argparse
import contextlib
import copy
import json
import os
import statistics
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import data  # before torch, whose precision it settles
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import save_image

import train
from data import BadInput, BatchDataset, Batches, Draws, Progress, load_batches, shot_groups
from models import SMALL_ARCHS, Encoder, global_average_pool
from train import STAGE2, autocast, comparable, gather, load, resume, save, to_json

STAGE = "stage 2 of DSCL + PBSD"
RESULT = "the classifier of DSCL + PBSD"


def main():
    args, cfg, saved = parse_args()  # cfg: the arguments of train.py
    if args.summary:
        return print(summary(args.summary))
    if args.predict:
        return predict(args, cfg, saved)

    # Load the run: its images, what earlier commands wrote to --output, and stage 1's encoder.
    rank, _, device = processes = train.start(args)
    sets = load_sets(args, cfg)
    labels = {split: dataset.labels for split, dataset in sets.items()}
    counts, keep_heads = labels["train"].bincount(), args.classifier == "stage1"  # --epochs 0
    if args.classifier == "balanced":
        train.lower_batch_size(args, len(sets["train"]))
    args.stage1 = vars(cfg) | dict(weights=hash_of(saved["encoder"]))
    args.images = {split: dataset.fingerprint() for split, dataset in sets.items()}
    prepare_output(args)
    encoder = load_encoder(cfg, saved.pop("encoder"), len(counts), args.seed, device, keep_heads)

    # Fit the classifier. Val may be used if there is a test set to report on.
    reported = "test" if "test" in sets else "val"
    chosen_on = "val" if reported == "test" and "val" in sets and not keep_heads else None
    epoch = penalty = None
    if args.classifier == "balanced":
        epoch = train_classifier(encoder, sets["train"], sets.get(chosen_on), args, cfg, processes)
    classifier = Classifier.of(encoder.heads)
    # The features come after `balanced`, which may change the statistics of BatchNorm.
    used = list(sets) if args.classifier == "adjusted" else [reported, chosen_on]
    features = {split: split_features(encoder, dataset, args, cfg, processes)
                for split, dataset in sets.items() if split in used}
    if args.classifier == "adjusted":
        penalty = args.penalty or 10 / len(sets["train"])
        classifier = fit_heads(features["train"], labels["train"], penalty)

    # Set the prior. A classifier fitted on images as they come expects classes as frequent as in
    # training; one of class-balanced batches or of --loss la expects equal frequencies.
    training = counts.double() / counts.sum()
    priors = dict(training=training, balanced=torch.ones_like(training))
    as_they_come = args.classifier == "adjusted" or (keep_heads and cfg.loss == "ce")
    fitted_for, prior = priors["training" if as_they_come else "balanced"], priors[args.prior]
    classifier = set_prior(classifier, fitted_for, prior)

    # Choose the temperature on val, and measure the accuracy there, too.
    temperature, on_val = None, None
    if chosen_on:
        logits = classifier.logits(features[chosen_on])[0]
        temperature = best_temperature(logits, labels[chosen_on], prior)
        on_val = evaluate(logits[None], labels[chosen_on], counts, prior, temperature)

    # Evaluate the test set once.
    logits = classifier.logits(features[reported])
    results = evaluate(logits, labels[reported], counts, prior, temperature)
    results |= dict(
        classes=cfg.classes, reported_on=reported, chosen_on=chosen_on, on_val=on_val,
        val=on_val and on_val["all"], classifier=args.classifier, epoch=epoch, penalty=penalty,
        prior=args.prior, fit_on=args.fit_on, arguments=to_json(args),
    )

    # Write. With --fit-on all, model.pth gets another classifier than the one that was measured.
    final = classifier, temperature, f"{len(sets['train'])} training images"
    if args.fit_on == "all":
        final = fit_on_all(features, labels, penalty, prior)
    if rank == 0:
        write_results(args, results, sets[reported], logits)
        write_model(args, cfg, encoder, results, *final)
        if args.plots:
            draw_accuracy(args.plots, results)
            draw_activation(args.plots, results, encoder, classifier, logits, sets[reported], cfg)
            data.say(f"wrote accuracy.png and activation.png to {args.plots}")


# ---------------------------------------------------------------------------------- loading the run


def load_sets(args, cfg):
    """The splits of the data set; says what differs from stage 1, or raises BadInput.

    Other classes are refused, and other training images if those held out now may be among the old.
    """
    if cfg.step < steps_of(cfg):
        data.say(f"stage 1 is unfinished: {args.checkpoint} has step {cfg.step} of {steps_of(cfg)}")
    sets = data.load_dataset(cfg.dataset, args.data_root, args.index_dir, args.imbalance)
    names, images = sets["train"].names, sets["train"].fingerprint()
    if names != cfg.classes:
        raise BadInput(f"{args.checkpoint}: the classes are not those of training "
                       f"({train.difference(cfg.classes, names)}): rename their folders back, or "
                       "train again")
    if images != cfg.training_images:
        says = f"{args.checkpoint} was trained on {cfg.training_images}, these are {images}"
        if sets["train"].origin in [sets[split].origin for split in sets if split != "train"]:
            raise BadInput(f"{says}: some images held out now could have been used for training; "
                           f"{train.OTHER_IMAGES}")
        data.say(f"{says}: the classifier is fitted on these, with the features of that training")
    return sets


def steps_of(cfg):
    """The steps of the whole of stage 1."""
    count = int(cfg.training_images.split()[0])  # "2478 images, hash ..."
    return cfg.epochs * (count // cfg.batch_size)


def hash_of(state):
    """A hash of the names and values of a state dict."""
    digest = sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def prepare_output(args):
    """Create the directories; BadInput if they hold the results of other arguments.

    Results of the same arguments but other weights of stage 1, which may have gone on or been
    trained again, are replaced, and this is said.
    """
    for directory in filter(None, (args.output, args.plots, args.export and args.export.parent)):
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise BadInput(f"{directory} cannot be written")
    results, model, earlier = args.output / "results.json", args.output / "model.pth", {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no results so far
        earlier[results] = json.loads(results.read_text())["arguments"]
    if model.exists():
        earlier[model] = load(model, RESULT, "eval.py")["args"]
    for path, arguments in earlier.items():
        train.refuse_differences(path, arguments, args)
        if arguments["stage1"].get("weights") != args.stage1["weights"]:
            data.say(f"{path} is of other weights of stage 1 and will be replaced")


def load_encoder(cfg, state, classes, seed, device, keep_heads):
    """Stage 1's frozen encoder, with linear classifiers as heads: new ones, or stage 1's."""
    torch.manual_seed(seed)
    encoder = Encoder(cfg.arch, cfg.experts, classes).requires_grad_(False)
    for head in encoder.heads.requires_grad_(True):
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    if not keep_heads:
        state = {name: value for name, value in state.items() if not name.startswith("heads.")}
    encoder.load_state_dict(encoder.state_dict() | state)
    return encoder.to(device, memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------- classifiers


class Classifier(NamedTuple):
    """A linear classifier for each of E experts: weight [E, classes, C] and bias [E, classes]."""

    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, heads):
        """A copy of the linear heads of an encoder."""
        weights, biases = zip(*((head.weight.detach(), head.bias.detach()) for head in heads))
        return cls(torch.stack(weights), torch.stack(biases))

    def copy_to(self, heads):
        for head, weight, bias in zip(heads, self.weight, self.bias):
            head.weight.data, head.bias.data = weight.clone(), bias.clone()

    def logits(self, features):
        """Logits [1 + E, N, classes] of features [E, N, C]: the mean of the experts, then each."""
        of_experts = torch.stack([F.linear(*one) for one in zip(features, self.weight, self.bias)])
        return torch.cat([of_experts.mean(0, keepdim=True), of_experts]).cpu()


def set_prior(classifier, fitted_for, wanted):
    """The classifier for classes as frequent as `wanted` instead of `fitted_for`, both [classes].

    The logits change by the logarithm of the quotient: logit adjustment (Menon et al., 2021,
    section 4).
    """
    shift = wanted.log() - fitted_for.log()
    return classifier._replace(bias=classifier.bias + shift.to(classifier.bias))


def fit_heads(features, labels, penalty):
    """The classifier of features [E, N, C] by logistic regression for each expert.

    It expects classes as frequent as in labels [N]. The features are standardised, and weight and
    bias converted so that they apply to the original features. Every rank solves the same problem
    on all features, 1 GB for ImageNet-LT and a ResNet-50.
    """
    weights, biases = [], []
    for of_expert in features:
        std, mean = torch.std_mean(of_expert, 0)
        std = std.clamp(min=1e-6)  # a feature that is always 0 keeps weight 0
        weight, bias = regression((of_expert - mean) / std, labels.to(of_expert.device), penalty)
        weights.append(weight / std)
        biases.append(bias - weights[-1] @ mean)
    return Classifier(torch.stack(weights), torch.stack(biases))


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


def fit_on_all(features, labels, penalty, prior, folds=5):
    """A classifier of the images of all splits for this prior: (classifier, temperature, words).

    The temperature is chosen by cross-validation on the images that stage 1 has not seen: each fold
    of them is predicted by a classifier of all other images, those of train included.
    """
    splits = ["train", *(split for split in features if split != "train")]
    features = torch.cat([features[split] for split in splits], dim=1)
    unseen = torch.arange(features.shape[1]) >= len(labels["train"])
    labels = torch.cat([labels[split] for split in splits])
    order = labels[unseen].argsort(stable=True)  # each class is spread over the folds
    fold = torch.full_like(labels, folds)
    fold[unseen.nonzero()[order, 0]] = torch.arange(len(order)) % folds
    logits = torch.empty(len(labels), len(prior))
    for number in range(folds):
        out = fold == number
        classifier = fit_heads(features[:, ~out], labels[~out], penalty)
        classifier = set_prior(classifier, labels[~out].bincount() / (~out).sum(), prior)
        logits[out] = classifier.logits(features[:, out])[0]
    temperature = best_temperature(logits[unseen], labels[unseen], prior)
    words = calibration_words(calibration(logits[unseen] / temperature, labels[unseen], prior))
    data.say(f"classifier of all {len(labels)} images for model.pth; probabilities by "
             f"cross-validation: {words}")
    classifier = fit_heads(features, labels, penalty)
    classifier = set_prior(classifier, labels.bincount() / len(labels), prior)
    return classifier, temperature, f"all {len(labels)} images"


def train_classifier(encoder, train_set, val_set, args, cfg, processes):
    """Train the heads by SGD with class-balanced sampling, as the paper does.

    The encoder ends with the weights of the best epoch on val_set or, without one, of the last,
    which is returned. Continues from classifier.pth.
    """
    rank, world, device = processes
    path, counts = args.output / "classifier.pth", train_set.labels.bincount()
    sgd = dict(lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    optimizer = torch.optim.SGD(encoder.heads.parameters(), **sgd)
    epoch, best, saved = 0, None, resume_classifier(path, args, device)
    if saved:
        encoder.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        epoch, best = saved["epoch"], saved["best"]
    per_epoch = len(train_set) // args.batch_size
    ranks = dict(seed=args.seed, start=epoch * per_epoch, rank=rank, world=world)
    batches = Batches(train_set.labels, args.batch_size, args.epochs, balanced=True, **ranks)
    crops = BatchDataset(train_set, cfg, int(args.augment))
    loader = load_batches(crops, batches, args.workers, device)
    heads = DistributedDataParallel(encoder.heads) if dist.is_initialized() else encoder.heads
    progress, began = Progress(len(batches.steps)), time.monotonic()
    for step, (images, labels) in zip(batches.steps, loader):
        encoder.train(args.bn == "train")
        passed = sum(step >= milestone * args.epochs * per_epoch for milestone in args.milestones)
        optimizer.param_groups[0]["lr"] = args.lr * 0.1**passed
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        view = training_view(images, step, batches, args, cfg)
        # Sum over experts, so that each classifier is trained as if it were alone.
        logits = heads(features_of(encoder, view, args.amp))
        loss = sum(F.cross_entropy(of_expert, labels) for of_expert in logits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % per_epoch == 0:
            epoch = (step + 1) // per_epoch
            train.average_statistics(encoder)
            on_val = None
            if val_set:
                features = split_features(encoder, val_set, args, cfg, processes)
                predicted = Classifier.of(encoder.heads).logits(features)[0].argmax(1)
                on_val = metrics(predicted[:, None], val_set.labels, counts)
            if not best or not on_val or on_val["all"] > best["accuracy"]:
                best = dict(accuracy=on_val and on_val["all"], epoch=epoch)
                best["model"] = copy.deepcopy(encoder.state_dict())
            state = dict(model=encoder.state_dict(), optimizer=optimizer.state_dict())
            if rank == 0:
                save(path, dict(stage=STAGE, args=to_json(args), epoch=epoch, best=best, **state))
            done = step + 1 - batches.steps.start
            rate = done * args.batch_size / (time.monotonic() - began)
            text = f"classifier, epoch {epoch}/{args.epochs}  loss {loss.item() / len(logits):.3f}"
            text += f"  val {accuracy_words(on_val)}" if on_val else ""
            progress.show(done, f"{text}  {rate:.0f} images/s")
    encoder.load_state_dict(best["model"])
    return best["epoch"]


def resume_classifier(path, args, device):
    """The content of classifier.pth, or None if its classifier must be begun anew.

    It belongs to stage 1's weights and to the images of train and val. Other arguments are refused.
    """
    saved = resume(path, STAGE, args, device)
    if not saved:
        return None

    before, now = saved["args"], vars(args)
    same = before["stage1"].get("weights") == now["stage1"]["weights"]
    others = [] if same else ["weights of stage 1"]
    for split in ("train", "val"):
        if (before.get("images") or {}).get(split) != now["images"].get(split):
            others.append(f"{split} images")
    if others:
        data.say(f"{path} belongs to other {' and other '.join(others)}: begun anew")
    return None if others else saved


def training_view(images, step, batches, args, cfg):
    """A batch uint8 [1, B, C, H, W] as the classifier is trained on it: [B, 3, H, W]."""
    if not args.augment:
        return evaluation_view(images, cfg)
    seed = data.seed_from(args.seed, step, data.CLASSIFIER)
    draws = Draws(seed, args.batch_size, batches.positions, images.device)
    return data.query_views(images[0], draws, cfg)[0]


# ----------------------------------------------------------------------------------------- features


@torch.no_grad()
def features_of(encoder, view, amp):
    """The features of a view, float32 [E, B, C], for classifiers."""
    with autocast(view.device, amp):
        return global_average_pool([maps.float() for maps in encoder.feature_maps(view)])


def evaluation_view(images, cfg):
    """Normalise uint8 images [1, B, C, H, W] for evaluation: [B, 3, H, W]."""
    return data.normalize(images[0].float() / 255, cfg)


def evaluation_loader(dataset, args, cfg, processes, kind=BatchDataset):
    """A loader of this process's part of a split: process i % world loads image i."""
    rank, world, device = processes
    indices = list(range(rank, len(dataset), world))
    batches = [(indices[start : start + 128], None) for start in range(0, len(indices), 128)]
    return load_batches(kind(dataset, cfg, crops=0), batches, args.workers, device)


@torch.no_grad()
def split_features(encoder, dataset, args, cfg, processes):
    """The features of all images of a split, in order, on all processes: [E, N, C]."""
    _, world, device = processes
    encoder.eval()
    # A process may have no image of a small split.
    batches = [torch.zeros(len(encoder.heads), 0, encoder.heads[0].in_features, device=device)]
    for images, _ in evaluation_loader(dataset, args, cfg, processes):
        view = evaluation_view(images.to(device, non_blocking=True), cfg)
        batches.append(features_of(encoder, view, args.amp))
    own = torch.cat(batches, dim=1)
    size = -(-len(dataset) // world)  # some processes have one image less
    every = gather(F.pad(own, (0, 0, 0, size - own.shape[1]))[None])  # [world, E, size, C]
    return every.permute(1, 2, 0, 3).flatten(1, 2)[:, : len(dataset)]


# ------------------------------------------------------------------------------------------ metrics


def metrics(top, labels, train_counts):
    """Accuracies in percent, each but top5 a weighted mean of those of the classes.

    top [N, 5] are the first classes of each image, labels [N] the true ones, train_counts [classes]
    the training images of each class. many, medium, few and all weigh classes equally, top1 by
    their images here, as_in_training by those of training. A class without images here is None and
    left out; a mean without classes is None. "standard_errors" has the same names, but for top5.
    """
    hits = top == labels[:, None]
    tested = labels.bincount(minlength=len(train_counts))
    right = labels[hits[:, 0]].bincount(minlength=len(train_counts)).double()
    weights = shot_groups(train_counts) | dict(top1=tested, as_in_training=train_counts)
    weights["all"] = torch.ones_like(tested)
    means, errors = {}, {}
    for name, weight in weights.items():
        means[name], errors[name] = mean_and_error(right, tested, weight)
    for values, of_class in ((means, 100 * right / tested), (errors, class_errors(right, tested))):
        pairs = zip(of_class.tolist(), tested)
        values["per_class"] = [value if count else None for value, count in pairs]
    top5 = 100 * hits.any(1).double().mean().item()
    return dict(top1=means.pop("top1"), top5=top5, **means, standard_errors=errors)


def class_errors(right, tested):
    """The standard error of the accuracy of each class in percent; right and tested are [classes].

    The square root of p (1 - p) / n, where p counts one right and one wrong image more (Agresti and
    Coull, 1998): by the observed p, a class of one image, which is always 0 or 100 % right, would
    be free of error.
    """
    p = (right + 1) / (tested + 2)
    return 100 * (p * (1 - p) / tested).sqrt()


def mean_and_error(right, tested, weights):
    """The weighted mean in percent of class accuracies, and its standard error; or (None, None).

    right, tested and weights are [classes]. Classes without tested images are left out.
    """
    present = tested > 0
    weights, accuracies = weights[present].double(), 100 * right[present].double() / tested[present]
    if not weights.sum():
        return None, None
    weights = weights / weights.sum()
    error = (weights * class_errors(right[present], tested[present])).norm()
    return round((weights @ accuracies).item(), 6), round(error.item(), 6)


def with_error(accuracy, error):
    """Text such as 84.32 ± 0.51."""
    return "-" if accuracy is None else f"{accuracy:.2f} ± {error:.2f}"


def accuracy_words(results, name="all"):
    """An accuracy of metrics() with its standard error, as text."""
    return with_error(results[name], results["standard_errors"][name])


def evaluate(logits, labels, counts, prior, temperature):
    """Accuracies and calibration of logits [1 + E, N, classes], the mean of the experts first.

    For classes as frequent as `prior` [classes]. The temperature is None if there was no val to
    choose it on. The expected calibration error of a few images would be mostly chance: it is None
    for less than a thousand.
    """
    top = logits.topk(min(5, len(counts))).indices
    accuracies = [metrics(indices, labels, counts) for indices in top]
    scaled, before, after = logits[0] / (temperature or 1), None, None
    if len(labels) >= 1000:
        before = calibration_error(logits[0], labels, prior)
        after = calibration_error(scaled, labels, prior) if temperature else None
    return accuracies[0] | dict(
        counts=counts.tolist(), reported_counts=labels.bincount(minlength=len(counts)).tolist(),
        experts=accuracies[1:] if len(accuracies) > 2 else None, temperature=temperature or 1.0,
        calibration=calibration(scaled, labels, prior),
        calibration_error=dict(before=before, after=after),
    )


def image_weights(labels, prior):
    """The weight of each image, so that classes count as `prior` [classes] says; the sum is 1."""
    weights = (prior / labels.bincount(minlength=len(prior)))[labels]
    return weights / weights.sum()


def best_temperature(logits, labels, prior):
    """T of the probabilities softmax(logits / T): temperature scaling (Guo et al., 2017).

    It minimises the cross-entropy of images with these labels, weighted so that their classes are
    as frequent as `prior` says. The square, a normal prior of log T with a standard deviation of
    0.5, makes large errors rarer if there are few images.
    """
    weights, log_t = image_weights(labels, prior), torch.zeros((), requires_grad=True)
    effective = 1 / weights.square().sum()  # so many images of equal weight say as much
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        losses = F.cross_entropy(logits / log_t.exp(), labels, reduction="none")
        loss = weights @ losses.to(weights.dtype) + 2 * log_t.square() / effective
        loss.backward()
        return loss

    optimizer.step(objective)
    return log_t.exp().item()


def calibration(logits, labels, prior):
    """Mean probability, accuracy and the standard error of their difference, in percent.

    Images are weighted so that classes are as frequent as `prior` says.
    """
    probability, predicted = logits.softmax(1).max(1)
    right, weights = (predicted == labels).double(), image_weights(labels, prior).double()
    mean, accuracy = weights @ probability.double(), weights @ right
    error = (weights * (probability - right - mean + accuracy)).square().sum().sqrt()
    values = dict(mean_probability=mean, accuracy=accuracy, error=error)
    return {name: 100 * value.item() for name, value in values.items()}


def calibration_words(values):
    """What calibration() returned, as text."""
    probability, accuracy, error = values.values()
    return (f"mean {probability:.1f} %, where {accuracy:.1f} % are right "
            f"(difference {probability - accuracy:+.1f} ± {error:.1f})")


def calibration_error(logits, labels, prior, bins=15):
    """Expected calibration error in percent (Guo et al., 2017, equation 3), weighted as above."""
    probability, predicted = logits.softmax(1).max(1)
    gaps = image_weights(labels, prior) * ((predicted == labels).double() - probability)
    bin_of = (probability * bins).long().clamp(max=bins - 1)
    return 100 * torch.zeros(bins, dtype=gaps.dtype).index_add(0, bin_of, gaps).abs().sum().item()


# --------------------------------------------------------------------- results.json and model.pth


def write_results(args, results, dataset, logits):
    """Write results.json and predictions.jsonl, and print what they say."""
    path, names = args.output / "results.json", results["classes"]
    probabilities, predicted = (logits[0] / results["temperature"]).softmax(1).max(1)
    save(path, json.dumps(results, indent=1) + "\n")
    lines, in_memory = [], data.cropped_on_device(args.stage1["dataset"])
    for index, label in enumerate(dataset.labels.tolist()):
        image = dict(index=index) if in_memory else dict(path=str(dataset.path(index)))
        image |= {"class": names[label], "predicted": names[predicted[index]]}
        lines.append(json.dumps(image | dict(probability=round(probabilities[index].item(), 6))))
    save(args.output / "predictions.jsonl", "\n".join(lines) + "\n")

    if args.fit_on == "all":
        print("below: the classifier of the training images; model.pth's accuracy is not measured")
    print(table(results))
    if results["experts"]:
        print("each expert alone: " + ", ".join(map(accuracy_words, results["experts"])))
    for line in worst_confusions(predicted, dataset.labels, names):
        print(line)
    chosen, on_val = "not calibrated", results["on_val"]
    if on_val:
        error = on_val["calibration"]["error"]
        chosen = f"temperature {results['temperature']:.2f}, chosen on val (± {error:.1f} points)"
    print(f"probabilities: {calibration_words(results['calibration'])}; {chosen}")
    before, after = results["calibration_error"].values()
    if after is not None:
        print(f"expected calibration error {after:.1f} %, before {before:.1f} %")
    words = classifier_words(results)
    if on_val:
        words += f"; val {accuracy_words(on_val)}"
    data.say(f"on {results['reported_on']}; {words}; {path}")


def classifier_words(results):
    """Such as "classifier adjusted, penalty 0.003"."""
    if results["classifier"] == "stage1":
        return "classifier of stage 1"
    chosen = {name: results[name] for name in ("epoch", "penalty") if results[name] is not None}
    words = [f"classifier {results['classifier']}", *(f"{n} {v:.3g}" for n, v in chosen.items())]
    return ", ".join(words)


def write_model(args, cfg, encoder, results, classifier, temperature, images):
    """Write model.pth, which says in words what it is, and export it if asked to.

    A model.pth of all images is kept if this classifier is of less images: plots need no other.
    """
    path = args.output / "model.pth"
    model = load(path, RESULT, "eval.py") if path.exists() else None
    same = model and model["args"]["stage1"].get("weights") == args.stage1["weights"]
    if same and model["args"]["fit_on"] == "all" and args.fit_on != "all":
        data.say(f"{path} is kept, since it is of more images: delete it to get this classifier")
    else:
        calibrated = f"temperature {temperature:.2f}" if temperature else "not calibrated"
        about = f"{classifier_words(results)}, fitted on {images}, prior {args.prior}, {calibrated}"
        about += f"; stage 1: step {cfg.step} of {steps_of(cfg)}"
        divided = Classifier(*(values / (temperature or 1) for values in classifier))
        divided.copy_to(encoder.heads)
        model = dict(stage=RESULT, args=to_json(args), classes=cfg.classes, about=about)
        model["model"] = encoder.state_dict()
        save(path, model)
    data.say(f"{path}: {model['about']}")
    if args.export:
        encoder.load_state_dict(model["model"])
        export(args.export, encoder, cfg, model["classes"])


def table(results):
    """The results as a table to print."""
    titles = dict(many="many-shot, > 100", medium="medium-shot", few="few-shot, < 20")
    counts, images = (torch.tensor(results[name]) for name in ("counts", "reported_counts"))
    split = results["reported_on"]
    rows = [("", "classes", "training images", f"{split} images", "top-1 ± s.e.")]

    def add(title, name, *cells):
        cells = cells or ("", "", "")
        rows.append((title, *cells, accuracy_words(results, name)))

    for name, mask in shot_groups(counts).items():
        if mask.any():
            span = f"{counts[mask].max()} to {counts[mask].min()} each"
            add(titles[name], name, int(mask.sum()), span, int(images[mask].sum()))
    add("all, mean of classes", "all", len(counts), int(counts.sum()), int(images.sum()))
    add("top1, mean of images", "top1")
    add("if classes came as in training", "as_in_training")
    lines = ["{:<30}{:>8}{:>17}{:>13}{:>16}".format(*row) for row in rows]
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


def export(path, encoder, cfg, names):
    """Write the weights under torchvision's names, and PATH.json with what else a user needs."""
    parts = encoder.shared, encoder.branches[0], nn.ModuleDict(dict(fc=encoder.heads[0]))
    state = {name: value.cpu() for part in parts for name, value in part.state_dict().items()}
    save(path, state)
    card = dict(arch=cfg.arch, classes=names, mean=cfg.mean, std=cfg.std)
    if not data.cropped_on_device(cfg.dataset):
        card |= dict(resize=data.shorter_side(cfg.view_size), crop=cfg.view_size)
    save(path.with_name(path.name + ".json"), json.dumps(card, indent=1) + "\n")
    data.say(f"wrote {path} and {path}.json")


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
def predict(args, cfg, saved):
    """Print path, class, probability and next four classes of images, a JSON line each.

    They are the files and folders args.predict; `saved` is the content of model.pth. The exit code
    is 2 if a file could not be read.
    """
    rank, world, device = processes = train.start(args)
    names = saved["classes"]
    encoder = load_encoder(cfg, saved["model"], len(names), 0, device, keep_heads=True).eval()
    data.say(f"{args.output}/model.pth: {saved.get('about', 'of an earlier version of this code')}")
    paths, unreadable = [], 0
    for path in args.predict:
        found, others = data.find_images(path) if path.is_dir() else ([path], [])
        data.say_left_out(path, others, " ".join(data.IMG_EXTENSIONS))
        if not found:
            data.say(f"eval.py: error: {path} holds no images")
        unreadable += not found
        paths += map(os.fsencode, found)
    files = data.ImageFiles(Path(), paths, [0] * len(paths), "", upright=True)
    loader = evaluation_loader(files, args, cfg, processes, ReadableImages)
    data.set_output(encoding="utf-8", errors="backslashreplace")
    for images, indices, problems in loader:
        for problem in problems:
            data.tell(f"eval.py: error: {problem}")
        unreadable += len(problems)
        if not indices:
            continue
        view = evaluation_view(images.to(device), cfg)
        logits = encoder.heads(features_of(encoder, view, args.amp)).mean(0)  # [B, classes]
        top = logits.softmax(1).topk(min(5, len(names)))
        for index, values, labels in zip(indices, top.values.tolist(), top.indices.tolist()):
            pairs = [(names[n], round(p, 6)) for n, p in zip(labels, values)]
            name, probability = pairs[0]
            line = {"path": str(files.path(index)), "class": name, "probability": probability}
            print(json.dumps(line | {"next": dict(pairs[1:])}, ensure_ascii=False))
    sys.stdout.flush()
    # Wait for all ranks: torchrun stops the others when one exits with an error.
    if gather(torch.tensor([unreadable], device=device)).any():
        sys.exit(2)


# ----------------------------------------------------------------------------------- summary, plots


def summary(runs):
    """A row for each run, and the mean and deviation of runs that differ only in their seed."""
    names, groups = ("many", "medium", "few", "all", "val"), {}
    ignored = train.MAY_CHANGE - {"amp"} | {"seed"}
    finished = [run for run in runs if (run / "results.json").exists()] or runs
    if len(finished) < len(runs):
        data.say(f"{len(runs) - len(finished)} of {len(runs)} runs have no results")
    for run in finished:
        try:
            results = json.loads((run / "results.json").read_text())
            settings = comparable(results["arguments"], ignored)
            seeds = results["arguments"]["seed"], results["arguments"]["stage1"]["seed"]
            accuracies = [results[name] for name in names]
            cells = [accuracy_words(results, name) for name in names[:-1]]
            cells.append(accuracy_words(results["on_val"]) if results["on_val"] else "-")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{run}/results.json cannot be read ({error}): run eval.py") from None
        key = tuple((name, json.dumps(value)) for name, value in sorted(settings.items()))
        members = groups.setdefault(key, {})
        if seeds in members:
            data.say(f"{run} has the arguments and seed of {members[seeds][0]}: counted once")
            continue
        members[seeds] = run, accuracies, cells

    lines = ["".join(f"{name:>16}" for name in names)]
    for key, members in groups.items():
        for run, _, cells in members.values():
            lines.append("".join(f"{cell:>16}" for cell in cells) + f"  {run}")
        if len(members) > 1:
            line = ""
            for values in zip(*(accuracies for _, accuracies, _ in members.values())):
                cell = "-"
                if None not in values:
                    cell = with_error(statistics.mean(values), statistics.stdev(values))
                line += f"{cell:>16}"
            lines.append(f"{line}  mean of {len(members)} seeds")
        differ = [f"{n} {v}" for n, v in key if any(dict(other).get(n) != v for other in groups)]
        lines[-1] += "".join(f", {text}" for text in differ)
    lines.append("±: of a run the standard error, of a mean the standard deviation over seeds")
    return "\n".join(lines)


GROUP_COLORS = {"many": (62, 110, 170), "medium": (228, 148, 48), "few": (192, 62, 104)}


def draw_accuracy(directory, results):
    """Draw a bar for each class, sorted by training images, coloured by many, medium and few.

    A line shows one standard error to both sides; classes without a test image are grey.
    """
    counts, tested = torch.tensor(results["counts"]), results["reported_counts"]
    order = counts.argsort(descending=True, stable=True).tolist()
    split, errors = results["reported_on"], results["standard_errors"]
    # Bars of this height begin here; a percent has 4 pixels.
    named, top = len(order) <= 100, 64
    height, left = (18, 300) if named else (2, 40)
    image = Image.new("RGB", (left + 430, top + height * len(order) + 6), "white")
    draw, font, groups = ImageDraw.Draw(image), load_font(), shot_groups(counts)
    title = f"top-1 on {split}, mean of classes {accuracy_words(results)}"
    title += f"; beside a name: training and {split} images" if named else ""
    draw.text((6, 4), title, "black", font)
    for n, name in enumerate(name for name in groups if results[name] is not None):
        text = f"{name} {accuracy_words(results, name)}"
        draw.text((6 + 160 * n, 24), text, GROUP_COLORS[name], font)
    for percent in range(0, 101, 20):
        x = left + 4 * percent
        draw.line([(x, top), (x, image.height)], (220, 220, 220))
        draw.text((x, top - 6), str(percent), "black", font, "ms")
    for n, label in enumerate(order):
        y, accuracy = top + n * height, results["per_class"][label]
        if accuracy is None:
            draw.rectangle((left, y, left + 400, y + height - 2), (235, 235, 235))
        else:
            color = next(GROUP_COLORS[name] for name, mask in groups.items() if mask[label])
            draw.rectangle((left, y, left + 4 * accuracy, y + height - 2), color)
        if named:
            text = f"{results['classes'][label]}: {counts[label]}, {tested[label]}"
            draw.text((left - 6, y + 8), text, "black", font, "rm")
            if accuracy is None:
                draw.text((left + 6, y + 8), f"no {split} image", "black", font, "lm")
            else:
                error = errors["per_class"][label]
                ends = max(accuracy - error, 0), min(accuracy + error, 100)
                draw.line([(left + 4 * end, y + 8) for end in ends], "black")
    image.save(directory / "accuracy.png")


def load_font():
    """The installed font with the most letters; Pillow's default has ASCII only."""
    for name in ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "arial.ttf"):
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, 13)
    return ImageFont.load_default(13)


def caption(lines, width):
    """An image of lines of text, 18 pixels high each."""
    strip = Image.new("RGB", (width, 18 * len(lines)), "white")
    for n, line in enumerate(lines):
        ImageDraw.Draw(strip).text((2, 18 * n + 1), line, "black", load_font())
    return strip


@torch.no_grad()
def draw_activation(directory, results, encoder, classifier, logits, dataset, cfg, side=160):
    """Draw class activation maps (Zhou et al., 2016) of images of the four smallest classes.

    The map is the sum over experts of the feature map times the weights of the image's class. The
    text says how the image is classified by logits [1 + E, N, classes].
    """
    counts, names = torch.tensor(results["counts"]), results["classes"]
    predicted = logits[0].argmax(1)
    tested = dataset.labels.unique()
    tail = tested[counts[tested].argsort(stable=True)[:4]]
    indices = torch.cat([(dataset.labels == label).nonzero()[:3, 0] for label in tail]).tolist()
    images, labels = dataset.views(indices, indices, cfg, 0), dataset.labels[indices]
    view = evaluation_view(images.to(classifier.bias.device), cfg)
    feature_maps = encoder.eval().feature_maps(view)
    pairs = zip(classifier.weight[:, labels], feature_maps)
    maps = sum(torch.einsum("bc,bchw->bhw", weight, f.float()) for weight, f in pairs).cpu()
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = ((maps - low) / (high - low).clamp(min=1e-12))[:, None]  # [B, 1, h, w]
    maps = F.interpolate(maps, (side, side), mode="bilinear")
    shown = F.interpolate(images[0].expand(-1, 3, -1, -1) / 255, (side, side))
    colors = torch.cat([maps, 0 * maps, 1 - maps], dim=1)  # [B, 3, side, side]
    both = torch.cat([shown, (shown + colors) / 2], dim=3)
    strips = []
    for label, other in zip(labels.tolist(), predicted[indices].tolist()):
        verdict = "right" if label == other else f"wrong: classified as {names[other]}"
        title = f"{names[label]}, {counts[label]} training images; red: for it"
        strips.append(pil_to_tensor(caption([title, verdict], 2 * side)) / 255)
    both = torch.cat([both, torch.stack(strips)], dim=2)
    save_image(both, directory / "activation.png", nrow=3, pad_value=1)


# ---------------------------------------------------------------------------------------- arguments


def stage1_arguments(saved):
    """The arguments and the step of stage 1, from the content of checkpoint.pth or model.pth."""
    arguments = saved["args"]  # in model.pth those of eval.py, which contain the others
    return argparse.Namespace(**arguments.get("stage1", arguments | dict(step=saved.get("step"))))


def find_run():
    """(output, checkpoint, source): two paths, and what load() needs to read the arguments."""
    parser = data.Parser()
    for flag in ("--checkpoint", "--output", "--dataset", "--predict"):
        parser.add_argument(flag, nargs="?")
    given = parser.parse_known_args()[0]
    beside = given.checkpoint and Path(given.checkpoint).parent
    output = Path(given.output or beside or f"runs/{given.dataset or data.DEFAULT}")
    checkpoint = Path(given.checkpoint or output / "checkpoint.pth")
    model = output / "model.pth", RESULT, "eval.py"
    return output, checkpoint, model if given.predict else (checkpoint, train.STAGE)


def parse_args():
    """This command's arguments, those of train.py, and the content of the file that holds them.

    The file is the checkpoint or, for --predict, model.pth. Its data set sets the defaults.
    """
    output, checkpoint, source = find_run()
    saved = load(*source) if source[0].exists() and "--summary" not in sys.argv else None
    cfg = stage1_arguments(saved) if saved else None

    parser = data.Parser(description=__doc__)
    dataset = data.add_data_flags(parser, cfg.dataset if cfg else data.DEFAULT)
    flag = parser.add_argument_group("what to do").add_argument
    flag("--checkpoint", type=Path, default=checkpoint, metavar="FILE", help="of train.py")
    flag("--predict", type=Path, nargs="+", metavar="PATH", help="predict images, as JSON lines")
    flag("--summary", type=Path, nargs="+", metavar="RUN", help="mean and deviation over seeds")
    flag("--plots", type=Path, metavar="DIR", help="draw accuracy by class and activation maps")
    flag("--export", type=Path, metavar="FILE", help="write weights under torchvision's names")
    run_rows = train.run_settings(dataset)
    train.add_settings(parser, "run", dataset, run_rows)
    train.add_settings(parser, "classifier", dataset, STAGE2)
    parser.set_defaults(output=output)
    if cfg:
        parser.set_defaults(**{n: getattr(cfg, n) for n in ("data_root", "index_dir", "imbalance")})
    args = train.parse_within_limits(parser, run_rows + STAGE2)
    args.classifier = args.classifier if args.epochs else "stage1"
    refuse_unused_flags(parser, args)
    if args.summary:
        return args, None, None
    if not saved:
        saved = load(*source)
        cfg = stage1_arguments(saved)
    if dataset != cfg.dataset:
        raise BadInput(f"{source[0]} was trained on {cfg.dataset}, not on {dataset}")
    if args.predict:
        if data.cropped_on_device(dataset):
            raise BadInput(f"--predict needs a run on image files, not on {dataset}")
        return args, cfg, saved
    if not hasattr(cfg, "training_images"):
        raise BadInput(f"{checkpoint} is from an earlier version of this code: train again")
    if args.classifier == "stage1" and cfg.loss not in train.CLASSIFIERS:
        raise BadInput(f"--epochs 0: {checkpoint} has no classifier; --loss ce or la have one")
    if args.export and (cfg.arch in SMALL_ARCHS or cfg.experts > 1):
        network = "networks of several experts" if cfg.experts > 1 else cfg.arch
        raise BadInput(f"--export: torchvision has no {network}")
    return args, cfg, dict(encoder=saved["encoder"])


def refuse_unused_flags(parser, args):
    """BadInput if a flag is given that this command or this classifier would ignore."""
    words = [word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")]
    names = {word: word[2:].removeprefix("no-").replace("-", "_") for word in words}
    of_stage2 = {name for name, *_ in STAGE2}
    uses = dict(adjusted={"penalty", "fit_on"}, stage1={"epochs"})
    uses["balanced"] = of_stage2 - uses["adjusted"]
    allowed = set(vars(args)) - of_stage2 | uses[args.classifier] | {"classifier", "prior"}
    command = f"the classifier {args.classifier}"
    if args.predict:
        allowed = {"predict", "output", "checkpoint", "dataset", "device", "amp", "workers"}
        command = "--predict"
    elif args.summary:
        allowed, command = {"summary"}, "--summary"
    for word, name in names.items():
        if name not in allowed:
            parser.error(f"{word}: this flag is not for {command}")


if __name__ == "__main__":
    train.run(main)
