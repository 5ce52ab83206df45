"""Metrics by many, medium and few, linear classifiers, kNN, summary, export and plots."""

import argparse
import json
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import torchvision
from benchmark import cfg_of
from conftest import command, folders, set_argv
from PIL import Image

import eval as stage2
import train
from data import BadInput, ImageArrays
from eval import Classifier, best_temperature, calibration, calibration_error, evaluate
from eval import features_of, fit_heads, fit_on_all, load_encoder, metrics
from eval import regression, set_prior, table, worst_confusions

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
    results |= dict(counts=counts.tolist())
    assert results["per_class"] == [100, 50, 50, 0, 50]
    assert (results["many"], results["medium"], results["few"]) == (75, 25, 50)
    assert results["all"] == 50 and results["top1"] == 100 * 6 / 12 == results["top5"]
    second = torch.cat([top, labels[:, None]], dim=1)
    second[-1, 1] = 0  # one image's class is not among the first
    assert metrics(second, labels, counts)["top5"] == pytest.approx(100 * 11 / 12)
    assert metrics(second, labels, counts)["top1"] == 50
    assert metrics(top, labels, counts + 100)["few"] is None
    lines = table(results).splitlines()
    errors = {name: f"{error:.2f}" for name, error in results["standard_errors"].items()
              if name != "per_class"}
    ending = lines[1].split("each")[1].split()
    assert ending == ["6", "75.00", "±", errors["many"]] and len(lines) == 7
    assert "500 to 200 each" in lines[1]
    assert lines[4].split()[-5:] == ["790", "12", "50.00", "±", errors["all"]]
    expected = (500 * 100 + 200 * 50 + 50 * 50 + 10 * 50) / 790
    assert results["as_in_training"] == pytest.approx(expected, abs=1e-5)
    words = f"if classes came as in training {expected:.2f} ± {errors['as_in_training']}"
    assert lines[-1].split() == words.split()
    results |= metrics(*predictions([0] * 5, [2] * 5), counts)
    assert table(results).split()[-3] == "0.00"


def test_classes_without_test_images_are_left_out_and_reported():
    counts = torch.tensor([500, 200, 50, 30, 10])
    top, labels = predictions([2, 0, 1, 0, 0], [0, 0, 1, 2, 0])
    results = metrics(top, labels, counts)
    results |= dict(reported_on="test", reported_counts=labels.bincount(minlength=5).tolist())
    results |= dict(counts=counts.tolist())
    assert results["per_class"] == [100, None, 50, 0, None]
    assert (results["many"], results["medium"], results["few"]) == (100, 25, None)
    assert results["all"] == 50 and results["top1"] == 50
    json.dumps(results, allow_nan=False)
    lines = table(results).splitlines()
    assert lines[3].split()[-1] == "-"  # few-shot
    assert lines[-1] == "classes without a test image, left out: 2 of 5"


@pytest.mark.parametrize("images", [1, 2, 5, 60, "mixed"])
def test_standard_errors_are_those_of_drawing_other_images(images):
    random = torch.Generator().manual_seed(0)
    probability = 0.2 + 0.7 * torch.rand(12, generator=random).double()
    tested = torch.tensor([60, 40, 20, 10, 5, 3, 2, 2, 1, 1, 1, 1])
    tested = tested if images == "mixed" else torch.full((12,), images)
    weights, drawn = torch.ones(12), []
    for _ in range(1500):
        p = probability.repeat_interleave(tested)
        hits = torch.rand(len(p), generator=random).double() < p
        labels = torch.arange(12).repeat_interleave(tested)
        right = labels[hits].bincount(minlength=12)
        drawn.append(stage2.mean_and_error(right, tested, weights))
    means, errors = torch.tensor(drawn).double().T
    assert errors.min() > 0  # also if all images happen to be right
    assert 0.95 < errors.square().mean().sqrt() / means.std() < 1.25
    # Without the two images the error of single images would be 0.
    assert means.mean() == pytest.approx(100 * probability.mean().item(), abs=1)


def test_errors_weigh_classes_as_the_mean_does():
    top, labels = predictions([90, 3], [10, 1])
    errors = metrics(top, labels, torch.tensor([300, 10]))["standard_errors"]
    p = torch.tensor([91 / 102, 4 / 6]).double()
    of_class = 100 * (p * (1 - p) / torch.tensor([100, 4])).sqrt()
    assert errors["per_class"] == pytest.approx(of_class.tolist())
    assert errors["few"] == pytest.approx(of_class[1].item()) and errors["medium"] is None
    for name, weights in dict(all=[0.5, 0.5], top1=[100 / 104, 4 / 104]).items():
        expected = (torch.tensor(weights).double() * of_class).norm().item()
        assert errors[name] == pytest.approx(expected)


def test_few_val_images_leave_a_temperature_as_uncertain_as_is_said():
    generator, prior = torch.Generator().manual_seed(0), torch.ones(4)
    logits = 2 * torch.randn(20000, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    gaps, errors = [], []
    for few in torch.randperm(20000, generator=generator)[:6000].split(60):
        temperature = best_temperature(3 * logits[few], labels[few], prior)
        new = calibration(3 * logits / temperature, labels, prior)
        gaps.append(new["mean_probability"] - new["accuracy"])
        errors.append(calibration(3 * logits[few] / temperature, labels[few], prior)["error"])
    rms, said = torch.tensor(gaps).square().mean().sqrt(), torch.tensor(errors).mean()
    assert 4 < said < 6 and 0.7 * said < rms < 1.1 * said


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


def test_calibration_compares_mean_probability_and_accuracy_with_the_error_of_the_difference():
    random, draws = torch.Generator().manual_seed(0), []
    for _ in range(400):  # 60 images, for which the logits are calibrated but for a factor of 2
        logits = 2 * torch.randn(60, 3, generator=random)
        labels = logits.softmax(1).multinomial(1, generator=random)[:, 0]
        draws.append(list(calibration(2 * logits, labels, labels.bincount(minlength=3)).values()))
    probability, accuracy, error = torch.tensor(draws).T
    assert (probability - accuracy).mean() > 8  # too certain
    assert 0.9 < error.mean() / (probability - accuracy).std() < 1.1
    values = calibration(logits, labels, torch.ones(3))
    assert values["accuracy"] == pytest.approx(
        metrics(logits.argmax(1)[:, None], labels, torch.ones(3))["all"], abs=1e-4
    )


@pytest.mark.parametrize("images, said", [(999, False), (1000, True)])
def test_calibration_error_of_a_few_images_is_not_reported(images, said):
    labels = torch.arange(images) % 3
    results = evaluate(torch.randn(2, images, 3), labels, torch.ones(3), torch.ones(3), 1.5)
    assert [value is not None for value in results["calibration_error"].values()] == [said] * 2
    results = evaluate(torch.randn(2, images, 3), labels, torch.ones(3), torch.ones(3), None)
    assert results["calibration_error"]["after"] is None and results["temperature"] == 1


class Identity(torch.nn.Module):
    """An encoder of three experts whose feature is the class, an image's first pixel."""

    heads = [torch.nn.Linear(8, 8)] * 3

    def feature_maps(self, view):
        return [torch.eye(8)[view[:, 0, 0, 0].round().long()][..., None, None]] * 3


def logits_by_rank():
    """Class c has logit c, except the class that the feature says, which has 2.5.

    The second expert is certain of the image's class, the third equally of the next class.
    """
    weight, sure = torch.diag(2.5 - torch.arange(8.0)), 90 * torch.eye(8)
    bias = torch.stack([torch.arange(8.0), torch.zeros(8), torch.zeros(8)])
    return Classifier(torch.stack([weight, sure, sure.roll(1, dims=0)]), bias)


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 2), (3, 0), (60, 0)])
def test_logits_do_not_depend_on_processes_and_workers(world, workers, monkeypatch):
    labels = torch.arange(50) % 8
    images = torch.arange(50)[:, None, None, None].expand(-1, 3, 2, 2) % 8
    dataset = ImageArrays(images.to(torch.uint8), labels, "made")
    cfg = argparse.Namespace(mean=(0.0,) * 3, std=(1 / 255,) * 3)
    args, parts = argparse.Namespace(workers=workers, amp="off"), []
    monkeypatch.setattr(stage2, "gather", lambda part: parts.append(part) or part)
    for rank in range(world):
        stage2.split_features(Identity(), dataset, args, cfg, (rank, world, CPU))
    gathered = torch.cat(parts)
    monkeypatch.setattr(stage2, "gather", lambda part: gathered)
    features = stage2.split_features(Identity(), dataset, args, cfg, (0, world, CPU))
    logits = logits_by_rank().logits(features)
    assert logits.shape == (4, 50, 8)
    mean, ranks, sure, wrong = logits.topk(5).indices
    # The logit 2.5 ranks behind 7, 6, 5, 4 and 3, unless it has replaced one of them.
    assert torch.equal((ranks == labels[:, None]).any(1), labels >= 3)
    assert torch.equal(sure[:, 0], labels) and torch.equal(wrong[:, 0], (labels + 1) % 8)
    # The other two cancel, so the first expert decides: 2.5 against the next class's 0 to 7.
    assert torch.equal(mean[:, 0], torch.where((labels < 2) | (labels == 7), labels, labels + 1))


def classifier(arch, experts=1):
    cfg = cfg_of("imagenet_lt", train.VIEWS, train.STAGE1, arch=arch, experts=experts)
    encoder = load_encoder(cfg, {}, 7, 0, CPU, keep_heads=False)
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
    counts = torch.tensor([640, 320, 160, 80, 40, 20, 10])
    labels = torch.arange(7).repeat_interleave(counts)
    features = torch.randn(1, len(labels), 128)
    fitted = set_prior(fit_heads(features, labels, 100.0), counts, torch.ones(7))
    logits = fitted.logits(features)
    assert (logits - logits.mean()).abs().max() < 0.02  # the prior alone explains the labels


def test_prior_is_set_both_ways_and_back():
    torch.manual_seed(0)
    before, features = Classifier(torch.randn(2, 3, 5), torch.randn(2, 3)), torch.randn(2, 4, 5)
    training, balanced = torch.tensor([0.7, 0.2, 0.1]), torch.ones(3)
    after = set_prior(before, training, balanced)
    probabilities = before.logits(features).softmax(2) / training
    expected = probabilities / probabilities.sum(2, keepdim=True)
    # Of each expert; and of their mean, whose logits change by the same.
    torch.testing.assert_close(after.logits(features).softmax(2), expected)
    back = set_prior(after, balanced, training)
    torch.testing.assert_close(back.logits(features), before.logits(features))
    assert torch.equal(set_prior(before, training, training).bias, before.bias)
    assert not torch.equal(after.bias, before.bias)  # `before` has not changed


def test_temperature_of_a_classifier_of_all_images_is_of_images_it_has_not_seen():
    torch.manual_seed(0)
    centres = torch.randn(6, 60)

    def images(count, noise):
        labels = torch.arange(count) % 6
        return (centres[labels] + noise * torch.randn(count, 60))[None], labels

    # Stage 1 has seen the images of train, which are better separated than others.
    (train_features, train_labels), (other, others) = images(60, 0.3), images(240, 4)
    features = dict(train=train_features, val=other[:, :80], test=other[:, 80:])
    labels = dict(train=train_labels, val=others[:80], test=others[80:])
    fitted, temperature, images_words = fit_on_all(features, labels, 1e-3, torch.ones(6))
    new, new_labels = images(6000, 4)
    logits = fitted.logits(new)[0]
    gap = {t: calibration(logits / t, new_labels, torch.ones(6)) for t in (1.0, temperature)}
    gap = {t: one["mean_probability"] - one["accuracy"] for t, one in gap.items()}
    assert gap[1.0] > 15 and abs(gap[temperature]) < 5
    assert images_words == "all 300 images"


def test_classifiers_are_fitted_per_expert_and_apply_to_raw_features():
    torch.manual_seed(0)
    labels = torch.arange(140) % 7
    features = 5 + 3 * torch.randn(2, 140, 128) + 4 * torch.randn(2, 7, 128)[:, labels]
    features[:, :, 9] = 0  # a constant feature
    fitted = fit_heads(features, labels, 0.01)
    logits = set_prior(fitted, labels.bincount() / 140, torch.ones(7)).logits(features)
    std, mean = torch.std_mean(features, 1)
    standardised = (features - mean[:, None]) / std.clamp(min=1e-6)[:, None]
    for expert in range(2):
        weight, bias = regression(standardised[expert], labels, 0.01)
        expected = standardised[expert] @ weight.T + bias + torch.tensor(7).log()  # minus log(1/7)
        torch.testing.assert_close(logits[1 + expert], expected, atol=1e-3, rtol=1e-3)
    assert not torch.equal(fitted.weight[0], fitted.weight[1])


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
    arguments = dict(seed=0, lr=lr, output=str(run), plots=None) | dict(stage1=stage1)
    groups = dict(zip(("many", "medium", "few", "all", "val"), accuracies))
    groups |= dict(standard_errors=dict(many=2.0, medium=2.0, few=None, all=1.5))
    on_val = dict(all=groups["val"], standard_errors=dict(all=3.0))
    groups["on_val"] = on_val if groups["val"] else None
    (run / "results.json").write_text(json.dumps(groups | dict(arguments=arguments)))
    return run


def test_summary_groups_runs_that_differ_only_in_seed(tmp_path, capsys):
    runs = [
        write_results(tmp_path / "a", (90, 80, None, 70, 60), seed=0),
        write_results(tmp_path / "b", (92, 81, None, 74, None), seed=1),
        write_results(tmp_path / "copy", (90, 80, None, 70, 60), seed=0),
        write_results(tmp_path / "c", (50, 40, None, 30, 20), alpha=None),
        write_results(tmp_path / "d", (50, 40, None, 35, 20), lr=1.0),
    ]
    printed = stage2.summary([*runs, tmp_path / "unfinished"]).replace(f"{tmp_path}/", "")
    said = capsys.readouterr().err
    assert "1 of 6 runs have no results" in said
    assert f"{tmp_path}/copy has the arguments and seed of {tmp_path}/a: counted once" in said
    header, *rows, legend = printed.splitlines()
    assert header.split() == ["many", "medium", "few", "all", "val"]
    assert legend.startswith("±: of a run the standard error, of a mean the standard deviation")
    assert [row.split() for row in rows] == [
        "90.00 ± 2.00 80.00 ± 2.00 - 70.00 ± 1.50 60.00 ± 3.00 a".split(),
        "92.00 ± 2.00 81.00 ± 2.00 - 74.00 ± 1.50 - b".split(),
        "91.00 ± 1.41 80.50 ± 0.71 - 72.00 ± 2.83 - mean of 2 seeds, lr 10.0, "
        "stage1 alpha 0.1".split(),
        "50.00 ± 2.00 40.00 ± 2.00 - 30.00 ± 1.50 20.00 ± 3.00 c, lr 10.0, "
        "stage1 alpha null".split(),
        "50.00 ± 2.00 40.00 ± 2.00 - 35.00 ± 1.50 20.00 ± 3.00 d, lr 1.0, "
        "stage1 alpha 0.1".split(),
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
    errors = dict(many=10.0, medium=None, few=20.0, all=9.0, per_class=[20.0, 10.0, None])
    results |= dict(classes=["bööts", "shirts", "bags"], standard_errors=errors)
    stage2.draw_accuracy(tmp_path, results)
    many, few = stage2.GROUP_COLORS["many"], stage2.GROUP_COLORS["few"]
    # Shirts, bags, boots: each 18 pixels high, from y = 64.
    with Image.open(tmp_path / "accuracy.png") as image:
        assert image.getpixel((300 + 195, 70)) == many != image.getpixel((300 + 205, 70))
        assert image.getpixel((302, 106)) == few and image.getpixel((300 + 398, 106)) == few
        # A class without a test image does not look like one of 0 %.
        assert image.getpixel((300, 84)) == image.getpixel((700, 84)) == (235, 235, 235)
        on_line = [image.getpixel((300 + 4 * x, 72)) == (0, 0, 0) for x in (41, 50, 59, 39, 61)]
        assert on_line == [True] * 3 + [False] * 2  # 50 ± 10
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
    path, fitted = tmp_path / "activation.png", Classifier.of(encoder.heads)
    results = dict(counts=[5, 9, 2], classes=["a", "b", "c"])  # c has no test image
    logits = torch.tensor([[[1.0, 0, 0], [1, 0, 0]]])  # the first is classified rightly
    for level in (0, 255):  # on dark and on light images
        dataset = ImageArrays(torch.full((2, 1, 28, 28), level).byte(), torch.tensor([0, 1]), "")
        with mock.patch.object(stage2, "caption", wraps=stage2.caption) as caption:
            stage2.draw_activation(tmp_path, results, encoder, fitted, logits, dataset, cfg)
        verdicts = [call.args[0][1] for call in caption.call_args_list]
        assert verdicts == ["right", "wrong: classified as a"]
        with Image.open(path) as image:  # tiles of 320 x 196 pixels: the image, and its map
            for left, here, elsewhere in ((2, (10, 10), (150, 150)), (324, (150, 150), (10, 10))):
                assert image.getpixel((left + 80, 80)) == (level, level, level)
                red, _, blue = image.getpixel((left + 160 + here[0], 2 + here[1]))
                assert red > blue + 50
                red, _, blue = image.getpixel((left + 160 + elsewhere[0], 2 + elsewhere[1]))
                assert blue > red + 50


# ------------------------------------------------------------ what a run and its model.pth say


SHARED = ["--workers", "0", "--output"]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A directory with class folders, data, and a tiny run of train.py on them, run."""
    root = tmp_path_factory.mktemp("folders")
    random = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("val", 4), ("test", 6)):
        folders(root / "data", **{split: dict(ant=count, bee=count // 2, moth=2)})
    for number, path in enumerate(sorted((root / "data").rglob("*.png"))):
        pixels = torch.randint(0, 120, (8, 9, 3), generator=random).byte().numpy()
        pixels[..., ["ant", "bee", "moth"].index(path.parent.name)] += 90
        Image.fromarray(pixels).save(path)
    options = ["--dataset", "small_imagefolder", "--data-root", root / "data", "--loss", "la"]
    options += ["--arch", "resnet_tiny", "--batch-size", 8, "--warmup", 0, "--epochs", 2]
    with pytest.MonkeyPatch.context() as patch:
        set_argv(patch, train, *options, *SHARED, root / "run")
        train.main()
    return root


@pytest.fixture
def evaluated(small_run, tmp_path, call):
    """A copy of the run, and a function that runs eval.py on it in this process."""
    run = shutil.copytree(small_run / "run", tmp_path / "run")
    return run, lambda *flags: call(stage2, *SHARED, run, *flags)


def test_model_says_what_it_is_and_one_of_all_images_stays(evaluated, small_run):
    run, evaluate_run = evaluated
    said = evaluate_run("--penalty", 0.1, "--plots", run / "plots").err
    words = torch.load(run / "model.pth", weights_only=True)["about"]
    says = r"classifier adjusted, penalty 0.1, fitted on 32 training images, prior balanced, "
    says += r"temperature \d\.\d\d; stage 1: step 8 of 8"
    assert re.fullmatch(says, words) and f"model.pth: {words}\n" in said
    assert said.splitlines()[-1] == f"wrote accuracy.png and activation.png to {run}/plots"
    predicted = evaluate_run("--predict", small_run / "data" / "test" / "ant")
    assert predicted.err.splitlines()[0] == f"{run}/model.pth: {words}"

    printed, said = evaluate_run("--penalty", 0.1, "--fit-on", "all")
    assert printed.startswith("below: the classifier of the training images; model.pth's accuracy")
    assert "fitted on all 51 images, prior balanced" in said
    assert re.search("classifier of all 51 images for model.pth; .*cross-validation.* % are right", said)
    of_all = (run / "model.pth").read_bytes()
    said = evaluate_run("--penalty", 0.1, "--plots", run / "plots").err
    assert (run / "model.pth").read_bytes() == of_all
    assert "model.pth is kept, since it is of more images: delete it to get this" in said
    assert said.count("fitted on all 51 images") == 1 and "fitted on 32" not in said


def test_predictions_of_the_reported_images_are_written(evaluated, small_run):
    run, evaluate_run = evaluated
    evaluate_run("--penalty", 0.1)
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    results = json.loads((run / "results.json").read_text())
    assert [Path(line["path"]).parent.name for line in lines] == [line["class"] for line in lines]
    rights = [line["class"] == line["predicted"] for line in lines]
    assert len(rights) == 11 and 100 * sum(rights) / 11 == pytest.approx(results["top1"])
    said = evaluate_run("--predict", *(line["path"] for line in lines)).out.splitlines()
    for line, again in zip(lines, map(json.loads, said), strict=True):
        assert line["predicted"] == again["class"] and line["path"] == again["path"]
        assert line["probability"] == pytest.approx(again["probability"], abs=2e-6)


def test_balanced_classifier_belongs_to_the_weights_and_the_images(evaluated, small_run):
    run, evaluate_run = evaluated
    balanced = ["--classifier", "balanced", "--epochs", 2]
    evaluate_run(*balanced)
    assert "begun anew" not in evaluate_run(*balanced).err  # complete
    saved = torch.load(run / "checkpoint.pth", weights_only=True)

    def equals_the_checkpoint():
        state = torch.load(run / "model.pth", weights_only=True)["model"]
        name = "shared.conv1.weight"
        return torch.equal(state[name], torch.load(run / "checkpoint.pth")["encoder"][name])

    # Stage 1 is trained again in the same place: equal arguments and step, other weights.
    for value in saved["encoder"].values():
        value.mul_(1.01) if value.is_floating_point() else None
    torch.save(saved, run / "checkpoint.pth")
    said = evaluate_run(*balanced).err
    assert "classifier.pth belongs to other weights of stage 1: begun anew" in said
    assert "results.json is of other weights of stage 1 and will be replaced" in said
    assert "model.pth is of other weights of stage 1 and will be replaced" in said
    assert equals_the_checkpoint() and "epoch 2/2" in said
    # Stage 1 goes on; fewer steps are refused.
    torch.save(saved | dict(step=7), run / "checkpoint.pth")
    with pytest.raises(BadInput, match="results.json .*stage1 step was 8, now 7"):
        evaluate_run(*balanced)
    saved["encoder"]["shared.conv1.weight"].mul_(1.01)
    torch.save(saved | dict(step=9), run / "checkpoint.pth")
    assert "belongs to other weights of stage 1: begun anew" in evaluate_run(*balanced).err
    assert equals_the_checkpoint()
    # Other images of val, which chose the epoch.
    image = small_run / "data" / "val" / "ant" / "0.png"
    image.rename(image.with_name("new.png"))
    try:
        said = evaluate_run(*balanced).err
    finally:
        image.with_name("new.png").rename(image)
    assert "classifier.pth belongs to other val images: begun anew" in said


def test_unfinished_stage_1_is_said_and_model_knows_it(evaluated):
    run, evaluate_run = evaluated
    saved = torch.load(run / "checkpoint.pth", weights_only=True)
    torch.save(saved | dict(step=5), run / "checkpoint.pth")
    said = evaluate_run("--penalty", 0.1).err
    assert f"stage 1 is unfinished: {run}/checkpoint.pth has step 5 of 8\n" in said
    about = torch.load(run / "model.pth", weights_only=True)["about"]
    assert about.endswith("stage 1: step 5 of 8")


@pytest.mark.parametrize("flags", [["--prior", "balanced"], ["--penalty=1"], ["--plots", "p"]])
def test_flags_that_a_command_does_not_use_are_refused(flags, evaluated, monkeypatch, capsys):
    run, _ = evaluated
    for given in (["--predict", "x.png"], ["--summary", run]):
        says = f"{flags[0].partition('=')[0]}: this flag is not for {given[0]}"
        output = [*SHARED, run] if given[0] == "--predict" else []
        code, _, said = command(monkeypatch, capsys, stage2, *output, *given, *flags)
        assert code == 2 and says in said


def test_val_in_brackets_is_named_under_the_prior_of_training(evaluated):
    _, evaluate_run = evaluated
    said = evaluate_run("--penalty", 0.1, "--prior", "training").err
    assert re.search(r"classifier adjusted, penalty 0.1; val \d+\.\d\d ± \d+\.\d\d; ", said)


def test_differences_of_lists_show_what_came_and_went():
    many = [f"class {n}" for n in range(40)]
    assert train.difference(many, [*many[1:], "moth"]) == "+ moth, - class 0"
    assert train.difference(many, many[::-1]) == "another order"
    assert train.difference([0.1], [0.2]) == "was [0.1], now [0.2]"
    assert train.difference(many, ["x"]).endswith(" and 31 more")
