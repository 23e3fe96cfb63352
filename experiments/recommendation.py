"""This file compares a recommended training with a whole sweep, a default, and random search.

    python experiments/recommendation.py experiments/recommendation.yaml --merges runs/merges

Groups of six tasks that no shipped base has seen are drawn. For each the sweep is all its cells,
every one of which is trained for all six tasks, merged and scored on test images; the experts are
those of `experiments/merges.py` in `--merges`, and what is missing is trained there. `recommend`
sees the same space, validation images and a budget, and trains its own probes. Random search pays
from the same budget: it trains cells at random on the same sampled tasks, as many as the probes and
the validation run cost, and takes the one whose merge has the least validation loss. Regret is the
test accuracy of the best cell less that of the chosen one: the best of many cells is lucky, so that
a regret of 0 is out of reach for any choice that does not see the test images.

`--real FOLDER` adds the tasks of a folder. One record a group; what is there is not made again. The
rows of all are written to `<out>/recommendation.json`.
`--no-train` passes over groups for which an expert of the sweep is missing.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from merge_groups import Cell
from merges import Pool, expert_file, jobs_of, tested
from omegaconf import OmegaConf
from testbed import trained, write_rows

from mergekit_lit.core.files import read_json, write_json
from mergekit_lit.core.seeds import derive_seed
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.reports.intervals import mean_told
from mergekit_lit.search.recommending.points import mean_of
from mergekit_lit.search.recommending.recommend import recommend
from mergekit_lit.search.recommending.request import Request, checked
from mergekit_lit.search.recommending.site import Site
from mergekit_lit.search.recommending.space import Space, Way
from mergekit_lit.search.tuning.scores import Scorer

_DRAWS = 200


@dataclass(frozen=True)
class Study:
    """One pool and backbone: the sweep, and what is compared with it."""

    pool: Pool
    settings: Mapping[str, Any]
    cells: tuple[Cell, ...]
    out: Path

    @property
    def space(self) -> Space:
        """The space of the sweep's cells."""
        first = self.cells[0]
        return Space(
            optimizer=["sgd"],
            lr=sorted({cell.lr for cell in self.cells}),
            batch=[first.batch],
            steps=sorted({cell.steps for cell in self.cells}),
            share=[1.0],
            warmup_steps=self.pool.warmup_steps,
        )

    def request(self, group: Sequence[str]) -> Request:
        """Return what the recommendation of a group is asked for."""
        given, longest = self.settings, max(cell.steps for cell in self.cells)
        cost = longest * len(group) * self.cells[0].batch / 32
        return Request(
            suite=self.pool.suite,
            backbone=self.pool.backbone,
            tasks=list(group),
            budget_steps=round(given["budget"] * cost),
            ways=given["ways"],
            probe_share=given["probe_share"],
            n=self.cells[0].n,
            seed=self.pool.seed,
        )

    def train(self, way: Way, task: str, steps: Sequence[int], until: int) -> dict[int, Path]:
        """Return experts: the sweep's, and probes of our own where it has no such steps."""
        wanted = [k for k in steps if k <= until]
        swept = {cell.steps: cell for cell in self.cells if cell.lr == way.lr}
        found = {k: expert_file(self.pool, task, swept[k]) for k in wanted if k in swept}
        own = [k for k in steps if k not in swept]
        if set(wanted) - set(found):
            cell = next(iter(swept.values()))
            found |= trained(
                TaskDataModule(
                    self.pool.suite, task, batch=cell.batch, n=cell.n, split_seed=self.pool.seed
                ),
                ExpertModule(
                    self.pool.backbone,
                    lr=way.lr,
                    schedule="constant",
                    warmup_steps=min(self.pool.warmup_steps, max(own) - 1),
                    seed=self.pool.seed,
                ),
                steps=own,
                out=self.out / "probes" / way.name,
                name=task,
            )
        return {k: found[k] for k in wanted}


def main() -> None:
    """Compare what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--merges", type=Path, default=Path("runs/merges"))
    parser.add_argument("--real", type=Path, help="folder of real tasks; left out without one")
    parser.add_argument("--backbones", nargs="+", default=["resnet", "vit"])
    parser.add_argument("--out", type=Path, default=Path("runs/recommendation"))
    parser.add_argument("--group", help="tasks, after commas, in place of the groups drawn")
    parser.add_argument("--no-train", action="store_true", help="pass over what lacks experts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(given.file))
    records = []
    for study in studies(settings, given.file.parent, given.merges, given.out, real=given.real):
        if study.pool.backbone not in given.backbones:
            continue
        drawn = groups(study.pool.tasks, settings)
        for group in [tuple(given.group.split(","))] if given.group else drawn:
            if given.no_train and not is_there(study, group):
                print(f"left out, experts are missing: {study.pool.backbone} {'+'.join(group)}")
                continue
            records.append(compared(study, group))
    rows = [row for path in records for row in read_json(path)["metrics"]["rows"]]
    write_json(given.out / "recommendation.json", rows)
    print(table(rows))


def studies(
    settings: Mapping[str, Any], folder: Path, merges: Path, out: Path, *, real: Path | None = None
) -> Iterator[Study]:
    """Yield every backbone and pool of the benchmark of merges."""
    plan: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(folder / settings["merges"]))
    pools = {job.pool for job in jobs_of(plan, merges, real=real)}
    for pool in sorted(pools, key=lambda each: (each.backbone, each.name)):
        own = settings["pools"][pool.name]
        cells = tuple(Cell(lr, own["batch"], own["n"], k) for lr in own["lr"] for k in own["steps"])
        yield Study(pool, settings, cells, out / pool.backbone.replace("/", "-") / pool.name)


def groups(tasks: Sequence[str], settings: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return groups of tasks, the same for every backbone."""
    draw = Random(derive_seed(settings["seed"], "recommendation", len(tasks)))
    return [tuple(draw.sample(list(tasks), settings["size"])) for _ in range(settings["groups"])]


def is_there(study: Study, group: Sequence[str]) -> bool:
    """Whether every expert of the sweep is there."""
    folder = study.pool.folder / "experts"
    return all(
        (folder / cell.training / f"{task}.record.json").is_file()
        for cell in study.cells
        for task in group
    )


def compared(study: Study, group: Sequence[str]) -> Path:
    """Compare one group, and write its record; a finished one is left."""
    name = "+".join(group)
    return write_rows(
        study.out / "groups" / f"{name}.json",
        lambda: [row_of(study, group)],
        stage="recommendation",
        name=name,
        config={"pool": asdict(study.pool), "settings": dict(study.settings), "tasks": list(group)},
        seeds={"seed": study.pool.seed},
    )


def row_of(study: Study, group: Sequence[str]) -> dict[str, Any]:
    """Return what the recommendation reaches on test images, and what the others do."""
    request = study.request(group)
    folder = study.out / "recommended" / "+".join(group)
    found = recommend(request, out=folder, space=study.space, train=study.train)
    metrics = found.record.metrics
    chosen = Cell(
        metrics["recommended"]["lr"],
        study.cells[0].batch,
        study.cells[0].n,
        metrics["recommended"]["steps"],
    )
    site = Site(checked(request, study.space), folder / "experts", train=study.train)
    sample = list(metrics["experts"])
    test, val = {}, {}
    suite, options = load_suite(study.pool.suite), SplitOptions(seed=study.pool.seed)
    whole = [suite.task(task).load(options) for task in group]
    images = study.settings["test_images"]
    scorer = Scorer(site.backbone, [tested(task, images=images) for task in whole])
    for cell in study.cells:
        merged = site.merged([expert_file(study.pool, task, cell) for task in group])[1]
        outcomes = scorer.outcomes(merged)
        test[cell] = statistics.fmean(found.accuracy for found in outcomes.values())
        few = site.merged([expert_file(study.pool, task, cell) for task in sample])[1]
        val[cell] = mean_of(site.scores(few), "val_loss")
    files = [expert_file(study.pool, task, study.cells[0]) for task in group]
    base = scorer.outcomes(site.at_base(files))
    budget = metrics["budget"]
    extra = budget["probes"] + budget["validation run"] + len(sample) * chosen.steps
    default = nearest(study)
    return {
        "backbone": study.pool.backbone,
        "pool": study.pool.name,
        "group": "+".join(group),
        "chosen": chosen.name,
        "best_cell": max(test, key=lambda cell: test[cell]).name,
        "best": max(test.values()),
        "recommended": test[chosen],
        "default": test[default],
        "random": by_chance(study, val, test, extra / len(sample)),
        "longest": test[max(study.cells, key=lambda cell: (cell.steps, cell.lr))],
        "mean_cell": statistics.fmean(test.values()),
        "base": statistics.fmean(found.accuracy for found in base.values()),
        "expected": metrics["expected"],
        "cost": extra,
        "cells": {cell.name: value for cell, value in test.items()},
        "val_losses": {cell.name: value for cell, value in val.items()},
    }


def nearest(study: Study) -> Cell:
    """Return the fixed recipe, or the cell of its rate that is nearest to it."""
    given = study.settings["default"]
    same = [cell for cell in study.cells if cell.lr == given["lr"]]
    return min(same, key=lambda cell: (abs(cell.steps - given["steps"]), cell.steps))


def by_chance(
    study: Study, val: Mapping[Cell, float], test: Mapping[Cell, float], steps: float
) -> float:
    """Return what random search reaches on average, whose trials cost so many steps a task."""
    draw, reached = Random(derive_seed(study.pool.seed, "random search")), []
    for _ in range(_DRAWS):
        spent, tried = 0.0, []
        for cell in draw.sample(study.cells, len(study.cells)):
            if tried and spent + cell.steps > steps:
                break
            spent += cell.steps
            tried.append(cell)
        reached.append(test[min(tried, key=lambda cell: val[cell])])
    return statistics.fmean(reached)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return mean regrets in points with Student's 95 % intervals over groups."""
    lines = [
        "| backbone | pool | groups | best cell | base | regret of recommended | within 1 point | "
        "default | random search | most training | cells | interval holds |",
        "|" + "---|" * 12,
    ]
    for key in sorted({(row["backbone"], row["pool"]) for row in rows}):
        of = [row for row in rows if (row["backbone"], row["pool"]) == key]
        regrets = {name: [100 * (row["best"] - row[name]) for row in of] for name in _TOLD}
        near = sum(regret <= 1 for regret in regrets["recommended"])
        held = sum(
            row["expected"]["low"] <= row["recommended"] <= row["expected"]["high"] for row in of
        )
        told = {name: mean_told(values, ".1f") for name, values in regrets.items()}
        means = [f"{statistics.fmean(row[name] for row in of):.3f}" for name in ("best", "base")]
        cells = [
            *(*key, str(len(of)), *means, told["recommended"], f"{near} of {len(of)}"),
            *(told[name] for name in _TOLD[1:]),
            f"{held} of {len(of)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_TOLD = ("recommended", "default", "random", "longest", "mean_cell")


if __name__ == "__main__":
    main()
