"""This file is the budget of a recommendation: what trainings cost, and how it is shared out.

Everything is paid from one budget: the probes, the validation run, and the training of all experts
as recommended. No clock decides anything but through the pace, which is measured once and kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mergekit_lit.search.recommending.space import Candidate, Space, Way

Unit = Literal["seconds", "steps"]

REFERENCE_BATCH = 32
"""Samples in one step of a budget in steps; a step of b samples counts b / 32."""
PROBE_LENGTHS = (80, 40, 20, 10)
_LEAST_TASKS = 2


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What work costs, in the unit of the budget.

    Attributes:
        unit: `seconds`, or `steps` of 32 samples.
        start: of a training, with the first expert that it leaves.
        export: of each further expert.
        step: of a step, whatever its batch.
        sample: of each of its samples.
        score: of the score of a merge on one task.
    """

    unit: Unit
    start: float = 0.0
    export: float = 0.0
    step: float = 0.0
    sample: float = 0.0
    score: float = 0.0

    def training(self, way: Way, steps: int, *, exports: int = 1) -> float:
        """Return the cost of one expert, or of several along one trajectory of `steps` steps."""
        each = self.step + self.sample * way.batch
        return self.start + (exports - 1) * self.export + steps * each


IN_STEPS = Pace(unit="steps", sample=1 / REFERENCE_BATCH)
"""The pace of a budget in steps: no clock, and only steps count."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What parts may cost, as shares of the budget.

    Attributes:
        probe: of the probes, in (0, 1).
        confirm: of the ways that the validation run gives up, in (0, 1); the rest trains the
            experts, some of them in the validation run.
    """

    probe: float = 0.05
    confirm: float = 0.2

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing."""
        for name, value in vars(self).items():
            if not 0 < value < 1:
                raise ValueError(f"`{name}_share` must lie in (0, 1), but is {value!r}.")
        if self.probe + self.confirm >= 1:
            raise ValueError(
                f"`probe_share` and `confirm_share` must leave a share for training, but sum to "
                f"{self.probe + self.confirm:g}."
            )

    @property
    def train(self) -> float:
        """What is left for the training of all experts."""
        return 1 - self.probe - self.confirm


@dataclass(frozen=True)
class Rung:
    """One round of the validation run: so many ways are trained until each has cost so much."""

    ways: int
    cost: float


@dataclass(frozen=True)
class Parts:
    """How a budget is shared out.

    Attributes:
        length: K of each probe.
        sample: tasks that probes and validation run take.
        candidates: whose training of all experts fits.
        rungs: of the validation run, on each task.
    """

    length: int
    sample: int
    candidates: tuple[Candidate, ...]
    rungs: tuple[Rung, ...]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What is to be shared out, among what.

    Attributes:
        space: of candidates.
        tasks: number of experts to train in the end.
        sample: tasks that probes and validation run take at most; a small budget makes them fewer,
            but not fewer than 2.
        ways: ways to train that enter the validation run, at least 1.
        shares: what parts may cost.
        pace: what work costs.
    """

    space: Space
    tasks: int
    sample: int
    ways: int
    shares: Shares
    pace: Pace

    def parts(self, limit: float) -> Parts:
        """Share out a budget.

        Raises:
            ValueError: it is too small for any candidate; says the smallest that would do.
        """
        found = self._parts(limit)
        if found is None:
            raise ValueError(
                f"The budget must be at least {self._least():.0f} {self.pace.unit} for any "
                f"candidate of this space to be probed, confirmed and trained on {self.tasks} "
                f"tasks, but is {limit:g}. Give more, fewer tasks, or smaller `space` values."
            )
        return found

    def probe_cost(self, steps: int, tasks: int) -> float:
        """Return the cost of all probes: two experts each, and the score of both merges."""
        each = [self.pace.training(way, steps, exports=2) for way in self.space.probes]
        return tasks * (sum(each) + 2 * len(each) * self.pace.score)

    def whole(self, candidate: Candidate) -> float:
        """Return the cost of the training of all experts."""
        return self.tasks * self.pace.training(candidate.way, candidate.steps)

    def within(self, way: Way, steps: Sequence[int], cost: float) -> list[int]:
        """Return those of ascending step counts that one trajectory of a cost serves."""
        exports = range(1, len(steps) + 1)
        return [
            k
            for k, count in zip(steps, exports, strict=True)
            if self.pace.training(way, k, exports=count) + count * self.pace.score <= cost
        ]

    def _parts(self, limit: float) -> Parts | None:
        fitting = [c for c in self.space.candidates if self.whole(c) <= self.shares.train * limit]
        for length, sample in self._probes():
            ways = min(self.ways, len(self.space.ways))
            rungs = rungs_of(ways, self.shares.confirm * limit / sample)
            kept = [c for c in fitting if self._enters(c.way, rungs)]
            if kept and self.probe_cost(length, sample) <= self.shares.probe * limit:
                return Parts(length, sample, tuple(kept), rungs)
        return None

    def _enters(self, way: Way, rungs: Sequence[Rung]) -> bool:
        """Whether the first round reaches the shortest training of a way."""
        return not rungs or bool(self.within(way, self.space.lengths[:1], rungs[0].cost))

    def _probes(self) -> Iterator[tuple[int, int]]:
        """Yield lengths and numbers of tasks of probes, the best first: more tasks, then longer."""
        for sample in range(self.sample, min(self.sample, _LEAST_TASKS) - 1, -1):
            for length in PROBE_LENGTHS:
                yield length, sample

    def _least(self) -> float:
        """Return the least budget that does, rounded up to three digits."""
        return least(lambda limit: self._parts(limit) is not None)


def rungs_of(ways: int, cost: float) -> tuple[Rung, ...]:
    """Return the rounds of successive halving that cost so much in all, on one task.

    Half of the ways, rounded up, go on after each round, until one is left, which needs none; each
    round doubles what a way has cost.
    """
    counts = []
    while ways > 1:
        counts.append(ways)
        ways = (ways + 1) // 2
    shares = [2.0 ** (place + 1 - len(counts)) for place in range(len(counts))]
    added = [after - before for before, after in zip([0.0, *shares], shares, strict=False)]
    whole = sum(count * more for count, more in zip(counts, added, strict=True))
    return tuple(Rung(n, cost * share / whole) for n, share in zip(counts, shares, strict=True))


def least(does: Callable[[float], bool]) -> float:
    """Return the least number of three digits that does, where all larger ones do too."""
    high = 1.0
    while not does(high):
        high *= 2
    low = high / 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if does(middle) else (middle, high)
    digits = 10.0 ** (len(str(int(high))) - 3)
    rounded = float(-(-high // digits) * digits)
    return rounded if does(rounded) else rounded + digits
