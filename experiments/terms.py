"""This file tells, for every method, which term of the bound falls against the simple average.

    python experiments/terms.py experiments/terms.yaml --backbones vit --experts runs/stability

Merges one group of experts by each method, has every term of the bound measured as
`mergekit-lit bound` does, and prints a table in which ↓ marks what lies below the average's value
by more than 5 %, and ↑ what lies above. What is there is not made again. A merge that is no sum of
scaled deltas has no coefficients, and no terms that need some; its Delta is known only where the
twins' refits lie beside the experts. `descent` holds for any merge. The numbers of all rows that
are finished go to `<out>/terms_<backbone>_<steps>.csv`.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finished import check_same, stem_of
from inputs import COUNT, LIST, MAPPING, WORD, WORDS, built, command, named, read_settings
from markdown import table
from methods import Row, row_of
from testbed import csv_of

from mergekit_lit.core.files import write_text
from mergekit_lit.core.records import Record
from mergekit_lit.core.twin_files import twins_folder
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.data.suites import load_suite
from mergekit_lit.search.crew import Crew
from mergekit_lit.stages.bound import bound_files
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.recipes import Recipe
from mergekit_lit.theory.effort import Effort

AVERAGE = Row("average", "average")
"""What the others are compared with."""
LEAST = 0.05
"""The least change against the average that is told, as a share."""

WEIGHED = (
    *("progress", "drift", "overshoot", "mismatch", "merged_noise", "divergence"),
    "delta2_by_path",
)
"""Terms that rest on coefficients."""
OTHERS = ("descent", "merged_gradient", "delta2", "delta2_by_refits", "generalization")


_KEYS = {
    "suite": WORD,
    "backbones": WORDS,
    "tasks": WORDS,
    "experts": WORD,
    "steps": COUNT,
    "split": MAPPING,
    "images": COUNT,
    "effort": MAPPING,
    "rows": LIST,
}


@dataclass(frozen=True)
class Job:
    """One method on one group of experts."""

    row: Row
    experts: tuple[Path, ...]
    calibration: Calibration
    effort: Effort
    out: Path

    @property
    def record(self) -> Path:
        """Where its record lies, once it is made."""
        return self.out / f"{stem_of(self.row.name)}.json"

    @property
    def recipe(self) -> Recipe:
        """What is merged how."""
        return Recipe(
            method=self.row.method, config=self.row.config, batch_norm="recalibrate-per-task"
        )

    def check(self, *, made: bool) -> None:
        """Refuse a record of other settings, or experts that are missing.

        Args:
            made: whether it is to be made where it has no record yet.

        Raises:
            FileNotFoundError: an expert is missing.
            ValueError: the record is of another configuration.
        """
        settings = {
            "recipe": asdict(self.recipe),
            "calibration": asdict(self.calibration),
            "effort": asdict(self.effort),
        }
        check_same(self.record, settings)
        found = Record.find(self.record)
        there = [Path(path).parts[-2:] for path in found.config["experts"]] if found else []
        if found and there != [path.parts[-2:] for path in self.experts]:
            raise ValueError(
                f"{str(self.record)!r} must be a record of {self.experts[0]} and its like, but is "
                f"of {found.config['experts'][0]}. Choose another --out."
            )
        if not made or self.record.is_file():
            return
        for path in self.experts:
            if not path.is_file():
                raise FileNotFoundError(f"No file {str(path)!r}. Train it, or give `--experts`.")


def main() -> None:
    """Make what is missing, and print a table of each backbone."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="YAML: suite, tasks, experts, rows ...")
    parser.add_argument("--suite", help="in place of the file's, such as your own folder")
    parser.add_argument("--backbones", nargs="+", help="in place of the file's")
    parser.add_argument("--steps", type=int, help="of the experts, in place of the file's")
    parser.add_argument("--rows", nargs="+", help="some of the file's, beside the average")
    parser.add_argument("--experts", type=Path, default=Path("runs/stability"))
    parser.add_argument("--out", type=Path, default=Path("runs/terms"))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    overrides = {name: getattr(given, name) for name in ("suite", "backbones", "steps")}
    settings = read_settings(given.file, _KEYS, **overrides)
    names = [AVERAGE.name, *named_rows(settings, given.rows, given.file)]
    every = {b: jobs_of(settings, b, given.experts, given.out) for b in settings["backbones"]}
    for job in [job for jobs in every.values() for job in jobs]:
        job.check(made=job.row.name in names)
    for backbone, jobs in every.items():
        chosen = [job for job in jobs if job.row.name in names]
        with Crew(given.jobs) as crew:
            crew.run(make, chosen)
        print(f"\n### {backbone}, {settings['steps']} steps\n\n{told(chosen)}", flush=True)
        # Of all rows, so that one after the other ends in the table of all.
        finished = [job for job in jobs if job.record.is_file()]
        rows = [{"method": job.row.name, **values(job)} for job in finished]
        name = f"terms_{backbone.replace('/', '-')}_{settings['steps']}.csv"
        write_text(given.out / name, csv_of(rows, ("method",)))


def named_rows(settings: Mapping[str, Any], wanted: Sequence[str] | None, file: Path) -> list[str]:
    """Return the names of the rows that are wanted, all of them where None are named.

    Raises:
        KeyError: there is no such row.
        ValueError: the average is not among the rows of the file, or two rows share a name.
    """
    rows = [row_of(entry) for entry in settings["rows"]]
    if AVERAGE not in rows:
        raise ValueError(
            f"`rows` of {str(file)!r} must hold `average`, to compare the others with."
        )
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"`rows` of {str(file)!r} must have a name each, but are {names!r}.")
    return named(f"row of {file}", wanted, names)


def jobs_of(settings: Mapping[str, Any], backbone: str, experts: Path, out: Path) -> list[Job]:
    """Return one job for each row of a file.

    Raises:
        KeyError: an unknown suite, task or key.
        ValueError: `experts` names a place that is not there.
    """
    folder, steps = backbone.replace("/", "-"), settings["steps"]
    tasks = load_suite(settings["suite"]).chosen(settings["tasks"])
    try:
        names = [
            settings["experts"].format(backbone=folder, task=task, steps=steps) for task in tasks
        ]
    except (KeyError, IndexError):
        raise ValueError(
            "`experts` must name places by {backbone}, {task} and {steps} alone, but is "
            f"{settings['experts']!r}."
        ) from None
    calibration = Calibration(
        suite=settings["suite"],
        options=built("`split`", SplitOptions, settings["split"]),
        images=settings["images"],
    )
    return [
        Job(
            row_of(entry),
            tuple(experts / name for name in names),
            calibration,
            built("`effort`", Effort, settings["effort"]),
            out / f"{folder}-{steps}",
        )
        for entry in settings["rows"]
    ]


def make(job: Job) -> Path:
    """Measure one method; a finished one is left."""
    if not job.record.is_file():
        bound_files(
            job.experts,
            recipe=job.recipe,
            calibration=job.calibration,
            effort=job.effort,
            refits=all(twins_folder(path).is_dir() for path in job.experts),
            out=job.record,
        )
        print(job.record, flush=True)
    return job.record


def told(jobs: Sequence[Job]) -> str:
    """Return a table of terms, a line for each method, marked against the average."""
    found = [values(job) for job in jobs]
    (average,) = [row for job, row in zip(jobs, found, strict=True) if job.row == AVERAGE]
    names = list(average)
    lines = [
        [job.row.name, *(marked(row[name], average[name]) for name in names)]
        for job, row in zip(jobs, found, strict=True)
    ]
    return table(["method", *(name.replace("_", " ") for name in names)], lines)


def values(job: Job) -> dict[str, float | str]:
    """Return losses, divergences and terms of a record: numbers, or why there is none."""
    metrics = Record.read(job.record).metrics
    bound, experts = metrics["bound"], metrics["experts"]
    found: dict[str, float | str] = {
        name: statistics.fmean(row[name] for row in experts)
        for name in ("train_loss", "test_loss", "gap")
    }
    found |= {name: _known(bound["weighing"][name]) for name in ("chi2_lambda", "chi2_w")}
    for name in (*WEIGHED, *OTHERS):
        term = bound["terms"][name]
        found[name] = term["provenance"] if term["value"] is None else term["value"]
    return {**found, **{name: _known(bound[name]) for name in ("total", "total_by_step")}}


def marked(value: float | str, average: float | str) -> str:
    """Return a number, marked if it lies below or above the average's; or a word as it is."""
    if isinstance(value, str):
        return value
    number = f"{value:.3g}"
    if isinstance(average, str) or abs(value - average) <= LEAST * abs(average):
        return number
    return f"{number} {'↓' if value < average else '↑'}"


def _known(value: float | None) -> float | str:
    return "unknown" if value is None else value


if __name__ == "__main__":
    sys.exit(command(main))
