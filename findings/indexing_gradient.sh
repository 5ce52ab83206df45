#!/usr/bin/env bash
# torch 2.14.1, CPU. The gradient of table[labels], and of torch.nn.functional.embedding, adds the
# gradients of the look-ups one by one in the type of the table. In bfloat16 such a sum of ones stops
# at 256, in float16 at 2048. index_select, gather and a product with one_hot give the same output,
# and add in float32: their gradient is right. So it is the frequent classes whose gradient is cut.
#
# torch 2.14.1+cu130
# float32  table[labels]                 [4000.0, 1000.0, 250.0, 16.0, 1.0]
# float32  embedding(labels, table)      [4000.0, 1000.0, 250.0, 16.0, 1.0]
# float32  table.index_select(0, labels) [4000.0, 1000.0, 250.0, 16.0, 1.0]
# float32  table.gather(...)             [4000.0, 1000.0, 250.0, 16.0, 1.0]
# float32  one_hot(labels) @ table       [4000.0, 1000.0, 250.0, 16.0, 1.0]
# bfloat16 table[labels]                 [256.0, 256.0, 250.0, 16.0, 1.0]
# bfloat16 embedding(labels, table)      [256.0, 256.0, 250.0, 16.0, 1.0]
# bfloat16 table.index_select(0, labels) [4000.0, 1000.0, 250.0, 16.0, 1.0]
# bfloat16 table.gather(...)             [4000.0, 1000.0, 250.0, 16.0, 1.0]
# bfloat16 one_hot(labels) @ table       [4000.0, 1000.0, 250.0, 16.0, 1.0]
# float16  table[labels]                 [2048.0, 1000.0, 250.0, 16.0, 1.0]
# float16  embedding(labels, table)      [2048.0, 1000.0, 250.0, 16.0, 1.0]
# float16  table.index_select(0, labels) [4000.0, 1000.0, 250.0, 16.0, 1.0]
# float16  table.gather(...)             [4000.0, 1000.0, 250.0, 16.0, 1.0]
# float16  one_hot(labels) @ table       [4000.0, 1000.0, 250.0, 16.0, 1.0]
#
# It hurts learned tables with a row for each class (prototypes, margins, offsets of the logits) in
# half precision: class 0 has four times the images of class 1, and gets the same gradient. Write
# table.index_select(0, labels), or look up in a float32 copy.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" - <<'EOF'
import torch
from torch.nn.functional import embedding, one_hot

print("torch", torch.__version__)
counts = torch.tensor([4000, 1000, 250, 16, 1])  # images of each class in the batch, or pixels
labels = torch.arange(5).repeat_interleave(counts)
ways = {
    "table[labels]": lambda table: table[labels],
    "embedding(labels, table)": lambda table: embedding(labels, table),
    "table.index_select(0, labels)": lambda table: table.index_select(0, labels),
    "table.gather(...)": lambda table: table.gather(0, labels[:, None].expand(-1, 8)),
    "one_hot(labels) @ table": lambda table: one_hot(labels, 5).to(table.dtype) @ table,
}
largest = {torch.float32: 2**24, torch.bfloat16: 2**8, torch.float16: 2**11}
for dtype, limit in largest.items():
    for name, look_up in ways.items():
        table = torch.zeros(5, 8, dtype=dtype, requires_grad=True)
        look_up(table).sum().backward()  # the gradient of a row is the number of its look-ups
        gradient = table.grad[:, 0].float()
        print(f"{str(dtype)[6:]:8} {name:29} {gradient.tolist()}")
        saturates = name in ("table[labels]", "embedding(labels, table)")
        expected = counts.clamp(max=limit).float() if saturates else counts.to(dtype).float()
        assert gradient.equal(expected), expected
EOF
