"""Metrics by many, medium and few, linear classifiers, kNN, summary, export and plots."""

import argparse
import json
from unittest import mock

import pytest
import torch
import torchvision
from benchmark import cfg_of
from PIL import Image

import eval as stage2
import train
from data import BadInput, ImageArrays
from eval import best_temperature, calibration_error, classifier_of, features_of, metrics
from eval import regression, table, worst_confusions

CPU = torch.device("cpu")


def predictions(rights, wrongs):
    """(top [N, 1], labels [N]) with so many right and wrong predictions of each class."""
    counts = torch.tensor(rights) + torch.tensor(wrongs)
    labels = torch.arange(len(rights)).repeat_interleave(counts)
    top = [[c] * r + [(c + 1) % len(rights)] * w for c, (r, w) in enumerate(zip(rights, wrongs))]
    return torch.tensor(sum(top, []))[:, None], labels


def test_metrics_are_class_means_by_group_and_none_for_empty_groups():
    counts = torch.tensor([500, 200, 50, 30, 10])
    top, labels = predictions([2, 2, 1, 0, 1], [0, 2, 1, 2, 1])
    results = metrics(top, labels, counts)
    results |= dict(reported_on="test", reported_counts=labels.bincount(minlength=5).tolist())
    assert results["per_class"] == [100, 50, 50, 0, 50]
    assert (results["many"], results["medium"], results["few"]) == (75, 25, 50)
    assert results["all"] == 50 and results["top1"] == 100 * 6 / 12 == results["top5"]
    second = torch.cat([top, labels[:, None]], dim=1)
    second[-1, 1] = 0  # one image's class is not among the first
    assert metrics(second, labels, counts)["top5"] == pytest.approx(100 * 11 / 12)
    assert metrics(second, labels, counts)["top1"] == 50
    assert metrics(top, labels, counts + 100)["few"] is None
    printed = table(results, counts)
    lines = printed.splitlines()
    assert lines[1].split("each")[1].split() == ["6", "4", "of", "6"] and len(lines) == 7
    assert "500 to 200 each" in lines[1] and lines[4].split()[-3:] == ["790", "12", "50.00"]
    expected = (500 * 100 + 200 * 50 + 50 * 50 + 10 * 50) / 790
    assert lines[-1].split() == f"if classes came as in training {expected:.2f}".split()
    results |= metrics(*predictions([0] * 5, [2] * 5), counts)
    assert table(results, counts).split()[-1] == "0.00"


def test_classes_without_test_images_are_left_out_and_reported():
    counts = torch.tensor([500, 200, 50, 30, 10])
    top, labels = predictions([2, 0, 1, 0, 0], [0, 0, 1, 2, 0])
    results = metrics(top, labels, counts)
    results |= dict(reported_on="test", reported_counts=labels.bincount(minlength=5).tolist())
    assert results["per_class"] == [100, None, 50, 0, None]
    assert (results["many"], results["medium"], results["few"]) == (100, 25, None)
    assert results["all"] == 50 and results["top1"] == 50
    json.dumps(results, allow_nan=False)
    lines = table(results, counts).splitlines()
    assert lines[3].split()[-1] == "-"  # few-shot
    assert lines[-1] == "classes without a test image, left out: 2 of 5"


def test_worst_confusions_are_listed_by_rate():
    labels = torch.tensor([0] * 10 + [1] * 10 + [2] * 4)
    predicted = torch.tensor([0] * 6 + [1] * 4 + [0] + [1] * 9 + [1, 1, 2, 2])
    names = ["Shirt", "T-shirt", "Coat"]
    assert worst_confusions(predicted, labels, names) == [  # four coats say too little
        "Shirt predicted as T-shirt: 40 % of 10 images",
        "T-shirt predicted as Shirt: 10 % of 10 images",
    ]
    predicted[10:20] = 1
    assert len(worst_confusions(predicted, labels, names)) == 1  # always right: not named


def test_temperature_makes_the_probabilities_those_of_the_labels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20000, 3, generator=generator)
    labels = logits.softmax(1).multinomial(1, generator=generator)[:, 0]  # calibrated
    prior = labels.bincount()
    for factor in (0.5, 1, 4):
        temperature = best_temperature(factor * logits, labels, prior)
        assert temperature == pytest.approx(factor, rel=0.05)
        assert calibration_error(factor * logits / temperature, labels, prior) < 1.5
    assert calibration_error(4 * logits, labels, prior) > 20
    # Classes count as prior says, however many images they have here.
    logits *= torch.tensor([1.0, 1.0, 6.0])[labels, None]
    rows = torch.cat([torch.arange(20000), *[(labels == 2).nonzero()[:, 0]] * 5])
    expected = best_temperature(logits, labels, prior)
    assert best_temperature(logits[rows], labels[rows], prior) == pytest.approx(expected, rel=1e-3)
    other = best_temperature(logits[rows], labels[rows], labels[rows].bincount())
    assert abs(other - expected) > 0.1
    certain = 9 * torch.eye(3)  # no error, but three images prove little
    assert 0.1 < best_temperature(certain, torch.arange(3), torch.ones(3)) < 10


def test_calibration_error_is_the_weighted_gap_of_its_bins():
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.45, 0.55], [0.3, 0.7]]).log()
    labels = torch.tensor([0, 1, 1, 1])
    # Bins [0.53, 0.6), [0.67, 0.73) and [0.87, 0.93) of 15; class 0 has one image, class 1 three.
    gaps = 0.5 * (1 - 0.9) + (0 - 0.9) / 6, (1 - 0.55) / 6, (1 - 0.7) / 6
    expected = 100 * sum(map(abs, gaps))
    assert calibration_error(logits, labels, torch.ones(2)) == pytest.approx(expected)


class Ranks(torch.nn.Module):
    """Class c has logit c, except the class given by an image's first pixel, which has 2.5.

    The second expert is certain of the image's class, the third equally of the next class.
    """

    def __init__(self):
        super().__init__()
        self.heads = self.Heads([torch.nn.Linear(1, 8)] * 3)

    def feature_maps(self, view):
        return [view[:, :1, :1, :1]] * 3

    class Heads(list):
        def __call__(self, features):
            named = features[0].round().long()
            logits = torch.arange(8.0).repeat(len(named), 1).scatter(1, named, 2.5)
            sure = torch.zeros_like(logits).scatter(1, named, 90)
            return torch.stack([logits, sure, sure.roll(1, dims=1)])


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 2), (3, 0), (60, 0)])
def test_logits_do_not_depend_on_processes_and_workers(world, workers, monkeypatch):
    labels = torch.arange(50) % 8
    images = torch.arange(50)[:, None, None, None].expand(-1, 3, 2, 2) % 8
    dataset = ImageArrays(images.to(torch.uint8), labels, "made")
    cfg = argparse.Namespace(mean=(0.0,) * 3, std=(1 / 255,) * 3)
    args, parts = argparse.Namespace(workers=workers, amp="off"), []
    monkeypatch.setattr(stage2, "gather", lambda part: parts.append(part) or part)
    for rank in range(world):
        stage2.split_features(Ranks(), dataset, args, cfg, (rank, world, CPU))
    gathered = torch.cat(parts)
    monkeypatch.setattr(stage2, "gather", lambda part: gathered)
    features = stage2.split_features(Ranks(), dataset, args, cfg, (0, world, CPU))
    logits = stage2.logits_of(Ranks().heads, features)
    assert logits.shape == (4, 50, 8)
    mean, ranks, sure, wrong = logits.topk(5).indices
    # The logit 2.5 ranks behind 7, 6, 5, 4 and 3, unless it has replaced one of them.
    assert torch.equal((ranks == labels[:, None]).any(1), labels >= 3)
    assert torch.equal(sure[:, 0], labels) and torch.equal(wrong[:, 0], (labels + 1) % 8)
    # The other two cancel, so the first expert decides: 2.5 against the next class's 0 to 7.
    assert torch.equal(mean[:, 0], torch.where((labels < 2) | (labels == 7), labels, labels + 1))


def classifier(arch, experts=1):
    cfg = cfg_of("imagenet_lt", train.VIEWS, train.STAGE1, arch=arch, experts=experts)
    encoder = classifier_of(cfg, {}, 7, 0, CPU, keep_heads=False)
    for module in encoder.modules():  # change the initial running statistics
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    return encoder, cfg


@pytest.mark.parametrize("bn", ["eval", "train"])
def test_only_classifiers_train_and_bn_decides_if_statistics_change(bn):
    encoder, _ = classifier("resnet_small", experts=2)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    logits = encoder.train(bn == "train").heads(features_of(encoder, torch.randn(8, 3, 28, 28), ""))
    assert logits.shape == (2, 8, 7)
    logits.sum().backward()
    trained = [name for name, p in encoder.named_parameters() if p.grad is not None]
    assert len(trained) == 4 and all(name.startswith("heads.") for name in trained)
    moved = any(not torch.equal(value, before[n]) for n, value in encoder.state_dict().items())
    assert moved == (bn == "train")


def test_regression_reaches_the_minimum_of_its_objective():
    torch.manual_seed(0)
    labels = torch.arange(400).sqrt().long() // 5  # four classes of 25 to 175
    features = torch.randn(400, 6, dtype=torch.float64) + 0.5 * torch.randn(4, 6)[labels]
    weight, bias = (part.requires_grad_() for part in regression(features, labels, 0.01))
    logits = features @ weight.T + bias
    objective = torch.nn.functional.cross_entropy(logits, labels) + 0.01 * weight.square().sum()
    objective.backward()  # convex: the gradient is 0 at the minimum
    assert weight.grad.abs().max() < 1e-4 and bias.grad.abs().max() < 1e-4


def test_regression_sums_over_chunks():
    torch.manual_seed(0)
    features, labels = torch.randn(20000, 5), torch.randint(3, (20000,))
    labels[:50], features[:50] = 0, 3.0
    seen, entropy = set(), torch.nn.functional.cross_entropy

    def watched(logits, *rest, **options):
        seen.add(len(logits))
        return entropy(logits, *rest, **options)

    with mock.patch.object(stage2.F, "cross_entropy", watched):
        whole = regression(features, labels, 0.1)
    assert max(seen) < 10000
    weight, bias = (part.requires_grad_() for part in whole)
    (entropy(features @ weight.T + bias, labels) + 0.1 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-4 and bias.grad.abs().max() < 1e-4


def test_adjusted_classifier_prefers_no_class_where_features_say_nothing():
    torch.manual_seed(0)
    encoder, _ = classifier("resnet_small")
    labels = torch.arange(7).repeat_interleave(torch.tensor([640, 320, 160, 80, 40, 20, 10]))
    features = torch.randn(1, len(labels), 128)
    dataset = ImageArrays(None, labels, "")
    stage2.fit_classifier(encoder.heads, lambda _: features, dataset, None, [100.0])
    logits = encoder.heads[0](features[0])
    assert (logits - logits.mean()).abs().max() < 0.02  # the prior alone explains the labels


def test_classifiers_are_fitted_per_expert_and_apply_to_raw_features():
    torch.manual_seed(0)
    encoder, _ = classifier("resnet_small", experts=2)
    labels = torch.arange(140) % 7
    features = 5 + 3 * torch.randn(2, 140, 128) + 4 * torch.randn(2, 7, 128)[:, labels]
    features[:, :, 9] = 0  # a constant feature
    dataset = ImageArrays(None, labels, "")
    best = stage2.fit_classifier(encoder.heads, lambda _: features, dataset, None, (0.01, 1.0))
    assert best == dict(accuracy=None, penalty=0.01)  # the first, without val
    std, mean = torch.std_mean(features, 1)
    standardised = (features - mean[:, None]) / std.clamp(min=1e-6)[:, None]
    for expert, head in enumerate(encoder.heads):
        weight, bias = regression(standardised[expert], labels, 0.01)
        expected = standardised[expert] @ weight.T + bias + torch.tensor(7).log()  # minus log(1/7)
        torch.testing.assert_close(head(features[expert]), expected, atol=1e-3, rtol=1e-3)
    assert not torch.equal(encoder.heads[0].weight, encoder.heads[1].weight)


@pytest.mark.parametrize("world, count", [(1, 20), (3, 20), (4, 2)])
def test_gathered_features_are_in_the_order_of_the_images(world, count, monkeypatch):
    images = torch.arange(count)[:, None, None, None].expand(-1, 1, 2, 2).to(torch.uint8)
    dataset = ImageArrays(images, torch.zeros(count).long(), "made")
    encoder = torch.nn.Module()
    encoder.heads = torch.nn.ModuleList([torch.nn.Linear(1, 5)])
    monkeypatch.setattr(stage2, "features_of", lambda e, view, amp: view[None, :, :1, 0, 0])
    monkeypatch.setattr(stage2, "evaluation_view", lambda images, cfg: images[0].float())
    args, parts = argparse.Namespace(workers=0, amp="off"), []
    monkeypatch.setattr(stage2, "gather", lambda part: parts.append(part) or part)
    for rank in range(world):
        stage2.split_features(encoder, dataset, args, None, (rank, world, CPU))
    gathered = torch.cat(parts)
    monkeypatch.setattr(stage2, "gather", lambda part: gathered)
    features = stage2.split_features(encoder, dataset, args, None, (0, world, CPU))
    assert features[0, :, 0].tolist() == list(range(count))


def write_results(run, accuracies, seed=0, alpha=0.1, lr=10.0):
    run.mkdir(parents=True)
    stage1 = dict(seed=seed, alpha=alpha, loss="dscl", output=str(run), amp="bf16", images={})
    arguments = dict(seed=seed, lr=lr, output=str(run), plots=None)
    arguments |= dict(stage1=stage1)
    groups = dict(zip(("many", "medium", "few", "all"), accuracies))
    (run / "results.json").write_text(json.dumps(groups | dict(arguments=arguments)))
    return run


def test_summary_groups_runs_that_differ_only_in_seed(tmp_path, capsys):
    runs = [
        write_results(tmp_path / "a", (90, 80, None, 70), seed=0),
        write_results(tmp_path / "b", (92, 81, None, 74), seed=1),
        write_results(tmp_path / "c", (50, 40, None, 30), alpha=None),
        write_results(tmp_path / "d", (50, 40, None, 35), lr=1.0),
    ]
    printed = stage2.summary([*runs, tmp_path / "unfinished"])
    assert "1 of 5 runs have no results" in capsys.readouterr().err
    header, *rows = [line.split() for line in printed.splitlines()]
    assert header == ["many", "medium", "few", "all", "seeds"]
    assert rows == [
        "91.00 ± 1.41 80.50 ± 0.71 - 72.00 ± 2.83 2 lr 10.0, stage1 alpha 0.1".split(),
        "50.00 40.00 - 30.00 1 lr 10.0, stage1 alpha null".split(),
        "50.00 40.00 - 35.00 1 lr 1.0, stage1 alpha 0.1".split(),
    ]
    (tmp_path / "b" / "results.json").write_text("[1]")
    for run in (tmp_path / "b", tmp_path / "unfinished"):
        with pytest.raises(BadInput, match="results.json cannot be read .*run eval.py"):
            stage2.summary([run])


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d"])
def test_exported_weights_give_the_same_logits_in_torchvision(arch, tmp_path):
    encoder, cfg = classifier(arch)
    stage2.export(tmp_path / "model.pth", encoder, cfg, list("abcdefg"))
    resnet = torchvision.models.get_model(arch, num_classes=7).eval()
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    resnet.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = encoder.heads(features_of(encoder.eval(), images, "off"))[0]
        torch.testing.assert_close(resnet(images), logits, rtol=1e-4, atol=1e-5)
    card = json.loads((tmp_path / "model.pth.json").read_text())
    assert card["arch"] == arch and card["classes"] == list("abcdefg")
    assert (card["resize"], card["crop"], card["mean"][0]) == (256, 224, 0.485)


def test_accuracy_bars_have_the_right_length_and_group_colour(tmp_path):
    results = dict(counts=[10, 500, 50], per_class=[100.0, 50.0, None], reported_on="test")
    results["reported_counts"] = [7, 7, 0]
    results |= dict(many=50.0, medium=None, few=100.0, all=75.0)  # bags have no test image
    stage2.draw_accuracy(tmp_path, results, ["bööts", "shirts", "bags"])
    many, few = stage2.GROUP_COLORS["many"], stage2.GROUP_COLORS["few"]
    # Shirts, bags, boots: each 18 pixels high, from y = 64.
    with Image.open(tmp_path / "accuracy.png") as image:
        assert image.getpixel((300 + 195, 70)) == many != image.getpixel((300 + 205, 70))
        assert image.getpixel((302, 106)) == few and image.getpixel((300 + 398, 106)) == few
        assert image.getpixel((300, 88)) not in (many, few)
        names = image.crop((0, 64, 298, 118)).convert("L")
        assert len(names.getcolors()) > 5  # the names are drawn


def test_activation_map_is_red_where_the_class_is_seen_and_blue_elsewhere(tmp_path):
    encoder, cfg = classifier("resnet_small", experts=2)
    feature_map = torch.zeros(2, 128, 4, 4)
    feature_map[:, 5, 0, 0] = feature_map[:, 6, 3, 3] = 1.0
    for head in encoder.heads:
        head.weight.data.zero_()
        head.weight.data[0, 5] = head.weight.data[1, 6] = 1.0
    encoder.feature_maps = lambda view: [feature_map, feature_map]
    path = tmp_path / "activation.png"
    counts = torch.tensor([5, 9, 2])  # the last has no test image
    for level in (0, 255):  # on dark and on light images
        dataset = ImageArrays(torch.full((2, 1, 28, 28), level).byte(), torch.tensor([0, 1]), "")
        stage2.draw_activation(tmp_path, encoder, dataset, counts, cfg, ["a", "b", "c"], CPU)
        with Image.open(path) as image:  # tiles of 320 x 178 pixels: the image, and its map
            for left, here, elsewhere in ((2, (10, 10), (150, 150)), (324, (150, 150), (10, 10))):
                assert image.getpixel((left + 80, 80)) == (level, level, level)
                red, _, blue = image.getpixel((left + 160 + here[0], 2 + here[1]))
                assert red > blue + 50
                red, _, blue = image.getpixel((left + 160 + elsewhere[0], 2 + elsewhere[1]))
                assert blue > red + 50
