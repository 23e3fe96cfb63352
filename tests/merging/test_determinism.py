"""The same seed gives the same bytes: in any process, for any hash seed and number of threads."""

import os
import subprocess
import sys

import pytest

from mergekit_lit.core.registry import MERGE_METHODS

# Tensors above the size from which torch shares one operation among threads.
SCRIPT = """
import sys
import torch
from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.params import content_hash
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging import merge

torch.set_num_threads(int(sys.argv[1]))
draw = torch.Generator().manual_seed(0)
shapes = {"a": (160, 300), "b": (64, 32, 5, 5), "c": (40_000,)}
kinds = {"a": "linear", "b": "convolution", "c": "embedding"}
base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
tuned = [
    {name: x + 0.01 * torch.randn(x.shape, generator=draw) for name, x in base.items()}
    for _ in range(4)
]
axes = {"a": ("units", None), "b": (None,) * 4, "c": (None,)}
structure = {n: TensorInfo(kind, 0, "blocks.0", axes[n]) for n, kind in kinds.items()}
for method in MERGE_METHODS:
    if method.facts["data"] not in ("none", "cards"):
        continue
    count = method.facts.get("experts", (1, None))[1] or 4
    names = [f"task{t}" for t in range(count)]
    cards = [Card(task=name, travel=1.0) for name in names]
    heads = [{} for _ in names]
    experts = Experts(base, tuned[:count], structure, cards, heads, names)
    merged = merge(experts, method.name, veneers=[("equal_norms", {}), ("lines", {})], seed=3)
    models = {task: merged.for_task(task) for task in names}
    print(method.name, *(content_hash(params) for params in models.values()))
"""


def hashes(*, threads: int, hash_seed: str) -> dict[str, list[str]]:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", SCRIPT, str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return {method: rest for method, *rest in lines}


@pytest.mark.slow
def test_every_data_free_method_gives_the_same_bytes_everywhere():
    one = hashes(threads=1, hash_seed="0")
    other = hashes(threads=2, hash_seed="1234")
    data_free = [m.name for m in MERGE_METHODS if m.facts["data"] in ("none", "cards")]
    assert sorted(one) == sorted(data_free)
    assert one == other
