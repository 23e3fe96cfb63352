"""This file measures where the stability of experts can be measured, and what it predicts.

    python experiments/stability.py experiments/stability.yaml --backbones vit --out runs/stability

Trains each configuration with twins (`StabilityTwins`), one trajectory for all step counts, scores
the experts, their plain average and the base, and prints tables: the measured distances beside the
floor of rounding and the path estimate, and rank correlations with the gap between test and
training loss, of experts and of merges. One row an expert goes to `<out>/<file>.csv`. What is there
is not made again. `experiments/stability_tables.py` prints the same tables of such a CSV.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finished import check_same, rows_in
from inputs import (
    COUNT,
    COUNTS,
    FLAG,
    LIST,
    NUMBER,
    SEEDS,
    SHARE,
    STEPS,
    WORD,
    WORDS,
    check_keys,
    command,
    read_settings,
)
from stability_exponents import flat
from stability_tables import draw, told
from testbed import (
    POLICY,
    Place,
    Recorded,
    Testbed,
    check_bases,
    csv_of,
    testbed_of,
    trained,
    write_rows,
)

from mergekit_lit.callbacks import StabilityTwins
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.files import write_text
from mergekit_lit.core.measurements import read_measurements
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.search.crew import Crew
from mergekit_lit.stages.recipes import Recipe

_KEYS = {
    "suite": WORD,
    "backbones": WORDS,
    "tasks": WORDS,
    "seeds": SEEDS,
    "images": COUNT,
    "replaced": COUNTS,
    "twins": COUNTS,
    "configurations": LIST,
}
_FACTORS = {"lr": NUMBER, "batch": COUNT, "steps": STEPS, "train_share": SHARE, "export": FLAG}


@dataclass(frozen=True)
class Run(Recorded):
    """One configuration of one backbone and seed, for all tasks."""

    backbone: str
    suite: str
    tasks: tuple[str, ...]
    seed: int
    images: int
    steps: tuple[int, ...]
    twins: tuple[int, ...]
    replaced: tuple[int, ...]
    lr: float
    batch: int
    train_share: float
    export: bool
    out: Path

    @property
    def name(self) -> str:
        """Name of the configuration."""
        share = "" if self.train_share == 1 else f"-share{self.train_share:g}"
        return f"lr{self.lr:g}-b{self.batch}{share}-{self.seed}"

    @property
    def record(self) -> Path:
        """Where its scores lie, once they are made."""
        return self.out / f"{self.name}.json"

    @property
    def twinned(self) -> StabilityTwins:
        """The twins of one training."""
        # That a twin with nothing replaced stays where the run is, the tests show.
        return StabilityTwins(
            twins=self.twins, replaced=self.replaced, null=False, every=10, export=self.export
        )

    def data(self, task: str) -> TaskDataModule:
        """Return the images that experts of a task are trained on."""
        return TaskDataModule(self.suite, task, batch=self.batch, train_share=self.train_share)


def main() -> None:
    """Make what is missing, and print the tables of each backbone."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="YAML: suite, tasks, configurations ...")
    parser.add_argument("--suite", help="in place of the file's, such as your own folder")
    parser.add_argument("--backbones", nargs="+", help="some of the file's, or others")
    parser.add_argument("--tasks", nargs="+", help="in place of the file's")
    parser.add_argument("--out", type=Path, default=Path("runs/stability"))
    parser.add_argument("--figures", type=Path, help="folder of the figures; none without it")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    settings = read_settings(given.file, _KEYS, suite=given.suite, tasks=given.tasks)
    chosen = given.backbones or settings["backbones"]
    every = dict.fromkeys([*settings["backbones"], *chosen])
    runs = {backbone: list(runs_of(settings, backbone, given.out)) for backbone in every}
    check([run for of in runs.values() for run in of], [r for name in chosen for r in runs[name]])
    for backbone in chosen:
        with Crew(given.jobs) as crew:
            crew.run(make, runs[backbone])
        rows = rows_in(run.record for run in runs[backbone])
        print(f"\n### {backbone}\n\n{told(rows)}", flush=True)
        if given.figures:
            draw(given.figures, backbone, rows)
    everyone = [
        {**row, "backbone": backbone}
        for backbone, of in runs.items()
        for row in rows_in(run.record for run in of)
    ]
    first = ("backbone", "task", "lr", "batch", "train_share", "n", "seed", "steps")
    write_text(given.out / f"{given.file.stem}.csv", csv_of(list(flat(everyone)), first))


def runs_of(settings: Mapping[str, Any], backbone: str, out: Path) -> Iterator[Run]:
    """Yield every run of a backbone.

    Raises:
        KeyError: an unknown key, suite or task.
        ValueError: a key is missing, or a value is not what it must be.
    """
    tasks = load_suite(settings["suite"]).chosen(settings["tasks"])
    for configuration in settings["configurations"]:
        optional = ("train_share", "export")
        own = check_keys("a configuration", configuration, _FACTORS, optional=optional)
        for seed in settings["seeds"]:
            chosen = {"train_share": 1.0, "export": False, **own}
            yield Run(
                backbone=backbone,
                suite=settings["suite"],
                tasks=tasks,
                seed=seed,
                images=settings["images"],
                twins=tuple(settings["twins"]),
                replaced=tuple(settings["replaced"]),
                out=out / backbone.replace("/", "-"),
                **{**chosen, "steps": tuple(chosen["steps"])},
            )


def check(runs: Sequence[Run], chosen: Sequence[Run]) -> None:
    """Refuse, before any training, records of other runs, and runs that cannot be made.

    Args:
        runs: all that become rows of the table.
        chosen: those to be made.

    Raises:
        KeyError: an unknown base.
        ValueError: a record of another configuration, or twins that the images do not suffice for.
    """
    for run in runs:
        check_same(run.record, run.config)
    missing = [run for run in chosen if not run.record.is_file()]
    check_bases(run.backbone for run in missing)
    suites = {run.suite: load_suite(run.suite) for run in missing}
    # Of each share of the images once, not of every run.
    for run in {run.train_share: run for run in missing}.values():
        most = max(place.m for place in run.twinned.places)
        for task in run.tasks:
            data = suites[run.suite].task(task).load(run.data(task).options)
            least = min(len(data.reserve), len(data.train))
            if most > least:
                raise ValueError(
                    f"`replaced` must be at most {least}, the images of task {task!r} in the "
                    f"reserve or to train on, but is {most}. Replace fewer."
                )


def make(run: Run) -> Path:
    """Train the experts of one configuration with their twins, and write their scores."""
    return write_rows(
        run.record,
        lambda: rows_of(run, [train(run, task) for task in run.tasks]),
        stage="stability",
        name=run.name,
        config=run.config,
        seeds={"seed": run.seed},
    )


def train(run: Run, task: str) -> tuple[Path, ...]:
    """Train one run with its twins, and return its experts by step count."""
    made = trained(
        run.data(task),
        ExpertModule(run.backbone, lr=run.lr, schedule="constant", warmup_steps=0, seed=run.seed),
        steps=run.steps,
        out=run.out / f"{task}-{run.name}",
        callbacks=[run.twinned],
    )
    return tuple(made.values())


def rows_of(run: Run, files: Sequence[Sequence[Path]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each step count: of every expert, and of their average.

    Args:
        run: the configuration.
        files: of each task, an expert for each step count.
    """
    bed = testbed_of(
        Place(
            backbone=run.backbone,
            suite=run.suite,
            seed=run.data(run.tasks[0]).options.seed,
            train_share=run.train_share,
            images=run.images,
        )
    )
    for steps, paths in zip(run.steps, zip(*files, strict=True), strict=True):
        experts = bed.experts(paths)
        merged = bed.merged(experts, Recipe(batch_norm=POLICY))
        alone = [load_expert(path) for path in paths]
        gaps = {
            "expert": gaps_of(bed, alone, experts),
            "merged": gaps_of(bed, merged, experts),
            "base": gaps_of(bed, bed.base, experts),
        }
        yield {
            **{name: getattr(run, name) for name in ("lr", "batch", "train_share", "seed")},
            "steps": steps,
            "experts": {
                task: measured_of(path) for task, path in zip(run.tasks, paths, strict=True)
            },
            "gaps": gaps,
        }


def gaps_of(bed: Testbed, model: Any, experts: Any) -> dict[str, float]:
    """Return test less training loss of a model on each task."""
    train, test = (
        bed.scores({"model": model}, experts, split=split)["model"] for split in ("train", "test")
    )
    return {task: test[task]["loss"] - train[task]["loss"] for task in train}


def measured_of(path: Path) -> dict[str, Any]:
    """Return what an expert's twins and card tell: squared distances by replaced samples."""
    card, stability = load_expert(path).card, read_measurements(path)["stability"]
    return {
        "eps2": {m: found["backbone"]["mean"] for m, found in stability["replaced"].items()},
        "each": {m: found["each"] for m, found in stability["replaced"].items()},
        "above": {m: found["above_rounding"] for m, found in stability["replaced"].items()},
        "rounding": stability["rounding"],
        "eps_path": card.eps_path,
        "displacement": card.displacement,
        "train_accuracy": card.train_accuracy,
        "n": card.n,
    }


if __name__ == "__main__":
    sys.exit(command(main))
