"""This file is the plan of a search: what is tried how, and what is refused before any work."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from mergekit_lit.core.merging import BatchNormPolicy
from mergekit_lit.core.registry import MERGE_METHODS, VENEERS, Registered, unknown_name
from mergekit_lit.lit.recalibration import Veneers
from mergekit_lit.merging.configuration import check_interval, parameters
from mergekit_lit.search.tuning.budget import Budget
from mergekit_lit.search.tuning.objective import Goal, Metric
from mergekit_lit.search.tuning.pool import Candidate, pool_of
from mergekit_lit.search.tuning.proposals import Propose, grid_proposals, optuna_proposals
from mergekit_lit.search.tuning.space import Space, grid_of, space_of

Search = Literal["grid", "optuna"]

_BUDGETS = ("budget", "budget_seconds")
# Optuna starts with ten random trials; fewer than as many again would hardly be a search.
_OPTUNA_TRIALS = 40


@dataclass(frozen=True, kw_only=True)
class TuningPlan:
    """What is searched, and how.

    Attributes:
        method: merge methods. Without a budget each is searched by itself, and their bests are
            compared; with one, they are searched at once.
        budget: most evaluations of one search over methods, parameters and BatchNorm policies at
            once; an evaluation is a look at all validation images, a part of them counts as that
            part. It chooses among the points of the methods' grids, task arithmetic at scale 0.3
            first, so that what is chosen is no worse.
        budget_seconds: most seconds that the trials of such a search may take; the one that is
            running is finished. With both budgets the first that is spent ends the search.
        table: measured merges of other experts (a file of `experiments/merges.py`, or `shipped`),
            from which a search with a budget knows beforehand what is likely to be good; without
            one it knows that merges that are alike do alike.
        search: a `grid` over the range of each parameter, or `optuna`, whose TPE sampler learns
            from the trials before (`pip install 'mergekit-lit[tune]'`).
        trials: most configurations of a method, its defaults among them: a draw from the grid,
            which is tried whole by default, or what Optuna may ask for, 40 by default.
        points: points of each range in the grid, at least 2; by default 10 for `scale`, dense near
            0, and 5 for all others.
        space: values of parameters in place of the ranges that the methods declare, by name: those
            of the grid, or with Optuna the ends of a range; one value fixes a parameter.
        objective: the `mean` over tasks, the `worst` task, or a mean `weighted` by `weights`.
        metric: `accuracy`, `normalised_accuracy` (over that of the task's expert), or
            `cross_entropy` (in nats, with a minus: more is better).
        weights: weight of each task; 1 for those not named.
        then: names and configs of veneers, which every candidate gets: what is done to the experts
            before the method, or to its result after it.
        batch_norm: BatchNorm statistics of candidates: the `base`'s, the `average` of the experts',
            or estimated again on training images, of all tasks together (`recalibrate`) or of each
            (`recalibrate-per-task`); with a budget there may be several, to be searched over.
        discard: confidence at which a candidate that cannot beat the best so far is given up after
            1/8, 1/4 or 1/2 of the images; null scores every candidate on all of them.
        regret: whether to score what was discarded on all images too, at the end, to tell what the
            discarding cost; a finished search can be asked for it later.
        candidate_images: training images of a task on which a candidate's statistics are estimated;
            the merge that is written takes as many as base and experts do.
        compile: whether to compile the model, once for all candidates.
        device: where to compute: `cpu`, `cuda`, ...; `auto` takes a GPU if there is one.
        seed: of the draw, the subsets, Optuna, and methods that draw at random.
    """

    method: Sequence[str]
    budget: int | None = None
    budget_seconds: float | None = None
    table: Path | None = None
    search: Search = "grid"
    trials: int | None = None
    points: int | None = None
    space: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    objective: Goal = "mean"
    metric: Metric = "normalised_accuracy"
    weights: Mapping[str, float] = field(default_factory=dict)
    then: Veneers = ()
    batch_norm: Sequence[str] = ("recalibrate-per-task",)
    discard: float | None = 0.99
    regret: bool = False
    candidate_images: int = 128
    compile: bool = False
    device: str = "auto"
    seed: int = 0

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, each once."""
        return tuple(dict.fromkeys(self.method))

    @property
    def policies(self) -> tuple[BatchNormPolicy, ...]:
        """The BatchNorm policies, each once; `check_plan` refuses names of none."""
        return cast("tuple[BatchNormPolicy, ...]", tuple(dict.fromkeys(self.batch_norm)))

    @property
    def joint(self) -> bool:
        """Whether all methods are searched at once, to a budget."""
        return self.budget is not None or self.budget_seconds is not None

    @property
    def spending(self) -> Budget:
        """What may be spent."""
        return Budget(evaluations=self.budget, seconds=self.budget_seconds)

    def pool(self, *, statistics: bool) -> list[Candidate]:
        """Return what a search to a budget chooses among.

        Args:
            statistics: whether the model has BatchNorm statistics; else one policy is like another.
        """
        policies = self.policies if statistics else self.policies[:1]
        return pool_of({name: self.space_of(name) for name in self.methods}, policies)

    @property
    def confidence(self) -> float:
        """The level at which a candidate is discarded."""
        return 1.0 if self.discard is None else self.discard

    def torch_device(self) -> torch.device:
        """Return the device to compute on.

        Raises:
            ValueError: torch has no device of that name.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"`device` must be one of this machine, but is {self.device!r}: {error}"
            ) from None

    def space_of(self, method: str) -> Space:
        """Return what is searched of one method."""
        return space_of(MERGE_METHODS.get(method), given=self.space, points=self.points)

    def proposals(self, method: str) -> tuple[Propose, int]:
        """Return what tells the next configurations of a method, and how many there are at most."""
        space = self.space_of(method)
        if self.search == "optuna" and space:
            trials = self.trials or _OPTUNA_TRIALS
            return optuna_proposals(space, trials=trials, seed=self.seed), trials
        count = len(grid_of(space, trials=self.trials, seed=self.seed))
        propose = grid_proposals(space, trials=self.trials, seed=self.seed)
        return propose, count

    def facts(self) -> dict[str, Any]:
        """Return what the values of trials depend on; the log of another search differs in it."""
        # More trials, methods or budget go on from those that are there; these change no value.
        apart = ("method", "trials", "regret", "compile", "device", "table", *_BUDGETS)
        kept = {name: value for name, value in vars(self).items() if name not in apart}
        return {**kept, "joint": self.joint}


def check_plan(plan: TuningPlan) -> None:
    """Refuse a plan with unknown names or values out of range, before anything is read.

    Raises:
        KeyError: unknown method, veneer, parameter or search.
        ModuleNotFoundError: Optuna is wanted and not installed.
        TypeError: a value of the wrong type in `space`.
        ValueError: a number out of range; no such device; no method; or one that looks at test
            images.
    """
    if not plan.methods:
        raise ValueError("`method` must name at least one merge method, but is empty.")
    if plan.search not in get_args(Search):
        raise KeyError(unknown_name("search", plan.search, get_args(Search)))
    _check_numbers(plan)
    _check_joint(plan)
    plan.torch_device()
    methods = [MERGE_METHODS.get(name) for name in plan.methods]
    _check_data([*methods, *(VENEERS.get(name) for name, _ in plan.then)])
    known_parameters = {name for method in methods for name in parameters(method.function)}
    for parameter in sorted(set(plan.space) - known_parameters):
        noun = f"parameter of {' or '.join(plan.methods)}"
        raise KeyError(unknown_name(noun, parameter, known_parameters))
    for method in methods:
        plan.proposals(method.name)


def _check_joint(plan: TuningPlan) -> None:
    """Refuse what only a search to a budget has without one, and the other way round."""
    if not plan.policies:
        raise ValueError("`batch_norm` must name at least one BatchNorm policy, but is empty.")
    for policy in plan.policies:
        if policy not in get_args(BatchNormPolicy):
            raise KeyError(unknown_name("BatchNorm policy", policy, get_args(BatchNormPolicy)))
    if plan.joint:
        plan.spending.check()
        for name, default in (("search", "grid"), ("trials", None)):
            if (value := getattr(plan, name)) != default:
                raise ValueError(
                    f"`{name}` is for methods that are searched one by one, without a budget, but "
                    f"is {value!r} beside one. Leave it out, or the budget."
                )
    elif len(plan.policies) > 1 or plan.table is not None:
        what = "several `batch_norm` policies" if plan.table is None else "a `table`"
        raise ValueError(f"A search with {what} must have a budget, but has none. Give `budget`.")


def _check_data(entries: Sequence[Registered[Any]]) -> None:
    for entry in entries:
        if entry.facts.get("data") == "test-unlabelled":
            raise ValueError(
                "What is searched must not look at test images, which choose nothing here, but "
                f"{entry.name!r} does. Merge with it as it is: mergekit-lit merge."
            )


def _check_numbers(plan: TuningPlan) -> None:
    for name, least in (("trials", 1), ("candidate_images", 2)):
        value = getattr(plan, name)
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, but is {value}.")
    if plan.discard is not None:
        check_interval("discard", plan.discard, "(0, 1)")


def told(config: Mapping[str, Any]) -> str:
    """Return a configuration as people write it: `density=0.2, scale=1`."""
    return ", ".join(f"{name}={_word(value)}" for name, value in config.items()) or "defaults"


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
