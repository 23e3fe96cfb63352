"""Measure whether twins are cheaper in lockstep: stacked weights, one pass by `torch.func.vmap`.

M copies of a network take steps of SGD with momentum, each on a batch of its own: one after the
other, as `StabilityTwins` does, and all at once. Rounds alternate; the ratio of the times is told,
and how far the weights are apart after the first step. A ResNet is in evaluation mode: statistics
of a batch cannot be kept under vmap.

    python experiments/benchmarks/lockstep.py
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from mergekit_lit.models.backbones import load_base

Step = Callable[[], None]


def main() -> None:
    """Print a row for each network and batch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["vit", "resnet", "mlp", "head"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--twins", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of one round")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("network  batch   one by one   lockstep / that (quartiles)   apart after a step")
    for name in given.networks:
        for batch in given.batches:
            alone, together, apart = pair(name, batch, given)
            on_device = given.device != "cpu"
            pairs = [
                (seconds(alone, given.steps, on_device), seconds(together, given.steps, on_device))
                for _ in range(given.rounds)
            ]
            low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
            plain = 1000 * statistics.median(a for a, _ in pairs)
            print(
                f"{name:8} {batch:5} {plain:9.1f} ms   {middle:.2f} ({low:.2f} to {high:.2f})"
                f"          {apart:.1e}",
                flush=True,
            )


def pair(name: str, batch: int, given: argparse.Namespace) -> tuple[Step, Step, float]:
    """Return a step of all twins one by one, one in lockstep, and how far apart they end."""
    torch.manual_seed(0)
    network, shape = network_of(name)
    network = network.to(given.device)
    x = torch.randn(given.twins, batch, *shape, device=given.device)
    y = torch.randint(10, (given.twins, batch), device=given.device)
    twins = [copy.deepcopy(network) for _ in range(given.twins)]
    stacked, buffers = stack_module_state(twins)
    weights = {key: tensor.detach().clone().requires_grad_() for key, tensor in stacked.items()}
    optimizers = [sgd(list(twin.parameters())) for twin in twins]
    one = sgd(list(weights.values()))

    def loss(params: dict[str, Tensor], kept: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(network, (params, kept), (x,)), y)

    def alone() -> None:
        for i, (twin, optimizer) in enumerate(zip(twins, optimizers, strict=True)):
            torch.autograd.backward(cross_entropy(twin(x[i]), y[i]))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def together() -> None:
        # Fused attention has no rule for vmap.
        with sdpa_kernel(SDPBackend.MATH):
            torch.autograd.backward(vmap(loss)(weights, buffers, x, y).sum())
        one.step()
        one.zero_grad(set_to_none=True)

    alone()
    together()
    after = [dict(twin.named_parameters()) for twin in twins]
    apart = [
        float((after[i][key] - tensor[i]).detach().abs().max())
        for key, tensor in weights.items()
        for i in range(given.twins)
    ]
    return alone, together, max(apart)


def network_of(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network of 10 classes, and the shape of its input."""
    image = (3, 32, 32)
    if name == "head":
        return nn.Linear(128, 10), (128,)
    if name == "mlp":
        layers = (nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))
        return nn.Sequential(*layers), image
    backbone, _ = load_base(name)
    network = nn.Sequential(backbone, nn.LazyLinear(10)).eval()
    network(torch.zeros(2, *image))
    return network, image


def sgd(parameters: list[nn.Parameter] | list[Tensor]) -> torch.optim.SGD:
    """Return the optimizer that both ways take, in its kernels for many tensors."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, foreach=True)


def seconds(step: Step, steps: int, on_device: bool) -> float:  # noqa: FBT001 - one of two clocks
    """Return the mean time of a step: the processor's, or the wall's where a device works."""
    clock = time.perf_counter if on_device else time.process_time
    start = clock()
    for _ in range(steps):
        step()
    if on_device:
        torch.cuda.synchronize()
    return (clock() - start) / steps


if __name__ == "__main__":
    main()
