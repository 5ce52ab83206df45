#!/usr/bin/env bash
# torch 2.14.1. A job that is to end gets SIGTERM, from Slurm in all its processes, and a training
# script often has a handler that sets a flag, so that the loop saves a checkpoint and stops. With
# num_workers > 0 the workers end at once, and torch's handler of SIGCHLD then raises RuntimeError in
# the main process, between any two lines of Python that run at the moment: not when the next batch is
# asked for, but in the middle of writing the checkpoint, say, which no line there can raise.
#
# torch 2.14.1
# 0 workers: asked to stop True, 100 of 100 parts written
# 1 workers: asked to stop True, fewer than 100 of 100 parts written, RuntimeError in write_checkpoint:
#            DataLoader worker is killed by signal: Terminated.
#
# It hurts runs on clusters that preempt jobs: the checkpoint that SIGTERM asks for is missing, or half
# of it. Let forked workers ignore SIGTERM (worker_init_fn), and kill them when the process exits,
# since multiprocessing ends them by the same signal; and write to a new file, which then replaces
# the old one.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
cat > "$tmp/run.py" <<'EOF'
import os
import signal
import subprocess
import sys
import time
import traceback

import torch
from torch.utils.data import DataLoader, TensorDataset

workers, asked, parts = int(sys.argv[1]), [], []


def write_checkpoint():
    for part in range(100):
        time.sleep(0.02)
        parts.append(part)


how = dict(multiprocessing_context="fork") if workers else {}
os.setsid()  # a job of its own: this process and its workers
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
batches = iter(DataLoader(TensorDataset(torch.arange(1000)), num_workers=workers, **how))
next(batches)
kill = f"sleep 0.5; kill -s TERM -- -{os.getpgid(0)}"  # from elsewhere, as a scheduler does
subprocess.Popen(["sh", "-c", kill], start_new_session=True)
error = None
try:
    write_checkpoint()
except RuntimeError as raised:
    error = raised
print(f"{workers} workers: asked to stop {bool(asked)}, "
      f"{'100' if len(parts) == 100 else 'fewer than 100'} of 100 parts written", end="")
if error:
    frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert "write_checkpoint" in frames, frames
    what, rest = str(error).split(" (pid ")  # DataLoader worker (pid 123) is killed by ...
    print(", RuntimeError in write_checkpoint:")
    print(f"{'':11}{what} {rest.partition(')')[2].strip()}")
else:
    print()
assert asked and (len(parts) == 100) == (workers == 0) == (error is None)
EOF
"$tmp/venv/bin/python" -c "import torch; print('torch', torch.__version__.partition('+')[0])"
for workers in 0 1; do OMP_NUM_THREADS=1 "$tmp/venv/bin/python" -W ignore "$tmp/run.py" $workers; done
