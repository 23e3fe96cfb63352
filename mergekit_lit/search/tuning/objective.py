"""This file is what a search maximises: one number made of what a model does on each image."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from mergekit_lit.core.registry import unknown_name
from mergekit_lit.lit.scores import Outcomes

Metric = Literal["accuracy", "normalised_accuracy", "cross_entropy"]
"""What counts on a task. Cross-entropy counts with a minus: more is better of each."""

Goal = Literal["mean", "worst", "weighted"]
"""How tasks become one number: their mean, the worst of them, or a mean with weights."""

Answers: TypeAlias = Mapping[str, Tensor]
"""Per task, what each image counts (n,): 1 or 0 for right or wrong, or minus its loss in nats."""


@dataclass(frozen=True)
class Objective:
    """What a search maximises.

    Attributes:
        goal: how tasks become one number.
        metric: what counts on a task.
        units: what a task's mean is divided by: its expert's accuracy for `normalised_accuracy`,
            else 1.
        weights: how much each task counts in a mean; any positive sum.
    """

    goal: Goal
    metric: Metric
    units: Mapping[str, float]
    weights: Mapping[str, float] = field(default_factory=dict)

    def answers(self, outcomes: Outcomes) -> Tensor:
        """Return what each image counts, (n,)."""
        if self.metric == "cross_entropy":
            return -outcomes.loss
        return outcomes.correct.to(outcomes.loss.dtype)

    def by_task(self, answers: Answers) -> dict[str, float]:
        """Return the value of each task: the mean of its images, exactly rounded, over its unit."""
        return {
            task: math.fsum(each.tolist()) / len(each) / self.units[task]
            for task, each in answers.items()
        }

    def total(self, values: Mapping[str, float]) -> float:
        """Return the number to maximise from the value of each task."""
        if self.goal == "worst":
            return min(values.values(), key=lambda value: (value == value, value))
        weights = {task: self.weights.get(task, 1.0) for task in values}
        weighed = math.fsum(weights[task] * value for task, value in values.items())
        return weighed / math.fsum(weights.values())

    def of(self, outcomes: Mapping[str, Outcomes]) -> float:
        """Return the number to maximise from what a model does on each task."""
        return self.total(self.by_task({task: self.answers(of) for task, of in outcomes.items()}))

    def upper(
        self, values: Mapping[str, float], errors: Mapping[str, float], confidence: float
    ) -> float:
        """Return the upper end of a one-sided interval of the total.

        total(values) + z sqrt(sum_t w_t^2 e_t^2) for a mean with weights w that sum to 1; the
        smallest of the tasks' own ends for the worst, at a level that T tasks share (Bonferroni).

        Args:
            values: estimated value of each task.
            errors: its standard error.
            confidence: level of the interval, in (0, 1).
        """
        if self.goal == "worst":
            z = NormalDist().inv_cdf(1 - (1 - confidence) / len(values))
            return min(value + z * errors[task] for task, value in values.items())
        total = math.fsum(self.weights.get(task, 1.0) for task in values)
        shares = {task: self.weights.get(task, 1.0) / total for task in values}
        error = math.sqrt(math.fsum((shares[t] * errors[t]) ** 2 for t in values))
        return self.total(values) + NormalDist().inv_cdf(confidence) * error


def objective_of(
    experts: Mapping[str, Mapping[str, Any]],
    *,
    goal: Goal = "mean",
    metric: Metric = "normalised_accuracy",
    weights: Mapping[str, float] | None = None,
) -> Objective:
    """Return the objective over the tasks of some experts.

    Args:
        experts: scores of each task's own expert on val, as `lit.scores.summarise` has them.
        goal: how tasks become one number.
        metric: what counts on a task.
        weights: how much tasks count, for the goal `weighted`; 1 where not named.

    Raises:
        KeyError: unknown goal, metric or task.
        ValueError: weights that do not fit the goal, negative or all zero; or an expert without a
            right image, of which no accuracy is a share.
    """
    check_goal(goal, metric, weights, list(experts))
    units = dict.fromkeys(experts, 1.0)
    if metric == "normalised_accuracy":
        units = {task: float(row["accuracy"]) for task, row in experts.items()}
    for task, unit in units.items():
        if unit == 0:
            raise ValueError(
                f"`metric` normalised_accuracy needs experts with a right image on val, but that "
                f"of {task!r} has none. Use accuracy."
            )
    return Objective(goal, metric, units, dict(weights or {}))


def check_goal(
    goal: str, metric: str, weights: Mapping[str, float] | None, tasks: Sequence[str]
) -> None:
    """Refuse unknown names, and weights that do not fit, before anything is scored.

    Raises:
        KeyError: unknown goal, metric or task.
        ValueError: weights that do not fit the goal, negative or all zero.
    """
    for noun, name, known in (("objective", goal, Goal), ("metric", metric, Metric)):
        if name not in get_args(known):
            raise KeyError(unknown_name(noun, name, get_args(known)))
    if (goal == "weighted") != bool(weights):
        came = "got none" if goal == "weighted" else f"the objective is {goal!r}"
        raise ValueError(
            f"`weights` belong to the objective 'weighted', but {came}. "
            "Write --objective weighted --weights TASK=NUMBER."
        )
    for task, weight in (weights or {}).items():
        if task not in tasks:
            raise KeyError(unknown_name("task to weigh", task, tasks))
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"The weight of {task!r} must be at least 0, but is {weight!r}.")
    if weights and len(weights) == len(tasks) and not any(weights.values()):
        raise ValueError("`weights` must weigh a task, but all are 0.")
