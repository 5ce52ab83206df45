"""Metrics by shots, what the linear classifier leaves alone, summaries, exports and pictures."""

import json

import pytest
import torch
import torchvision
from PIL import Image

import eval as stage2
from data import DATASETS, BadInput, Pictures, evaluation_view
from eval import LinearProbes, count_right, metrics, table
from train import load_batches, shard


def test_metrics_are_class_means_by_group_and_none_where_a_group_is_empty():
    counts = torch.tensor([500, 200, 50, 30, 10, 2])
    tally = torch.tensor([[2, 4, 2, 2, 2, 0], [2, 2, 1, 0, 1, 0], [2, 4, 1, 1, 2, 0]])
    results = metrics(tally, counts)
    assert results["per_class"] == [100, 50, 50, 0, 50, None]  # class 5 has no test picture
    assert (results["many"], results["medium"], results["few"]) == (75, 25, 50)
    assert results["all"] == 50 and results["top1"] == 100 * 6 / 12
    assert results["top5"] == pytest.approx(100 * 10 / 12)
    assert metrics(tally, counts + 100)["few"] is None
    printed = table(results, counts)
    assert "75.00" in printed and "500 to 200 each" in printed and len(printed.splitlines()) == 5


class Ranks(torch.nn.Module):
    """Class c has logit c, but for the class that a picture's first pixel names: that has 2.5.

    A second expert is sure of the picture's class, a third as sure of the next one.
    """

    def heads(self):
        return [None] * 3

    def forward(self, images):
        named = images[:, 0, 0, :1].round().long()
        logits = torch.arange(8.0).repeat(len(images), 1).scatter(1, named, 2.5)
        sure = torch.zeros_like(logits).scatter(1, named, 90)
        return torch.stack([logits, sure, sure.roll(1, dims=1)])


@pytest.mark.parametrize(
    "batch_size, world, workers", [(64, 1, 0), (7, 1, 2), (5, 3, 0), (5, 60, 0)]
)
def test_right_answers_do_not_depend_on_batches_processes_and_workers(batch_size, world, workers):
    labels = torch.arange(50) % 8
    images = torch.arange(50)[:, None, None, None].expand(-1, 3, 2, 2) % 8
    pictures = Pictures(images.to(torch.uint8), labels, "made")
    recipe = dict(mean=(0.0,) * 3, std=(1 / 255,) * 3)
    tally = 0
    for rank in range(world):
        batches = shard(len(pictures), rank, world, batch_size)
        loader = load_batches(pictures, batches, recipe, 0, workers, torch.device("cpu"))
        tally += count_right(Ranks(), loader, recipe, 8, torch.device("cpu"))
    mean, ranks, sure, wrong = tally.tolist()
    counts = labels.bincount().tolist()
    # 2.5 stands behind 7, 6, 5, 4 and 3, those of them that it has not replaced.
    assert ranks == [counts, [0] * 8, [0, 0, 0] + counts[3:]]
    assert sure == [counts, counts, counts] and wrong[:2] == [counts, [0] * 8]
    # Between the two that are sure the first decides: 2.5 against the next class's 0 to 7.
    assert mean == [counts, [*counts[:2], 0, 0, 0, 0, 0, counts[7]], counts]


@pytest.mark.parametrize("bn", ["eval", "train"])
def test_only_the_classifier_trains_and_bn_decides_about_the_statistics(bn):
    run = dict(arch="resnet_small", experts=2, expert_width=0.5)
    model = LinearProbes([run, run], 10, bn, "off", 0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(torch.randn(8, 3, 28, 28))
    assert logits.shape == (4, 8, 10)
    logits.sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 8 and all("head." in name for name in trained)
    moved = any(not torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert moved == (bn == "train")
    assert not any(m.training for m in model.eval().modules())


def write_results(run, accuracies, seed=0, alpha=0.1, lr=10.0):
    run.mkdir(parents=True)
    stage1 = dict(seed=seed, alpha=alpha, loss="dscl", output=str(run), amp="bf16", step=9, data={})
    arguments = dict(stage1=[stage1], seed=seed, lr=lr, output=str(run), data={}, plots=None)
    groups = dict(zip(("many", "medium", "few", "all"), accuracies))
    (run / "results.json").write_text(json.dumps(groups | dict(arguments=arguments)))
    return run


def test_the_summary_groups_runs_that_differ_in_seed_alone(tmp_path, capsys):
    runs = [
        write_results(tmp_path / "a", (90, 80, None, 70), seed=0),
        write_results(tmp_path / "b", (92, 81, None, 74), seed=1),
        write_results(tmp_path / "c", (50, 40, None, 30), alpha=None),
        write_results(tmp_path / "d", (50, 40, None, 35), lr=1.0),
    ]
    header, *rows = stage2.summary([*runs, tmp_path / "unfinished"]).split("\n\n")[0].splitlines()
    assert header.split() == ["alpha", "stage", "2", "lr", "seeds", "many", "medium", "few", "all"]
    assert [row.split() for row in rows] == [
        "0.1 1.0 1 50.00 40.00 - 35.00".split(),
        "0.1 10.0 2 91.00 ± 1.41 80.50 ± 0.71 - 72.00 ± 2.83".split(),
        "null 10.0 1 50.00 40.00 - 30.00".split(),
    ]
    assert "1 of 5 have no results yet" in capsys.readouterr().err
    with pytest.raises(BadInput, match="results.json cannot be read .*run eval.py"):
        stage2.summary([tmp_path / "unfinished"])


RECIPE = DATASETS["fashion_mnist_lt"] | dict(view_size=20)
PICTURES = Pictures(torch.arange(48 * 28 * 28).view(48, 1, 28, 28).byte(), torch.arange(48) % 7, "")


def probes(arch, experts=1, width=1.0, runs=1):
    run = dict(arch=arch, experts=experts, expert_width=width)
    model = LinearProbes([run] * runs, 7, "eval", "off", 0)
    for module in model.modules():  # running statistics that are not those of the start
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    return model.eval()


def test_an_exported_resnet_is_torchvisions_own(tmp_path):
    model = probes("resnet18")
    stage2.export(tmp_path / "resnet18.pth", model, PICTURES, RECIPE)
    resnet = torchvision.models.resnet18(num_classes=7).eval()
    state = torch.load(tmp_path / "resnet18.pth", weights_only=True)
    resnet.load_state_dict(state, strict=True)
    images = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(resnet(images), model(images)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet50", "resnext50_32x4d", "resnet152"])
def test_the_names_of_an_exported_state_are_torchvisions(arch, tmp_path):
    stage2.export(tmp_path / "whole.pth", probes(arch), PICTURES, RECIPE)
    with torch.device("meta"):
        resnet = torchvision.models.get_model(arch, num_classes=7)
    state = torch.load(tmp_path / "whole.pth", weights_only=True)
    resnet.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize("experts, runs", [(1, 1), (2, 2)])
def test_an_exported_program_gives_the_mean_of_all_logits_for_any_batch(experts, runs, tmp_path):
    model = probes("resnet_small", experts, 0.5, runs)
    stage2.export(tmp_path / "small.pt2", model, PICTURES, RECIPE)
    program = torch.export.load(tmp_path / "small.pt2").module()
    for batch in (1, 5):
        images = evaluation_view(PICTURES.images[None, :batch], RECIPE)  # whole, as in evaluation
        torch.testing.assert_close(program(images), model(images).mean(0), rtol=1e-4, atol=1e-5)


def pixel(path, x, y):
    with Image.open(path) as image:
        return image.getpixel((x, y))


def test_bars_stand_at_their_accuracy_in_the_colour_of_their_shots(tmp_path):
    results = dict(counts=[10, 500, 50], per_class=[100.0, 50.0, None], reported_on="test")
    results |= dict(many=50.0, medium=None, few=100.0, all=75.0)
    other = results | dict(per_class=[20.0, 90.0, 40.0], medium=40.0, name="other")
    names = ["boots", "shirts", "bags"]
    stage2.draw_accuracy(tmp_path / "a.png", results | dict(medium=0.0), names, other)
    # Sorted by training pictures: shirts, bags, boots; 560 x 280 pixels from (50, 60) on.
    path, many, few = tmp_path / "a.png", stage2.SHOTS["many"], stage2.SHOTS["few"]
    assert pixel(path, 110, 60 + 145) == many and pixel(path, 110, 60 + 135) != many
    assert pixel(path, 560, 62) == few and pixel(path, 560, 338) == few
    assert pixel(path, 50 + 280, 340 - 112) == stage2.INK  # the other run's bags at 40


def test_the_confusion_matrix_is_sorted_by_training_pictures(tmp_path):
    labels, predicted = torch.tensor([0, 0, 1, 2]), torch.tensor([2, 2, 1, 2])
    counts = torch.tensor([5, 50, 500])
    stage2.draw_confusion(tmp_path / "c.png", predicted, labels, counts, ["a", "b", "c"])

    def cell(row, column):
        return pixel(tmp_path / "c.png", 110 + 166 * column + 5, 80 + 166 * row + 5)

    sure, never = stage2.shade(1), stage2.shade(0)
    assert [cell(0, n) for n in range(3)] == [sure, never, never]  # class 2, taken for itself
    assert [cell(2, n) for n in range(3)] == [sure, never, never]  # class 0, taken for class 2


def test_the_sheet_of_views_shows_the_pixels_that_the_network_saw(tmp_path):
    recipe = dict(mean=(0.5,) * 3, std=(0.25,) * 3)
    colors = torch.tensor([[0.8, 0.2, 0.4], [0.0, 1.0, 0.6]])

    def flat(of, size):
        return ((of[..., None, None] - 0.5) / 0.25).expand(*of.shape, size, size)

    patches = flat(colors.flip(0), 8)[None]
    boxes = torch.tensor([4.0, 4.0, 12.0, 12.0]).expand(1, 2, 4)
    stage2.draw_views(
        tmp_path / "v.png", flat(colors, 16), boxes, patches, flat(1 - colors, 16), recipe
    )
    for row, color in enumerate(colors):
        y = 46 + 160 * row + 75
        shown = (color, color, 1 - color, colors[1 - row])
        for x, expected in zip((95, 255, 415, 540), shown):
            assert pixel(tmp_path / "v.png", x, y) == tuple((expected * 255).round().int().tolist())
        # The box begins at a quarter of the view.
        assert pixel(tmp_path / "v.png", 180 + 38, y) == stage2.SHOTS["few"]


def test_the_sheet_needs_neither_patches_nor_keys(tmp_path):
    recipe = dict(mean=(0.5,) * 3, std=(0.25,) * 3)
    stage2.draw_views(tmp_path / "v.png", torch.ones(2, 3, 16, 16), None, None, None, recipe)
    assert pixel(tmp_path / "v.png", 95, 121) == (191, 191, 191)


def test_an_activation_map_is_high_where_the_pictures_class_is_seen():
    model = probes("resnet_small", experts=2)
    features = torch.zeros(2, 128, 7, 7)
    features[:, 5, 2, 3] = features[:, 6, 4, 1] = 1.0
    for head in model.heads():
        head.weight.data.zero_()
        head.weight.data[0, 5] = head.weight.data[1, 6] = 1.0
    model.encoders[0].features = lambda views: [features, features]
    maps = stage2.activation_maps(model, None, torch.tensor([0, 1]))
    expected = torch.zeros(2, 7, 7)
    expected[0, 2, 3] = expected[1, 4, 1] = 1.0
    torch.testing.assert_close(maps, expected)


def test_the_nearest_training_pictures_come_first(tmp_path):
    model, rows = probes("resnet_small"), [3, 5]
    images = torch.randint(256, (40, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    trained = Pictures(images.byte(), torch.arange(40) % 7, "")
    tested = trained.subset(torch.arange(20))
    tested.labels[5] = 6  # its twin in the training set is of class 5
    loading, names = dict(workers=0, device=torch.device("cpu")), list("abcdefg")
    stage2.draw_neighbours(
        tmp_path / "n.png", model, {"train": trained}, tested, rows, names, RECIPE, loading
    )
    with Image.open(tmp_path / "n.png") as image:
        for n, color in enumerate((stage2.GREEN, stage2.RED)):
            top = 40 + 92 * n
            twins = [image.crop((left, top, left + 70, top + 70)) for left in (20, 112)]
            middle = [twin.crop((2, 2, 68, 68)).tobytes() for twin in twins]
            assert middle[0] == middle[1] and image.getpixel((111, top + 35)) == color


def write_log(run, probability, **arguments):
    run.mkdir()
    arguments = dict(loss="dscl", alpha=0.1, contrast="global", processes=1) | arguments
    header = dict(arguments=arguments | dict(batch_size=65, queue_size=872))
    records = [
        dict(epoch=epoch, step=epoch, loss=1.0, own_key={"64": probability, "256": probability})
        for epoch in range(1, 31)
    ]
    lines = [json.dumps(line) for line in (header, *records)]
    (run / "log.jsonl").write_text("\n".join(lines) + '\n{"epoch": 3')  # cut short by a kill
    return run


def test_each_runs_own_key_probability_is_drawn_though_their_names_are_alike(tmp_path):
    runs = [write_log(tmp_path / "a", 0.5), write_log(tmp_path / "b", 0.02)]
    stage2.draw_own_key(tmp_path / "p.png", runs, [100, 300, 600])
    axes = stage2.Axes(
        stage2.Canvas(1, 1), (735, 60, 200, 270), (64, 512), (0.001, 1), log_x=True, log_y=True
    )
    for probability, color in zip((0.5, 0.02), (stage2.SHOTS["many"], stage2.SHOTS["medium"])):
        x, y = axes.at(180, probability)
        near = [pixel(tmp_path / "p.png", round(x), round(y) + d) for d in (-1, 0, 1)]
        assert color in near
    (tmp_path / "c").mkdir()
    with pytest.raises(BadInput, match="log.jsonl holds no records to draw"):
        stage2.draw_own_key(tmp_path / "p.png", [tmp_path / "c"], [100, 300, 600])


def test_theory_is_alpha_under_dscl_and_one_over_the_positives_under_scl():
    args = dict(alpha=0.1, batch_size=65, queue_size=872, contrast="global", processes=2)
    # 1000 others in the contrast set; of them 100 are of the class of 100, and 2 of that of 2.
    for size, counts, positives in ((64, [100, 900], 100.0), (2, [2, 998], 2.0)):
        drawn = torch.distributions.Poisson(torch.tensor(positives, dtype=torch.double))
        number = torch.arange(400, dtype=torch.double)
        weights = drawn.log_prob(number).exp()
        for alpha in (0.1, None):
            share = 1 / (number + 1) if alpha is None else torch.full_like(number, alpha)
            expected = (weights * torch.where(number == 0, 1.0, share)).sum().item()
            for run in (args, args | dict(batch_size=130, contrast="local")):
                given = stage2.expected_share(run | dict(alpha=alpha), counts, size)
                assert given == pytest.approx(expected)


def test_the_tail_pictures_are_of_the_few_shot_classes_in_turn():
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    rows = stage2.tail_pictures(labels, torch.tensor([10, 500, 15]), 4)
    assert rows == [0, 2, 3, 5]
