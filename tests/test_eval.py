"""Metrics by shots, and what the linear classifier leaves alone."""

import pytest
import torch

from data import Pictures
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
