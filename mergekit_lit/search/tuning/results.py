"""This file is what a search found, made of its trials alone: the choice, its price, its regret."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lit.search.tuning.space import Space
from mergekit_lit.search.tuning.trials import Trial, TrialLog, best_of


def method_results(log: TrialLog, method: str, space: Space, images: int) -> dict[str, Any]:
    """Return what was found of one method, as JSON.

    Args:
        log: the trials.
        method: name of the method.
        space: what was searched.
        images: validation images of all tasks.

    Returns:
        `chosen` configuration with `value` and `by_task`; the `defaults` likewise, whose value is
        estimated where they were discarded; the `space`; numbers of `trials`, of those `discarded`
        and `failed`; `images` that candidates were scored on, and their `saved_share` of what all
        of them would have taken without discarding; `seconds` and `cpu_seconds`; and the `regret`,
        if known.
    """
    trials = log.of(method)
    best = best_of(trials)
    if best is None:
        raise ValueError(
            f"{method!r} must have a candidate whose answers are numbers, but all {len(trials)} "
            "failed. Train the experts again with a lower learning rate."
        )
    made = [trial for trial in trials if trial.images]
    seen = sum(trial.images for trial in made)
    return {
        "chosen": dict(best.config),
        "value": best.value,
        "by_task": dict(best.by_task),
        "trial": best.number,
        "defaults": {
            "config": dict(trials[0].config),
            "value": trials[0].value,
            "state": trials[0].state,
        },
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


def regret(trials: Sequence[Trial], again: Sequence[Trial]) -> dict[str, Any] | None:
    """Return how much the choice falls short of the best of all candidates on all images.

    Args:
        trials: those of a search.
        again: those of its discarded candidates on all images.

    Returns:
        `regret` = best - chosen value, at least 0; the `best` configuration with its `value`; and
        the `seconds` and `cpu_seconds` that scoring all candidates on all images takes. None while
        a discarded candidate has not been scored on all images.
    """
    whole = {trial.number: trial for trial in again}
    everyone = [
        whole.get(trial.number, trial) if trial.state == "discarded" else trial for trial in trials
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


def best_method(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the method with the best value; of equal ones the first."""
    return max(results, key=lambda method: results[method]["value"])


def trial_rows(log: TrialLog, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row a trial with the same keys; None where there is nothing to tell."""
    trials = [trial for name in methods for trial in (*log.of(name), *log.again(name))]
    tasks = list(dict.fromkeys(task for trial in trials for task in trial.by_task))
    return [
        {
            "method": trial.method,
            "trial": trial.number,
            "config": json.dumps(dict(trial.config), sort_keys=True),
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
