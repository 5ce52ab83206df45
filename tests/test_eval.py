"""Metrics by shots, and what the linear classifier leaves alone."""

import pytest
import torch

from eval import LinearProbe, metrics, table


def test_metrics_are_class_means_by_group_and_none_where_a_group_is_empty():
    counts = torch.tensor([500, 200, 50, 30, 10, 2])
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])  # class 5 has no test picture
    answers = torch.tensor([0, 0, 1, 2, 2, 0, 0, 0, 4, 5])
    logits = torch.nn.functional.one_hot(answers, 6).double()
    results = metrics(logits, labels, counts)
    assert results["per_class"] == [100, 50, 50, 0, 50, None]
    assert (results["many"], results["medium"], results["few"]) == (75, 25, 50)
    assert results["top1"] == pytest.approx(50)
    assert results["top5"] >= results["top1"]
    assert metrics(logits, labels, counts + 100)["few"] is None
    printed = table(results, counts)
    assert "75.00" in printed and "500 to 200 each" in printed and len(printed.splitlines()) == 5


def test_top5_counts_the_five_largest():
    logits = torch.arange(8.0).repeat(8, 1)  # ranks 7, 6, 5, 4, 3 first
    results = metrics(logits, torch.arange(8), torch.full((8,), 50))
    assert results["top1"] == pytest.approx(100 / 8) and results["top5"] == pytest.approx(500 / 8)


@pytest.mark.parametrize("bn", ["eval", "train"])
def test_only_the_classifier_trains_and_bn_decides_about_the_statistics(bn):
    model = LinearProbe("resnet_small", 10, bn).train()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    model(torch.randn(8, 3, 28, 28)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "classifier.weight",
        "classifier.bias",
    ]
    after = model.backbone.state_dict()
    moved = any(not torch.equal(after[name], before[name]) for name in before)
    assert moved == (bn == "train")
    assert not model.eval().backbone.training
