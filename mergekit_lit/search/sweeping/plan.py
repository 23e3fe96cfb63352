"""This file turns points into runs: named by content, each trajectory once, neighbours together.

A run's name is the hash of what decides its results, so a sweep that is started again, or extended
by a value, finds what is done already. Points that differ in the number of steps alone, under a
schedule that does not depend on it, are one run that leaves several experts. What files hold
(images, experts) is not part of the name: sweep anew, in another folder, where they change.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_lit.search.sweeping.axes import Axes, Point
from mergekit_lit.search.sweeping.jobs import Config, Job

_NAME_LENGTH = 16
# What is costly to load, and so kept by a worker from one run to the next where it is the same.
_LOADED = ("model.base", "model.image_size", "data.suite", "data.task", "models", "experts", "base")


@dataclass(frozen=True, slots=True)
class Run:
    """One piece of work.

    Attributes:
        name: of its folder; hash of what decides the results.
        kind: which of the plan's bases it changes.
        changes: typed values that differ from those of the base, by dotted key.
        steps: counts K after which an expert is left, ascending; empty for jobs without.
    """

    name: str
    kind: int
    changes: Mapping[str, Any]
    steps: tuple[int, ...] = ()

    @property
    def results(self) -> int:
        """Number of experts or models that it makes."""
        return max(1, len(self.steps))


@dataclass(frozen=True)
class Plan:
    """Every run of a sweep, in the order in which they are taken.

    Attributes:
        bases: complete configurations, of which runs say what they change.
        runs: the runs; those that load the same data and base stand together.
        keys: keys of the axes.
    """

    bases: tuple[Config, ...]
    runs: tuple[Run, ...]
    keys: tuple[str, ...]

    def config(self, run: Run) -> Config:
        """Return the complete configuration of a run."""
        return {**self.bases[run.kind], **run.changes}

    @property
    def results(self) -> int:
        """Number of experts or models that all runs make."""
        return sum(run.results for run in self.runs)

    @property
    def shared(self) -> int:
        """Number of runs that leave several experts."""
        return sum(len(run.steps) > 1 for run in self.runs)


def plan_runs(axes: Iterable[Axes], job: Job) -> Plan:
    """Return the runs of all points of the axes.

    Points are typed value by value, so that ten thousand of them take seconds.

    Args:
        axes: mappings of axes, of which Optuna is not asked for anything.
        job: what is done at each point.

    Raises:
        ValueError: an unknown key or a wrong value.
    """
    typed = _Typed(job)
    runs: dict[str, Run] = {}
    keys: dict[str, None] = {}
    for block in axes:
        for point in block.points():
            keys.update(dict.fromkeys(point))
            for run in typed.runs(point):
                before = runs.get(run.name)
                steps = {*run.steps, *(before.steps if before else ())}
                runs[run.name] = Run(run.name, run.kind, run.changes, tuple(sorted(steps)))
    bases = tuple(typed.bases.values())
    return Plan(bases, tuple(_neighbours_together(runs.values(), bases)), tuple(keys))


class _Typed:
    """Makes typed configurations of points: each value is typed once, not once a point."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._values: dict[tuple[Hashable, str, str], Any] = {}
        self._followed: dict[Hashable, Callable[[Point], Point]] = {}
        self.bases: dict[Hashable, Config] = {}

    def runs(self, point: Point) -> Iterator[Run]:
        """Yield the runs of a point, each with its own steps alone."""
        # A base holds its first point's values, which are no others' where they leave a key out.
        kind = (*sorted(point), self._job.kind(point))
        if kind not in self.bases:
            self.bases[kind] = self._job.complete(point)
            self._followed[kind] = self._job.followed(self.bases[kind])
        base, place = self.bases[kind], list(self.bases).index(kind)
        whole = self._followed[kind](point)
        changed = {key: self._typed(kind, point, key, value) for key, value in whole.items()}
        for config in self._job.separate({**base, **changed}):
            identity, steps = self._job.identity(config)
            text = json.dumps([self._job.stage, identity], sort_keys=True)
            name = hashlib.sha256(text.encode()).hexdigest()[:_NAME_LENGTH]
            differs = {key: value for key, value in config.items() if value != base.get(key)}
            yield Run(name, place, differs, steps)

    def _typed(self, kind: Hashable, point: Point, key: str, value: Any) -> Any:
        """Return a value that a point has, or makes, as the job's parser types it.

        Numbers have no range there: of many, the first of each type speaks for the others.
        """
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        known = (kind, key, type(value).__name__ if number else repr(value))
        if known not in self._values:
            found = self._job.complete(point)[key]
            self._values[known] = type(found) if number else found
        found = self._values[known]
        if not number:
            return found
        return [value] if found is list else found(value)


def _neighbours_together(runs: Iterable[Run], bases: tuple[Config, ...]) -> list[Run]:
    """Return runs that load the same things one after another, otherwise in their order."""
    places: dict[str, int] = {}

    def place(run: Run) -> int:
        base = bases[run.kind]
        text = repr([run.changes.get(key, base.get(key)) for key in _LOADED])
        return places.setdefault(text, len(places))

    return sorted(runs, key=place)
