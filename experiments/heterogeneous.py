"""This file measures what becomes of a merge whose experts were trained differently.

    python experiments/heterogeneous.py experiments/heterogeneous.yaml --backbones resnet --seeds 0

Takes the experts of `experiments/hyperparameters.py`, trains those that are missing, and merges
random groups of which one half comes from one configuration, the other from another. Each mix
ends in one record; what is there is not made again. The rows of all are written to
`<out>/<file>.csv`, and what they say is printed as by `experiments/heterogeneous_report.py`.

Accuracies are on a few test images of each task and BatchNorm statistics as in the sweep; a scale
is chosen on validation images.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heterogeneous_report import UNIFORM, told
from hyperparameters import Run, experts_of, runs_of
from hyperparameters_report import read
from methods import Row, row_of
from omegaconf import OmegaConf
from testbed import POLICY, Testbed, csv_of, groups_of, write_rows

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.files import read_json, write_text
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.configuration import SCALE
from mergekit_lit.search.coefficients import choose, scale_grid
from mergekit_lit.search.crew import Crew
from mergekit_lit.stages.recipes import Recipe
from mergekit_lit.theory.coefficients import weigh


@dataclass(frozen=True)
class Mix:
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
        name = "".join(c if c.isalnum() else "-" for c in self.name)
        return self.out / folder / f"{name}.json"


def main() -> None:
    """Make what is missing, write the table, and print what it says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="YAML: sweep, groups, mixes, rows")
    parser.add_argument("--suite", help="in place of the sweep's, such as your own folder")
    parser.add_argument("--backbones", nargs="+", help="some of the file's")
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of the sweep's")
    parser.add_argument("--experts", type=Path, default=Path("runs/hyperparameters"))
    parser.add_argument("--out", type=Path, default=Path("runs/heterogeneous"))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    settings: Any = OmegaConf.to_container(OmegaConf.load(given.file))
    sweep: Any = OmegaConf.to_container(OmegaConf.load(given.file.parent / settings["sweep"]))
    sweep |= {k: v for k in ("suite", "seeds") if (v := getattr(given, k))}
    mixes = mixes_of(settings, runs_of(sweep, given.experts), given.out)
    backbones = given.backbones or list(settings["mixes"])
    with Crew(given.jobs) as crew:
        crew.run(make, [mix for mix in mixes if mix.runs[0].backbone in backbones])
    made = [mix.record for mix in mixes if mix.record.is_file()]
    rows = [row for record in made for row in read_json(record)["metrics"]["rows"]]
    table = given.out / f"{given.file.stem}.csv"
    write_text(table, csv_of(rows, ("backbone", "seed", "mix")))
    print(told([row for row in read(table) if row["backbone"] in backbones]), flush=True)


def mixes_of(settings: Mapping[str, Any], runs: Sequence[Run], out: Path) -> list[Mix]:
    """Return every mix of a file, of the seeds and backbones of the sweep's runs.

    Raises:
        ValueError: the sweep has no such configuration or number of steps.
    """
    found = []
    rows = tuple(row_of(entry) for entry in settings["rows"])
    for seed in dict.fromkeys(run.seed for run in runs):
        for backbone, mixes in settings["mixes"].items():
            own = [run for run in runs if (run.seed, run.backbone) == (seed, backbone)]
            sizes = settings["groups"].items()
            groups = [g for size, count in sizes for g in groups_of(own[0].tasks, size, count)]
            for name, (first, second) in mixes.items():
                pair = (configured(own, first), configured(own, second))
                steps = (first["steps"], second["steps"])
                found.append(Mix(name, pair, steps, tuple(groups), rows, out))
    return found


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
        config={**asdict(mix), "batch_norm": POLICY},
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
    lengths = [card.displacement or 0.0 for card in experts.cards]
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
            "travel": statistics.fmean(travel or 0.0 for travel in travels),
            "ratio": max(lengths) / (min(lengths) or 1.0),
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
    main()
