"""This file turns the `axes` of a sweep into points: what is set differently in each run.

An axis is a key of the job's configuration with what to try for it:

    model.lr: [0.01, 0.03]                                    a grid: every value with every other
    model.lr: {grid: [0.01, 0.03]}                            the same
    data.task: {list: [mnist, letters]}                       lists go together, value by value
    model.weight_decay: {random: {low: 1e-5, high: 1e-2, log: true, samples: 20, seed: 1}}
    model.momentum: {optuna: {low: 0.5, high: 0.99}}          asked of Optuna, trial by trial

Grids, lists, and the draws of all random axes together, are multiplied with one another. Several
mappings of axes in a list are several sweeps in one, such as one for each merge method with that
method's own parameters. Two whole numbers as `low` and `high` draw whole numbers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeAlias

import numpy as np

from mergekit_lit.core.registry import unknown_name
from mergekit_lit.core.seeds import derive_seed

Point: TypeAlias = dict[str, Any]
"""Values by dotted key."""

_FORMS = ("grid", "list", "optuna", "random")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between two ends.

    Attributes:
        low: the least.
        high: the largest, above `low`.
        log: whether equal ratios are equally likely, rather than equal differences.
    """

    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether the numbers are whole."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def at(self, share: float) -> float | int:
        """Return the number below which a share of them lies.

        low + share (high - low); exp of the same in logarithms where `log`. Whole numbers are all
        equally likely where `log` is not asked for.
        """
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            value = min(max(math.exp(low + share * (high - low)), self.low), self.high)
            return round(value) if self.whole else value
        if self.whole:
            return int(self.low + math.floor(share * (self.high - self.low + 1)))
        return self.low + share * (self.high - self.low)


@dataclass(frozen=True)
class Axes:
    """One mapping of axes, sorted by what is done with them.

    Attributes:
        grid: values that are multiplied.
        lists: values that go together, all of one length.
        draws: values drawn at random, which go together too.
        asked: what Optuna is asked for: ends of a range, or values to choose from.
    """

    grid: dict[str, Sequence[Any]] = field(default_factory=dict)
    lists: dict[str, Sequence[Any]] = field(default_factory=dict)
    draws: dict[str, Sequence[Any]] = field(default_factory=dict)
    asked: dict[str, Range | tuple[Any, ...]] = field(default_factory=dict)

    def points(self) -> Iterator[Point]:
        """Yield every point, without what Optuna is asked for; the last axis moves fastest."""
        together = [_side_by_side(self.lists), _side_by_side(self.draws)]
        alone = [[{key: value} for value in values] for key, values in self.grid.items()]
        for parts in product(*together, *alone):
            yield {key: value for part in parts for key, value in part.items()}

    def __len__(self) -> int:
        sizes = [len(values) for values in self.grid.values()]
        sizes += [len(next(iter(each.values()))) for each in (self.lists, self.draws) if each]
        return math.prod(sizes)


def read_axes(given: Any) -> tuple[Axes, ...]:
    """Return the axes that a sweep file holds.

    Args:
        given: a mapping of keys to axes, or a list of such mappings.

    Raises:
        ValueError: what came is no axis, or an empty one; in one line.
    """
    blocks = given if isinstance(given, list) else [given]
    if not blocks or not all(isinstance(block, Mapping) and block for block in blocks):
        raise ValueError(
            "`axes` must map keys to what to try for them, such as `model.lr: [0.01, 0.03]`, but "
            f"{'is ' + repr(given) if given else 'is empty'}."
        )
    return tuple(_read_block(block) for block in blocks)


def _read_block(block: Mapping[str, Any]) -> Axes:
    axes, draws = Axes(), {}
    for key, given in block.items():
        form, value = _form(str(key), given)
        if form == "optuna":
            axes.asked[key] = _asked(key, value)
        elif form == "random":
            draws[key] = value
        else:
            (axes.grid if form == "grid" else axes.lists)[key] = _values(key, value)
    lengths = {key: len(values) for key, values in axes.lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            "Axes of the form `list` go together and must be of one length, but "
            + ", ".join(f"`{key}` has {length}" for key, length in lengths.items())
            + " values."
        )
    axes.draws.update(_drawn(draws))
    return axes


def _form(key: str, given: Any) -> tuple[str, Any]:
    """Return how an axis is written, and what it says."""
    if isinstance(given, list):
        return "grid", given
    if not isinstance(given, Mapping) or len(given) != 1:
        raise ValueError(
            f"The axis `{key}` must be a list of values, or one of {', '.join(_FORMS)} with what "
            f"to try, but is {given!r}."
        )
    form, value = next(iter(given.items()))
    if form not in _FORMS:
        raise ValueError(f"The axis `{key}`: {unknown_name('form of an axis', str(form), _FORMS)}")
    return str(form), value


def _values(key: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"The axis `{key}` must have a value to try at least, but is "
            f"{'empty' if value in ([], None) else repr(value)}. Add one, or leave the axis out."
        )
    if len({repr(each) for each in value}) < len(value):
        raise ValueError(f"The axis `{key}` must name each value once, but some come twice.")
    return value


def _asked(key: str, value: Any) -> Range | tuple[Any, ...]:
    if isinstance(value, list):
        return tuple(_values(key, value))
    return _range(key, value, known={"low", "high", "log"})


def _range(key: str, value: Any, *, known: set[str]) -> Range:
    if not isinstance(value, Mapping):
        raise ValueError(f"The axis `{key}` must say `low` and `high`, but is {value!r}.")
    for name in value:
        if name not in known:
            raise ValueError(f"The axis `{key}`: {unknown_name('setting', str(name), known)}")
    low, high = (_number(value.get(end)) for end in ("low", "high"))
    log = value.get("log", False)
    if low is None or high is None or low >= high or log not in (False, low > 0):
        raise ValueError(
            f"The axis `{key}` must have `low` below `high`, both numbers, and above 0 with `log: "
            f"true`, but says {dict(value)!r}."
        )
    return Range(low=low, high=high, log=log)


def _number(value: Any) -> float | int | None:
    """Return a finite number; YAML takes 1e-5, without a point, for a text."""
    try:
        number = value if isinstance(value, int) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _drawn(given: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """Return the draws of every random axis, keyed by seed and name: none moves another."""
    ranges, settings = {}, {}
    for key, value in given.items():
        ranges[key] = _range(key, value, known={"low", "high", "log", "samples", "seed"})
        settings[key] = (value.get("samples"), value.get("seed", 0))
    counts = {samples for samples, _ in settings.values() if samples is not None}
    if not given:
        return {}
    count = next(iter(counts), None)
    if len(counts) != 1 or not isinstance(count, int) or count < 1:
        told = ", ".join(f"`{key}`: {samples!r}" for key, (samples, _) in settings.items())
        raise ValueError(
            "Random axes are drawn together and need one number of `samples`, at least 1, but "
            f"theirs are {told}."
        )
    return {
        key: _draw(key, each, count=count, seed=settings[key][1]) for key, each in ranges.items()
    }


def _draw(key: str, ends: Range, *, count: int, seed: Any) -> list[float | int]:
    if not isinstance(seed, int):
        raise ValueError(f"The `seed` of the axis `{key}` must be a whole number, but is {seed!r}.")
    shares = np.random.default_rng(derive_seed(seed, "axis", key)).random(count)
    return [ends.at(float(share)) for share in shares]


def _side_by_side(columns: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Return a point a row; one empty point without columns."""
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows] if columns else [{}]
