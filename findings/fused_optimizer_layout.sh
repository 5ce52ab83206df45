#!/usr/bin/env bash
# torch 2.14.1, CPU. The fused optimizers (SGD, Adam, AdamW and Adagrad with fused=True) read weight,
# gradient and state as flat memory. If a weight is channels_last, and its gradient or its momentum
# holds the same numbers in contiguous layout, each number is applied to another weight. There is no
# error and no warning, and with fused=False the result is right. Autograd gives gradients the layout
# of the weight, but a gradient that was cut from a flat vector has not, nor a state that went
# through a file format without strides.
#
# torch 2.14.1+cu130
# SGD      gradient  error / size of the two steps: fused=False 0.0000, fused=True 1.2088
# SGD      state     error / size of the two steps: fused=False 0.0000, fused=True 0.5726
# Adam     gradient  error / size of the two steps: fused=False 0.0000, fused=True 1.2948
# Adam     state     error / size of the two steps: fused=False 0.0000, fused=True 0.4451
# AdamW    gradient  error / size of the two steps: fused=False 0.0000, fused=True 1.2941
# AdamW    state     error / size of the two steps: fused=False 0.0000, fused=True 0.4451
# Adagrad  gradient  error / size of the two steps: fused=False 0.0000, fused=True 1.1317
# Adagrad  state     error / size of the two steps: fused=False 0.0000, fused=True 0.2334
#
# It hurts whoever trains channels_last networks and changes gradients by hand (averages over
# processes, gradient surgery, clipping of a flat vector), or converts a checkpoint of the optimizer.
# Write with p.grad.copy_(new) instead of p.grad = new, and after loading compare the strides of
# every state tensor with those of its weight.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" - <<'EOF'
import io

import numpy as np
import torch

print("torch", torch.__version__)
kinds = dict(
    SGD=lambda p, fused: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=fused),
    Adam=lambda p, fused: torch.optim.Adam(p, lr=0.1, fused=fused),
    AdamW=lambda p, fused: torch.optim.AdamW(p, lr=0.1, fused=fused),
    Adagrad=lambda p, fused: torch.optim.Adagrad(p, lr=0.1, fused=fused),
)
generator = torch.Generator().manual_seed(0)
weight, first, second = torch.randn(3, 16, 8, 3, 3, generator=generator)
flat = torch.cat([first.reshape(-1), torch.zeros(5)])  # all gradients in one vector, as for a send


def train(kind, fused, how):
    """Two steps on a channels_last weight; the gradients are the same numbers for every `how`."""
    p = torch.nn.Parameter(weight.to(memory_format=torch.channels_last))
    optimizer = kinds[kind]([p], fused)
    p.grad = first.to(memory_format=torch.channels_last)
    if how == "gradient":  # cut from the vector again
        p.grad = flat[: p.numel()].view_as(p)
    optimizer.step()
    if how == "state":  # the optimizer's state goes through an .npy file
        state = optimizer.state_dict()
        for name, value in state["state"][0].items():
            if torch.is_tensor(value) and value.ndim:
                file = io.BytesIO()
                np.save(file, value.numpy().copy("C"))
                file.seek(0)
                restored = torch.from_numpy(np.load(file))
                assert restored.equal(value)
                state["state"][0][name] = restored
        optimizer.load_state_dict(state)
    p.grad = second.to(memory_format=torch.channels_last)
    optimizer.step()
    return p.detach()


for kind in kinds:
    for how in ("gradient", "state"):
        error = {}
        for fused in (False, True):
            right = train(kind, fused, "same layout")
            error[fused] = ((train(kind, fused, how) - right).norm() / (right - weight).norm()).item()
        print(f"{kind:8} {how:9} error / size of the two steps: "
              f"fused=False {error[False]:.4f}, fused=True {error[True]:.4f}")
        assert error[False] < 1e-4 and error[True] > 0.1
EOF
