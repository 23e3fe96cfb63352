"""This file shows what methods reach over their own parameters, beside task arithmetic, on val.

    python experiments/settings.py experiments/methods_embedded8.yaml --backbone vit
    python experiments/settings.py experiments/methods_embedded8.yaml --backbone resnet \
        --rows ties tsv_m regmean regmean_plus_plus --exclude conv1.weight

Takes the experts of `experiments/methods.py` in `--out`. Every method is tried with each of the
values below and a grid of scales; a line tells the best by mean normalised accuracy, and how far it
is from the best task arithmetic, with the standard error of that difference over the images. What
looks at training images has no scale, and is tried with its whole step made longer (`length`).
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from methods import plan_of
from omegaconf import OmegaConf

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.experts import Merged
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.recalibration import (
    CALIBRATION_IMAGES,
    calibration_images,
    images_by_split,
    recalibrate,
    splits_needed,
)
from mergekit_lit.merging.engine import merge_many
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.merging.patterns import select
from mergekit_lit.search.stations import Plan
from mergekit_lit.search.tuning.objective import Answers, objective_of
from mergekit_lit.search.tuning.scores import Scorer, expert_rows
from mergekit_lit.stages.opening import load_base_of
from mergekit_lit.stages.recipes import Recipe, merge_recipe

SPACES: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "task_arithmetic": {"scale": (0.05, 0.105, 0.15, 0.195, 0.25, 0.3, 0.37, 0.45, 0.6)},
    "lines": {"alpha": (0.0, 0.05, 0.1), "beta": (0.0, 0.05, 0.1, 0.2, 0.3)},
    "ties": {"density": (0.05, 0.1, 0.2, 1.0), "scale": (0.21, 0.39, 0.6, 0.9, 1.35, 1.8)},
    "pcb": {"density": (0.02, 0.1, 0.5), "scale": (0.21, 0.39, 0.6, 0.9, 1.35)},
    "sce": {"density": (0.1, 0.5, 1.0), "scale": (0.39, 0.6, 0.9, 1.35, 2.1)},
    "consensus": {"threshold": (0.2, 0.4), "scale": (0.105, 0.195, 0.3, 0.45, 0.675)},
    "breadcrumbs": {"drop": (0.5, 0.85), "scale": (0.105, 0.195, 0.3, 0.45, 0.675)},
    "nearswap": {"reach": (1e-3, 3e-3, 1e-2), "scale": (0.9, 1.35, 2.1, 4.0, 6.0, 8.0)},
    "wudi": {"lr": (1e-5, 1e-4, 1e-3), "scale": (0.195, 0.3, 0.45, 0.675, 1.05)},
    "wudi, exact": {
        "solver": ("exact",),
        "ridge": (1e-6, 1e-2, 1e-1),
        "scale": (0.195, 0.3, 0.45, 0.675, 1.05),
    },
    "tsv_m": {"scale": (0.105, 0.21, 0.39, 0.6, 0.9, 1.35, 2.1)},
    "iso_c": {"scale": (0.105, 0.21, 0.39, 0.6, 0.9, 1.35, 2.1)},
    "mats": {"iterations": (1, 5, 10, 30, 100), "length": (1.0,)},
    "regmean": {"off_diagonal": (0.0, 0.9), "length": (1.0, 1.5, 2.1)},
    "regmean_plus_plus": {"off_diagonal": (0.0, 0.9), "length": (1.0, 1.5, 2.1)},
}

POLICY = "recalibrate-per-task"
_ALONG = ("scale", "length", "beta")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="YAML of experiments/methods.py")
    parser.add_argument("--suite", help="in place of the file's, such as your own folder")
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", default=list(SPACES), choices=list(SPACES))
    parser.add_argument("--exclude", nargs="+", default=[], help="tensors that stay the base's")
    parser.add_argument("--every", action="store_true", help="tell the best of every setting")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(given.file))
    settings |= {"suite": given.suite} if given.suite else {}
    bench = Bench(plan_of(settings, given.backbone, given.seed, given.out), given.exclude)
    print("| method | values | best on val | beside task arithmetic |\n|---|---|---|---|")
    beside: Answers = {}
    for row in dict.fromkeys(["task_arithmetic", *given.rows]):
        bests = sorted(
            (bench.best(row, own) for own in directions(SPACES[row])), key=lambda b: b[0]
        )
        beside = beside or bests[-1][2]
        for value, config, answers in bests if given.every else bests[-1:]:
            gain, error = bench.difference(answers, beside)
            told = ", ".join(f"{name} {v}" for name, v in config.items())
            print(f"| {row} | {told} | {value:.3f} | {gain:+.3f} ± {error:.3f} |", flush=True)


def directions(space: Mapping[str, Sequence[Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the configurations of each combination of values that differ in the size alone."""
    (size,) = space.keys() & set(_ALONG)
    own = {name: values for name, values in space.items() if name != size}
    for values in product(*own.values()):
        yield [{**dict(zip(own, values, strict=True)), size: s} for s in space[size]]


class Bench:
    """The experts of one backbone and seed, and their validation images."""

    def __init__(self, plan: Plan, exclude: Sequence[str]) -> None:
        paths = plan.expert_paths()
        self._backbone, base = load_base_of(paths, plan.backbone)
        self._experts = select(in_memory(load_experts(paths, base=base)), exclude=exclude)
        suite = load_suite(plan.suite)
        self._tasks = tasks = [suite.task(task).load(plan.split) for task in plan.tasks]
        # As many as a search spends on a candidate's BatchNorm statistics.
        self._images = {t.name: calibration_images(t.train, t.name, count=128) for t in tasks}
        self._scorer = Scorer(self._backbone, tasks)
        rows = expert_rows(self._backbone, [load_expert(path) for path in paths], tasks)
        self._objective = objective_of(rows, metric="normalised_accuracy")

    def best(
        self, row: str, configs: Sequence[dict[str, Any]]
    ) -> tuple[float, dict[str, Any], Answers]:
        """Return the best score of some configurations, which it is of, and its answers."""
        found = []
        merges = self._merges(row.split(",")[0], configs)
        for config, merged in zip(configs, merges, strict=True):
            whole = recalibrate(merged, self._images, backbone=self._backbone, per_task=True)
            outcomes = self._scorer.outcomes(whole)
            answers = {task: self._objective.answers(of) for task, of in outcomes.items()}
            found.append((self._objective.of(outcomes), config, answers))
        return max(found, key=lambda each: each[0])

    def _merges(self, method: str, configs: Sequence[dict[str, Any]]) -> Iterator[Merged]:
        """Yield the merge of each configuration."""
        if MERGE_METHODS.get(method).facts["data"] == "none":
            yield from merge_many(self._experts, method, configs)
            return
        needed = splits_needed(method, POLICY, self._experts.structure)
        images = images_by_split(self._tasks, needed, count=CALIBRATION_IMAGES)
        for config in configs:
            own = {name: value for name, value in config.items() if name != "length"}
            longer = ("lines", {"alpha": config["length"], "beta": 0.0})
            recipe = Recipe(method=method, config=own, veneers=[longer], batch_norm=POLICY)
            yield merge_recipe(self._experts, recipe, self._backbone, images)

    def difference(self, one: Answers, other: Answers) -> tuple[float, float]:
        """Return how much better the first is, and the standard error over the images."""
        gaps = {t: (one[t] - other[t]).double() / self._objective.units[t] for t in one}
        mean = sum(float(gap.mean()) for gap in gaps.values()) / len(gaps)
        variance = sum(float(gap.var() / len(gap)) for gap in gaps.values()) / len(gaps) ** 2
        return mean, variance**0.5


if __name__ == "__main__":
    main()
