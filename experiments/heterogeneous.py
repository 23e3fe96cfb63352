"""This file measures what becomes of a merge whose experts were trained differently.

    python experiments/heterogeneous.py experiments/heterogeneous.yaml --backbones resnet --seeds 0

Takes the experts of `experiments/hyperparameters.py`, trains those that are missing, and merges
random groups of which one half comes from one configuration, the other from another. Each mix
ends in one record; what is there is not made again. The rows of all records of the file, whenever
they were made, are written to `<out>/<file>.csv`, and what they say is printed as by
`experiments/heterogeneous_report.py`.

Accuracies are on a few test images of each task and BatchNorm statistics as in the sweep; a scale
is chosen on validation images.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finished import check_same, rows_in, stem_of
from heterogeneous_report import UNIFORM, read, told
from hyperparameters import experts_of, mean_known
from hyperparameters_runs import Run, runs_of, sweep_of
from inputs import (
    COUNT,
    GROUPS,
    LIST,
    MAPPING,
    NUMBER,
    SHARE,
    WORD,
    check_keys,
    command,
    named,
    read_settings,
    seeds_with,
)
from methods import Row, row_of
from testbed import POLICY, Recorded, Testbed, check_bases, csv_of, groups_of, write_rows

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.files import write_text
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.configuration import SCALE
from mergekit_lit.search.coefficients import choose, scale_grid
from mergekit_lit.search.crew import Crew
from mergekit_lit.stages.recipes import Recipe
from mergekit_lit.theory.coefficients import weigh

_KEYS = {"sweep": WORD, "groups": GROUPS, "mixes": MAPPING, "rows": LIST}
_HALF = {"lr": NUMBER, "batch": COUNT, "train_share": SHARE, "steps": COUNT}


@dataclass(frozen=True)
class Mix(Recorded):
    """Two configurations of one backbone and seed, and the groups that are mixed of them."""

    name: str
    runs: tuple[Run, Run]
    steps: tuple[int, int]
    groups: tuple[tuple[str, ...], ...]
    rows: tuple[Row, ...]
    out: Path

    @property
    def record(self) -> Path:
        """Where its record lies, once it is made."""
        run = self.runs[0]
        folder = f"{run.backbone.replace('/', '-')}-{run.seed}"
        return self.out / folder / f"{stem_of(self.name)}.json"


def main() -> None:
    """Make what is missing, write the table, and print what it says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="YAML: sweep, groups, mixes, rows")
    parser.add_argument("--suite", help="in place of the sweep's, such as your own folder")
    parser.add_argument("--backbones", nargs="+", help="some of the file's")
    parser.add_argument("--seeds", nargs="+", type=int, help="some of the sweep's, or others")
    parser.add_argument("--experts", type=Path, default=Path("runs/hyperparameters"))
    parser.add_argument("--out", type=Path, default=Path("runs/heterogeneous"))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    settings = read_settings(given.file, _KEYS)
    sweep = sweep_of(given.file.parent / settings["sweep"], suite=given.suite)
    seeds = given.seeds or sweep["seeds"]
    runs = runs_of({**sweep, "seeds": seeds_with(sweep, given.seeds)}, given.experts)
    mixes = mixes_of(settings, runs, given.out)
    backbones = named(f"backbone of {given.file}", given.backbones, settings["mixes"])
    # All of them, as all that are finished become rows of one table.
    for mix in mixes:
        check_same(mix.record, mix.config)
    wanted = [m for m in mixes if m.runs[0].backbone in backbones and m.runs[0].seed in seeds]
    check_bases(mix.runs[0].backbone for mix in wanted if not mix.record.is_file())
    with Crew(given.jobs) as crew:
        crew.run(make, wanted)
    rows = rows_in(mix.record for mix in mixes)
    table = given.out / f"{given.file.stem}.csv"
    write_text(table, csv_of(rows, ("backbone", "seed", "mix")))
    print(told([row for row in read(table) if row["backbone"] in backbones]), flush=True)


def mixes_of(settings: Mapping[str, Any], runs: Sequence[Run], out: Path) -> list[Mix]:
    """Return every mix of a file, of the seeds and backbones of the sweep's runs.

    Raises:
        KeyError: an unknown key or method, or a backbone that the sweep lacks.
        ValueError: the sweep has no such configuration or number of steps.
    """
    found = []
    rows = tuple(row_of(entry) for entry in settings["rows"])
    named("backbone of the sweep", settings["mixes"], dict.fromkeys(run.backbone for run in runs))
    for seed in dict.fromkeys(run.seed for run in runs):
        for backbone, mixes in settings["mixes"].items():
            own = [run for run in runs if (run.seed, run.backbone) == (seed, backbone)]
            sizes = settings["groups"].items()
            groups = [g for size, count in sizes for g in groups_of(own[0].tasks, size, count)]
            for name, halves in mixes.items():
                first, second = _halves(name, halves)
                pair = (configured(own, first), configured(own, second))
                steps = (first["steps"], second["steps"])
                found.append(Mix(name, pair, steps, tuple(groups), rows, out))
    return found


def _halves(name: str, listed: Any) -> list[dict[str, Any]]:
    """Return the two configurations of a mix, as far as it names them."""
    if not isinstance(listed, list) or len(listed) != 2:
        raise ValueError(f"The mix {name!r} must list two configurations, but is {listed!r}.")
    optional = set(_HALF) - {"steps"}
    return [check_keys(f"the mix {name!r}", half, _HALF, optional=optional) for half in listed]


def configured(runs: Sequence[Run], wanted: Mapping[str, Any]) -> Run:
    """Return the run that differs from the centre, the first, in what is wanted alone."""
    names = ("lr", "batch", "train_share")
    chosen = {name: wanted.get(name, getattr(runs[0], name)) for name in names}
    for run in runs:
        same = all(getattr(run, name) == value for name, value in chosen.items())
        if same and wanted["steps"] in run.steps:
            return run
    raise ValueError(f"The sweep must hold the configuration {dict(wanted)!r}, but does not.")


def make(mix: Mix) -> Path:
    """Measure one mix, and write its record; a finished one is left."""
    return write_rows(
        mix.record,
        lambda: rows_of(mix),
        stage="heterogeneous",
        name=mix.name,
        config=mix.config,
        seeds={"seed": mix.runs[0].seed},
    )


def rows_of(mix: Mix) -> Iterator[dict[str, Any]]:
    """Yield one row for each group and method, and one for the averages without a mix."""
    run = mix.runs[0]
    bed = run.testbed
    files = [experts_of(run)[steps] for run, steps in zip(mix.runs, mix.steps, strict=True)]
    places = {task: place for place, task in enumerate(run.tasks)}
    for drawn in mix.groups:
        same = [uniform(bed, [each[places[task]] for task in drawn]) for each in files]
        for swapped in (False, True):
            sides = files[::-1] if swapped else files
            half = len(drawn) // 2
            group = [sides[i >= half][places[task]] for i, task in enumerate(drawn)]
            about = {
                "backbone": run.backbone,
                "seed": run.seed,
                "mix": mix.name,
                "group": "+".join(drawn),
                "swapped": swapped,
            }
            yield {**about, "row": UNIFORM, **_mean_of(same)}
            for found in of_group(bed, group, mix.rows):
                yield {**about, **found}


def uniform(bed: Testbed, files: Sequence[Path]) -> dict[str, float]:
    """Return the scores of the plain average of one configuration."""
    experts = bed.experts(files)
    merged = bed.merged(experts, Recipe(batch_norm=POLICY))
    return _scores(bed, merged, experts, _accuracies(bed, files, experts))


def of_group(bed: Testbed, files: Sequence[Path], rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield the scores of every row's merge of one group, with its divergences."""
    experts = bed.experts(files)
    alone = _accuracies(bed, files, experts)
    travels = [card.travel for card in experts.cards]
    lengths = [card.displacement for card in experts.cards if card.displacement]
    for row in rows:
        merged = merge(bed, experts, row)
        coefficients = merged.facts["coefficients"]
        weighing = weigh(coefficients, travels)
        yield {
            "row": row.name,
            **_scores(bed, merged, experts, alone),
            "sum": sum(coefficients),
            "chi2_lambda": weighing.chi2_lambda,
            "chi2_w": weighing.chi2_w,
            "tv_w": weighing.tv_w,
            "travel": mean_known(travels),
            "ratio": max(lengths) / min(lengths) if len(lengths) == len(travels) else None,
        }


def merge(bed: Testbed, experts: Experts, row: Row) -> Merged:
    """Return a row's merge, its scale chosen on validation images if there is one to choose."""
    grid = () if SCALE in row.config else scale_grid(MERGE_METHODS.get(row.method))

    def at(config: Mapping[str, Any]) -> Merged:
        return bed.merged(experts, Recipe(method=row.method, config=config, batch_norm=POLICY))

    def right(merged: Merged) -> float:
        found = bed.scores({"merged": merged}, experts, split="val")["merged"]
        return statistics.fmean(task["accuracy"] for task in found.values())

    if not grid:
        return at(row.config)
    choice = choose(grid, lambda scales: [right(at({**row.config, SCALE: s})) for s in scales])
    return at({**row.config, SCALE: choice.chosen})


def _accuracies(bed: Testbed, files: Sequence[Path], experts: Experts) -> dict[str, float]:
    """Return the test accuracy of each expert on its own task."""
    alone = [load_expert(path) for path in files]
    found = bed.scores({"experts": alone}, experts, split="test")["experts"]
    return {task: row["accuracy"] for task, row in found.items()}


def _scores(
    bed: Testbed, merged: Merged, experts: Experts, alone: Mapping[str, float]
) -> dict[str, float]:
    """Return accuracy, the same over the experts', and loss: means over the tasks."""
    found = bed.scores({"merged": merged}, experts, split="test")["merged"]
    # An expert without a right image counts as 1, as in `experiments/methods.py`.
    ratios = [row["accuracy"] / (alone[task] or 1.0) for task, row in found.items()]
    return {
        "accuracy": statistics.fmean(row["accuracy"] for row in found.values()),
        "normalised_accuracy": statistics.fmean(ratios),
        "test_loss": statistics.fmean(row["loss"] for row in found.values()),
    }


def _mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


if __name__ == "__main__":
    sys.exit(command(main))
