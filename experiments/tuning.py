"""This file compares searches for a merge on groups where every candidate was scored.

    python experiments/tuning.py --real FOLDER --table runs/merges/merges.parquet

First it makes an exhaustive grid for each of 16 groups (two backbones; shipped and real tasks; of
2 to 5 experts, trained alike or not), drawn by another seed than those of `experiments/merges.py`:
about 400 candidates of 8 methods, their parameters and BatchNorm policies, each scored once on
validation and once on test images. Experts are trained as there, and found where `--out` holds
them. Records are kept, so that a killed run goes on; `--limit N` makes N groups alone of each
backbone and pool, `--strategies-only` none.

Then searches are simulated on the grids, all of them to the same budget in evaluations, which is
5 % of the grid. All choose on validation images, through the loop of `mergekit-lit tune`; test
images judge the choice. Without `--table` the searches that learn from one are left out. What a
real group's prior learns from are the rows of shipped tasks alone; that of a group of shipped tasks
leaves out groups of the same tasks on the same backbone.

The columns: by how many points of mean test accuracy the choice falls short of the grid's own
choice (its best on validation images; negative where it is better), and of the best candidate on
test images, which nobody can choose; how far it lies above task arithmetic at 0.3, and on how many
groups below it; and by how much it falls short of the grid's best on validation images. Means over
groups with Student's 95 % intervals over groups. AdaMerging learns from unlabelled test images, at
the price of the budget: it is no search, and chooses nothing on validation images.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from tuning_grids import Grid, make_grid, read_grid, works_of
from tuning_strategies import (
    Stand,
    Strategy,
    at_random,
    chosen,
    coarse,
    evolved,
    ours,
    prior_alone,
    searched,
    tree_parzen,
)

from mergekit_lit.core.files import write_json
from mergekit_lit.reports.intervals import mean_told
from mergekit_lit.search.crew import Crew
from mergekit_lit.search.predicting.columns import Row
from mergekit_lit.search.predicting.table import read_table
from mergekit_lit.search.tuning.prior import Measured, measured_of

# What is proposed; whether losers are given up early; whether it knows the table.
STRATEGIES: Mapping[str, tuple[Strategy, bool, bool]] = {
    "ours, with table": (ours, True, True),
    "ours, without table": (ours, True, False),
    "ours, with table, no discarding": (ours, False, True),
    "prior's order alone": (prior_alone, True, True),
    "random": (at_random, False, False),
    "random, discarding": (at_random, True, False),
    "Optuna TPE": (tree_parzen, False, False),
    "CMA-ES, rounded": (evolved, False, False),
    "coarse grid": (coarse, False, False),
}
_DRAWN = (at_random, tree_parzen, evolved)
COLUMNS = ("to_choice", "to_best", "over_reference", "on_val")


def main() -> None:
    """Make what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--suite", help="in place of the suite of the pool `embedded`")
    parser.add_argument("--real", type=Path, help="folder of real tasks; left out without one")
    parser.add_argument("--table", type=Path, help="table of merges that priors are learned from")
    parser.add_argument("--limit", type=int, help="number of groups of each backbone and pool")
    parser.add_argument(
        "--strategies-only", action="store_true", help="on the grids that are there"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tuning"))
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(given.file))
    works = [
        work
        for work in works_of(settings, given.out, real=given.real, suite=given.suite)
        if given.limit is None or work.job.group.place < given.limit
    ]
    if not given.strategies_only:
        with Crew(given.jobs) as crew:
            crew.run(make_grid, works)
    grids = [read_grid(work.job.record) for work in works if work.job.record.is_file()]
    table = read_table(given.table) if given.table else None
    found = compared(grids, table, budget=settings["budget"], draws=settings["draws"])
    print(told(grids, found), flush=True)
    write_json(given.out / "tuning.json", found)


def compared(
    grids: Sequence[Grid], table: Sequence[Row] | None, *, budget: int, draws: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Return how each strategy does on each group, in shares of 1: by strategy, group and column.

    Args:
        grids: the groups.
        table: measured merges; None leaves out the strategies that learn from them.
        budget: evaluations of each.
        draws: seeds of those that draw at random, which are averaged over.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for grid in grids:
        measured = known_to(grid, table) if table else None
        for name, (strategy, discard, knows) in STRATEGIES.items():
            if knows and measured is None:
                continue
            stand = Stand(grid, discard, measured if knows else None)
            seeds = range(draws if strategy in _DRAWN else 1)
            scores = []
            for seed in seeds:
                trials = searched(stand, strategy(stand, seed), budget)
                place = chosen(stand, trials)
                scores.append({**judged(grid, place), "trials": float(len(trials))})
            found.setdefault(name, {})[grid.name] = _means(scores)
        for name, score in _without_search(grid).items():
            found.setdefault(name, {})[grid.name] = score
    return found


def known_to(grid: Grid, table: Sequence[Row]) -> Measured:
    """Return the measured merges that the prior of a group may learn from."""
    tasks = set(grid.labels)
    return measured_of(
        [
            row
            for row in table
            if not (grid.real and row["real"])
            and not (row["backbone"] == grid.backbone and set(row["tasks"].split("+")) == tasks)
        ]
    )


def judged(grid: Grid, place: int) -> dict[str, float]:
    """Return how a choice compares, in shares of 1; the grid itself is what comes after place 0."""
    val, test = grid.on_val[1:], grid.test[1:]
    return {
        "to_choice": float(test[val.argmax()] - grid.test[place]),
        "to_best": float(test.max() - grid.test[place]),
        "over_reference": float(grid.test[place] - grid.test[0]),
        "on_val": float(val.max() - grid.on_val[place]),
    }


def _without_search(grid: Grid) -> dict[str, dict[str, float]]:
    """Return task arithmetic at 0.3, the whole grid's choice, and test-time adaptation."""
    reference = judged(grid, 0)
    gain = grid.adapted - float(grid.test[0])
    return {
        "task arithmetic at 0.3": {**reference, "trials": 1.0},
        "AdaMerging (test-time adaptation)": {
            "to_choice": reference["to_choice"] - gain,
            "to_best": reference["to_best"] - gain,
            "over_reference": gain,
            "trials": 0.0,
        },
        "whole grid": {
            **judged(grid, 1 + int(grid.on_val[1:].argmax())),
            "trials": float(len(grid.pool) - 1),
        },
    }


def told(grids: Sequence[Grid], found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the table: points, means over groups with intervals, and the share within a point."""
    parts = {"all": grids}
    for backbone in dict.fromkeys(grid.backbone for grid in grids):
        for real in (False, True):
            kind = [g for g in grids if (g.backbone, g.real) == (backbone, real)]
            if kind:
                parts[f"{backbone}, {'real' if real else 'embedded'}"] = kind
    lines = []
    for name, own in parts.items():
        lines += [f"\n{name} ({len(own)} groups)\n", _HEADER]
        names = [grid.name for grid in own]
        lines += [_line(label, [by_group[n] for n in names]) for label, by_group in found.items()]
    return "\n".join(lines)


_HEADER = (
    "| search | short of the grid's choice | short of the best on test | above task arithmetic "
    "| below it | short of the grid on val | within a point of the grid's choice | trials |\n"
    "|---|---|---|---|---|---|---|---|"
)


def _line(label: str, scores: Sequence[Mapping[str, float]]) -> str:
    known = [[100 * score[name] for score in scores if name in score] for name in COLUMNS]
    cells = [_cell(values) for values in known]
    below = sum(score["over_reference"] < -1e-9 for score in scores)
    cells.insert(-1, f"{below} of {len(scores)}")
    near = sum(score["to_choice"] <= 0.01 for score in scores)
    trials = float(np.mean([score["trials"] for score in scores]))
    return f"| {label} | {' | '.join(cells)} | {near} of {len(scores)} | {trials:.0f} |"


def _cell(values: Sequence[float]) -> str:
    return mean_told(values, ".2f") if values else ""


def _means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


if __name__ == "__main__":
    main()
