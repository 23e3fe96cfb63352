"""This file is the quickstart's work: what its crew does for one expert, and for one merge."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mergekit_lit.callbacks.delta_geometry import DeltaGeometry
from mergekit_lit.callbacks.progress import Progress
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.recalibration import calibration_images, recalibrate
from mergekit_lit.lit.run_facts import LoggerKind
from mergekit_lit.merging.configuration import SCALE
from mergekit_lit.merging.engine import merge_many
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.search.coefficients import Choice, choose, scale_grid
from mergekit_lit.search.crew import tell
from mergekit_lit.search.tuning.objective import objective_of
from mergekit_lit.search.tuning.scores import Scorer, expert_rows
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.merge import merge_files
from mergekit_lit.stages.opening import load_base_of
from mergekit_lit.stages.recipes import Recipe
from mergekit_lit.stages.train import train_expert

# Images of a task on which a candidate's BatchNorm statistics are estimated; the final merge takes
# as many as base and experts do.
_SEARCH_IMAGES = 128


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the quickstart does, in full.

    Attributes:
        backbone: spec of the base.
        suite: name of the suite.
        tasks: its tasks.
        out: folder of the run.
        seed: seed of the split, the order and all else.
        steps: optimizer steps of each expert.
        lr: peak learning rate.
        batch: samples in one step.
        warmup_steps: steps of linear warm-up; a cosine to 0 follows.
        logger: where the experts' curves go beside CSV and JSON.
    """

    backbone: str
    suite: str
    tasks: tuple[str, ...]
    out: Path
    seed: int
    steps: int
    lr: float
    batch: int
    warmup_steps: int
    logger: LoggerKind = "csv"

    @property
    def split(self) -> SplitOptions:
        """How each task is carved, alike for training, search and evaluation."""
        return SplitOptions(seed=self.seed)

    def expert_paths(self) -> list[Path]:
        """Return the file of each expert, in the order of the tasks."""
        return [self.out / f"{task}.safetensors" for task in self.tasks]


@dataclass(frozen=True)
class Made:
    """One merge: its file and facts, its score on val, the search for its scale, its deltas."""

    method: str
    path: Path
    facts: Mapping[str, Any]
    val: float
    choice: Choice | None
    geometry: Mapping[str, Any]


def train_one(job: tuple[Plan, str]) -> Path:
    """Fine-tune the expert of one task; tells (`expert`, task, steps done, steps, loss)."""
    plan, task = job

    def report(done: int, total: int, loss: float | None) -> None:
        tell("expert", task, done, total, "" if loss is None else f"loss {loss:.3f}")

    tell("expert", task, 0, plan.steps, "fitting the head")
    result = train_expert(
        data=TaskDataModule(plan.suite, task, batch=plan.batch, split_seed=plan.split.seed),
        model=ExpertModule(
            plan.backbone,
            head="frozen-ncm",
            lr=plan.lr,
            schedule="cosine",
            warmup_steps=plan.warmup_steps,
            seed=plan.seed,
        ),
        steps=[plan.steps],
        out=plan.out,
        trainer={"accelerator": "cpu", "devices": 1, "log_every_n_steps": 2},
        callbacks=[Progress(report)],
        loggers=plan.logger,
        checkpoint_every=0,
    )
    return result.experts[0]


def merge_one(job: tuple[Plan, str]) -> Made:
    """Choose a method's scale on val and merge; tells (`merge`, method, done, all, note)."""
    plan, method = job
    grid = scale_grid(MERGE_METHODS.get(method))
    judge = judge_of(plan)
    choice = _choice(judge, method, grid) if grid else None
    geometry = DeltaGeometry()
    config = {SCALE: choice.chosen} if choice else {}
    result = merge_files(
        plan.expert_paths(),
        out=plan.out / "merged" / f"{method}.safetensors",
        recipe=Recipe(method=method, config=config, batch_norm="recalibrate-per-task"),
        base=plan.backbone,
        calibration=Calibration(suite=plan.suite, options=plan.split),
        observers=[geometry],
    )
    val = choice.best if choice else next(judge.scores(method, [{}]))
    note = f"scale {choice.chosen:g}" if choice else ""
    tell("merge", method, len(grid) + 1, len(grid) + 1, note)
    facts = result.record.metrics["merged"]
    return Made(method, result.path, facts, val, choice, geometry.to_json())


class Judge:
    """Scores merges of a plan's experts on the validation images of all tasks; never on test."""

    def __init__(self, plan: Plan) -> None:
        """Load the experts and the images.

        Args:
            plan: whose experts are there.
        """
        paths = plan.expert_paths()
        self._backbone, base = load_base_of(paths, plan.backbone)
        self._experts = in_memory(load_experts(paths, base=base))
        suite = load_suite(plan.suite)
        tasks = [suite.task(task).load(plan.split) for task in plan.tasks]
        self._images = {
            task.name: calibration_images(task.train, task.name, count=_SEARCH_IMAGES)
            for task in tasks
        }
        self._scorer = Scorer(self._backbone, tasks)
        # What an expert's file stores is what the final table estimates again: both take
        # `lit.recalibration.task_statistics`. Only candidates make do with fewer images.
        rows = expert_rows(self._backbone, [load_expert(path) for path in paths], tasks)
        # Where an expert has no image right the ratio is undefined; plain accuracy takes its place.
        known = all(row["accuracy"] > 0 for row in rows.values())
        self._objective = objective_of(rows, metric="normalised_accuracy" if known else "accuracy")

    def scores(self, method: str, configs: Sequence[Mapping[str, Any]]) -> Iterator[float]:
        """Yield the score of each configuration: normalised accuracy, averaged over the tasks."""
        for merged in merge_many(self._experts, method, configs):
            whole = recalibrate(merged, self._images, backbone=self._backbone, per_task=True)
            yield self._objective.of(self._scorer.outcomes(whole))


@lru_cache(maxsize=1)
def judge_of(plan: Plan) -> Judge:
    """Return the judge of a plan, loaded once in each process."""
    return Judge(plan)


def _choice(judge: Judge, method: str, grid: Sequence[float]) -> Choice:
    """Choose the scale, and tell of each that is tried."""

    def scores(scales: Sequence[float]) -> list[float]:
        total = len(scales) + 1
        tell("merge", method, 0, total, "merging")
        found = []
        tried = judge.scores(method, [{SCALE: scale} for scale in scales])
        for done, scale in enumerate(scales):
            tell("merge", method, done, total, f"trying scale {scale:g}")
            found.append(next(tried))
        return found

    return choose(grid, scores)
