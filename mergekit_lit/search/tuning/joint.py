"""This file is the search over methods, parameters and BatchNorm policies at once, to a budget.

Task arithmetic at 0.3 comes first, on all images, so that nothing worse is chosen. Then the
candidate is tried that is expected to improve most on the best so far, given what the prior holds
and what was scored; it is given up early if it cannot win.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import TypeAlias

import numpy as np

from mergekit_lit.search.tuning.beliefs import improvement, posterior
from mergekit_lit.search.tuning.bench import Bench
from mergekit_lit.search.tuning.budget import Budget
from mergekit_lit.search.tuning.loop import Heard, candidate_of, tried
from mergekit_lit.search.tuning.objective import Objective
from mergekit_lit.search.tuning.places import Numbers
from mergekit_lit.search.tuning.pool import Candidate
from mergekit_lit.search.tuning.prior import FLOOR, NOISE, Prior
from mergekit_lit.search.tuning.trials import Trial, TrialLog

ProposeOne: TypeAlias = Callable[[Sequence[Trial]], Candidate | None]
"""Takes every finished trial, in order, and returns what to try next; None at the end.

What is returned depends on the trials alone, so a resumed search goes on alike.
"""

# Nats of cross-entropy that a share of 1 in accuracy is worth, roughly: from log(10) at 0.1 to 0.2
# at 0.95.
_NATS = 2.5


def search_jointly(
    bench: Bench, log: TrialLog, propose: ProposeOne, budget: Budget, *, heard: Heard
) -> None:
    """Try what is proposed until nothing is, or the budget is spent; each trial goes to the log.

    Args:
        bench: makes and scores candidates.
        log: holds the trials of earlier runs, which are not made again, but count.
        propose: what to try next.
        budget: what may be spent.
        heard: called with each new trial.

    Raises:
        ValueError: the first candidate cannot be merged.
    """
    while budget.allows(own := log.own, bench.count):
        candidate = propose(own)
        if candidate is None:
            return
        trial = tried(bench, candidate, own)
        log.add(trial)
        heard(trial)


def expected_best(
    pool: Sequence[Candidate], prior: Prior, objective: Objective, *, confidence: float
) -> ProposeOne:
    """Propose the candidate of a pool that is expected to improve most on the best so far.

    Args:
        pool: the candidates; the first is the reference, and is tried first.
        prior: what is believed of them.
        objective: what values are of.
        confidence: level of the discarded ones' upper ends.
    """
    places = {candidate.key: place for place, candidate in enumerate(pool)}
    unit = _unit(objective)

    def propose(finished: Sequence[Trial]) -> Candidate | None:
        known = [(places.get(candidate_of(trial).key), trial) for trial in finished]
        trials = [(place, trial) for place, trial in known if place is not None]
        done = {place for place, _ in trials}
        if 0 not in done:
            return pool[0]
        left = [place for place in range(len(pool)) if place not in done]
        if not left:
            return None
        values, variances = _observed([t for _, t in trials], unit, confidence)
        mean, deviation = posterior(prior, [place for place, _ in trials], values, variances)
        best = max(mean[place] for place, t in trials if t.state == "scored")
        gains = improvement(mean, deviation, float(best))
        return pool[max(left, key=lambda place: gains[place])]

    return propose


def _observed(trials: Sequence[Trial], unit: float, confidence: float) -> tuple[Numbers, Numbers]:
    """Return values less the first's, in accuracy, and the variances of their noise.

    A merge that failed counts as one of the worst.
    """
    first = trials[0].value or 0.0
    z = NormalDist().inv_cdf(confidence) if confidence < 1 else 1.0
    values, variances = [], []
    for trial in trials:
        value = -np.inf if trial.value is None else (trial.value - first) / unit
        error = 0.0
        if trial.upper is not None and trial.value is not None:
            error = (trial.upper - trial.value) / z / unit
        values.append(max(value, -FLOOR))
        variances.append(NOISE**2 + error**2)
    return np.array(values), np.array(variances)


def _unit(objective: Objective) -> float:
    """Return what a share of 1 in accuracy is worth in an objective."""
    if objective.metric == "cross_entropy":
        return _NATS
    return float(np.mean([1 / unit for unit in objective.units.values()]))
