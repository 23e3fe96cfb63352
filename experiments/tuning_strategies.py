"""This file is the searches that are compared on grids where every merge is scored already.

All of them go through the loop of `mergekit-lit tune`, to the same budget; only what they propose
differs. It is a module, not a command.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
from tuning_grids import Grid

from mergekit_lit.core.seeds import derive_seed
from mergekit_lit.search.tuning.budget import Budget
from mergekit_lit.search.tuning.joint import ProposeOne, expected_best, search_jointly
from mergekit_lit.search.tuning.loop import candidate_of
from mergekit_lit.search.tuning.objective import Answers, Objective
from mergekit_lit.search.tuning.pool import Candidate
from mergekit_lit.search.tuning.prior import Measured, Prior, prior_of
from mergekit_lit.search.tuning.race import Run, Stage, race, stages_of
from mergekit_lit.search.tuning.trials import Trial, best_of

CONFIDENCE = 0.99

Strategy: TypeAlias = Callable[["Stand", int], ProposeOne]
"""Makes, for one grid and seed, what is proposed."""


@dataclass(frozen=True)
class Stand:
    """Stands in for the bench of a search: what it is asked for was scored before.

    Attributes:
        grid: the group.
        discard: whether candidates are given up early.
        measured: merges of other groups that the prior may know; None without a table.
    """

    grid: Grid
    discard: bool = True
    measured: Measured | None = None

    @cached_property
    def objective(self) -> Objective:
        """Mean accuracy over the tasks."""
        return Objective("mean", "accuracy", dict.fromkeys(self.grid.labels, 1.0))

    @cached_property
    def stages(self) -> list[Stage]:
        """The validation images in growing subsets, or all at once."""
        return stages_of(self.grid.labels, seed=0, discard=self.discard)

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Where candidates are in the pool, by key."""
        return {candidate.key: place for place, candidate in enumerate(self.grid.pool)}

    @cached_property
    def prior(self) -> Prior:
        """What is believed of the pool; where there is one policy alone there is no BatchNorm."""
        statistics = len({candidate.batch_norm for candidate in self.grid.pool}) > 1
        return prior_of(self.grid.pool, self.grid.facts, self.measured, statistics=statistics)

    @property
    def count(self) -> int:
        """How many validation images there are."""
        return sum(len(labels) for labels in self.grid.labels.values())

    def under(self, policy: str) -> Any:
        """Return what makes merges under a policy."""

        def merges(method: str, configs: Sequence[Mapping[str, Any]]) -> Iterator[int]:
            return (self.places[Candidate(method, c, policy).key] for c in configs)  # type: ignore[arg-type] # of the pool

        return SimpleNamespace(merges=merges)

    def run(self, place: int, rival: Run | None = None) -> Run:
        """Score a candidate; against a rival only for as long as it may win."""

        def answer(stage: Stage) -> Answers:
            return {
                task: torch.from_numpy(self.grid.val[task][place][positions.numpy()]).float()
                for task, positions in stage.items()
            }

        return race(answer, self.stages, self.objective, rival=rival, confidence=CONFIDENCE)


@dataclass
class Kept:
    """Trials in memory."""

    trials: list[Trial] = field(default_factory=list)

    @property
    def own(self) -> list[Trial]:
        """All of them."""
        return self.trials

    def add(self, trial: Trial) -> None:
        """Keep a trial."""
        self.trials.append(trial)


def searched(stand: Stand, propose: ProposeOne, evaluations: int) -> list[Trial]:
    """Return the trials of one search."""
    kept = Kept()
    budget = Budget(evaluations=evaluations)
    search_jointly(stand, kept, propose, budget, heard=lambda _: None)  # type: ignore[arg-type] # both stand in
    return kept.trials


def chosen(stand: Stand, trials: Sequence[Trial]) -> int:
    """Return the place of the candidate that a search chooses."""
    best = best_of(trials)
    if best is None:
        raise ValueError("A search must score a candidate, but scored none.")
    return stand.places[candidate_of(best).key]


def ours(stand: Stand, _: int) -> ProposeOne:
    """Propose as `mergekit-lit tune` does; it draws nothing."""
    prior = stand.prior
    return expected_best(stand.grid.pool, prior, stand.objective, confidence=CONFIDENCE)


def prior_alone(stand: Stand, _: int) -> ProposeOne:
    """Propose in the order of the prior's means."""
    prior = stand.prior
    order = np.argsort(-prior.mean, kind="stable")
    return _in_order([stand.grid.pool[place] for place in order])


def at_random(stand: Stand, seed: int) -> ProposeOne:
    """Propose in a random order."""
    pool = stand.grid.pool[1:]
    return _in_order(Random(derive_seed(seed, stand.grid.name)).sample(pool, len(pool)))


def coarse(stand: Stand, _: int) -> ProposeOne:
    """Propose the middle of each method's grid, then its quarters, and so on, policy by policy."""
    parts: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in stand.grid.pool[1:]:
        parts.setdefault((candidate.method, candidate.batch_norm), []).append(candidate)
    rounds = max(len(part) for part in parts.values())
    spread = [_spread(part) for part in parts.values()]
    return _in_order([part[k] for k in range(rounds) for part in spread if k < len(part)])


def _spread(items: Sequence[Candidate]) -> list[Candidate]:
    """Return items so that the first few lie far apart: the middle, then those of both halves."""
    queue, found = [list(items)], []
    while queue:
        part = queue.pop(0)
        if part:
            middle = len(part) // 2
            found.append(part[middle])
            queue += [part[:middle], part[middle + 1 :]]
    return found


def _in_order(candidates: Sequence[Candidate]) -> ProposeOne:
    def propose(finished: Sequence[Trial]) -> Candidate | None:
        return candidates[len(finished)] if len(finished) < len(candidates) else None

    return propose


def tree_parzen(stand: Stand, seed: int) -> ProposeOne:
    """Propose what Optuna's TPE asks for: a method, a policy, and a point of that method's grid."""
    return _optuna(stand, seed, "tpe")


def evolved(stand: Stand, seed: int) -> ProposeOne:
    """Propose what Optuna's CMA-ES asks for, rounded to the nearest candidate.

    It knows numbers alone: method and policy are two of them, rounded.
    """
    return _optuna(stand, seed, "cma")


def _optuna(stand: Stand, seed: int, kind: str) -> ProposeOne:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = derive_seed(seed, stand.grid.name) % 2**32
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
        "cma": lambda: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
    }
    study = optuna.create_study(direction="maximize", sampler=samplers[kind]())
    axes = _Axes(stand.grid.pool)
    waiting: list[Any] = []

    def propose(finished: Sequence[Trial]) -> Candidate:
        if waiting:
            study.tell(waiting.pop(), finished[-1].value)
        trial = study.ask()
        waiting.append(trial)
        return axes.by_name(trial) if kind == "tpe" else axes.by_number(trial)

    return propose


class _Axes:
    """A pool as the axes of a sampler."""

    def __init__(self, pool: Sequence[Candidate]) -> None:
        self.pool = pool[1:]
        self.methods = list(dict.fromkeys(c.method for c in self.pool))
        self.policies = list(dict.fromkeys(c.batch_norm for c in self.pool))

    def by_name(self, trial: Any) -> Candidate:
        """Ask for a method and a policy by name, and for a value of each of its parameters."""
        method = trial.suggest_categorical("method", self.methods)
        policy = trial.suggest_categorical("batch_norm", self.policies)
        near = [c for c in self.pool if (c.method, c.batch_norm) == (method, policy)]
        for name in near[0].config:
            values = sorted({c.config[name] for c in near})
            place = trial.suggest_int(f"{method}.{name}", 0, len(values) - 1)
            near = _nearest(near, name, values[place])
        return near[0]

    def by_number(self, trial: Any) -> Candidate:
        """Ask for four numbers in [0, 1]: method, policy, and places of up to two parameters."""
        share = [trial.suggest_float(name, 0.0, 1.0) for name in ("m", "b", "first", "second")]
        method = self.methods[_round(share[0], len(self.methods))]
        policy = self.policies[_round(share[1], len(self.policies))]
        near = [c for c in self.pool if (c.method, c.batch_norm) == (method, policy)]
        for name, at in zip(near[0].config, share[2:], strict=False):
            values = sorted({c.config[name] for c in near})
            near = _nearest(near, name, values[_round(at, len(values))])
        return near[0]


def _round(share: float, count: int) -> int:
    return min(int(share * count), count - 1)


def _nearest(pool: Sequence[Candidate], name: str, value: float) -> list[Candidate]:
    """Return the candidates whose parameter is nearest to a value."""
    gaps = [abs(each.config[name] - value) for each in pool]
    return [each for each, gap in zip(pool, gaps, strict=True) if gap == min(gaps)]
