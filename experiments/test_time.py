"""This file shows what AdaMerging's objective does, step by step, beside what labels would do.

    python experiments/test_time.py experiments/methods_embedded8.yaml --backbone vit

Takes the experts of `experiments/methods.py` in `--out`. Everything is on validation images: the
coefficients adapt to them, without labels as the method does to test images, or with them, and the
same images tell what came of it. The first lines are task arithmetic, whose one coefficient is
what the layer-wise ones start from. `--held` holds the features' distance from their mean at the
base, so that no loss can fall by longer features.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from methods import plan_of
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mergekit_lit.core.calibration import Batch, Calibration
from mergekit_lit.core.params import Params
from mergekit_lit.core.tensorfiles import floats
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.calibration import calibration_on
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.merging.methods.test_time import Combination, Draws, descend, mean_entropy
from mergekit_lit.stages.opening import load_base_of

SCALES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)

Loss = Callable[[Tensor, Batch], Tensor]
LOSSES: Mapping[str, Loss] = {
    "entropy": lambda logits, _: mean_entropy(logits),
    "labels": lambda logits, batch: cross_entropy(logits, batch.labels),
}


@dataclass(frozen=True)
class Bench:
    """The experts of some tasks, their validation images, and the features to be held to."""

    combination: Combination
    calibration: Calibration
    whole: Mapping[str, Batch]
    held: Mapping[str, Tensor]

    def logits(self, params: Params, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """Return the logits of a model on a batch of each task."""
        features = self.calibration.merged_features(params, batches)
        features |= {t: as_far(features[t], base) for t, base in self.held.items()}
        return {task: self.calibration.logits(task, features[task]) for task in batches}

    @torch.no_grad()
    def told(self, label: str, params: Params) -> str:
        """Return a line of the table: means over the tasks, and the accuracy of each."""
        logits = self.logits(params, self.whole)
        right = {
            t: float((z.argmax(dim=1) == self.whole[t].labels).double().mean())
            for t, z in logits.items()
        }
        entropy = statistics.fmean(float(mean_entropy(z)) for z in logits.values())
        loss = statistics.fmean(
            float(cross_entropy(z, self.whole[t].labels)) for t, z in logits.items()
        )
        each = " ".join(f"{value:.2f}" for value in right.values())
        mean = statistics.fmean(right.values())
        return f"| {label} | {mean:.3f} | {entropy:.3f} | {loss:.3f} | {each} |"


def main() -> None:
    """Print the course of the descents."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="YAML of experiments/methods.py")
    parser.add_argument("--suite", help="in place of the file's, such as your own folder")
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", help="some of the tasks; all by default")
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--held", action="store_true")
    parser.add_argument("--start", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = open_bench(given)
    print(f"| coefficients | accuracy | entropy | cross-entropy | {' '.join(bench.whole)} |")
    print("|---|---|---|---|---|")
    rows = torch.ones(len(bench.combination.deltas), len(bench.whole), dtype=torch.float64)
    for scale in SCALES:
        print(bench.told(f"{scale:g}", at(bench, scale * rows)), flush=True)
    for name in given.losses:
        follow(bench, name, given.start * rows, given)


def open_bench(given: argparse.Namespace) -> Bench:
    """Load experts and images."""
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(given.file))
    settings |= {"suite": given.suite} if given.suite else {}
    plan = plan_of(settings, given.backbone, given.seed, given.out)
    tasks = given.tasks or plan.tasks
    paths = [plan.out / f"{task}.safetensors" for task in tasks]
    backbone, base = load_base_of(paths, plan.backbone)
    experts = in_memory(load_experts(paths, base=base))
    suite = load_suite(plan.suite)
    calibration = calibration_on(
        {task: suite.task(task).load(plan.split).val for task in tasks},
        experts,
        backbone=backbone,
        split="val",
        batch_norm="recalibrate-per-task",
    )
    whole = {t: s.take(torch.arange(len(s))) for t, s in calibration.samples.items()}
    deltas = {name: experts.deltas(name) for name in experts.merged_names()}
    with torch.no_grad():
        held = calibration.merged_features(experts.base, whole) if given.held else {}
    return Bench(Combination(floats(dict(experts.base)), deltas), calibration, whole, held)


def as_far(features: Tensor, base: Tensor) -> Tensor:
    """Return features (b, d) as far from the base's mean as the base's (n, d) are on average."""
    mean = base.mean(dim=0)
    return mean + normalize(features - mean, dim=1) * (base - mean).norm(dim=1).mean()


def at(bench: Bench, coefficients: Tensor) -> dict[str, Tensor]:
    """Return the whole model at some coefficients."""
    return {**bench.combination.base, **bench.combination.at(coefficients)}


def follow(bench: Bench, name: str, start: Tensor, given: argparse.Namespace) -> None:
    """Descend by a loss, and print what the model is worth now and then."""
    draws = Draws(bench.calibration, list(bench.whole), given.batch, 0)
    taken = 0

    def loss(params: Params) -> Tensor:
        nonlocal taken
        if taken % given.every == 0:
            print(bench.told(f"{name}, {taken} steps", params), flush=True)
        taken += 1
        batches = draws.next()
        logits = bench.logits(params, batches)
        return torch.stack([LOSSES[name](logits[t], batches[t]) for t in batches]).sum()

    # One step more than is told of: the loss is asked for before each.
    descend(bench.combination, start, loss, steps=given.steps + 1, lr=1e-3)


if __name__ == "__main__":
    main()
