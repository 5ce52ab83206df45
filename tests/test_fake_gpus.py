"""Both stages on eight GPUs that do not exist: tensors without data carry shape, type and device.

An operation on tensors of two devices, or one that makes the host wait for a value, raises.
"""

import argparse

import benchmark
import numpy as np
import pytest
import torch
import torch.distributed as dist

import data
import eval as stage2
import train
from models import Encoder, Queue

fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")
fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
GPU = torch.device("cuda", 0)


@pytest.fixture
def eight_gpus(monkeypatch):
    # A generator and pinned memory need a real GPU. The host knows the order of the keys.
    unseeded = argparse.Namespace(manual_seed=lambda seed: None)
    monkeypatch.setattr(torch, "Generator", lambda device=None: unseeded)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    order = argparse.Namespace(numpy=lambda: np.random.default_rng(0).permutation(256))
    monkeypatch.setattr(torch, "randperm", lambda count, generator: order)
    data.constant.cache_clear()
    dist.init_process_group("fake", rank=1, world_size=8, store=fake_pg.FakeStore())
    try:
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=False):
            try:
                torch.empty(1, device=GPU).uniform_()
            except RuntimeError:
                pytest.skip("this version of torch asks for a GPU, also for fake tensors")
            yield
    finally:
        dist.destroy_process_group()
        data.constant.cache_clear()


def on_gpu(*shape, high=None):
    if high:
        return torch.randint(high, shape, device=GPU)
    return torch.randint(255, shape, dtype=torch.uint8, device=GPU)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_step_of_imagenet_lt_stays_on_the_gpu_and_never_waits(eight_gpus):
    args = benchmark.train_args("imagenet_lt", batch_size=256)
    with torch.device(GPU):
        encoder, key_encoder = Encoder(args.arch), Encoder(args.arch).requires_grad_(False)
        queue = Queue(args.queue_size)
    queue.written = args.queue_size  # it is full
    batch = train.ShuffledBatch(args, 0, slice(32, 64), GPU)
    images, labels = (on_gpu(32, 3, 224, 224), on_gpu(32, 3, 224, 224)), on_gpu(32, high=1000)
    values = train.dscl_pbsd_step(encoder, key_encoder, queue, images, labels, batch, args)
    assert {name: value.device for name, value in values.items()} == dict.fromkeys(values, GPU)
    assert values.keys() == {"loss", "dscl", "pbsd"} and values["loss"].requires_grad
    assert batch.key_positions.device == queue.keys.device == GPU and queue.written == 65536 + 256
    gradient = train._GatherQueries.backward(None, torch.ones(1, 256, 128, device=GPU))
    assert gradient.shape == (1, 32, 128) and gradient.device == GPU
    with pytest.raises(RuntimeError, match="cpu and cuda:0|cuda:0, cpu"):
        train.dscl_pbsd_step(encoder, key_encoder, queue, images, labels.cpu(), batch, args)
    with pytest.raises(Exception, match="_local_scalar_dense"):
        values["loss"].item()


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_features_and_predictions_of_stage_2_stay_on_the_gpu(eight_gpus, monkeypatch):
    stage1 = benchmark.train_args("imagenet_lt")
    with torch.device(GPU):
        encoder = Encoder(stage1.arch, classes=1000)
    batches = [(on_gpu(1, 128, 3, 224, 224), None)] * 2
    monkeypatch.setattr(stage2, "evaluation_loader", lambda *_: batches)
    given = encoder, range(8 * 256), argparse.Namespace(amp="off"), stage1, (1, 8, GPU)
    features = stage2.split_features(*given)
    assert features.shape == (1, 2048, 2048) and features.device == GPU
    logits = stage2.Classifier.of(encoder.heads).logits(features)
    assert logits.shape == (2, 2048, 1000) and logits.device.type == "cpu"


def test_costs_of_a_step_hardly_grow_with_the_number_of_gpus():
    try:
        few, many = benchmark.costs_of(8), benchmark.costs_of(512)
    except fake_tensor.UnsupportedOperatorException:
        pytest.skip("this version of torch has no fake all_to_all_single")
    assert many.products < 1.15 * few.products and many.largest == few.largest
    # At most queries, keys and gradients of all [16384, 128], the rank's images, and labels.
    assert few.received < many.received < 3 * 16384 * 128 * 4 + 32 * 3 * 224**2 + 16384 * 8
