"""The same seed gives the same bytes: in any process, for any hash seed and number of threads."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from mergekit_lit.core.calibration import Batch, Calibration
from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.params import content_hash
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging import merge
from mergekit_lit.models.capture import network

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
    other = hashes(threads=3, hash_seed="1234")
    data_free = [m.name for m in MERGE_METHODS if m.facts["data"] in ("none", "cards")]
    assert sorted(one) == sorted(data_free)
    assert one == other


class Net(nn.Module):
    """A network whose passes torch shares among threads."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.conv = nn.Conv2d(32, 48, 3, stride=2)
        self.fc = nn.Linear(48, 24)

    def forward(self, x):
        x = self.conv(self.norm(self.stem(x)).relu()).relu()
        return self.fc(x.mean(dim=(2, 3)))


STRUCTURE = {
    "stem.weight": TensorInfo("convolution", 0, "stem", ("stem", None, None, None)),
    "stem.bias": TensorInfo("convolution", 0, "stem", ("stem",)),
    "norm.weight": TensorInfo("norm", 0, "stem", ("stem",)),
    "norm.bias": TensorInfo("norm", 0, "stem", ("stem",)),
    "norm.running_mean": TensorInfo("statistic", 0, "stem", ("stem",)),
    "norm.running_var": TensorInfo("statistic", 0, "stem", ("stem",)),
    "norm.num_batches_tracked": TensorInfo("counter", 0, "stem"),
    "conv.weight": TensorInfo("convolution", 1, "conv", ("inner", "stem", None, None)),
    "conv.bias": TensorInfo("convolution", 1, "conv", ("inner",)),
    "fc.weight": TensorInfo("linear", 2, "fc", ("features", "inner")),
    "fc.bias": TensorInfo("linear", 2, "fc", ("features",)),
}
HEAD = torch.randn(5, 24, generator=torch.Generator().manual_seed(7))
QUICK = {"adamerging": {"steps": 5}, "surgery": {"steps": 5}, "fisher": {"samples": 8}}


class Noise:
    """Sixty-four random images of one task."""

    def __init__(self, seed):
        self.x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.x)

    def take(self, positions):
        return Batch(self.x[positions], positions % 5)


@pytest.fixture(scope="module")
def experts() -> Experts:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = [Net().state_dict() for _ in range(3)]
    base, *others = models
    tuned = [{n: x + (0.2 * (m[n] - x)).to(x.dtype) for n, x in base.items()} for m in others]
    cards = [Card(task=name, travel=1.0) for name in "ab"]
    return Experts(base, tuned, STRUCTURE, cards, [{}, {}], ["a", "b"])


def looked(method: str, experts: Experts, *, batch_statistics: bool) -> list[str]:
    entry = MERGE_METHODS.get(method)
    calibration = Calibration(
        split=entry.facts["data"],
        samples={"a": Noise(1), "b": Noise(2)},
        expert=network(Net()),
        merged=network(Net(), batch_statistics=batch_statistics),
        logits=lambda _, features: features @ HEAD.T,
    )
    merged = merge(experts, method, config=QUICK.get(method), calibration=calibration)
    tensors = [merged.for_task(task) for task in merged.tasks]
    return [content_hash(params) for params in (*tensors, *merged.adapters.values())]


@pytest.mark.slow
@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize(
    "method", [m.name for m in MERGE_METHODS if m.facts["data"] not in ("none", "cards")]
)
def test_every_method_that_looks_at_images_gives_the_same_bytes(
    experts, method, batch_statistics, threads
):
    found = []
    for count in (1, 3, 4):
        with threads(count):
            found.append(looked(method, experts, batch_statistics=batch_statistics))
            assert torch.get_num_threads() == count
    assert found[0] == found[1] == found[2]
