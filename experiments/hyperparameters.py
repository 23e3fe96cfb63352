"""This file measures what each hyperparameter of the experts does to their merge.

    python experiments/hyperparameters.py experiments/hyperparameters.yaml --seeds 0 --jobs 1
    python experiments/hyperparameters.py experiments/hyperparameters_cosine.yaml --seeds 0 --jobs 1
    python experiments/hyperparameters.py experiments/hyperparameters_real8.yaml --suite FOLDER \
        --out runs/hyperparameters_real8

Trains an expert of every task in each configuration, merges random groups of them by the simple
average at each step count, and measures losses and the terms of the bound. Each configuration ends
in one record; what is there is not made again, and a training that was killed goes on. The rows of
all records of the file, whenever they were made, are written to `<out>/<file>.csv`, which
`experiments/hyperparameters_report.py` reads. `--backbones resnet` makes those of one backbone. A
record of other tasks, images, groups or steps is refused, and wants another `--out`.

How it is measured: losses and accuracies on at most `images` images of each task and split, those
of merges, experts and base under BatchNorm statistics that are estimated again on these training
images of the task; heads are frozen nearest class means. L, G^2 and the merged gradient are
measured at the merge of the first group at each step count, L as the 95th percentile of the secants
between base, merge, two of the experts and halfway to them, and stand for all groups. Delta is the
path estimate of the cards, which no twins have calibrated: what is derived from it is named
`..._path`.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from finished import check_same, rows_in
from hyperparameters_runs import Run, runs_of, sweep_of
from inputs import command, named, seeds_with
from testbed import POLICY, Around, Slopes, Testbed, check_bases, csv_of, trained, write_rows
from torch import Tensor

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.files import write_text
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.search.crew import Crew
from mergekit_lit.stages.bound_facts import expert_facts
from mergekit_lit.stages.recipes import Recipe
from mergekit_lit.theory.bound import bound
from mergekit_lit.theory.facts import ALL, MergeFacts

Losses: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Scores by task."""


def main() -> None:
    """Make what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="YAML: suite, configurations, steps, groups ...")
    parser.add_argument("--suite", help="in place of the file's, such as your own folder")
    parser.add_argument("--backbones", nargs="+", help="some of the file's")
    parser.add_argument("--seeds", nargs="+", type=int, help="some of the file's, or others")
    parser.add_argument("--out", type=Path, default=Path("runs/hyperparameters"))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    settings = sweep_of(given.file, suite=given.suite)
    seeds = given.seeds or settings["seeds"]
    runs = runs_of({**settings, "seeds": seeds_with(settings, given.seeds)}, given.out)
    backbones = named(f"backbone of {given.file}", given.backbones, settings["configurations"])
    # All of them, as all that are finished become rows of one table.
    for run in runs:
        check_same(run.record, run.config)
    chosen = [run for run in runs if run.seed in seeds and run.backbone in backbones]
    check_bases(run.backbone for run in chosen if not run.record.is_file())
    with Crew(given.jobs) as crew:
        crew.run(make, chosen)
    # Of all runs, so that one backbone or seed after the other ends in the table of all.
    rows = rows_in(run.record for run in runs)
    table = given.out / f"{given.file.stem}.csv"
    write_text(table, csv_of(rows, (*_SETTINGS, "steps", "size", "group")))
    print(f"{len(rows)} rows in {table}", flush=True)


def make(run: Run) -> Path:
    """Train and measure one configuration, and write its record; a finished one is left."""
    return write_rows(
        run.record,
        lambda: rows_of(run),
        stage="hyperparameters",
        name=run.name,
        config=run.config,
        seeds={"seed": run.seed},
    )


def experts_of(run: Run) -> dict[int, list[Path]]:
    """Return the experts of each step count in the order of the tasks; train what is missing."""
    # Under a schedule with a horizon each length is a training of its own.
    trainings = [run.steps] if run.schedule == "constant" else [(steps,) for steps in run.steps]
    found: dict[int, list[Path]] = {steps: [] for steps in run.steps}
    for task in run.tasks:
        for steps in trainings:
            made = trained(
                TaskDataModule(
                    run.suite,
                    task,
                    batch=run.batch,
                    train_share=run.train_share,
                    split_seed=run.seed,
                ),
                ExpertModule(
                    run.backbone,
                    lr=run.lr,
                    schedule=run.schedule,  # type: ignore[arg-type] # checked there
                    warmup_steps=run.warmup_steps,
                    seed=run.seed,
                ),
                steps=steps,
                out=run.folder,
                name=task if len(steps) > 1 else f"{task}-step{steps[0]}",
            )
            for count, path in made.items():
                found[count].append(path)
    return found


def rows_of(run: Run) -> Iterator[dict[str, Any]]:
    """Yield one row for each step count and group: what was merged, losses and terms."""
    bed, base, slopes = run.testbed, None, None
    for steps, files in experts_of(run).items():
        everyone = bed.experts(files)
        # Of the heads and the base alone, which all step counts share.
        base = base or _losses(bed, bed.base, everyone)
        slopes = slopes or bed.slopes(everyone, run.effort)
        alone = _losses(bed, [load_expert(path) for path in files], everyone)
        around = None
        for group in run.groups:
            experts = bed.experts([files[run.tasks.index(task)] for task in group])
            merged = bed.merged(experts, Recipe(batch_norm=POLICY))
            # Once for all groups, at the first.
            around = around or bed.around(experts, merged, run.effort)
            found = _losses(bed, merged, experts)
            step = bed.step(experts, merged)
            yield {
                **{name: getattr(run, name) for name in _SETTINGS},
                "steps": steps,
                "size": len(group),
                "group": "+".join(group),
                **path_of(experts),
                **_means(found, group),
                **{f"experts_{name}": value for name, value in _means(alone, group).items()},
                **{f"base_{name}": value for name, value in _means(base, group).items()},
                **terms_of(experts, found["train"], base["train"], slopes, around, step),
            }


_SETTINGS = ("backbone", "seed", "schedule", "lr", "batch", "train_share")


def path_of(experts: Experts) -> dict[str, float | None]:
    """Return means over a group of what its cards tell of the ways; None where one does not."""
    cards = experts.cards
    eps2 = mean_known([None if card.eps_path is None else card.eps_path**2 for card in cards])
    return {
        "n": mean_known([card.n for card in cards]),
        "travel": mean_known([card.travel for card in cards]),
        "displacement": mean_known([card.displacement for card in cards]),
        "noise": mean_known([card.gradient_noise for card in cards]),
        "eps_path": None if eps2 is None else eps2**0.5,
    }


def mean_known(values: Sequence[float | None]) -> float | None:
    """Return the mean; None where a value is unknown."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def terms_of(
    experts: Experts,
    merged: Losses,
    base: Losses,
    slopes: Slopes,
    around: Around,
    step: Tensor,
) -> dict[str, float | None]:
    """Return the terms of the bound of a simple average, with the path estimate for Delta.

    Args:
        experts: the group.
        merged: loss of the merge on training images, by task.
        base: of the base, of all tasks.
        slopes: gradients at the base.
        around: L, G^2 and the merged gradient, of this or another group of the configuration.
        step: x_avg - x0, (P,).
    """
    group = experts.names
    zeta2 = slopes.zeta2(group)
    facts = [
        replace(
            expert_facts(card, task, None, None),
            eps2=None if card.eps_path is None else card.eps_path**2,
            zeta2=apart,
            base_loss=base[task]["loss"],
            train_loss=merged[task]["loss"],
            slope=along,
        )
        for card, task, apart, along in zip(
            experts.cards, group, zeta2, slopes.along(group, step), strict=True
        )
    ]
    merge = MergeFacts(
        smoothness=around.smoothness,
        gram={ALL: slopes.of(group).tolist()},
        merged_gradient2=around.gradient2,
        sample_gradient2=around.sample_gradient2,
        step2={ALL: float(step.square().sum())},
    )
    found = bound(facts, merge, [1 / len(group)] * len(group))
    terms = {name: found.terms[name].value for name in ("progress", "drift", "merged_noise")}
    return {
        "smoothness": around.smoothness,
        "merged_gradient": around.gradient2,
        "sample_gradient2": around.sample_gradient2,
        "zeta2": statistics.fmean(zeta2),
        **terms,
        "delta2_path": found.terms["delta2_by_path"].value,
        "generalization_path": found.terms["generalization"].value,
        "total_path": found.total,
        "descent": found.terms["descent"].value,
        "total_by_step_path": found.total_by_step,
    }


def _losses(bed: Testbed, model: Any, experts: Experts) -> dict[str, dict[str, Any]]:
    """Return loss and accuracy of a model by split and task."""
    return {
        split: bed.scores({"model": model}, experts, split=split)["model"]
        for split in ("train", "test")
    }


def _means(scores: Mapping[str, Losses], group: Sequence[str]) -> dict[str, float]:
    """Return the losses, their gap and the test accuracy, each a plain mean over a group."""
    train, test = ([scores[split][task]["loss"] for task in group] for split in ("train", "test"))
    return {
        "train_loss": statistics.fmean(train),
        "test_loss": statistics.fmean(test),
        "gap": statistics.fmean(test) - statistics.fmean(train),
        "accuracy": statistics.fmean(scores["test"][task]["accuracy"] for task in group),
    }


if __name__ == "__main__":
    sys.exit(command(main))
