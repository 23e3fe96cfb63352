"""This file builds the benchmark of merges: what can be known of each, and what came out.

    python experiments/merges.py experiments/merges.yaml --real FOLDER --jobs 2
    python experiments/merges.py --columns

Draws groups of 2 to 8 experts, half of them trained alike, half each in its own way; trains what is
missing (one training serves several step counts); merges each group by eight of the methods, with
scales and densities that are drawn too, so that good and bad ones occur; and writes one record a
group. What is there is not made again, so that a killed run goes on. The rows of all records become
`<out>/merges.parquet`, one row a merge and task, and `<out>/merges.json` tells how they were made
and the table's hash; both ship with the package. `--columns` prints what the columns are.

Tasks that a shipped base has seen are left out. `--real FOLDER` adds the tasks of a folder, whose
rows are marked `real`; they are never mixed with the others. `--limit N` makes N groups alone of
each backbone and pool, `--backbones resnet` those of one backbone.

How it is measured: heads are frozen nearest class means; BatchNorm statistics of merges, experts
and base are estimated again on the same few training images of each task. Outcomes alone are
measured on test images: features are made before these are looked at, of tasks without them.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from time import process_time
from typing import Any

import torch
from merge_groups import Cell, Group, MergePlan, groups_of_pool
from omegaconf import OmegaConf
from testbed import POLICY, Recorded, trained, write_rows

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.files import file_hash, read_json, write_json
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.data.splits import SplitOptions, TaskData
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.recalibration import calibration_images, images_by_split, splits_needed
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.models.backbones import load_base
from mergekit_lit.search.crew import Crew
from mergekit_lit.search.predicting.cards import of_cards
from mergekit_lit.search.predicting.columns import Row, joined
from mergekit_lit.search.predicting.data import of_data, of_probe
from mergekit_lit.search.predicting.deltas import angles_of, of_deltas, of_step
from mergekit_lit.search.predicting.probing import Score, probe_of, score_of, scores_on
from mergekit_lit.search.predicting.sights import (
    OfExpert,
    Sight,
    blind,
    look_at_expert,
    one_of,
    see,
    sight_of,
)
from mergekit_lit.search.predicting.table import columns_told, write_table
from mergekit_lit.search.tuning.scores import Scorer
from mergekit_lit.stages.recipes import Recipe, merge_recipe
from mergekit_lit.theory.effort import Effort


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Tasks of one suite, for one backbone, and how they are learned and looked at."""

    name: str
    backbone: str
    suite: str
    tasks: tuple[str, ...]
    seed: int
    schedule: str
    warmup_steps: int
    trainings: tuple[tuple[float, int, int, tuple[int, ...]], ...]
    test_images: int
    val_images: int
    effort: Effort
    out: Path

    @property
    def folder(self) -> Path:
        """Where experts and records lie."""
        return self.out / self.backbone.replace("/", "-") / self.name


@dataclass(frozen=True)
class Job(Recorded):
    """One group of a pool, to be merged and measured."""

    pool: Pool
    group: Group

    @property
    def record(self) -> Path:
        """Where its record lies, once it is made."""
        return self.pool.folder / "groups" / f"{self.group.name}.json"


def main() -> None:
    """Make what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--suite", help="in place of the suite of the pool `embedded`")
    parser.add_argument("--real", type=Path, help="folder of real tasks; left out without one")
    parser.add_argument("--backbones", nargs="+", help="some of the file's")
    parser.add_argument("--limit", type=int, help="number of groups of each backbone and pool")
    parser.add_argument("--out", type=Path, default=Path("runs/merges"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--columns", action="store_true", help="print the columns, and leave")
    given = parser.parse_args()
    if given.columns:
        print(columns_told())
        return
    settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(given.file))
    jobs = jobs_of(settings, given.out, real=given.real, suite=given.suite)
    chosen = [
        job for job in jobs if job.pool.backbone in (given.backbones or settings["backbones"])
    ]
    with Crew(given.jobs) as crew:
        crew.run(
            make, [job for job in chosen if given.limit is None or job.group.place < given.limit]
        )
    made = [job.record for job in jobs if job.record.is_file()]
    rows = [row for record in made for row in read_json(record)["metrics"]["rows"]]
    table = given.out / "merges.parquet"
    write_table(table, rows)
    write_json(table.with_suffix(".json"), provenance(settings, table, rows))
    print(f"{len(rows)} rows of {len(made)} groups in {table}", flush=True)


def provenance(settings: Mapping[str, Any], table: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Return how a table was made, what is in it, and its hash."""
    keys = ("backbone", "suite", "group")
    return {
        "command": "python experiments/merges.py experiments/merges.yaml --real FOLDER",
        "settings": settings,
        "sha256": file_hash(table),
        "rows": len(rows),
        "merges": len({tuple(row[key] for key in (*keys, "merge")) for row in rows}),
        "groups": len({tuple(row[key] for key in keys) for row in rows}),
        "tasks": {
            suite: sorted({row["task"] for row in rows if row["suite"] == suite})
            for suite in sorted({row["suite"] for row in rows})
        },
    }


def jobs_of(
    settings: Mapping[str, Any], out: Path, *, real: Path | None = None, suite: str | None = None
) -> list[Job]:
    """Return every group of a file, backbone by backbone and pool by pool."""
    named = {"embedded": suite, "real": str(real) if real else None}
    found = []
    for backbone in settings["backbones"]:
        for name, own in settings["pools"].items():
            chosen = named.get(name) or own.get("suite")
            if chosen is None:
                continue
            plan = MergePlan.of(settings, own)
            pool = _pool(settings, name, chosen, backbone, plan, out)
            found += [Job(pool, group) for group in groups_of_pool(pool.tasks, plan)]
    return found


def unseen(suite: str) -> tuple[str, ...]:
    """Return the tasks of a suite that no shipped base has seen."""
    return tuple(task.name for task in load_suite(suite).tasks if not task.seen_by)


def _pool(
    settings: Mapping[str, Any], name: str, suite: str, backbone: str, plan: MergePlan, out: Path
) -> Pool:
    shared = ("seed", "schedule", "warmup_steps", "test_images", "val_images")
    return Pool(
        name=name,
        backbone=backbone,
        suite=suite,
        tasks=unseen(suite),
        trainings=plan.trainings,
        effort=Effort(**settings["effort"]),
        out=out,
        **{key: settings[key] for key in shared},
    )


def make(job: Job) -> Path:
    """Train, merge and measure one group, and write its record; a finished one is left."""
    seconds: dict[str, float] = {}
    path = write_rows(
        job.record,
        lambda: rows_of(job, seconds),
        stage="merges",
        name=job.group.name,
        config=job.config,
        seeds={"seed": job.pool.seed},
    )
    if seconds:
        print(
            "  " + ", ".join(f"{part} {spent:.1f}" for part, spent in seconds.items()), flush=True
        )
    return path


def rows_of(job: Job, seconds: dict[str, float] | None = None) -> Iterator[Row]:
    """Yield a row a merge and task of one group.

    Args:
        job: the group.
        seconds: is told the processor time of each part.
    """
    clock = Clock({} if seconds is None else seconds)
    files = [expert_file(job.pool, task, cell) for task, cell in job.group.members]
    clock.lap("train")
    bed = bed_of(job.pool)
    experts = bed.experts(files)
    sights = [bed.sight(experts, t, cell) for t, (_, cell) in enumerate(job.group.members)]
    alone = [bed.alone(file, experts, t, sights[t]) for t, file in enumerate(files)]
    clock.lap("tasks and experts")
    angles = of_deltas(experts, angles_of(experts))
    clock.lap("geometry")
    average = bed.merged(experts, sights, Recipe())
    seen = see(experts, average, sights, alone)
    clock.lap("data")
    tasks = [sight.data for sight in sights]
    probe = probe_of(average, bed.backbone, tasks, bed.val, effort=job.pool.effort)
    probed = of_probe(experts, seen, probe)
    clock.lap("probe")
    keys = [bed.keys(job, t) for t in range(len(experts))]
    known = [bed.outcomes(file, experts, t, sights[t]) for t, file in enumerate(files)]
    clock.lap("tasks and experts")
    for place, (method, config) in enumerate(job.group.merges):
        recipe = Recipe(method=method, config=config, batch_norm=POLICY, seed=job.pool.seed)
        merged = bed.merged(experts, sights, recipe)
        clock.lap("merge")
        parts = (of_cards(experts, merged), angles, of_step(experts, merged))
        clock.lap("geometry")
        by_data = of_data(experts, merged, seen)
        clock.lap("data")
        about = {"merge": place, "method": method, "config": json.dumps(config, sort_keys=True)}
        about["looks_at"] = MERGE_METHODS.get(method).facts["data"]
        outcomes = _outcomes(scores_on(bed.test, merged, experts.names), known)
        clock.lap("score")
        named = [{**row, **about} for row in keys]
        yield from joined(named, *parts, by_data, probed, outcomes)


class Clock:
    """Adds up processor time by part."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, process_time()

    def lap(self, part: str) -> None:
        """Count what has passed since the last lap for a part."""
        now = process_time()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now


def expert_file(pool: Pool, task: str, cell: Cell) -> Path:
    """Return the file of an expert; train what is missing of its trajectory."""
    (steps,) = (
        s for *own, s in pool.trainings if own == [cell.lr, cell.batch, cell.n] and cell.steps in s
    )
    made = trained(
        TaskDataModule(pool.suite, task, batch=cell.batch, n=cell.n, split_seed=pool.seed),
        ExpertModule(
            pool.backbone,
            lr=cell.lr,
            schedule=pool.schedule,  # type: ignore[arg-type] # checked there
            warmup_steps=pool.warmup_steps,
            seed=pool.seed,
        ),
        steps=steps,
        out=pool.folder / "experts" / cell.training,
        name=task,
    )
    return made[cell.steps]


class Bed:
    """Base, images and all that groups share, kept in each process.

    Features come from tasks without test images (`sight`, `alone`, `val`), outcomes from `test`.
    """

    def __init__(self, pool: Pool) -> None:
        """Load what stays the same."""
        torch.set_num_threads(1)
        self._pool, self._suite = pool, load_suite(pool.suite)
        self.backbone, self.base = load_base(pool.backbone)
        whole = [self._suite.task(task).load(SplitOptions(seed=pool.seed)) for task in pool.tasks]
        self.val = Scorer(self.backbone, [blind(task, images=pool.val_images) for task in whole])
        tests = [tested(task, images=pool.test_images) for task in whole]
        self.test = Scorer(self.backbone, tests)
        self._sights: dict[tuple[str, int], Sight] = {}
        self._alone: dict[Path, OfExpert] = {}
        self._known: dict[Path, Row] = {}

    def experts(self, files: Sequence[Path]) -> Experts:
        """Return experts of the base, in memory."""
        return in_memory(load_experts(files, base=self.base))

    def sight(self, experts: Experts, t: int, cell: Cell) -> Sight:
        """Return what images tell of the base under the head of one expert, which n decides."""
        task = experts.names[t]
        if (task, cell.n) not in self._sights:
            options = SplitOptions(seed=self._pool.seed, n=cell.n)
            data = blind(self._suite.task(task).load(options), images=self._pool.val_images)
            self._sights[task, cell.n] = sight_of(
                one_of(experts, t), self.backbone, data, self.val, effort=self._pool.effort
            )
        return self._sights[task, cell.n]

    def alone(self, file: Path, experts: Experts, t: int, sight: Sight) -> OfExpert:
        """Return what images tell of one expert."""
        if file not in self._alone:
            one, effort = one_of(experts, t), self._pool.effort
            self._alone[file] = look_at_expert(one, self.backbone, sight, self.val, effort=effort)
        return self._alone[file]

    def merged(self, experts: Experts, sights: Sequence[Sight], recipe: Recipe) -> Merged:
        """Return a merge, with a few training images where it looks at some."""
        needed = splits_needed(recipe.method, recipe.batch_norm, experts.structure)
        tasks = [sight.data for sight in sights]
        images = images_by_split(tasks, needed, count=self._pool.effort.images)
        return merge_recipe(experts, recipe, self.backbone, images)

    def outcomes(self, file: Path, experts: Experts, t: int, sight: Sight) -> Row:
        """Return how base and expert do on the task's test images."""
        if file not in self._known:
            one = one_of(experts, t)
            found = {
                name: score_of(
                    one, params, self.backbone, sight.data, self.test, effort=self._pool.effort
                )
                for name, params in (("base", one.base), ("expert", one.tuned[0]))
            }
            self._known[file] = {
                f"test_{name}_{what}": value
                for name, score in found.items()
                for what, value in asdict(score).items()
            } | {"test_images": len(self.test.labels[experts.names[t]])}
        return self._known[file]

    def keys(self, job: Job, t: int) -> Row:
        """Return what a row is of, but for its merge."""
        group = job.group
        task, cell = group.members[t]
        return {
            "backbone": self._pool.backbone,
            "suite": Path(self._pool.suite).name,
            "real": self._pool.name == "real",
            "group": group.name,
            "uniform": group.uniform,
            "tasks": "+".join(name for name, _ in group.members),
            "task": task,
            "expert": cell.name,
        }


def tested(task: TaskData, *, images: int) -> TaskData:
    """Return a task with a few test images where a scorer looks: among those of val."""
    return replace(task, val=calibration_images(task.test, task.name, count=images))


@lru_cache(maxsize=1)
def bed_of(pool: Pool) -> Bed:
    """Return the bed of a pool, made once in each process."""
    return Bed(pool)


def _outcomes(merged: Mapping[str, Score], known: Sequence[Row]) -> list[Row]:
    return [
        {
            **row,
            "test_accuracy": score.accuracy,
            "test_loss": score.loss,
            "test_excess_error": score.loss - row["test_expert_loss"],
        }
        for score, row in zip(merged.values(), known, strict=True)
    ]


if __name__ == "__main__":
    main()
