"""Encoder, momentum encoder and queue."""

import pytest
import torch

from models import ARCHS, Encoder, MomentumEncoder, Queue, build_backbone, load_pretrained


@pytest.mark.parametrize(
    "arch, size, channels, stride",
    [
        ("resnet_small", 32, None, 4),
        ("resnet18", 64, 512, 32),
        ("resnet50", 64, 2048, 32),
        ("resnext50_32x4d", 64, 2048, 32),
        ("resnet152", 64, 2048, 32),
    ],
)
def test_backbones_end_in_their_last_feature_map_and_start_with_silent_blocks(
    arch, size, channels, stride
):
    backbone, given = build_backbone(arch)
    assert channels in (None, given)
    with torch.no_grad():
        assert backbone.eval()(torch.zeros(1, 3, size, size)).shape == (
            1,
            given,
            size // stride,
            size // stride,
        )
    last = [
        m for name, m in backbone.named_modules() if name.endswith("bn2" if given <= 512 else "bn3")
    ]
    assert last and all(norm.weight.eq(0).all() for norm in last) == (arch != "resnet_small")


def test_pretrained_weights_are_torchvisions_or_refused(tmp_path):
    import torchvision

    whole = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(whole, tmp_path / "resnet18.pth")
    backbone, _ = build_backbone("resnet18")
    load_pretrained(backbone, "resnet18", tmp_path / "resnet18.pth")
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, whole[name])
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"layer1.0.conv1.weight": whole["layer1.0.conv1.weight"]}, tmp_path / "part.pth")
    for file in ("resnet50.pth", "text.pth", "part.pth"):
        with pytest.raises(ValueError, match="no file of resnet18 weights.*IMAGENET1K_V1"):
            load_pretrained(backbone, "resnet18", tmp_path / file)
    with pytest.raises(ValueError, match="Missing key|size mismatch"):
        load_pretrained(build_backbone("resnet50")[0], "resnet50", tmp_path / "resnet18.pth")


def test_an_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="resnet50"):
        build_backbone("vgg16")
    assert "vgg16" not in ARCHS


def test_torchvision_weights_load_into_a_backbone_by_name():
    import torchvision

    whole = torchvision.models.resnet18(weights=None).state_dict()
    backbone, _ = build_backbone("resnet18")
    missing, unexpected = backbone.load_state_dict(whole, strict=False)
    assert not missing and unexpected == ["fc.weight", "fc.bias"]


def test_embeddings_of_views_patches_and_regions_are_float32_unit_vectors():
    encoder = Encoder("resnet_small")
    images, patches = torch.randn(4, 3, 28, 28), torch.randn(5, 4, 3, 12, 12)
    boxes = torch.tensor([2.0, 2.0, 20.0, 20.0]).expand(5, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        embedding, feature_maps, patch = encoder(images, patches)
        roi = encoder.embed_regions(feature_maps, boxes, 28)
    assert embedding.shape == (4, 128) and patch.shape == roi.shape == (5, 4, 128)
    for rows in (embedding, patch, roi):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:-1]))


def test_experts_share_the_first_stages_and_have_the_rest_of_their_own():
    one, three = Encoder("resnet_small"), Encoder("resnet_small", experts=3, width=0.75)
    assert all(name.startswith(("backbone.", "head.")) for name in one.state_dict())
    images, patches = torch.randn(4, 3, 28, 28), torch.randn(2, 4, 3, 12, 12)
    calls = []
    three.backbone.layer2.register_forward_hook(lambda *inputs: calls.append(None))
    embedding, feature_maps, patch = three.eval()(images, patches)
    assert len(calls) == 2 and embedding.shape == (4, 3 * 128) and patch.shape == (2, 4, 3 * 128)
    assert [maps.shape for maps in feature_maps] == [(4, 96, 7, 7)] * 3  # three quarters of 128
    alone = Encoder("resnet_small", width=0.75).eval()
    own = alone.state_dict().keys()
    for number, expert in enumerate(three.experts, 1):
        state = {name: value for name, value in three.state_dict().items() if name in own}
        layers = {
            f"backbone.{name}": value for name, value in expert["layers"].state_dict().items()
        }
        head = {f"head.{name}": value for name, value in expert["head"].state_dict().items()}
        alone.load_state_dict(state | layers | head)
        torch.testing.assert_close(alone(images)[0], embedding.chunk(3, dim=1)[number])
    boxes = torch.tensor([2.0, 2.0, 20.0, 20.0]).expand(2, 4, 4)
    regions = three.embed_regions(feature_maps, boxes, 28).chunk(3, dim=2)[2]
    torch.testing.assert_close(alone.embed_regions(feature_maps[2:], boxes, 28), regions)


@pytest.mark.parametrize("arch, channels", [("resnet18", 384), ("resnet50", 1536)])
def test_the_width_narrows_what_experts_have_of_their_own(arch, channels):
    narrow, given = build_backbone(arch, 0.75)
    whole, _ = build_backbone(arch)
    assert given == channels and narrow(torch.zeros(2, 3, 64, 64)).shape == (2, channels, 2, 2)
    shapes = {name: value.shape for name, value in whole.state_dict().items()}
    differ = {name for name, value in narrow.state_dict().items() if value.shape != shapes[name]}
    assert differ and all(name.startswith(("layer3.", "layer4.")) for name in differ)
    last = [m for name, m in narrow.named_modules() if name.endswith(("bn2", "bn3"))][-1]
    assert last.weight.eq(0).all()


def test_all_patches_go_through_the_backbone_in_one_pass_and_keep_their_places():
    encoder = Encoder("resnet_small").eval()
    sizes = []
    encoder.backbone.layer3.register_forward_hook(
        lambda module, inputs, output: sizes.append(len(inputs[0]))
    )
    images, patches = torch.randn(4, 3, 28, 28), torch.randn(5, 4, 3, 12, 12)
    _, _, together = encoder(images, patches)
    assert sizes == [4, 20]
    for j in range(5):
        torch.testing.assert_close(encoder(patches[j])[0], together[j])


def test_patches_leave_the_running_statistics_alone_and_still_use_the_batch():
    encoder, other = Encoder("resnet_small"), Encoder("resnet_small")
    other.load_state_dict(encoder.state_dict())
    images, patches = torch.randn(4, 3, 28, 28), 3 + torch.randn(5, 4, 3, 12, 12)
    encoder(images, patches)
    other(images)
    for (name, buffer), expected in zip(encoder.named_buffers(), other.buffers()):
        assert torch.equal(buffer, expected), name
    encoder(images)
    assert encoder.backbone.bn1.num_batches_tracked == 2
    # In training mode a patch pass has statistics of its own: the scale of all patches vanishes.
    torch.testing.assert_close(
        encoder(images, patches)[2], encoder(images, 4 * patches)[2], atol=1e-3, rtol=0
    )


def test_a_region_is_where_its_box_is():
    # A ramp as feature map: RoIAlign of a box must give the coordinate of the box's centre, to the
    # pixel; without aligned=True or with a fixed scale it is off by half a cell or more.
    encoder = Encoder("resnet_small")
    encoder.head = torch.nn.Identity()
    cells, view = 7, 28
    x = (torch.arange(cells) + 0.5) * view / cells
    ramp = torch.stack([x.expand(cells, cells), x[:, None].expand(cells, cells)])[None].repeat(
        2, 1, 1, 1
    )
    boxes = torch.tensor(
        [[[4.0, 8.0, 16.0, 24.0], [6.5, 5.0, 14.5, 19.0]], [[3.0, 2.5, 25.0, 25.5]] * 2]
    )
    centres = torch.stack([boxes[..., [0, 2]].mean(-1), boxes[..., [1, 3]].mean(-1)], dim=-1)
    torch.testing.assert_close(encoder.embed_regions([ramp], boxes, view), centres)


def test_momentum_encoder_averages_parameters_and_keeps_its_own_statistics():
    encoder = Encoder("resnet_small")
    momentum = MomentumEncoder(encoder, 0.9)
    before = [p.clone() for p in momentum.encoder.parameters()]
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    encoder(torch.randn(8, 3, 28, 28))
    momentum.update(encoder)
    for key, old, new in zip(momentum.encoder.parameters(), before, encoder.parameters()):
        torch.testing.assert_close(key, 0.9 * old + 0.1 * new)
        assert not key.requires_grad
    assert momentum.encoder.backbone.bn1.num_batches_tracked == 0
    assert not momentum(torch.randn(8, 3, 28, 28)).requires_grad
    assert momentum.encoder.backbone.bn1.num_batches_tracked == 1
    assert encoder.backbone.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("size", [0, 1, 5, 8, 100])
def test_queue_holds_the_last_keys_for_any_size_and_any_batch(size):
    queue, put = Queue(size, 1), []
    for batch in (3, 1, 7, 5, 30, 2):
        keys = torch.arange(len(put), len(put) + batch, dtype=torch.float32)[:, None]
        queue.put(keys, keys[:, 0].long() + 1000)
        put += keys[:, 0].tolist()
        expected = put[-size:] if size else []
        assert sorted(queue.keys[:, 0].tolist()) == expected
        assert torch.equal(queue.labels, queue.keys[:, 0].long() + 1000)


def test_queue_goes_on_after_its_state_dict_is_loaded():
    queue, copy = Queue(5, 2), Queue(5, 2)
    queue.put(torch.randn(7, 2), torch.arange(7))
    copy.load_state_dict(queue.state_dict())
    for q in (queue, copy):
        q.put(torch.ones(2, 2), torch.tensor([70, 71]))
    assert torch.equal(queue.keys, copy.keys) and torch.equal(queue.labels, copy.labels)
    assert sorted(copy.labels.tolist()) == [4, 5, 6, 70, 71]
    half = Queue(5, 2)
    half.put(torch.randn(2, 2), torch.arange(2))
    copy.load_state_dict(half.state_dict())
    assert len(copy.keys) == 2
