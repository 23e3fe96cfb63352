"""This file is what a search found, made of its trials alone: the choice, its price, its regret."""

import json
from collections.abc import Sequence
from typing import Any

from mergekit_lit.search.tuning.plan import TuningPlan
from mergekit_lit.search.tuning.pool import REFERENCE
from mergekit_lit.search.tuning.space import Space, key_of, start_of
from mergekit_lit.search.tuning.trials import Trial, TrialLog, best_of


def results_of(log: TrialLog, plan: TuningPlan, images: int) -> dict[str, Any]:
    """Return what was found, as JSON.

    Args:
        log: the trials.
        plan: what was searched, and how.
        images: validation images of all tasks.

    Returns:
        `methods`: what was found of each, as `method_results` has it. Of a search to a budget also
        what was `spent`: `evaluations`, `seconds` and `cpu_seconds` of so many `trials`; and its
        `regret`, if known.

    Raises:
        ValueError: no candidate of a method has answers that are numbers.
    """
    names = _names(log, plan)
    found: dict[str, Any] = {
        "methods": {name: method_results(log, name, plan.space_of(name), images) for name in names}
    }
    if plan.joint:
        found["spent"] = {
            "evaluations": sum(trial.images for trial in log.own) / images,
            "trials": len(log.own),
            **_spent(log.own),
        }
        found["regret"] = regret(log.own, [trial for trial in log.trials if trial.again])
    return found


def chosen_of(log: TrialLog, plan: TuningPlan) -> Trial:
    """Return the best trial of all methods; of equal ones that with the shortest step.

    Raises:
        ValueError: there is none.
    """
    names = _names(log, plan)
    best = best_of([trial for trial in log.own if trial.method in names])
    if best is None:
        raise ValueError(_nothing(", ".join(plan.methods), len(log.own)))
    return best


def _names(log: TrialLog, plan: TuningPlan) -> list[str]:
    """Return the methods there is something to tell of; method by method that is each of them."""
    if not plan.joint:
        return list(plan.methods)
    valued = {trial.method for trial in log.own if trial.value is not None}
    return [name for name in dict.fromkeys((*plan.methods, REFERENCE)) if name in valued]


def method_results(log: TrialLog, method: str, space: Space, images: int) -> dict[str, Any]:
    """Return what was found of one method, as JSON.

    Args:
        log: the trials.
        method: name of the method.
        space: what was searched.
        images: validation images of all tasks.

    Returns:
        `chosen` configuration with its `batch_norm`, `value` and `by_task`, which are estimated if
        every candidate was discarded (as `state` says); the `defaults` likewise, None where they
        were not tried; the `space`; numbers of `trials`, of those `discarded`
        and `failed`; `images` that candidates were scored on, and their `saved_share` of what all
        of them would have taken without discarding; `seconds` and `cpu_seconds`; and the `regret`,
        if known.
    """
    trials = log.of(method)
    best = best_of(trials) or best_of(trials, "discarded")
    if best is None:
        raise ValueError(_nothing(method, len(trials)))
    made = [trial for trial in trials if trial.images]
    start = next((t for t in trials if key_of(t.config) == key_of(start_of(space))), None)
    seen = sum(trial.images for trial in made)
    return {
        "chosen": dict(best.config),
        "batch_norm": best.batch_norm,
        "state": best.state,
        "value": best.value,
        "by_task": dict(best.by_task),
        "trial": best.number,
        "defaults": start
        and {"config": dict(start.config), "value": start.value, "state": start.state},
        "space": {
            name: {"values": list(axis.values), "ends": axis.ends} for name, axis in space.items()
        },
        "trials": len(trials),
        "discarded": sum(trial.state == "discarded" for trial in trials),
        "failed": sum(trial.state == "failed" for trial in trials),
        "images": seen,
        "saved_share": 1 - seen / (images * len(made)),
        **_spent(trials),
        "regret": regret(trials, log.again(method)),
    }


def _nothing(method: str, count: int) -> str:
    return (
        f"{method!r} must have a candidate whose answers are numbers, but all {count} failed. "
        "Train the experts again with a lower learning rate."
    )


def regret(trials: Sequence[Trial], again: Sequence[Trial]) -> dict[str, Any] | None:
    """Return how much the choice falls short of the best of the trials on all images.

    Args:
        trials: those of a search.
        again: those of its discarded candidates on all images.

    Returns:
        `regret` = best - chosen value, at least 0; the `best` configuration with its `value`; and
        the `seconds` and `cpu_seconds` that scoring all candidates on all images takes. None while
        a discarded candidate has not been scored on all images.
    """
    whole = {(trial.method, trial.number): trial for trial in again}
    everyone = [
        whole.get((trial.method, trial.number), trial) if trial.state == "discarded" else trial
        for trial in trials
    ]
    if any(trial.state == "discarded" for trial in everyone):
        return None
    chosen, best = best_of(trials), best_of(everyone)
    if chosen is None or best is None or chosen.value is None or best.value is None:
        return None
    return {
        "regret": best.value - chosen.value,
        "best": dict(best.config),
        "value": best.value,
        **_spent(everyone),
    }


def _spent(trials: Sequence[Trial]) -> dict[str, float]:
    return {
        "seconds": round(sum(trial.seconds for trial in trials), 3),
        "cpu_seconds": round(sum(trial.cpu_seconds for trial in trials), 3),
    }


def trial_rows(log: TrialLog) -> list[dict[str, Any]]:
    """Return one row a trial with the same keys, in the order in which they were made.

    None stands where there is nothing to tell.
    """
    trials = log.trials
    tasks = list(dict.fromkeys(task for trial in trials for task in trial.by_task))
    return [
        {
            "method": trial.method,
            "trial": trial.number,
            "config": json.dumps(dict(trial.config), sort_keys=True),
            "batch_norm": trial.batch_norm,
            "state": trial.state,
            "value": trial.value,
            "upper": trial.upper,
            **{task: trial.by_task.get(task) for task in tasks},
            "images": trial.images,
            "seconds": trial.seconds,
            "cpu_seconds": trial.cpu_seconds,
            "again": trial.again,
            "note": trial.note,
        }
        for trial in trials
    ]
