"""Stage 2 of DSCL + PBSD: a linear classifier on the frozen backbone, with class-balanced sampling.

    python eval.py                                                 # after python train.py
    python eval.py --checkpoint runs/mine/checkpoint.pth           # any run of train.py
    python eval.py --checkpoint runs/{a,b,c}/checkpoint.pth --output runs/abc  # their mean
    torchrun --nproc_per_node=8 eval.py --output runs/imagenet_lt  # several GPUs
    python eval.py --plots plots --compare runs/other              # pictures of the results
    python eval.py --summary runs/*                                # mean and std over seeds

Chooses the epoch on val, reports on test by many/medium/few-shot classes; without a val split the
last epoch counts, without a test split val is reported. Writes OUTPUT/results.json and
OUTPUT/classifier.pth; the same command again goes on from there.
"""

import contextlib
import copy
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
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
    recipe_of,
    seed_from,
    shot_groups,
)
from models import Encoder
from train import (
    Parser,
    Progress,
    autocast,
    embed_all,
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
        self.runs, self.bn, self.amp = runs, bn, amp

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


# ------------------------------------------------------------------------- summary of several runs


def read_results(run):
    """The results.json of a run's directory; BadInput if there is none."""
    path = run / "results.json"
    try:
        results = json.loads(path.read_text())
        return results | dict(stage1=results["arguments"].pop("stage1"))
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise BadInput(f"{path} cannot be read ({reason}): run eval.py on it first") from None


def settings_of(results):
    """What may change the results of a run, seeds left out: {name: value}, stage 2's marked."""
    runs = [set(run) for run in results["stage1"]]
    names = set.union(*runs) - train.HARMLESS - {"seed", "data"} | {"amp"}
    settings = {"runs": len(runs)}
    for name in sorted(names):
        values = {json.dumps(run.get(name)) for run in results["stage1"]}
        settings[name] = ", ".join(sorted(values)).strip('"')
    same = train.HARMLESS | {"seed", "data", "dataset", "imbalance"}  # said of stage 1
    for name in sorted(results["arguments"].keys() - same):
        settings[f"stage 2 {name}"] = json.dumps(results["arguments"][name]).strip('"')
    return settings


def summary(runs):
    """A table of runs, those that differ in seed alone in one row: mean and standard deviation."""
    groups = {}
    finished = [run for run in runs if (run / "results.json").exists()]
    if 0 < len(finished) < len(runs):
        print(f"{len(runs) - len(finished)} of {len(runs)} have no results yet", file=sys.stderr)
    for results in map(read_results, finished or runs):
        groups.setdefault(tuple(settings_of(results).items()), []).append(results)
    names = dict.fromkeys(name for key in groups for name, _ in key)
    values = {name: [dict(key).get(name, "-") for key in groups] for name in names}
    differing = {name: v for name, v in values.items() if len(set(v)) > 1}
    columns = {name: list(map(str, column)) for name, column in differing.items()}
    columns["seeds"] = [str(len(members)) for members in groups.values()]
    for name in ("many", "medium", "few", "all"):
        columns[name] = [mean_and_std([r[name] for r in own]) for own in groups.values()]
    widths = {name: max(map(len, [name, *column])) for name, column in columns.items()}
    rows = zip(*([name, *column] for name, column in columns.items()))
    lines = ["  ".join(v.rjust(w) for v, w in zip(row, widths.values())) for row in rows]
    lines[1:] = sorted(lines[1:])
    common = {name: v[0] for name, v in values.items() if name not in differing}
    return "\n".join([*lines, "", f"all: {', '.join(f'{n} {v}' for n, v in common.items())}"])


def mean_and_std(values):
    """Text of the mean and, of several, the sample standard deviation; of None "-"."""
    if None in values:
        return "-"
    text = f"{statistics.mean(values):.2f}"
    return text + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


# ---------------------------------------------------------------------------------------- pictures

INK, FAINT, RED, GREEN = (38, 42, 50), (222, 225, 230), (205, 60, 70), (50, 150, 90)
SHOTS = {"many": (62, 110, 170), "medium": (228, 148, 48), "few": (192, 62, 104)}


def shade(share):
    """A colour for a share from 0 to 1, from pale yellow to deep blue."""
    stops = ((255, 253, 224), (170, 220, 185), (70, 165, 190), (40, 95, 165), (30, 35, 95))
    place = min(max(share, 0), 1) * (len(stops) - 1)
    low = min(int(place), len(stops) - 2)
    return tuple(round(a + (place - low) * (b - a)) for a, b in zip(stops[low], stops[low + 1]))


class Canvas:
    """A white picture of width x height pixels, drawn at twice the size: that smooths its lines."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (2 * width, 2 * height), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x, y, text, size=12, color=INK, anchor="la"):
        self.draw.text((2 * x, 2 * y), text, color, ImageFont.load_default(2 * size), anchor)

    def line(self, points, color=INK, width=1.0, dashed=False):
        points = [(2 * x, 2 * y) for x, y in points]
        if not dashed:
            self.draw.line(points, color, round(2 * width), "curve")
            return
        for (x, y), (to_x, to_y) in zip(points, points[1:]):
            pieces = max(1, int(math.hypot(to_x - x, to_y - y) / 14))
            for n in range(pieces):
                a, b = n / pieces, (n + 0.5) / pieces
                ends = [(x + t * (to_x - x), y + t * (to_y - y)) for t in (a, b)]
                self.draw.line(ends, color, round(2 * width))

    def box(self, left, top, right, bottom, fill=None, outline=None, width=1.0):
        corners = [2 * v for v in (left, top, right, bottom)]
        if right > left and bottom > top:
            self.draw.rectangle(corners, fill, outline, round(2 * width))

    def picture(self, pixels, x, y, size):
        """uint8 [1 or 3, H, W] as a square of `size`, small ones enlarged pixel by pixel."""
        array = pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy()
        small = len(array) < 64 or len(array) == size
        how = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
        picture = Image.fromarray(array).resize((2 * size, 2 * size), how)
        self.image.paste(picture, (2 * x, 2 * y))

    def save(self, path):
        half = self.image.reduce(2)
        save(path, half, lambda image, file: image.save(file, "PNG", optimize=True))
        print(f"drew {path}", file=sys.stderr)


class Axes:
    """A chart in a box of a canvas: its frame, ticks and names, and where a value is drawn."""

    def __init__(self, canvas, box, x, y, title="", x_name="", log_x=False, log_y=False):
        self.canvas, self.box, self.ranges, self.logs = canvas, box, (x, y), (log_x, log_y)
        left, top, width, height = box
        canvas.text(left, top - 24, title, 13)
        for value in ticks(*y, log_y):
            _, place = self.at(x[0], value)
            canvas.line([(left, place), (left + width, place)], FAINT)
            canvas.text(left - 6, place, f"{value:g}", 11, anchor="rm")
        for value in ticks(*x, log_x) if x_name else ():
            place, _ = self.at(value, y[0])
            canvas.line([(place, top + height), (place, top + height + 4)])
            canvas.text(place, top + height + 7, f"{value:g}", 11, anchor="ma")
        canvas.line([(left, top + height), (left + width, top + height)])
        canvas.text(left + width / 2, top + height + 24, x_name, 12, anchor="ma")

    def at(self, x, y):
        shares = []
        for value, (low, high), log in zip((x, y), self.ranges, self.logs):
            if log:
                value, low, high = (math.log(max(v, 1e-12)) for v in (value, low, high))
            shares.append((min(max(value, low), high) - low) / ((high - low) or 1))
        left, top, width, height = self.box
        return left + shares[0] * width, top + (1 - shares[1]) * height

    def line(self, points, color, width=1.5, dashed=False):
        """Through points (x, y), those with y None left out."""
        points = [self.at(x, y) for x, y in points if y is not None]
        if len(points) > 1:
            self.canvas.line(points, color, width, dashed)

    def key(self, colors):
        """Names of lines in their colours, {name: colour}, to the right of the chart."""
        left, top, width, _ = self.box
        for row, (name, color) in enumerate(colors.items()):
            self.canvas.text(left + width + 10, top + 16 * row, name, 11, color)


def ticks(low, high, log=False):
    """About five round values from low to high."""
    if log:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        few = math.log10(high / low) < 2
        values = [10**n * digit for n in tens for digit in ((1, 2, 5) if few else (1,))]
    else:
        rough = (high - low) / 5 or 1
        step = min(
            (d * 10 ** math.floor(math.log10(rough)) for d in (1, 2, 5, 10)),
            key=lambda step: abs(step - rough),
        )
        values = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [round(value, 10) for value in values if low <= value <= high]


def draw_accuracy(path, results, names, other=None):
    """Accuracy by class, sorted by training pictures, shots marked; another run's as dots.

    More than 100 classes are too many for dots: there lines show means over 25 neighbours.
    """
    counts = torch.tensor(results["counts"])
    order = counts.argsort(descending=True, stable=True).tolist()
    width = max(560, min(1200, 56 * len(order)))
    canvas = Canvas(width + 90, 420)
    title = f"top-1 on {results['reported_on']} by class, in all {results['all']:.2f}"
    many = len(order) > 100
    if other:
        mark = "dashed" if many else "dots"
        title += f"; {mark}: {other['name']}, in all {other['all']:.2f}"
    canvas.text(50, 12, title, 13)
    axes = Axes(canvas, (50, 60, width, 280), (0, len(order)), (0, 100))
    group_of = {}
    for group, mask in shot_groups(counts).items():
        rows = [n for n, label in enumerate(order) if mask[label]]
        if rows:
            left, right = axes.at(rows[0], 0)[0], axes.at(rows[-1] + 1, 0)[0]
            group_of |= dict.fromkeys(rows, group)
            text = f"{group} {results[group]:.1f}" + (f" / {other[group]:.1f}" if other else "")
            canvas.text((left + right) / 2, 55, text, 12, SHOTS[group], "mb")
            canvas.line([(right, 60), (right, 340)], FAINT)
    gap = 0 if many else 0.1
    for n, label in enumerate(order):
        value = results["per_class"][label]
        if value is not None:
            left, top = axes.at(n + gap, value)
            canvas.box(left, top, axes.at(n + 1 - gap, 0)[0], 340, SHOTS[group_of[n]])
        if other and not many and other["per_class"][label] is not None:
            x, y = axes.at(n + 0.5, other["per_class"][label])
            canvas.box(x - 4, y - 4, x + 4, y + 4, "white")
            canvas.box(x - 3, y - 3, x + 3, y + 3, INK)
    for run in (results, other) if many and other else ():
        values = [run["per_class"][label] for label in order]
        around = [
            [v for v in values[max(0, n - 12) : n + 13] if v is not None]
            for n in range(len(values))
        ]
        means = [
            (n + 0.5, statistics.mean(near) if near else None) for n, near in enumerate(around)
        ]
        axes.line(means[::5], INK, 2, dashed=run is other)
    if len(order) <= 20:
        for n, label in enumerate(order):
            x = axes.at(n + 0.5, 0)[0]
            canvas.text(x, 346, names[label][:11], 10, anchor="ma")
            canvas.text(x, 360, f"{counts[label]}", 10, anchor="ma")
    canvas.text(50 + width / 2, 385, "classes by training pictures, most first", 12, anchor="ma")
    canvas.save(path)


def draw_confusion(path, predicted, labels, counts, names):
    """How often pictures of a class (row) are taken for another (column), shares of the row."""
    order = counts.argsort(descending=True, stable=True)
    classes, place = len(counts), order.argsort()
    cells = (place[labels] * classes + place[predicted]).bincount(minlength=classes**2)
    cells = cells.view(classes, classes).float()
    cells = cells / cells.sum(1, keepdim=True).clamp(min=1)
    side, few = max(1, 500 // classes), classes <= 20
    shown = F.adaptive_max_pool2d(cells[None], min(classes, 700))[0]
    colors = torch.tensor([shade(n / 255) for n in range(256)], dtype=torch.uint8)
    # The root, so that rare confusions are seen.
    pixels = colors[(255 * shown.sqrt()).round().long()]
    pixels = pixels.repeat_interleave(side, 0).repeat_interleave(side, 1).permute(2, 0, 1)
    canvas = Canvas(130 + pixels.shape[2], 100 + pixels.shape[1])
    canvas.text(20, 16, "rows: the class; columns: what it is taken for; percent", 13)
    canvas.picture(pixels, 110, 80, pixels.shape[2])
    for row in range(classes) if few else ():
        name = names[order[row]]
        canvas.text(104, 80 + (row + 0.5) * side, name[:13], 11, anchor="rm")
        canvas.text(110 + (row + 0.5) * side, 74, name[:10], 9, anchor="ms")
        for column, share in enumerate(cells[row].tolist()):
            if share >= 0.005:
                x, y = 110 + (column + 0.5) * side, 80 + (row + 0.5) * side
                color = "white" if share > 0.25 else INK
                canvas.text(x, y, f"{100 * share:.0f}", 11, color, "mm")
    canvas.save(path)


def tail_pictures(labels, counts, number=12):
    """Rows of test pictures of the classes with the fewest training pictures, in turn."""
    tail = counts.argsort(stable=True)[: max(2, min(number, int((counts < 20).sum())))]
    rows = [(labels == label).nonzero()[:, 0].tolist() for label in tail]
    turns = [own[n] for n in range(number) for own in rows if n < len(own)]
    return turns[:number]


def activation_maps(model, views, labels):
    """Class activation maps (Zhou et al., 2016) [B, h, w], from 0 to 1: where a class is seen.

    The classifier's row of the picture's class, labels [B], times the feature map of its view
    [B, 3, V, V]; the sum over all experts.
    """
    maps = 0
    for encoder in model.encoders:
        for head, features in zip(encoder.heads, encoder.features(views)):
            maps = maps + torch.einsum("bc,bchw->bhw", head.weight[labels], features.float())
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


def draw_activation(path, model, tested, rows, predicted, names, recipe, device):
    """Class activation maps of tail-class pictures, for the class that they are of."""
    canvas = Canvas(20 + 250 * min(3, len(rows)), 50 + 165 * math.ceil(len(rows) / 3))
    canvas.text(20, 16, "class activation maps of tail-class pictures", 13)
    whole, labels = tested.views(rows, rows, recipe, 0), tested.labels[rows]
    maps = activation_maps(model, evaluation_view(whole.to(device), recipe), labels.to(device))
    maps = F.interpolate(maps[None].cpu(), (110, 110), mode="bicubic")[0].clamp(0, 1)
    grey = F.interpolate(whole[0].float().mean(1, keepdim=True), (110, 110))  # [B, 1, 110, 110]
    heat = [(2 * maps).clamp(0, 1), (2 * maps - 1).clamp(0, 1), 0.3 * (1 - maps)]
    overlaid = (0.45 * grey + 0.55 * 255 * torch.stack(heat, dim=1)).byte()
    for n, row in enumerate(rows):
        left, top = 20 + 250 * (n % 3), 45 + 165 * (n // 3)
        canvas.picture(whole[0, n], left, top, 110)
        canvas.picture(overlaid[n], left + 115, top, 110)
        name, guess = names[labels[n]], names[predicted[row]]
        text = name if predicted[row] == labels[n] else f"{name}, taken for {guess}"
        canvas.text(left, top + 114, text[:34], 11, GREEN if text == name else RED)
    canvas.save(path)


def draw_neighbours(path, model, sets, tested, rows, names, recipe, loading, shown=8):
    """The training pictures nearest to tail-class test pictures in the backbone's features."""
    trained, features = sets["train"], []
    for pictures in (tested.subset(rows), trained):
        every = [embed_all(encoder, pictures, recipe, **loading) for encoder in model.encoders]
        features.append(F.normalize(torch.cat(every, dim=1), dim=1))
    nearest = (features[0] @ features[1].T).topk(min(shown, len(trained))).indices.tolist()
    canvas = Canvas(50 + 76 * (shown + 1), 40 + 92 * len(rows))
    canvas.text(20, 14, "tail-class test pictures, and the training pictures nearest to them", 13)
    for n, (row, others) in enumerate(zip(rows, nearest)):
        top, label = 40 + 92 * n, int(tested.labels[row])
        canvas.picture(tested.views([row], [0], recipe, 0)[0, 0], 20, top, 70)
        canvas.text(20, top + 72, names[label][:11], 10)
        for place, other in enumerate(others, 1):
            left, own = 36 + 76 * place, int(trained.labels[other])
            canvas.picture(trained.views([other], [0], recipe, 0)[0, 0], left, top, 70)
            color = GREEN if own == label else RED
            canvas.box(left - 1, top - 1, left + 71, top + 71, outline=color, width=2)
            canvas.text(left, top + 72, names[own][:11], 10, color)
    canvas.save(path)


def read_log(run):
    """The arguments and the records of a run's log.jsonl; BadInput if it has none."""
    path, lines = run / "log.jsonl", []
    with contextlib.suppress(FileNotFoundError, ValueError):  # a last line cut short
        for line in path.read_text().splitlines():
            lines.append(json.loads(line))
    records = [line for line in lines if "loss" in line]
    if not records or "arguments" not in lines[0]:
        raise BadInput(f"{path} holds no records to draw: name a run whose log is there")
    return lines[0]["arguments"], records


def by_size(records, bins):
    """p(z+|z) of a log by class size: {size: [(epoch, mean over the records of a bin or None)]}."""
    curves, last = {}, records[-1]["epoch"]
    for number in range(bins):
        start, end = number * last / bins, (number + 1) * last / bins
        own = [r["own_key"] for r in records if start < r["epoch"] <= end]
        for size in own[0] if own else ():
            values = [record[size] for record in own if record[size] is not None]
            mean = statistics.mean(values) if values else None
            curves.setdefault(int(size), []).append(((start + end) / 2, mean))
    return curves


def expected_share(args, counts, size):
    """What theory says of p(z+|z) in classes of [size, 2 size) training pictures.

    The optimum is alpha under DSCL, 1 where |P| = 0, and 1 / (|P| + 1) under SCL: here their mean
    over |P|, Poisson-distributed around its share of batch and queue.
    """
    counts = torch.tensor(counts, dtype=torch.double)
    own = counts[(counts >= size) & (counts < 2 * size)]
    parts = args["processes"] if args["contrast"] == "local" else 1
    contrast = 2 * (args["batch_size"] // parts - 1) + args["queue_size"]
    positives = contrast * own / counts.sum()
    none = (-positives).exp()
    alpha = args["alpha"]
    share = (1 - none) / positives if alpha is None else alpha + (1 - alpha) * none
    return share.mean().item()


def draw_own_key(path, runs, counts):
    """p(z+|z) by class size, during training and in its last tenth against theory."""
    logs = [(*read_log(run), run) for run in runs]
    logs = [log for log in logs if log[0]["loss"] != "ce"]
    if not logs:
        return
    sizes = sorted(map(int, logs[0][1][0]["own_key"]))
    shades = {size: shade(0.3 + 0.7 * n / len(sizes)) for n, size in enumerate(sizes)}
    canvas, left = Canvas(420 + 310 * len(logs), 400), 55
    names = []
    for args, records, run in logs:
        name = "SCL" if args["alpha"] is None else f"DSCL, alpha {args['alpha']:g}"
        names.append(f"{name} ({run})" if name in names else name)
        axes = Axes(
            canvas,
            (left, 60, 240, 270),
            (0, records[-1]["epoch"]),
            (0.001, 1),
            f"p(z+|z) during training, {names[-1]}",
            "epoch",
            log_y=True,
        )
        left += 310
        for size, curve in by_size(records, min(24, records[-1]["epoch"])).items():
            axes.line(curve, shades[size])
    pictures = {f"{size} to {2 * size - 1}": color for size, color in shades.items()}
    axes.key({"a class of": INK} | pictures)
    axes = Axes(
        canvas,
        (left + 60, 60, 200, 270),
        (sizes[0], 2 * sizes[-1]),
        (0.001, 1),
        "in the last tenth; dashed: theory",
        "training pictures of a class",
        log_x=True,
        log_y=True,
    )
    colors = SHOTS["many"], SHOTS["medium"]
    axes.key(dict(zip(names, colors)))
    for (args, records, _), color in zip(logs, colors):
        last = {size: curve[-1][1] for size, curve in by_size(records, 10).items()}
        axes.line([(size * 2**0.5, value) for size, value in last.items()], color, 2)
        theory = [(size * 2**0.5, expected_share(args, counts, size)) for size in last]
        axes.line(theory, color, dashed=True)
    canvas.save(path)


def draw_curves(path, run):
    """The losses of a run's log and, where they are, its nearest-neighbour looks at val."""
    _, records = read_log(run)
    looks = [(record["epoch"], record["knn"]) for record in records if "knn" in record]
    last = records[-1]
    epochs = [record["step"] / last["step"] * last["epoch"] for record in records]
    colors = {"loss": INK, "dscl": SHOTS["many"], "pbsd": SHOTS["medium"]}
    colors = {name: color for name, color in colors.items() if name in last}
    values = [record[name] for record in records for name in colors]
    canvas = Canvas(480 + 420 * bool(looks), 360)
    span = (0, last["epoch"])
    axes = Axes(canvas, (55, 50, 340, 250), span, (min(values), max(values)), "losses", "epoch")
    axes.key(colors)
    for name, color in colors.items():
        axes.line(zip(epochs, [record[name] for record in records]), color)
    if looks:
        of = [value for _, value in looks]
        title = "nearest neighbours: balanced accuracy on val"
        limits = (min(of) - 2, max(of) + 2)
        axes = Axes(canvas, (510, 50, 340, 250), span, limits, title, "epoch")
        axes.line(looks, SHOTS["few"], 2)
    canvas.save(path)


def draw_views(path, view, boxes, patches, keys, recipe, shown=4):
    """Query views, their boxes and patches and the key views, as the networks saw them."""
    mean, std = (torch.tensor(recipe[name])[:, None, None] for name in ("mean", "std"))

    def pixels(images):
        return ((images.cpu().float() * std + mean) * 255).round().clamp(0, 255).byte()

    columns = {"query view": view, "with boxes": view if boxes is not None else None}
    columns["key view"] = keys
    columns = {name: views for name, views in columns.items() if views is not None}
    patches = () if patches is None else patches
    shown, side, small = min(shown, len(view)), 150, 84
    width = (side + 10) * len(columns)
    canvas = Canvas(20 + width + (small + 8) * len(patches), 50 + shown * (side + 10))
    for n, name in enumerate([*columns, *["patches"] * bool(len(patches))]):
        canvas.text(20 + n * (side + 10), 24, name, 13)
    palette = [SHOTS["few"], SHOTS["medium"], SHOTS["many"], GREEN, INK]
    for row in range(shown):
        top = 46 + row * (side + 10)
        for n, views in enumerate(columns.values()):
            canvas.picture(pixels(views[row]), 20 + n * (side + 10), top, side)
        for n in range(len(patches)):
            color = palette[n % len(palette)]
            x1, y1, x2, y2 = (v * side / view.shape[-1] for v in boxes[n, row].tolist())
            x, y = 30 + side, top + 20
            canvas.box(x + x1, top + y1, x + x2, top + y2, outline=color, width=2)
            x = 20 + width + n * (small + 8)
            canvas.picture(pixels(patches[n, row]), x, y, small)
            canvas.box(x - 2, y - 2, x + small + 2, y + small + 2, outline=color, width=2)
    canvas.save(path)


# ----------------------------------------------------------------------------------------- stage 2


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
    parser.add_argument(
        "--summary",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="print mean and standard deviation of finished runs, grouped by what differs besides "
        "--seed, and do nothing else",
    )
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="DIR",
        help="draw accuracy by class, the confusion matrix, class activation maps and nearest "
        "neighbours of tail-class pictures, and p(z+|z) by class size, as PNG files",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="DIR",
        help="a finished run that --plots draws beside this one",
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="write backbone and classifier for use elsewhere: a state dict of torchvision's "
        "architecture, or a torch.export program where torchvision has none",
    )
    parser.setting(
        "--bn",
        str,
        "BatchNorm of the frozen backbone while the classifier trains: running statistics "
        "of stage 1 (eval) or of the batch (train)",
        choices=("train", "eval"),
    )
    return parser.parse_args()


def export(path, model, pictures, recipe):
    """Write the trained classifiers for use without this code, on any device.

    One expert of torchvision's architecture as a state dict that loads with strict=True; others as
    a torch.export program from views as evaluation_view makes them of `pictures`, [B, 3, V, V], to
    logits, the mean over experts.
    """
    run, model = model.runs[0], copy.deepcopy(model).cpu()
    whole = (len(model.heads()), run["expert_width"]) == (1, 1) and run["arch"] != "resnet_small"
    example = evaluation_view(pictures.views([0, 0], [0, 0], recipe, 0), recipe)
    if whole:
        state = model.encoders[0].state_dict()
        state = {n.replace("backbone.", "").replace("head.", "fc."): v for n, v in state.items()}
        save(path, state)
    else:
        batch = {"images": {0: torch.export.Dim("batch", min=1)}}
        program = torch.export.export(MeanLogits(model), (example,), dynamic_shapes=batch)
        save(path, program, torch.export.save)
    kind = f"state dict of torchvision's {run['arch']}" if whole else "torch.export program"
    print(
        f"wrote {path}, a {kind}; for {list(example.shape[1:])} from 0 to 1, standardised by mean "
        f"{recipe['mean']} and std {recipe['std']}",
        file=sys.stderr,
    )


class MeanLogits(nn.Module):
    """Normalised views [B, 3, V, V] to the mean of all experts' logits [B, classes]."""

    def __init__(self, model):
        super().__init__()
        self.encoders = model.encoders.eval().requires_grad_(False)
        self.encoders.to(memory_format=torch.contiguous_format)  # export warns of other strides
        self.experts = len(model.heads())

    def forward(self, images):
        logits = torch.cat([encoder(images)[0] for encoder in self.encoders], dim=1)
        return logits.unflatten(1, (self.experts, -1)).mean(1)


@torch.no_grad()
def draw(args, model, sets, results, recipe, loading):
    """All pictures of a run and, with --compare, of another beside it."""
    tested, counts = sets[results["reported_on"]], torch.tensor(results["counts"])
    names = sets["train"].names or recipe.get("names")
    names = names or [f"class {label}" for label in range(len(counts))]
    device, rows = loading["device"], tail_pictures(tested.labels, counts)
    predicted = []
    for images, _ in load_batches(tested, shard(len(tested), 0, 1), recipe, 0, **loading):
        logits = model.eval()(evaluation_view(images.to(device), recipe))
        predicted.append(logits.mean(0).argmax(1).cpu())
    predicted = torch.cat(predicted)

    other = args.compare and read_results(args.compare) | dict(name=str(args.compare))
    if other and other["counts"] != results["counts"]:
        raise BadInput(f"{args.compare} is of another data set or imbalance: name one of the same")
    args.plots.mkdir(parents=True, exist_ok=True)
    draw_accuracy(args.plots / "accuracy.png", results, names, other)
    draw_confusion(args.plots / "confusion.png", predicted, tested.labels, counts, names)
    of_rows = model, tested, rows, predicted, names, recipe, device
    draw_activation(args.plots / "activation.png", *of_rows)
    of_rows = model, sets, tested, rows, names, recipe, loading
    draw_neighbours(args.plots / "neighbours.png", *of_rows)
    runs = [args.checkpoint[0].parent] + [args.compare] * bool(other)
    try:
        draw_own_key(args.plots / "own_key.png", runs, results["counts"])
    except BadInput as error:  # a checkpoint may stand alone
        print(f"own_key.png is left out: {error}", file=sys.stderr)


def main():
    args = parse_args()
    if args.summary:
        print(summary(args.summary))
        return
    if args.compare and not args.plots:
        raise BadInput("--compare goes with --plots DIR")
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
    # No step can take more than there are, and every process takes as many.
    most = max(1, len(sets["train"]) // world) * world
    given = args.batch_size or recipe_of(args.dataset, len(sets["train"]))["stage2"]["batch_size"]
    args.batch_size = min(given, most)
    recipe = with_recipe(args, "stage2", len(sets["train"]))
    of_stage1 = args.epochs == 0  # the classifier of a --loss ce run as it is
    for path, run in zip(args.checkpoint, args.stage1):
        if of_stage1 and run["loss"] != "ce":
            raise BadInput(f"--epochs 0: {path} has no classifier; stage 1 trains one by --loss ce")
    recipe = recipe | dict(view_size=first["view_size"])
    counts = sets["train"].labels.bincount()
    classes = len(counts)
    reported = "test" if "test" in sets else "val"
    chosen = "val" if reported == "test" and "val" in sets and not of_stage1 else None

    model = LinearProbes(args.stage1, classes, args.bn, args.amp, args.seed)
    model = model.to(device, memory_format=torch.channels_last)
    for encoder, run in zip(model.encoders, stage1):
        trained = run["encoder"]
        if not of_stage1:
            trained = {name: value for name, value in trained.items() if "head." not in name}
        encoder.load_state_dict(encoder.state_dict() | trained)
    heads = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(heads, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)

    path, epoch = args.output / "classifier.pth", 0
    best = dict(accuracy=-1.0, epoch=0, model=copy.deepcopy(model.state_dict()))
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
    when = f"at epoch {best['epoch']}, "
    when += f"chosen on val ({best['accuracy']:.2f})" if chosen else "the last"
    when = "the classifier of stage 1" if of_stage1 else when
    print(f"on {reported}, {when}; {args.output / 'results.json'}", file=sys.stderr)
    if args.plots:
        loading = dict(workers=args.workers, device=device)
        draw(args, model, sets, results, recipe, loading)
    if args.export:
        export(args.export, model, sets[reported], recipe)


if __name__ == "__main__":
    train.run(main)
