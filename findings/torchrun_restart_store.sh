#!/usr/bin/env bash
# torch 2.14.1, CPU. When torchrun restarts failed processes (--max-restarts), the new ones get the
# store of the old ones, with all keys in it and without a prefix for the attempt: counters go on from
# where they were, and init_process_group("gloo") finds the addresses of processes that are dead. A
# process that is there first may take them for those of the others. When we let one process start
# 8 to 12 seconds later than the other, some restarts worked, and some failed with "Connection
# refused" from the port of the dead process. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 the store is new.
#
# c10d: attempt 0: place 1, addresses found 0
# c10d: attempt 0: place 2, addresses found 0
# c10d: attempt 1: place 3, addresses found 2
# c10d: attempt 1: place 4, addresses found 2
# no flags: attempt 0: place 1, addresses found 0
# no flags: attempt 0: place 2, addresses found 0
# no flags: attempt 1: place 3, addresses found 2
# no flags: attempt 1: place 4, addresses found 2
# c10d, store not shared: attempt 0: place 1, addresses found 0
# c10d, store not shared: attempt 0: place 2, addresses found 0
# c10d, store not shared: attempt 1: place 1, addresses found 0
# c10d, store not shared: attempt 1: place 2, addresses found 0
#
# It hurts whoever counts arrivals in the store, as a barrier or to choose one process for a download:
# after a restart the barrier is open at once, and nobody is first. It hurts restarts in which the
# processes start at different times. Set that variable for torchrun, and put
# TORCHELASTIC_RESTART_COUNT into the names of your own keys.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export TMPDIR="$tmp"  # torchrun leaves its log folders there
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6

cat > "$tmp/train.py" <<'EOF'
import os
import sys

import torch.distributed as dist

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
store, rank, world = next(dist.rendezvous("env://"))  # the store that init_process_group uses
addresses = sum(key.startswith("default_pg") for key in store.list_keys()) if attempt else 0
place = store.add("arrived", 1)  # the first to arrive would prepare something for the others
print(f"attempt {attempt}: place {place}, addresses found {addresses}", flush=True)
store.set(f"printed {attempt} {rank}", "yes")
store.wait([f"printed {attempt} {other}" for other in range(world)])
if attempt == 0:
    dist.init_process_group("gloo")  # it writes the address of every process into the store
    dist.barrier()
    sys.exit(3 if rank == 1 else 0)  # one process fails, and torchrun starts both again
EOF

start() {  # start TITLE PLACES ADDRESSES FLAG...: run train.py, check what the second attempt finds
    OMP_NUM_THREADS=1 "$tmp/venv/bin/torchrun" --nproc_per_node=2 --max-restarts=1 "${@:4}" \
        "$tmp/train.py" > "$tmp/out" 2> "$tmp/err"
    grep -oE 'attempt [01]: place [0-9]+, addresses found [0-9]+' "$tmp/out" | sort > "$tmp/seen"
    sed "s/^/$1: /" "$tmp/seen"
    printf 'attempt %d: place %d, addresses found %d\n' 0 1 0 0 2 0 1 "${2%-*}" "$3" \
        1 "${2#*-}" "$3" | diff - "$tmp/seen"
}

c10d="--rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0"
start "c10d" 3-4 2 $c10d
start "no flags" 3-4 2
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
start "c10d, store not shared" 1-2 0 $c10d
