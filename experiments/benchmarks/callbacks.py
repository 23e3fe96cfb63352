"""Measure what the training callbacks cost: ResNet-18, 32 px, one thread, processor time.

Runs without and with a callback alternate. Two figures each: the time inside the callback as a
share of a plain step (steady on a busy machine), and the ratio of whole steps (everything, but
noisy there). Clipping is by norm where it is on.

    python experiments/benchmarks/callbacks.py
"""

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mergekit_lit.callbacks import GradientNoise, GradientNorm, PathLength

WARM_UP = 2
# Which methods of each callback do its work while training.
WORK = {
    "GradientNorm": ("_norms", "_record", "on_train_batch_end"),
    "PathLength": ("_add_step", "on_train_batch_end"),
    "GradientNoise": ("on_train_batch_start",),
}


class ResNet(LightningModule):
    """ResNet-18 with a linear head, trained by SGD with momentum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = timm.create_model("resnet18", num_classes=0)
        self.head = nn.Linear(512, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the cross-entropy of one batch."""
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.backbone(x)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Steps(Callback):
    """Takes the processor time at the start of every step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Note the time."""
        self.at.append(time.process_time())

    def seconds(self) -> float:
        """Return the median step."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.at[WARM_UP:]))


def main() -> None:
    """Print the cost of each callback."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10, help="steps of one run")
    parser.add_argument("--rounds", type=int, default=5, help="runs without and with, in turn")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    sizes = {"steps": arguments.steps, "batch": arguments.batch}
    settings: list[tuple[str, Callable[[], Callback], float | None]] = [
        ("GradientNorm", GradientNorm, None),
        ("GradientNorm, clipping", GradientNorm, 0.1),
        ("PathLength", PathLength, None),
        ("GradientNoise, 1 in 50", GradientNoise, None),
    ]
    print(f"ResNet-18, 32 px, batch {arguments.batch}, 1 thread, {arguments.rounds} rounds")
    print(
        "callback                 plain step   inside the callback      whole step, with / without"
    )
    for title, make, clip in settings:
        rounds = [measure(make(), clip=clip, **sizes) for _ in range(arguments.rounds)]
        print(f"{title:24} {row(*zip(*rounds, strict=True))}", flush=True)


def measure(
    callback: Callback, *, clip: float | None, steps: int, batch: int
) -> tuple[float, float, float]:
    """Return seconds: of a plain step, inside the callback a step, of a watched step."""
    plain, _ = run(None, clip=clip, steps=steps, batch=batch)
    watched, inside = run(callback, clip=clip, steps=steps, batch=batch)
    if isinstance(callback, GradientNoise):
        # In the long run one estimate in `every` steps; the steps between are plain.
        share = inside / (callback.card_facts()["noise_estimates"] or 1) / callback.every
        return plain, share, plain + share
    return plain, inside / steps, watched


def run(
    callback: Callback | None, *, clip: float | None, steps: int, batch: int
) -> tuple[float, float]:
    """Train; return the seconds of a step and all seconds inside the callback."""
    clock, spent = Steps(), [0.0]
    for name in WORK[type(callback).__name__] if callback else ():
        setattr(callback, name, timed(getattr(callback, name), spent))
    trainer = Trainer(
        callbacks=[clock, *([callback] if callback else [])],
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        gradient_clip_val=clip,
        log_every_n_steps=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(4 * batch, 3, 32, 32, generator=draw), torch.arange(4 * batch) % 10
    trainer.fit(ResNet(), DataLoader(TensorDataset(x, y), batch_size=batch))
    return clock.seconds(), spent[0]


def timed(method: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """Return the method, its processor time added to `spent`."""

    def work(*arguments: Any) -> Any:
        start = time.process_time()
        result = method(*arguments)
        spent[0] += time.process_time() - start
        return result

    return work


def row(plain: tuple[float, ...], inside: tuple[float, ...], watched: tuple[float, ...]) -> str:
    """Return the plain step in ms, and share and ratio as medians with quartiles."""
    step = statistics.median(plain)
    shares = statistics.quantiles([part / step for part in inside], n=4)
    ratios = statistics.quantiles([b / a for a, b in zip(plain, watched, strict=True)], n=4)
    share = f"{shares[1]:.2%} ({shares[0]:.2%} to {shares[2]:.2%})"
    ratio = f"{ratios[1]:.3f} ({ratios[0]:.3f} to {ratios[2]:.3f})"
    return f"{1000 * step:7.0f} ms   {share:25} {ratio}"


if __name__ == "__main__":
    main()
