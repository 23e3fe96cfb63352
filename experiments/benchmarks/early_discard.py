"""What early discard saves and costs: images and regret over many draws of the subsets.

Every candidate of each method's grid is scored on all validation images once; the race of
`mergekit-lit tune` is then run on those answers for several confidences and seeds.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.lit.scores import Outcomes
from mergekit_lit.merging.gather import load_experts
from mergekit_lit.search.tuning.bench import Bench
from mergekit_lit.search.tuning.loading import make_bench
from mergekit_lit.search.tuning.objective import Answers, Metric
from mergekit_lit.search.tuning.plan import TuningPlan
from mergekit_lit.search.tuning.race import Run, Stage, race, stages_of
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.opening import load_base_of

METRICS: tuple[Metric, ...] = ("normalised_accuracy", "cross_entropy")
CONFIDENCES = (0.9, 0.95, 0.99)


def main() -> None:
    """Print a row for each metric, method and confidence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experts", nargs="+", type=Path)
    parser.add_argument("--methods", nargs="+", default=["ties", "task_arithmetic"])
    parser.add_argument("--suite", default="embedded8")
    parser.add_argument("--split_seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=12, help="draws of the subsets")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| metric | method | candidates | confidence | images saved | regret: mean | largest |")
    print("|---|---|---|---|---|---|---|")
    benches = {metric: load_bench(given, metric) for metric in METRICS}
    for method in given.methods:
        outcomes = all_outcomes(benches[METRICS[0]], method)
        for metric, bench in benches.items():
            answers = [
                {task: bench.objective.answers(each) for task, each in found.items()}
                for found in outcomes
            ]
            for confidence in CONFIDENCES:
                runs = [raced(bench, answers, confidence, seed) for seed in range(given.seeds)]
                saved, regrets = zip(*runs, strict=True)
                print(
                    f"| {metric} | {method} | {len(answers)} | {confidence} | "
                    f"{sum(saved) / len(saved):.0%} | {sum(regrets) / len(regrets):.4f} | "
                    f"{max(regrets):.4f} |",
                    flush=True,
                )


def load_bench(given: argparse.Namespace, metric: Metric) -> Bench:
    """Return the bench of `mergekit-lit tune` on these experts."""
    plan = TuningPlan(method=given.methods, metric=metric, discard=None)
    backbone, base = load_base_of(given.experts)
    experts = load_experts(given.experts, base=base)
    calibration = Calibration(suite=given.suite, options=SplitOptions(seed=given.split_seed))
    return make_bench(experts, backbone, list(calibration.tasks(experts.names)), plan, calibration)


def all_outcomes(bench: Bench, method: str) -> list[dict[str, Outcomes]]:
    """Return what each candidate of a method's grid does on each image, in their order."""
    configs = TuningPlan(method=[method]).proposals(method)[0]([])
    return [
        bench.scorer.outcomes(merged)
        for merged in bench.merges(method, configs)
        if not isinstance(merged, ValueError)
    ]


def raced(
    bench: Bench, candidates: Sequence[Answers], confidence: float, seed: int
) -> tuple[float, float]:
    """Return the share of images that the race saves, and its regret."""
    stages = stages_of(bench.scorer.labels, seed=seed, discard=True)
    rival: Run | None = None
    images = 0
    for answers in candidates:
        run = race(
            partial(taken, answers),
            stages,
            bench.objective,
            rival=rival,
            confidence=confidence,
        )
        images += run.images
        if run.upper is None and (rival is None or run.total > rival.total):
            rival = run
    totals = [bench.objective.total(bench.objective.by_task(each)) for each in candidates]
    chosen = rival.total if rival else float("nan")
    return 1 - images / (bench.count * len(candidates)), max(totals) - chosen


def taken(answers: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
    """Return the answers to the images of a stage."""
    return {task: answers[task][places] for task, places in stage.items()}


if __name__ == "__main__":
    main()
