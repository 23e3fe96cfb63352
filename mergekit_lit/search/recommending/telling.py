"""This file tells a recommendation: as plain values for the record, and as a file for `train`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from mergekit_lit.core.records import plain
from mergekit_lit.search.recommending.budget import Budget
from mergekit_lit.search.recommending.confirming import Confirmed
from mergekit_lit.search.recommending.expecting import Expected
from mergekit_lit.search.recommending.points import Point, Probed
from mergekit_lit.search.recommending.ranking import Outlook
from mergekit_lit.search.recommending.site import Setting
from mergekit_lit.search.recommending.space import Candidate


def facts_of(
    budget: Budget, limit: float, probed: Probed, confirmed: Confirmed, expected: Expected
) -> dict[str, Any]:
    """Return the metrics of the record."""
    parts, chosen = budget.parts(limit), confirmed.chosen
    order = confirmed.ranking.ranked(parts.candidates)
    candidate = Candidate(chosen.way, chosen.steps)
    totals = [each for each in order if each.bound["total"] is not None]
    alone = min(totals, key=lambda each: (each.bound["total"], each.candidate), default=None)
    every = budget.space.candidates
    return {
        "recommended": {**asdict(chosen.way), "steps": chosen.steps},
        "expected": asdict(expected),
        "measured": _told_point(chosen),
        "base": {task: asdict(score) for task, score in probed.constants.base.items()},
        "candidates": [_told(each) for each in order],
        "bound_alone": None if alone is None else _told(alone),
        "laws": {name: asdict(law) for name, law in confirmed.ranking.laws.items()},
        "generalization_share": confirmed.ranking.share,
        "constants": asdict(probed.constants),
        "points": [_told_point(point) for point in confirmed.points],
        "rounds": [asdict(each) for each in confirmed.rounds],
        "rejected": {
            "over_budget": len(every) - len(parts.candidates),
            "of": len(every),
            "diverged": dict(probed.failed),
        },
        "budget": {
            "unit": budget.pace.unit,
            "limit": limit,
            "probes": budget.probe_cost(parts.length, parts.sample),
            "validation run": parts.sample * _given_up(budget, confirmed),
            "training": budget.whole(candidate),
        },
        "cautions": [
            *_passed_over(order, candidate),
            *_cautions(budget, candidate, parts.candidates, alone, expected),
        ],
    }


def tables_of(metrics: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the tables for a tracker: every candidate, the bound's terms too, and every merge."""
    return {
        "candidates": [
            {**_flat(row, "bound"), **{f"bound/{name}": v for name, v in row["bound"].items()}}
            for row in metrics["candidates"]
        ],
        "points": [_flat(row, "tasks") for row in metrics["points"]],
    }


def _flat(row: Mapping[str, Any], nested: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != nested}


def training_file(setting: Setting, metrics: Mapping[str, Any], out: Path) -> str:
    """Return the YAML of the recommended training, for `train`, or `sweep` with axes."""
    chosen = metrics["recommended"]
    values = {
        "data": {
            "suite": setting.suite,
            "task": ",".join(setting.tasks),
            "batch": chosen["batch"],
            "train_share": setting.split(chosen["share"]).train_share,
            "n": setting.split(chosen["share"]).n,
            "val_share": setting.val_share,
            "reserve": setting.reserve,
            "split_seed": setting.seed,
            **({"root": str(setting.root)} if setting.root else {}),
        },
        "model": {
            "base": setting.backbone,
            "head": setting.head,
            **setting.space.training_of(chosen["optimizer"], chosen["lr"]),
            "seed": setting.seed,
        },
        "steps": [chosen["steps"]],
        "out": str(out / "recommended"),
    }
    text = yaml.safe_dump(plain(values), sort_keys=False)
    return f"# By mergekit-lit recommend, to train: mergekit-lit train --config THIS_FILE\n{text}"


def _told(outlook: Outlook) -> dict[str, Any]:
    value = asdict(outlook)
    candidate = value.pop("candidate")
    return {**candidate["way"], "steps": candidate["steps"], **value}


def _told_point(point: Point) -> dict[str, Any]:
    return {
        **asdict(point.way),
        "steps": point.steps,
        "travel": point.travel,
        "train_loss": point.train_loss,
        "val_loss": point.val_loss,
        "accuracy": point.accuracy,
        "tasks": {
            task: {"val_loss": score.val_loss, "accuracy": score.accuracy}
            for task, score in point.scores.items()
        },
    }


def _given_up(budget: Budget, confirmed: Confirmed) -> float:
    """Return the cost, on one task, of what the validation run trained in vain."""
    chosen, cost = confirmed.chosen, 0.0
    tried = {name for each in confirmed.rounds for name, k in each.until.items() if k}
    for way in {point.way for point in confirmed.points if point.way.name in tried}:
        counts = [point.steps for point in confirmed.points if point.way == way]
        cost += budget.pace.training(way, max(counts), exports=len(counts))
        cost += len(counts) * budget.pace.score
    return cost - budget.pace.training(chosen.way, chosen.steps)


def _passed_over(order: Sequence[Outlook], chosen: Candidate) -> list[str]:
    """Return why the first of the order is not what is recommended, where it is not."""
    first = order[0]
    if first.candidate == chosen or first.measured:
        return []
    return [
        f"{_words(first.candidate)} now looks better (validation loss {first.val_loss:.3f}), but "
        "was never merged: the validation run had given its way up, or ended before. What is "
        "recommended is the best that was measured."
    ]


def _cautions(
    budget: Budget,
    chosen: Candidate,
    fitting: Sequence[Candidate],
    alone: Outlook | None,
    expected: Expected,
) -> list[str]:
    """Return what a reader should keep in mind, a sentence each."""
    lines = []
    longest = max(each.steps for each in fitting if each.way == chosen.way)
    if chosen.steps == longest:
        lines.append(
            f"{longest} steps are the most that the budget or the space allows in this way, and "
            "were the best: longer may be better."
        )
    rates = budget.space.lr if chosen.way.optimizer == "sgd" else budget.space.adam_lr
    if len(rates) > 1 and chosen.way.lr in (min(rates), max(rates)):
        lines.append(f"The rate {chosen.way.lr:g} lies at an end of the space: widen `space.lr`.")
    if alone is not None and alone.candidate != chosen:
        lines.append(
            f"By the bound's total alone {_words(alone.candidate)} would be best: its terms that "
            "grow with travel are loose by orders of magnitude, so that it asks for the shortest "
            "way. It is told, and does not choose."
        )
    if expected.gain <= 0:
        lines.append("No merge that was measured beats the base: merging may not help here.")
    if expected.tried < expected.tasks:
        lines.append(
            f"Merges of {expected.tried} of {expected.tasks} tasks were measured: what the other "
            "experts do to these tasks is not in the expected accuracy."
        )
    return lines


def _words(candidate: Candidate) -> str:
    way = candidate.way
    return f"{way.optimizer} at {way.lr:g}, batch {way.batch}, {candidate.steps} steps"
