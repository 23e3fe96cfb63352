"""This file ranks candidates: the terms of the bound in closed form, and the outlook of each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_lit.search.recommending.outlook import Known, Law, fit_law, fit_share
from mergekit_lit.search.recommending.points import Constants, OfExpert, Point
from mergekit_lit.search.recommending.space import Candidate, Space, Way
from mergekit_lit.theory.bound import bound
from mergekit_lit.theory.facts import ALL, ExpertFacts, MergeFacts
from mergekit_lit.theory.stability import stability_estimate
from mergekit_lit.theory.travel import effective_steps, sgd_rule

MEMORY = 20
"""Steps whose noise a merge remembers: what is older, later steps have mended.

In the bound noise adds up for ever. On `embedded8` it does not: what a large rate costs within the
first 20 steps is made good by the next hundred. Outlooks from 20 steps rank the merges of longer
trainings with a Spearman correlation of about .9 that way, and of about -.2 without.
"""
_TERMS = ("progress", "drift", "merged_noise", "generalization")


@dataclass(frozen=True)
class Sums:
    """What the step weights w_k = eta_k a_k of a training add up to.

    Attributes:
        travel: sum_k w_k.
        squares: sum_k w_k^2.
    """

    travel: float
    squares: float


@dataclass(frozen=True)
class Outlook:
    """What is expected of one candidate.

    Attributes:
        candidate: how experts would be trained.
        val_loss: of their merge, on the tasks of the probes.
        progress: fall of the training loss that travel brings.
        noise: rise of it by the noise of batches.
        generalization: rise of the gap between validation and training loss.
        travel: s.
        bound: terms of the bound, None where unknown, and their total.
        measured: whether the loss was measured, and not looked ahead to.
    """

    candidate: Candidate
    val_loss: float
    progress: float
    noise: float
    generalization: float
    travel: float
    bound: Mapping[str, float | None]
    measured: bool = False


class Ranking:
    """What is known of a space by measured merges; made anew when more are measured."""

    def __init__(
        self,
        space: Space,
        constants: Constants,
        points: Sequence[Point],
        *,
        coefficient: float | None = None,
    ) -> None:
        """Fit what the outlook takes.

        Args:
            space: of candidates.
            constants: of the loss.
            points: measured merges, at least one, all of the same tasks as the constants.
            coefficient: lambda of each expert; by default that of their average.
        """
        self._coefficient = coefficient or 1 / len(constants.base)
        self._space, self._constants, self._points = space, constants, list(points)
        self._weights: dict[tuple[bool, int], Sums] = {}
        self._laws = {
            name: fit_law([(self._known(p.way, p.steps), self._change(p)) for p in of])
            for name, of in self._by_optimizer().items()
        }
        self._share = fit_share(list(self._gaps()))

    @property
    def laws(self) -> Mapping[str, Law]:
        """The law of each optimizer."""
        return self._laws

    @property
    def share(self) -> float:
        """g, the share of the bound's generalization that experts show."""
        return self._share

    def sums(self, way: Way, steps: int) -> Sums:
        """Return travel and its squares in closed form.

        Those of adaptive optimizers are scaled to the travel that was measured at their rate.
        """
        linear = way.optimizer == "sgd"
        if (linear, steps) not in self._weights:
            momentum = self._space.momentum if linear else 0.0
            factors = self._space.factors(steps)
            weights = effective_steps([sgd_rule(f, momentum=momentum) for f in factors])
            self._weights[linear, steps] = Sums(float(weights.sum()), float(weights.square().sum()))
        unit = self._weights[linear, steps]
        rate = way.lr
        if not linear:
            seen = self._nearest(way)
            rate = seen.travel / self.sums_of_one(seen.steps).travel
        return Sums(rate * unit.travel, rate**2 * unit.squares)

    def sums_of_one(self, steps: int) -> Sums:
        """Return the sums of a rate of 1 without momentum."""
        factors = self._space.factors(steps)
        return Sums(math.fsum(factors), math.fsum(f**2 for f in factors))

    def outlook(self, candidate: Candidate) -> Outlook:
        """Return what is expected of a candidate."""
        way, steps = candidate.way, candidate.steps
        known, law = self._known(way, steps), self._laws[way.optimizer]
        start = math.fsum(s.train_loss for s in self._constants.base.values())
        start = start / len(self._constants.base) + self._constants.base_gap
        rise = self._share * known.stability
        last = self._last(way)
        off = 0.0
        if last is not None:
            # What a way was measured to be beside the outlook, it is taken to stay.
            here = self._known(way, last.steps)
            off = last.val_loss - (start + law.change(here) + self._share * here.stability)
        exact = next((p for p in self._points if (p.way, p.steps) == (way, steps)), None)
        return Outlook(
            candidate=candidate,
            val_loss=exact.val_loss if exact else start + law.change(known) + rise + off,
            progress=law.progress(known),
            noise=law.noise * known.noise,
            generalization=rise,
            travel=known.travel,
            bound=self._bound(way, steps),
            measured=exact is not None,
        )

    def ranked(self, candidates: Sequence[Candidate]) -> list[Outlook]:
        """Return the outlook of candidates whose rate was probed, the best first."""
        known = [each for each in candidates if self._is_known(each.way)]
        found = [self.outlook(each) for each in known]
        return sorted(found, key=lambda each: (each.val_loss, each.candidate))

    def _is_known(self, way: Way) -> bool:
        return any((p.way.optimizer, p.way.lr) == (way.optimizer, way.lr) for p in self._points)

    def _by_optimizer(self) -> dict[str, list[Point]]:
        found: dict[str, list[Point]] = {}
        for point in self._points:
            if math.isfinite(point.train_loss):
                found.setdefault(point.way.optimizer, []).append(point)
        return found

    def _nearest(self, way: Way) -> Point:
        """Return the longest measured training at a way's rate, in the same way if there is one."""
        same = [p for p in self._points if (p.way.optimizer, p.way.lr) == (way.optimizer, way.lr)]
        return max(same, key=lambda p: (p.way == way, p.steps))

    def _last(self, way: Way) -> Point | None:
        own = [p for p in self._points if p.way == way]
        return max(own, key=lambda p: p.steps, default=None)

    def _change(self, point: Point) -> float:
        base = self._constants.base.values()
        return point.train_loss - math.fsum(s.train_loss for s in base) / len(self._constants.base)

    def _known(self, way: Way, steps: int) -> Known:
        sums, seen = self.sums(way, steps), self._nearest(way)
        count = len(seen.experts)
        smooth = self._constants.smoothness or 0.0
        recent = self.sums(way, min(steps, MEMORY)).squares
        each = [self._stability(row, sums, way, seen) for row in seen.experts]
        return Known(
            travel=sums.travel,
            noise=smooth * recent * seen.noise * count * self._coefficient**2 / way.batch,
            stability=math.fsum(each) / count * self._coefficient,
        )

    def _stability(self, row: OfExpert, sums: Sums, way: Way, seen: Point) -> float:
        """Return G eps_path of one expert."""
        n = self._images(row, way, seen)
        sigma = math.sqrt(max(0.0, row.noise))
        eps2 = stability_estimate(
            sums.squares * sigma**2, sums.travel * sigma, n=n, batch=way.batch
        )
        return math.sqrt(self._constants.sample_gradient2 * eps2)

    @staticmethod
    def _images(row: OfExpert, way: Way, seen: Point) -> int:
        return max(1, round(row.n * way.share / seen.way.share))

    def _gaps(self) -> list[tuple[float, float]]:
        """Return G eps_path of each measured expert, and its gap above the base's."""
        found = []
        for point in self._points:
            sums = self.sums(point.way, point.steps)
            for row in point.experts:
                base = self._constants.base[row.task].val_loss
                before = base - self._constants.base_loss[row.task]
                gap = row.val_loss - row.train_loss - before
                found.append((self._stability(row, sums, point.way, point), gap))
        return found

    def _bound(self, way: Way, steps: int) -> dict[str, float | None]:
        """Return the terms of the bound for the merge of the probes' tasks, and their total."""
        seen, constants = self._nearest(way), self._constants
        sums = self.sums(way, steps)
        facts = [self._facts(row, sums, way, seen) for row in seen.experts]
        merge = MergeFacts(
            smoothness=constants.smoothness,
            gram={ALL: constants.gram},
            sample_gradient2=constants.sample_gradient2,
        )
        found = bound(facts, merge, [self._coefficient] * len(facts))
        terms = {name: found.terms[name].value for name in _TERMS}
        values = [value for value in terms.values() if value is not None]
        return {**terms, "total": math.fsum(values) if len(values) == len(_TERMS) else None}

    def _facts(self, row: OfExpert, sums: Sums, way: Way, seen: Point) -> ExpertFacts:
        n = self._images(row, way, seen)
        sigma = math.sqrt(max(0.0, row.noise))
        base = self._constants.base_loss[row.task]
        return ExpertFacts(
            travel=sums.travel,
            travel_squared=sums.squares,
            # As the square of the travel: what a straight path would give.
            d2=row.d2 * (sums.travel / row.travel) ** 2 if row.travel else row.d2,
            batch=way.batch,
            noise=row.noise,
            zeta2=self._constants.zeta2[row.task],
            eps2=stability_estimate(
                sums.squares * sigma**2, sums.travel * sigma, n=n, batch=way.batch
            ),
            base_loss=base,
            # Of a merge that is not there yet: no more than the base's.
            train_loss=base,
            lr=way.lr,
            adaptive=way.optimizer != "sgd",
        )
