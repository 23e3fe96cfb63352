"""This file asks Optuna which values to try next, batch by batch.

A trial is one choice of what Optuna is asked for, at every point of the other axes: its value is
the mean of the metric over all of them, such as tasks and seeds. What a batch asks depends on the
results of those before and on the seed alone, so that a study that was killed goes on alike.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from mergekit_lit.core.registry import unknown_name
from mergekit_lit.core.seeds import derive_seed
from mergekit_lit.search.sweeping.axes import Axes, Point, Range
from mergekit_lit.search.sweeping.jobs import Job
from mergekit_lit.search.sweeping.plan import Plan, plan_runs
from mergekit_lit.search.sweeping.worker import Sweep


@dataclass(frozen=True, kw_only=True)
class Study:
    """How Optuna is asked.

    Attributes:
        metric: what is made as large as possible, or as small where it is a loss: a column of
            `results.csv`, such as `val_accuracy`.
        trials: how many are made.
        batch: how many are asked for at once, and run side by side; workers start anew for each
            batch.
        seed: of the sampler.
    """

    metric: str
    trials: int = 20
    batch: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name, least in (("trials", 1), ("batch", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"`optuna.{name}` must be a whole number of at least {least}, but is {value!r}."
                )

    @property
    def direction(self) -> str:
        """What is done to the metric."""
        return "minimize" if self.metric.endswith("loss") else "maximize"


def check_study(study: Study | None, axes: Sequence[Axes], job: Job) -> None:
    """Refuse a study that does not fit the axes.

    Raises:
        ValueError: axes ask for Optuna and nothing says how, or the other way round; the metric is
            none of the job's; or Optuna would choose the number of steps.
        ModuleNotFoundError: Optuna is not installed.
    """
    asked = [key for block in axes for key in block.asked]
    if study is None:
        if asked:
            raise ValueError(
                f"The axis `{asked[0]}` asks for Optuna, so `optuna` must say at least the metric: "
                "optuna: {metric: val_accuracy, trials: 20}."
            )
        return
    if len(axes) > 1 or not asked:
        raise ValueError(
            "`optuna` must come with one mapping of axes, of which one at least has the form "
            "`optuna`, but does not."
        )
    if "steps" in asked:
        raise ValueError(
            "`steps` must be a grid beside Optuna: all of them are steps of one training."
        )
    if study.metric not in job.metrics:
        raise ValueError(unknown_name(f"metric of {job.stage!r}", study.metric, job.metrics))
    _optuna()


class Trials:
    """The trials of a study so far."""

    def __init__(self, study: Study, axes: Axes, job: Job) -> None:
        """Begin without a trial."""
        self._study, self._axes, self._job = study, axes, job
        self.points: list[Point] = []

    def plan(self) -> Plan:
        """Return the runs of all trials so far."""
        return plan_runs([self._at(point) for point in self.points], self._job)

    def ask(self, sweep: Sweep | None) -> bool:
        """Add a batch of trials; return whether there was one to add.

        Args:
            sweep: of the trials so far, all done or failed; None before the first.
        """
        values = [self.value(point, sweep) for point in self.points] if sweep else []
        count = min(self._study.batch, self._study.trials - len(self.points))
        self.points += self._asked(values, count) if count > 0 else []
        return count > 0

    def value(self, point: Point, sweep: Sweep) -> float | None:
        """Return the metric of a trial, averaged over the other axes; None where a run failed."""
        runs = plan_runs([self._at(point)], self._job).runs
        if not all(sweep.is_done(run) for run in runs):
            return None
        rows = [row for run in runs for row in self._job.rows(sweep.folder(run))]
        found = [row[self._study.metric] for row in rows]
        return fmean(found) if found and None not in found else None

    def told(self, sweep: Sweep) -> dict[str, Any]:
        """Return each trial with its value, and the best, for a record."""
        values = [self.value(point, sweep) for point in self.points]
        sign = -1 if self._study.direction == "maximize" else 1
        scored = [(sign * value, place) for place, value in enumerate(values) if value is not None]
        rows = [
            {"point": point, "value": value}
            for point, value in zip(self.points, values, strict=True)
        ]
        best = rows[min(scored)[1]] if scored else None
        return {"metric": self._study.metric, "trials": rows, "best": best}

    def _at(self, point: Point) -> Axes:
        fixed = {key: [value] for key, value in point.items()}
        return replace(self._axes, grid={**self._axes.grid, **fixed}, asked={})

    def _asked(self, values: Sequence[float | None], count: int) -> list[Point]:
        optuna = _optuna()
        ends = {key: _distribution(optuna, each) for key, each in self._axes.asked.items()}
        seed = derive_seed(self._study.seed, "study", len(values)) % 2**32
        with warnings.catch_warnings():
            # Optuna calls the liar experimental. With it, trials of a batch keep apart.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        found = optuna.create_study(direction=self._study.direction, sampler=sampler)
        for point, value in zip(self.points, values, strict=True):
            state = optuna.trial.TrialState
            found.add_trial(
                optuna.trial.create_trial(
                    params=point,
                    distributions=ends,
                    value=value,
                    state=state.FAIL if value is None else state.COMPLETE,
                )
            )
        return [dict(found.ask(ends).params) for _ in range(count)]


def _distribution(optuna: Any, asked: Range | tuple[Any, ...]) -> Any:
    kinds = optuna.distributions
    if not isinstance(asked, Range):
        return kinds.CategoricalDistribution(asked)
    kind = kinds.IntDistribution if asked.whole else kinds.FloatDistribution
    return kind(asked.low, asked.high, log=asked.log)


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "Axes of the form `optuna` need it installed: pip install 'mergekit-lit[tune]'. "
            "Those of the form `random` need nothing."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
