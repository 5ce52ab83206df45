"""Encoder, momentum encoder and queue."""

import argparse

import pytest
import torch
import torchvision
from torch import nn

from models import (
    ARCHS,
    Encoder,
    Queue,
    build_backbone,
    cifar_resnet,
    load_pretrained,
    moving_average,
    roi_means,
    smallest_sides,
)


@pytest.mark.parametrize(
    "arch, size, channels, stride",
    [
        ("resnet_tiny", 32, 96, 4),
        ("resnet_small", 32, 128, 4),
        ("resnet20", 32, 64, 4),
        ("resnet32", 32, 64, 4),
        ("resnet18", 64, 512, 32),
        ("resnet50", 64, 2048, 32),
        ("resnext50_32x4d", 64, 2048, 32),
        ("resnet152", 64, 2048, 32),
    ],
)
def test_backbones_return_the_last_map_and_large_ones_zero_init_residuals(
    arch, size, channels, stride
):
    backbone, given = build_backbone(arch)
    with torch.no_grad():
        last = backbone.eval()(torch.zeros(1, 3, size, size))
    assert arch in ARCHS and given == channels
    assert last.shape == (1, channels, size // stride, size // stride)
    name = "bn2" if channels <= 512 else "bn3"
    norms = [norm for path, norm in backbone.named_modules() if path.endswith(name)]
    assert all(norm.weight.eq(0).all() for norm in norms) == (channels >= 512)


@pytest.mark.parametrize("arch", ARCHS)
def test_smallest_view_ends_in_2x2_cells_and_patches_keep_2_pixels_before_a_stride(arch):
    view, patch = smallest_sides(arch)
    backbone, before = build_backbone(arch)[0].eval(), []
    for module in backbone.modules():
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d)) and module.stride in (2, (2, 2)):
            module.register_forward_pre_hook(lambda _, images: before.append(images[0].shape[-1]))
    for side, cells, least in (
        (view, 2, None), (view - 1, 1, None), (patch, None, 2), (patch - 1, None, 1)
    ):
        before.clear()
        with torch.no_grad():
            ended = backbone(torch.zeros(1, 3, side, side)).shape[-1]
        assert cells in (None, ended) and least in (None, min(before))


def test_resnet20_matches_its_paper_except_for_projection_shortcuts():
    backbone, _ = cifar_resnet(blocks=3, channels=16, strides=(1, 1, 2, 2))
    layers = [m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sum(layer.kernel_size == (3, 3) for layer in layers) == 19  # and the linear classifier
    weights = sum(layer.weight.numel() for layer in layers if layer.kernel_size == (3, 3))
    assert round(weights / 1e6, 2) == 0.27  # as in the paper's table


def test_checkpoints_of_our_own_runs_are_pretrained_weights(tmp_path):
    trained = Encoder("resnet_tiny", 2, classes=5)
    for key in ("encoder", "model"):  # checkpoint.pth, model.pth
        torch.save({"stage": "x", key: trained.state_dict()}, tmp_path / "own.pth")
        encoder = Encoder("resnet_tiny", 2)
        load_pretrained(encoder, "resnet_tiny", tmp_path / "own.pth")
        for branch in encoder.branches:  # from the first expert
            for ours, theirs in ((encoder.shared, trained.shared), (branch, trained.branches[0])):
                ours, theirs = ours.state_dict(), theirs.state_dict()
                assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    torch.save(dict(args=argparse.Namespace(lr=1)), tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"\(it holds argparse.Namespace, which could run code"):
        load_pretrained(encoder, "resnet_tiny", tmp_path / "code.pth")


def test_pretrained_weights_are_loaded_into_every_expert_or_refused(tmp_path):
    whole = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(whole, tmp_path / "resnet18.pth")
    encoder = Encoder("resnet18", experts=2)
    load_pretrained(encoder, "resnet18", tmp_path / "resnet18.pth")
    state = encoder.state_dict()
    for name, value in whole.items():
        own = name.startswith(("layer3", "layer4"))
        for prefix in ("branches.0.", "branches.1.") if own else ("shared.",):
            assert name.startswith("fc.") or torch.equal(state[prefix + name], value)
    (tmp_path / "text.pth").write_text("no weights")
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "wide.pth")
    torch.save({"layer1.0.conv1.weight": whole["layer1.0.conv1.weight"]}, tmp_path / "part.pth")
    for file in ("resnet50.pth", "text.pth", "part.pth"):
        with pytest.raises(ValueError, match="not a file of resnet18 weights, nor .*IMAGENET1K_V1"):
            load_pretrained(encoder, "resnet18", tmp_path / file)
    with pytest.raises(ValueError, match="'conv1.weight', .* but not .'layer1.0.conv3.weight'"):
        load_pretrained(Encoder("resnet50"), "resnet50", tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match="size mismatch"):
        load_pretrained(Encoder("resnext50_32x4d"), "resnext50_32x4d", tmp_path / "wide.pth")


@pytest.mark.parametrize(
    "key, prefix",
    [
        ("state_dict", "module.encoder_q."),  # MoCo
        ("model", "encoder.module."),  # SupContrast
        ("model", ""),  # torchvision's references
        ("state_dict", "backbone."),  # lightning
    ],
)
def test_weights_are_read_from_the_checkpoints_of_other_programs(key, prefix, tmp_path):
    whole = torchvision.models.resnet18(weights=None).state_dict()
    skipped = ("fc.", "num_batches_tracked")  # torchvision's files have no num_batches_tracked
    renamed = {prefix + name: v for name, v in whole.items() if not any(s in name for s in skipped)}
    others = {"module.encoder_k." + name: torch.zeros_like(v) for name, v in whole.items()}
    others |= {"projector.0.weight": torch.zeros(2, 2)}
    torch.save({key: others | renamed, "epoch": 3}, tmp_path / "a.pth")
    encoder = Encoder("resnet18")
    load_pretrained(encoder, "resnet18", tmp_path / "a.pth")
    assert torch.equal(encoder.shared.conv1.weight, whole["conv1.weight"])
    bn = encoder.branches[0].layer4[1].bn2
    assert torch.equal(bn.running_var, whole["layer4.1.bn2.running_var"])


def test_embeddings_of_every_expert_are_float32_unit_vectors():
    encoder = Encoder("resnet_small", experts=2)
    view, patches = torch.randn(4, 3, 28, 28), torch.randn(5, 4, 3, 12, 12)
    boxes = torch.tensor([2.0, 2.0, 20.0, 20.0]).expand(5, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        z, c, s = encoder(view, boxes, patches)
    assert z.shape == (2, 4, 128) and c.shape == s.shape == (2, 5, 4, 128)
    for rows in (z, c, s):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:-1]))
    assert z.requires_grad and s.requires_grad and not c.requires_grad  # the teacher is constant


def test_experts_share_the_first_stages_and_patches_pass_in_one_batch():
    three, alone = Encoder("resnet_small", experts=3).eval(), Encoder("resnet_small").eval()
    view, patches = torch.randn(4, 3, 28, 28), torch.randn(2, 4, 3, 12, 12)
    boxes, sizes = torch.tensor([2.0, 2.0, 20.0, 20.0]).expand(2, 4, 4), []
    three.shared.register_forward_hook(lambda module, given, out: sizes.append(len(given[0])))
    together = three(view, boxes, patches)
    assert sizes == [4, 8]  # views, then patches
    for j in range(2):  # whose order is kept
        torch.testing.assert_close(three(patches[j])[0], together[2][:, j])
    alone.shared.load_state_dict(three.shared.state_dict())
    for number in range(3):
        alone.branches[0].load_state_dict(three.branches[number].state_dict())
        alone.heads[0].load_state_dict(three.heads[number].state_dict())
        for own, mean in zip(alone(view, boxes, patches), together):
            torch.testing.assert_close(own[0], mean[number])


def test_patches_do_not_change_running_statistics_but_use_the_batch():
    encoder, other = Encoder("resnet_small"), Encoder("resnet_small")
    other.load_state_dict(encoder.state_dict())
    view, patches = torch.randn(4, 3, 28, 28), 3 + torch.randn(5, 4, 3, 12, 12)
    boxes = torch.ones(5, 4, 4)
    encoder(view, boxes, patches)
    other(view)
    for (name, buffer), expected in zip(encoder.named_buffers(), other.buffers()):
        assert torch.equal(buffer, expected), name
    encoder(view)
    assert encoder.shared.bn1.num_batches_tracked == 2
    # In training mode patches are normalised by their batch, so scaling them has no effect.
    one, four = (encoder(view, boxes, scale * patches)[2] for scale in (1, 4))
    torch.testing.assert_close(one, four, atol=1e-3, rtol=0)


def test_regions_are_pooled_at_their_boxes():
    # A ramp as feature map: RoIAlign of a box must give the coordinate of the box's centre, to the
    # pixel; without aligned=True or with a fixed scale it is off by half a cell or more.
    cells, view = 7, 28
    x = (torch.arange(cells) + 0.5) * view / cells
    ramp = torch.stack([x.expand(cells, cells), x[:, None].expand(cells, cells)])
    boxes = [[[4.0, 8.0, 16.0, 24.0], [6.5, 5.0, 14.5, 19.0]], [[3.0, 2.5, 25.0, 25.5]] * 2]
    boxes = torch.tensor(boxes)
    centres = torch.stack([boxes[..., [0, 2]].mean(-1), boxes[..., [1, 3]].mean(-1)], dim=-1)
    torch.testing.assert_close(roi_means(ramp.repeat(2, 1, 1, 1), boxes, view), centres)


def test_moving_average_updates_only_parameters():
    encoder, keys = Encoder("resnet_small"), Encoder("resnet_small").requires_grad_(False)
    before = [p.clone() for p in keys.parameters()]
    encoder(torch.randn(8, 3, 28, 28))
    moving_average(keys, encoder, 0.9)
    for key, old, new in zip(keys.parameters(), before, encoder.parameters()):
        torch.testing.assert_close(key, 0.9 * old + 0.1 * new)
        assert not key.requires_grad
    assert keys.shared.bn1.num_batches_tracked == 0
    assert not keys(torch.randn(8, 3, 28, 28))[0].requires_grad


@pytest.mark.parametrize("size", [0, 1, 5, 8, 100])
def test_queue_holds_the_last_keys_for_any_size_and_any_batch(size):
    queue, put = Queue(size, experts=2, dim=1), []
    for batch in (3, 1, 7, 5, 30, 2):
        keys = torch.arange(len(put), len(put) + batch, dtype=torch.float32)
        queue.put(torch.stack([keys, -keys])[..., None], keys.long() + 1000)
        put += keys.tolist()
        expected = put[-size:] if size else []
        assert sorted(queue.keys[0, :, 0].tolist()) == expected
        assert torch.equal(queue.keys[1], -queue.keys[0])
        assert torch.equal(queue.labels, queue.keys[0, :, 0].long() + 1000)


def test_queue_continues_after_its_state_dict_is_loaded():
    queue, copy, half = (Queue(5, dim=2) for _ in range(3))
    queue.put(torch.randn(1, 7, 2), torch.arange(7))
    copy.load_state_dict(queue.state_dict())
    for q in (queue, copy):
        q.put(torch.ones(1, 2, 2), torch.tensor([70, 71]))
    assert torch.equal(queue.keys, copy.keys) and torch.equal(queue.labels, copy.labels)
    assert sorted(copy.labels.tolist()) == [4, 5, 6, 70, 71]
    half.put(torch.randn(1, 2, 2), torch.arange(2))
    copy.load_state_dict(half.state_dict())
    assert copy.keys.shape == (1, 2, 2)
