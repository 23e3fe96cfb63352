"""This file tells, for every method, which term of the bound falls against the simple average.

    python experiments/terms.py experiments/terms.yaml --backbones vit --experts runs/stability

Merges one group of experts by each method, has every term of the bound measured as
`mergekit-lit bound` does, and prints a table in which ↓ marks what lies below the average's value
by more than 5 %, and ↑ what lies above. What is there is not made again. A merge that is no sum of
scaled deltas has no coefficients: terms that need some take the average's, with the merge's own L
and losses, and stand in brackets; its Delta is known only where the twins' refits lie beside the
experts. `descent` holds for any merge. The numbers go to `<out>/terms_<backbone>_<steps>.csv` too.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods import Row, row_of
from omegaconf import OmegaConf
from testbed import csv_of

from mergekit_lit.core.files import write_text
from mergekit_lit.core.records import Record
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.search.crew import Crew
from mergekit_lit.stages.bound import bound_files
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.recipes import Recipe
from mergekit_lit.theory.effort import Effort

LEAST = 0.05
"""The least change against the average that is told, as a share."""

WEIGHED = (
    *("progress", "drift", "overshoot", "mismatch", "merged_noise", "divergence"),
    "delta2_by_path",
)
"""Terms that rest on coefficients."""
BRACKETED = {*WEIGHED, "chi2_lambda", "chi2_w", "total"}
"""Columns that are the average's where a merge has no coefficients of its own."""
OTHERS = ("descent", "merged_gradient", "delta2", "delta2_by_refits", "generalization")


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
        name = "".join(c if c.isalnum() else "-" for c in self.row.name)
        return self.out / f"{name}.json"

    @property
    def linear(self) -> bool:
        """Whether the merge is a sum of scaled deltas, as a whole or by tensor."""
        blocks = Record.read(self.record).metrics["bound"]["weighing"].get("blocks")
        return MERGE_METHODS.get(self.row.method).facts["form"] == "linear" or bool(blocks)


def main() -> None:
    """Make what is missing, and print a table of each backbone."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="YAML: suite, tasks, experts, rows ...")
    parser.add_argument("--suite", help="in place of the file's, such as your own folder")
    parser.add_argument("--backbones", nargs="+", help="in place of the file's")
    parser.add_argument("--steps", type=int, help="of the experts, in place of the file's")
    parser.add_argument("--rows", nargs="+", help="some of the file's, the first among them")
    parser.add_argument("--experts", type=Path, default=Path("runs/stability"))
    parser.add_argument("--out", type=Path, default=Path("runs/terms"))
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    settings: Any = OmegaConf.to_container(OmegaConf.load(given.file))
    settings |= {k: v for k in ("suite", "backbones", "steps") if (v := getattr(given, k))}
    names = [row_of(entry).name for entry in settings["rows"]]
    if wrong := set(given.rows or []) - set(names):
        parser.error(f"--rows must name rows of {given.file}, {names}, but names {sorted(wrong)}.")
    for backbone in settings["backbones"]:
        jobs = [
            job
            for job in jobs_of(settings, backbone, given.experts, given.out)
            if given.rows is None or job.row.name in given.rows
        ]
        with Crew(given.jobs) as crew:
            crew.run(make, jobs)
        print(f"\n### {backbone}, {settings['steps']} steps\n\n{told(jobs)}", flush=True)
        rows = [{"method": job.row.name, **values(job)} for job in jobs]
        name = f"terms_{backbone.replace('/', '-')}_{settings['steps']}.csv"
        write_text(given.out / name, csv_of(rows, ("method",)))


def jobs_of(settings: Mapping[str, Any], backbone: str, experts: Path, out: Path) -> list[Job]:
    """Return one job for each row of a file."""
    folder, steps = backbone.replace("/", "-"), settings["steps"]
    names = [
        settings["experts"].format(backbone=folder, task=task, steps=steps)
        for task in settings["tasks"]
    ]
    calibration = Calibration(
        suite=settings["suite"],
        options=SplitOptions(**settings["split"]),
        images=settings["images"],
    )
    return [
        Job(
            row_of(entry),
            tuple(experts / name for name in names),
            calibration,
            Effort(**settings["effort"]),
            out / f"{folder}-{steps}",
        )
        for entry in settings["rows"]
    ]


def make(job: Job) -> Path:
    """Measure one method; a finished one is left."""
    if not job.record.is_file():
        bound_files(
            job.experts,
            recipe=Recipe(
                method=job.row.method,
                config=job.row.config,
                batch_norm="recalibrate-per-task",
            ),
            calibration=job.calibration,
            effort=job.effort,
            refits=all(path.with_suffix(".twins").is_dir() for path in job.experts),
            out=job.record,
        )
        print(job.record, flush=True)
    return job.record


def told(jobs: Sequence[Job]) -> str:
    """Return a table of terms, a line for each method, marked against the first."""
    found = [values(job) for job in jobs]
    names = list(found[0])
    lines = [
        f"| method | {' | '.join(name.replace('_', ' ') for name in names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for job, row in zip(jobs, found, strict=True):
        cells = []
        for name in names:
            cell = marked(row[name], found[0][name])
            cells.append(cell if job.linear or name not in BRACKETED else f"({cell})")
        lines.append(f"| {' | '.join([job.row.name, *cells])} |")
    return "\n".join(lines)


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
    main()
