"""Measure whether networks are trained faster in lockstep: stacked weights, one pass for all.

M copies of a network take steps of SGD with momentum, each on a batch of its own, one after the
other and all at once (`lit.stacking`). Rounds alternate; the ratio of the times is told, and how
far the weights are apart after the first step. `--trainings` measures whole trainings instead, with
Lightning, callbacks and logs, as `mergekit-lit sweep --lockstep auto` does.

    python experiments/benchmarks/lockstep.py
    python experiments/benchmarks/lockstep.py --trainings --networks resnet vit
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.lockstep import Pace, Together, in_lockstep
from mergekit_lit.lit.stacking import stacked_losses
from mergekit_lit.models.backbones import load_base
from mergekit_lit.stages.train import train_expert

Step = Callable[[], None]

# Enough for all rounds that `Pace` times, and for the gradient-noise estimates between them.
_STEPS = 40
_IMAGES = 256


def main() -> None:
    """Print a row for each network and batch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["vit", "resnet", "mlp", "head"])
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 8, 32])
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="of passes; trainings take 5")
    parser.add_argument("--image_size", type=int, default=32, help="in pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trainings", action="store_true", help="measure whole trainings")
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure = trainings if given.trainings else passes
    for name in given.networks:
        for batch in given.batches:
            told = f"{name:26} {given.image_size} px, batch {batch:3}, {given.members} members"
            print(f"{told}: {measure(name, batch, given)}", flush=True)


def trainings(name: str, batch: int, given: argparse.Namespace) -> str:
    """Return what a step of all trainings takes, both ways."""
    on_gpu = given.device != "cpu"
    pace = Pace(on_gpu=on_gpu)
    data = TaskDataModule("embedded8", "mnist", batch=batch, n=_IMAGES, val_share=0.01)
    data.setup()
    with tempfile.TemporaryDirectory() as folder:

        def train(seed: int, together: Together) -> None:
            model = ExpertModule(
                name, image_size=given.image_size, lr=1e-3, schedule="constant", seed=seed
            )
            model.together = together
            own = TaskDataModule("embedded8", "mnist", batch=batch)
            own.task_data = data.task_data
            where = {"accelerator": "gpu" if on_gpu else "cpu", "devices": 1}
            train_expert(
                data=own, model=model, steps=[_STEPS], out=Path(folder) / str(seed), trainer=where
            )

        for error in in_lockstep([partial(train, seed) for seed in range(given.members)], pace):
            if error is not None:
                raise error
    pairs = zip(pace.alone_s, pace.together_s, strict=True)
    return row(pace.alone_s, [together / alone for alone, together in pairs])


def passes(name: str, batch: int, given: argparse.Namespace) -> str:
    """Return what a bare step of all networks takes, both ways, and how far they end apart."""
    alone, together, apart = pair(name, batch, given)
    pairs = [(seconds(alone, given), seconds(together, given)) for _ in range(given.rounds)]
    ratios = [other / one for one, other in pairs]
    return f"{row([one for one, _ in pairs], ratios)}, {apart:.1e} apart after a step"


def row(alone: list[float], ratios: list[float]) -> str:
    """Return a median time, and the median and quartiles of ratios."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    plain = 1000 * statistics.median(alone)
    return f"{plain:7.1f} ms one by one, lockstep / that {middle:.2f} ({low:.2f} to {high:.2f})"


def pair(name: str, batch: int, given: argparse.Namespace) -> tuple[Step, Step, float]:
    """Return a step of all networks one by one, one in lockstep, and how far apart they end."""
    torch.manual_seed(0)
    network, shape = network_of(name, given.image_size)
    network = network.to(given.device).train()
    x = torch.randn(given.members, batch, *shape, device=given.device)
    y = torch.randint(10, (given.members, batch), device=given.device)
    apart = [copy.deepcopy(network) for _ in range(given.members)]
    stacked = [copy.deepcopy(network) for _ in range(given.members)]
    optimizers = {each: sgd(each) for each in (*apart, *stacked)}

    def move(each: nn.Module, loss: torch.Tensor) -> None:
        torch.autograd.backward(loss)
        optimizers[each].step()
        optimizers[each].zero_grad(set_to_none=True)

    def alone() -> None:
        for each, images, labels in zip(apart, x, y, strict=True):
            move(each, cross_entropy(each(images), labels))

    def together() -> None:
        for each, loss in zip(stacked, stacked_losses(stacked, x, y), strict=True):
            move(each, loss)

    alone()
    together()
    gaps = [
        float((one - other).detach().abs().max())
        for first, second in zip(apart, stacked, strict=True)
        for one, other in zip(first.parameters(), second.parameters(), strict=True)
    ]
    return alone, together, max(gaps)


def network_of(name: str, size: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network of 10 classes, and the shape of its input."""
    image = (3, size, size)
    if name == "head":
        return nn.Linear(128, 10), (128,)
    if name == "mlp":
        layers = (nn.Flatten(), nn.Linear(3 * size**2, 64), nn.ReLU(), nn.Linear(64, 10))
        return nn.Sequential(*layers), image
    backbone, _ = load_base(name, image_size=size)
    return nn.Sequential(backbone, nn.Linear(backbone.features, 10)), image


def sgd(network: nn.Module) -> torch.optim.SGD:
    """Return the optimizer that both ways take, in its kernels for many tensors."""
    return torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, foreach=True)


def seconds(step: Step, given: argparse.Namespace) -> float:
    """Return the time of a step: the processor's, or the wall's where a device works."""
    on_device = given.device != "cpu"
    clock = time.perf_counter if on_device else time.process_time
    start = clock()
    step()
    if on_device:
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
