"""This file makes the grids on which searches are compared: every merge of a group, scored once.

It is a module, not a command.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from time import process_time
from typing import Any, TypeAlias

import numpy as np
import torch
from merges import Job, Pool, expert_file, jobs_of, tested
from numpy.typing import NDArray
from testbed import write_rows

from mergekit_lit.core.experts import Experts
from mergekit_lit.core.files import read_json
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.data.splits import SplitOptions, TaskData
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.recalibration import calibration_images
from mergekit_lit.merging.configuration import SCALE
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.models.backbones import load_base
from mergekit_lit.reports.intervals import pack_flags, unpack_flags
from mergekit_lit.search.tuning.bench import Bench
from mergekit_lit.search.tuning.group import facts_of_group
from mergekit_lit.search.tuning.loading import make_bench
from mergekit_lit.search.tuning.plan import TuningPlan
from mergekit_lit.search.tuning.pool import Candidate, pool_of
from mergekit_lit.search.tuning.scores import Scorer
from mergekit_lit.search.tuning.space import Space, space_of
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.recipes import Recipe, merge_recipe

Array: TypeAlias = NDArray[Any]
Vector: TypeAlias = NDArray[np.float64]

ADAPTED = "adamerging"
_ADAPTED_BATCH = 16


@dataclass(frozen=True)
class Work:
    """One group, and what is tried on it.

    Attributes:
        job: the group and its pool.
        pool: every candidate, the reference first.
        budget: evaluations that test-time adaptation may cost.
    """

    job: Job
    pool: Sequence[Candidate]
    budget: int


def works_of(
    settings: Mapping[str, Any], out: Path, *, real: Path | None = None, suite: str | None = None
) -> list[Work]:
    """Return what is to be tried of every group of a file; groups are drawn by their own seed."""
    found = []
    for backbone, seed in settings["group_seeds"].items():
        own = {**settings, "seed": seed, "backbones": [backbone]}
        pool = candidates_of(settings, backbone)
        for job in jobs_of(own, out, real=real, suite=suite):
            trained = replace(job.pool, seed=settings["seed"])
            found.append(Work(replace(job, pool=trained), pool, settings["budget"]))
    return found


def candidates_of(settings: Mapping[str, Any], backbone: str) -> list[Candidate]:
    """Return the grid of one backbone."""
    cut = settings["grids"][backbone]
    methods = [entry["method"] for entry in settings["methods"]]
    return pool_of({name: _space(name, cut) for name in methods}, cut["policies"])


def _space(method: str, cut: Mapping[str, Any]) -> Space:
    entry = MERGE_METHODS.get(method)
    declared = entry.facts.get("search", {})
    points = {name: cut["scale" if name == SCALE else "other"] for name in declared}
    if len(declared) == 1:
        points = dict.fromkeys(declared, cut["one"])
    return {name: space_of(entry, points=count)[name] for name, count in points.items()}


def make_grid(work: Work) -> Path:
    """Train what is missing, try everything, and write the record; a finished one is left."""
    job = work.job
    return write_rows(
        job.record,
        lambda: _rows(work),
        stage="tuning",
        name=job.group.name,
        config=asdict(job),
        seeds={"seed": job.pool.seed},
    )


def _rows(work: Work) -> Iterator[dict[str, Any]]:
    """Yield first what is known of the group, then a row for each candidate."""
    job, clock = work.job, process_time()
    files = [expert_file(job.pool, task, cell) for task, cell in job.group.members]
    bed = bed_of(job.pool)
    experts = bed.experts(files)
    bench = bed.bench(experts)
    yield {
        "backbone": job.pool.backbone,
        "real": job.pool.name == "real",
        "group": job.group.name,
        "tasks": list(experts.names),
        "facts": facts_of_group(experts),
        "labels": {task: bench.scorer.labels[task].tolist() for task in experts.names},
        "adapted": _adapted(bed, bench, work),
        "preparing_seconds": process_time() - clock,
    }
    for candidate, found in _scored(bench, bed.test, work.pool):
        yield {**asdict(candidate), **found}


def _scored(
    bench: Bench, test: Scorer, pool: Sequence[Candidate]
) -> Iterator[tuple[Candidate, dict[str, Any]]]:
    """Yield candidates with answers to val, accuracies on test and CPU-seconds of either."""
    parts: dict[tuple[str, Any], list[Candidate]] = {}
    for each in pool:
        parts.setdefault((each.method, each.batch_norm), []).append(each)
    for (method, policy), candidates in parts.items():
        merges = bench.under(policy).merges(method, [c.config for c in candidates])
        for candidate in candidates:
            start = process_time()
            merged = next(merges)
            if isinstance(merged, ValueError):
                raise merged
            val = bench.scorer.outcomes(merged)
            half = process_time()
            places = {task: torch.arange(len(test.labels[task])) for task in merged.tasks}
            yield (
                candidate,
                {
                    "val": {
                        task: pack_flags(outcomes.correct.numpy()) for task, outcomes in val.items()
                    },
                    "test": {t: o.accuracy for t, o in test.outcomes(merged, places).items()},
                    "seconds": half - start,
                    "test_seconds": process_time() - half,
                },
            )


def _adapted(bed: "GridBed", bench: Bench, work: Work) -> dict[str, float]:
    """Return test accuracies of test-time adaptation that costs what a search may spend.

    A step on a batch is a pass forward and one backward, counted as three forward.
    """
    steps = work.budget * work.job.pool.val_images // (3 * _ADAPTED_BATCH)
    policy = work.pool[0].batch_norm
    config = {"steps": steps, "batch": _ADAPTED_BATCH}
    images = {"train": bench.statistics, "test-unlabelled": bed.unlabelled(bench.experts)}
    recipe = Recipe(method=ADAPTED, config=config, batch_norm=policy)
    merged = merge_recipe(bench.experts, recipe, bed.backbone, images)  # type: ignore[arg-type] # splits by name
    places = {task: torch.arange(len(bed.test.labels[task])) for task in merged.tasks}
    return {task: found.accuracy for task, found in bed.test.outcomes(merged, places).items()}


class GridBed:
    """Base, images and all that groups of a pool share, kept in each process."""

    def __init__(self, pool: Pool) -> None:
        """Load what stays the same."""
        torch.set_num_threads(1)
        self._pool = pool
        self.backbone, self.base = load_base(pool.backbone)
        suite = load_suite(pool.suite)
        whole = [suite.task(task).load(SplitOptions(seed=pool.seed)) for task in pool.tasks]
        few = [_few(task, pool) for task in whole]
        self._tasks = {task.name: task for task in few}
        tests = [tested(task, images=pool.test_images) for task in whole]
        self.test = Scorer(self.backbone, tests)

    def experts(self, files: Sequence[Path]) -> Experts:
        """Return experts of the base, in memory."""
        return in_memory(load_experts(files, base=self.base))

    def bench(self, experts: Experts) -> Bench:
        """Return the bench of a search by mean accuracy, on the few validation images."""
        plan = TuningPlan(
            method=["average"],
            metric="accuracy",
            candidate_images=self._pool.effort.images,
            seed=self._pool.seed,
            device="cpu",
        )
        tasks = [self._tasks[name] for name in experts.names]
        images = Calibration(suite=self._pool.suite, images=self._pool.effort.images)
        return make_bench(experts, self.backbone, tasks, plan, images)

    def unlabelled(self, experts: Experts) -> dict[str, Any]:
        """Return the few test images of the experts' tasks."""
        return {name: self._tasks[name].test for name in experts.names}


def _few(task: TaskData, pool: Pool) -> TaskData:
    """Return a task with only so many images of val and test as are looked at."""
    return replace(
        task,
        val=calibration_images(task.val, task.name, count=pool.val_images),
        test=calibration_images(task.test, task.name, count=pool.test_images),
    )


@lru_cache(maxsize=1)
def bed_of(pool: Pool) -> GridBed:
    """Return the bed of a pool, made once in each process."""
    return GridBed(pool)


@dataclass(frozen=True)
class Grid:
    """A group whose candidates are all scored.

    Attributes:
        name: of the group, with backbone and pool.
        backbone: spec of the base.
        real: whether the tasks are real ones.
        facts: what is known of the group beforehand.
        labels: labels of each task's validation images.
        pool: the candidates, the reference first.
        val: whether a candidate has an image right, by task, each (candidates, images).
        test: mean test accuracy of each candidate, (candidates,).
        adapted: mean test accuracy of test-time adaptation.
        seconds: of making and scoring everything on val.
    """

    name: str
    backbone: str
    real: bool
    facts: Mapping[str, float]
    labels: Mapping[str, Array]
    pool: Sequence[Candidate]
    val: Mapping[str, Array]
    test: Vector
    adapted: float
    seconds: float

    @property
    def on_val(self) -> Vector:
        """Mean validation accuracy of each candidate, (candidates,)."""
        found: Vector = np.mean([right.mean(axis=1) for right in self.val.values()], axis=0)
        return found


def read_grid(path: Path) -> Grid:
    """Return the grid that `make_grid` wrote."""
    head, *rows = read_json(path)["metrics"]["rows"]
    labels = {task: np.array(each) for task, each in head["labels"].items()}
    nan = float("nan")
    return Grid(
        name="/".join((head["backbone"], "real" if head["real"] else "embedded", head["group"])),
        backbone=head["backbone"],
        real=head["real"],
        facts={name: nan if value is None else value for name, value in head["facts"].items()},
        labels=labels,
        pool=[Candidate(row["method"], row["config"], row["batch_norm"]) for row in rows],
        val={
            task: np.stack([unpack_flags(row["val"][task], len(each)) for row in rows])
            for task, each in labels.items()
        },
        test=np.array([np.mean(list(row["test"].values())) for row in rows]),
        adapted=float(np.mean(list(head["adapted"].values()))),
        seconds=float(sum(row["seconds"] for row in rows)),
    )
