"""This file says where merges lie to one another: those that are alike will do alike.

Each declared parameter becomes a place in [0, 1] within its range, by the rule by which grids are
cut (`space_of`): the root of its share for lengths of steps, since good ones are short; the share
of the logarithm where the ends differ tenfold; else the share itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_lit.core.merging import BatchNormPolicy
from mergekit_lit.core.registry import MERGE_METHODS, Registered
from mergekit_lit.merging.configuration import SCALE, resolve
from mergekit_lit.search.tuning.pool import Candidate
from mergekit_lit.search.tuning.space import key_of

Numbers: TypeAlias = NDArray[np.float64]

# How far the statistics are from those that the merge has on each task.
_POLICIES: Mapping[BatchNormPolicy, float] = MappingProxyType(
    {"recalibrate-per-task": 0.0, "recalibrate": 1 / 3, "average": 2 / 3, "base": 1.0}
)
_MIDDLE = 0.5


@dataclass(frozen=True)
class Places:
    """Where n merges lie.

    Attributes:
        method: names, (n,).
        length: place of `scale`, or of the first parameter where a method has none, (n,).
        rest: places of the other declared parameters, (n, p), padded with the middle.
        words: the values of what has no range, as one text, (n,).
        policy: distance of the BatchNorm statistics from the task's own, in [0, 1], (n,).
    """

    method: NDArray[np.str_]
    length: Numbers
    rest: Numbers
    words: NDArray[np.str_]
    policy: Numbers

    def __len__(self) -> int:
        return len(self.length)


def places_of(candidates: Sequence[Candidate], *, statistics: bool = True) -> Places:
    """Return where candidates lie.

    Args:
        candidates: n merges.
        statistics: whether the model has BatchNorm statistics; without, policies change nothing.

    Raises:
        KeyError: unknown method or parameter.
    """
    found = [_place(each) for each in candidates]
    width = max((len(rest) for _, rest, _ in found), default=0)
    padded = [[*rest, *[_MIDDLE] * (width - len(rest))] for _, rest, _ in found]
    return Places(
        method=np.array([each.method for each in candidates]),
        length=np.array([length for length, _, _ in found]),
        rest=np.array(padded, dtype=np.float64).reshape(len(found), width),
        words=np.array([words for _, _, words in found]),
        policy=np.array([_POLICIES[each.batch_norm] * statistics for each in candidates]),
    )


def _place(candidate: Candidate) -> tuple[float, list[float], str]:
    """Return the places of the length and of the rest, and the text of what has no range."""
    method = MERGE_METHODS.get(candidate.method)
    values = resolve(method, candidate.config)
    ranges = dict(method.facts.get("search", {}))
    at = {name: _within(method, name, values[name]) for name in ranges}
    words = {name: str(value) for name, value in values.items() if name not in ranges}
    first = SCALE if SCALE in at else next(iter(at), None)
    length = at.pop(first) if first is not None else _MIDDLE
    return length, list(at.values()), key_of(words)


def _within(method: Registered[Any], name: str, value: Any) -> float:
    """Return the place of a value in its declared range; the middle for one by pattern."""
    low, high = (float(end) for end in method.facts["search"][name])
    if not isinstance(value, int | float):
        return _MIDDLE
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    if name == SCALE:
        return math.sqrt(share)
    if 0 < 10 * low <= high:
        return math.log(min(max(value, low), high) / low) / math.log(high / low)
    return share


def likeness(a: Places, b: Places, *, lengths: "Lengths") -> Numbers:
    """Return how alike merges are, (n, m), 1 for the same; a kernel, positive semidefinite.

    k = exp(-d_length^2 / 2) exp(-d_policy^2 / 2) (c + (1 - c) [same method] exp(-d_rest^2 / 2) w)

    with distances in units of `lengths`, c `across` methods, and w `words` where the texts differ.
    """
    same = _same(a.method, b.method)
    words = lengths.words + (1 - lengths.words) * _same(a.words, b.words)
    width = min(a.rest.shape[1], b.rest.shape[1])
    rest = np.ones_like(same)
    for column in range(width):
        rest = rest * _near(a.rest[:, column], b.rest[:, column], lengths.rest)
    own = same * words * rest
    shape = _near(a.length, b.length, lengths.length) * _near(a.policy, b.policy, lengths.policy)
    found: Numbers = shape * (lengths.across + (1 - lengths.across) * own)
    return found


@dataclass(frozen=True)
class Lengths:
    """How fast likeness falls.

    Attributes:
        length: with the place of the step's length.
        rest: with the place of any other parameter.
        policy: with the distance of BatchNorm policies.
        across: what is left of it between methods, in [0, 1].
        words: what is left of it where values without a range differ, in [0, 1].
    """

    length: float
    rest: float
    policy: float
    across: float
    words: float


def _near(a: Numbers, b: Numbers, unit: float) -> Numbers:
    found: Numbers = np.exp(-0.5 * ((a[:, None] - b[None]) / unit) ** 2)
    return found


def _same(a: NDArray[np.str_], b: NDArray[np.str_]) -> Numbers:
    found: Numbers = (a[:, None] == b[None]).astype(np.float64)
    return found
