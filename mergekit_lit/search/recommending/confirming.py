"""This file confirms: the best ways are trained on a few tasks, merged and scored on validation.

Successive halving over K: each round trains every way that is left as far as its share of the cost
goes, scores the merge at every K on the way, and looks ahead again with what was measured; the
better half goes on. One trajectory serves all K, and goes on from where the round before left it.
The way that is left is trained until longer no longer looks better: on these tasks its experts are
then there, and are part of what is recommended.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mergekit_lit.core.files import read_json, write_json
from mergekit_lit.core.records import plain
from mergekit_lit.search.recommending.budget import Budget, Parts, Rung
from mergekit_lit.search.recommending.points import Constants, Point, point_from
from mergekit_lit.search.recommending.probes import diverged, measured
from mergekit_lit.search.recommending.ranking import Outlook, Ranking
from mergekit_lit.search.recommending.site import Site
from mergekit_lit.search.recommending.space import Candidate, Way


@dataclass(frozen=True)
class Round:
    """One round of the validation run.

    Attributes:
        until: largest K that each way was trained for, by its name.
        dropped: why a way went no further, by its name.
    """

    until: Mapping[str, int]
    dropped: Mapping[str, str]


@dataclass(frozen=True)
class Confirmed:
    """What the validation run found.

    Attributes:
        chosen: the best candidate that was measured.
        points: every merge that was measured.
        rounds: of the halving.
        ranking: with all that was measured.
    """

    chosen: Point
    points: tuple[Point, ...]
    rounds: tuple[Round, ...]
    ranking: Ranking


@dataclass
class Log:
    """Measured merges, kept in a file, so that a run that was killed scores none twice."""

    path: Path
    points: dict[tuple[Way, int], Point] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what is there."""
        if self.path.is_file():
            self.add([point_from(each) for each in read_json(self.path)], write=False)

    def add(self, points: Sequence[Point], *, write: bool = True) -> None:
        """Keep points."""
        self.points |= {(point.way, point.steps): point for point in points}
        if write and points:
            write_json(self.path, plain([asdict(each) for each in self.points.values()]))


class Confirmation:
    """The validation run of one recommendation."""

    def __init__(
        self,
        site: Site,
        tasks: Sequence[str],
        budget: Budget,
        parts: Parts,
        steps: Mapping[Way, Sequence[int]],
        log: Log,
    ) -> None:
        """Hold what it is done with.

        Args:
            site: where.
            tasks: on which.
            budget: tells what trainings cost.
            parts: the candidates, and what each round may cost.
            steps: of each way all step counts that its trajectory may be asked for.
            log: keeps what is measured.
        """
        self._site, self._tasks, self._budget = site, tuple(tasks), budget
        self._parts, self._steps, self._log = parts, steps, log

    def run(
        self, constants: Constants, probes: Sequence[Point], *, by_accuracy: bool = False
    ) -> Confirmed:
        """Train, merge, score and halve until one way is left.

        Args:
            constants: of the loss.
            probes: what the probes measured.
            by_accuracy: whether accuracy counts, and not the loss.

        Raises:
            ValueError: every way diverged.
        """
        self._constants = constants
        self._points = {(point.way, point.steps): point for point in probes}
        order = self._ranking().ranked(self._parts.candidates)
        rungs = self._parts.rungs
        alive = best_ways(order, rungs[0].ways if rungs else 1)
        rounds = []
        for place, rung in enumerate(rungs):
            left = rungs[place + 1].ways if place + 1 < len(rungs) else 1
            alive, told = self._halve(alive, rung, left)
            rounds.append(told)
        rounds += [self._finish(way) for way in alive]
        fitting = set(self._parts.candidates)
        confirmed = [point for key, point in self._points.items() if Candidate(*key) in fitting]
        if not confirmed:
            raise ValueError(
                "At least one way must train, but all that were tried diverged: "
                f"{'; '.join(rounds[0].dropped.values())} Give smaller rates: `space.lr`."
            )
        chosen = best_point(confirmed, by_accuracy=by_accuracy)
        return Confirmed(chosen, tuple(self._points.values()), tuple(rounds), self._ranking())

    def _ranking(self) -> Ranking:
        setting = self._site.setting
        return Ranking(
            setting.space,
            self._constants,
            list(self._points.values()),
            coefficient=setting.coefficient,
        )

    def _halve(self, alive: Sequence[Way], rung: Rung, left: int) -> tuple[list[Way], Round]:
        """Train some ways a round further, and return those that go on."""
        until, dropped = {}, {}
        for way in alive:
            wanted = self._budget.within(way, self._lengths(way), rung.cost)
            try:
                self._points |= self._measure(way, wanted)
            except ValueError as error:
                dropped[way.name] = diverged(error)
            until[way.name] = max((k for of, k in self._points if of == way), default=0)
        whole = [way for way in alive if way.name not in dropped]
        order = self._ranking().ranked([c for c in self._parts.candidates if c.way in whole])
        kept = best_ways(order, left)
        dropped |= {way.name: _told(order, way, kept) for way in whole if way not in kept}
        return kept, Round(until, dropped)

    def _finish(self, way: Way) -> Round:
        """Train the way that is left until longer no longer looks better."""
        until, dropped = 0, {}
        try:
            for k in self._lengths(way):
                own = [c for c in self._parts.candidates if c.way == way and c.steps >= k]
                seen = [p.val_loss for (of, _), p in self._points.items() if of == way]
                ahead = self._ranking().ranked(own)[0].val_loss
                known = (way, k) in self._points
                if not known and seen and ahead >= min(seen):
                    break
                self._points |= self._measure(way, [k])
                until = k
        except ValueError as error:
            dropped[way.name] = diverged(error)
        return Round({way.name: until}, dropped)

    def _lengths(self, way: Way) -> list[int]:
        """Return the step counts of a way whose training fits, ascending."""
        return sorted(c.steps for c in self._parts.candidates if c.way == way)

    def _measure(self, way: Way, wanted: Sequence[int]) -> dict[tuple[Way, int], Point]:
        """Return the merges of a way at some step counts; make those that the log lacks."""
        new = [k for k in wanted if (way, k) not in self._log.points]
        if new:
            self._log.add(list(measured(self._site, way, self._tasks, self._steps[way], new)))
        return {(way, k): self._log.points[way, k] for k in wanted}


def best_ways(order: Sequence[Outlook], count: int) -> list[Way]:
    """Return the first few ways of an order of candidates: one of each rate, before any others.

    Rates differ in what nobody can know beforehand; batches and shares of one rate differ by what
    the outlook says of noise and generalization.
    """
    ways = list(dict.fromkeys(each.candidate.way for each in order))
    first = list({(way.optimizer, way.lr): way for way in reversed(ways)}.values())
    return [*sorted(first, key=ways.index), *(way for way in ways if way not in first)][:count]


def best_point(points: Sequence[Point], *, by_accuracy: bool) -> Point:
    """Return the merge with the least validation loss, or with the highest accuracy."""

    def rank(point: Point) -> tuple[float, float, int, Way]:
        loss = point.val_loss if math.isfinite(point.val_loss) else math.inf
        return (-point.accuracy if by_accuracy else 0.0, loss, point.steps, point.way)

    return min(points, key=rank)


def _told(order: Sequence[Outlook], way: Way, kept: Sequence[Way]) -> str:
    """Return why a way goes no further."""
    own = next(each.val_loss for each in order if each.candidate.way == way)
    best = next(each.val_loss for each in order if each.candidate.way == kept[0])
    return f"expected to reach {own:.3f}, the best {best:.3f}"
