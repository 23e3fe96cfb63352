"""This file is the space of a search: what a method's parameters may be, and a grid over it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import torch

from mergekit_lit.core.registry import Registered
from mergekit_lit.core.seeds import generator
from mergekit_lit.merging.configuration import SCALE, parameters, resolve
from mergekit_lit.search.coefficients import scale_grid

Config: TypeAlias = Mapping[str, Any]
"""Values of some of a method's parameters; the others keep their defaults."""

_POINTS = 5


@dataclass(frozen=True)
class Axis:
    """What one parameter may be.

    Attributes:
        values: the values of a grid, at least one.
        start: the one that a search starts from: the parameter's default where it is allowed.
        ends: between which a sampler may choose; None where `values` are all there is.
        whole: whether the parameter is a whole number.
    """

    values: tuple[Any, ...]
    start: Any
    ends: tuple[float, float] | None = None
    whole: bool = False


Space: TypeAlias = Mapping[str, Axis]
"""What is searched of one method, by parameter; empty where there is nothing to search."""


def space_of(
    method: Registered[Any],
    *,
    given: Mapping[str, Sequence[Any]] | None = None,
    points: int | None = None,
) -> dict[str, Axis]:
    """Return what is searched of a method: the ranges that it declares, or what is given instead.

    A range of `scale` becomes the quickstart's grid, dense near 0, where good steps lie; any other
    becomes five points: of equal ratios where the ends differ tenfold, else of equal distances.

    Args:
        method: the method.
        given: values of parameters in place of the declared ranges, by name; those of parameters
            that the method has not are left out. One value fixes a parameter.
        points: points of each declared range, at least 2; for `scale` their distances from the
            lower end grow as squares.

    Raises:
        TypeError: a given value of the wrong type.
        ValueError: no value for a parameter, or one that must be given and is not.
    """
    if points is not None and points < 2:
        raise ValueError(f"`points` must be at least 2, but is {points}.")
    known = parameters(method.function)
    mine = {name: list(values) for name, values in (given or {}).items() if name in known}
    _check_given(method, mine)
    space = {}
    for name in [*method.facts.get("search", {}), *mine]:
        whole = known[name].annotation is int
        if name in mine:
            space[name] = _given_axis(mine[name], known[name].default, whole=whole)
        else:
            space[name] = _declared_axis(method, name, known[name].default, points, whole=whole)
    return space


def start_of(space: Space) -> dict[str, Any]:
    """Return the configuration that a search starts from: the method's defaults, if allowed."""
    return {name: axis.start for name, axis in space.items()}


def grid_of(space: Space, *, trials: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Return every combination of the axes' values: the start, then near to it before far from it.

    Configurations that differ in `scale` alone follow one another: they share most of their work.

    Args:
        space: what is searched.
        trials: at most so many of them, drawn by `seed`, the start among them; None takes all.
        seed: of the draw; a smaller number of trials is part of a larger one.
    """
    names = sorted(space, key=lambda name: name == SCALE)
    near = [sorted(space[name].values, key=_distance_from(space[name].start)) for name in names]
    start = start_of(space)
    combinations = [dict(zip(names, values, strict=True)) for values in product(*near)]
    apart = {key_of(config): config for config in combinations if config != start}
    others = list(apart.values())
    if trials is not None:
        drawn = torch.randperm(len(others), generator=generator(seed, "grid"))[: trials - 1]
        others = [others[place] for place in sorted(drawn.tolist())]
    return [start, *others]


def key_of(config: Config) -> str:
    """Return the text that two configurations share if they are equal."""
    return json.dumps(config, sort_keys=True)


def _check_given(method: Registered[Any], given: Mapping[str, Sequence[Any]]) -> None:
    for name, values in given.items():
        if not values:
            raise ValueError(f"`space.{name}` must hold at least one value, but is empty.")
    first = {name: values[0] for name, values in given.items()}
    resolve(method, first)
    for name, values in given.items():
        for value in values:
            resolve(method, {**first, name: value})


def _given_axis(values: Sequence[Any], default: Any, *, whole: bool) -> Axis:
    start = default if default in values else values[0]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    ends = (min(values), max(values)) if numbers and len(set(values)) > 1 else None
    return Axis(tuple(values), start, ends, whole)


def _declared_axis(
    method: Registered[Any], name: str, default: Any, points: int | None, *, whole: bool
) -> Axis:
    low, high = (float(end) for end in method.facts["search"][name])
    if name == SCALE and points is None:
        values: Sequence[float] = scale_grid(method)
    else:
        cut = _squares if name == SCALE else _ratios if 0 < 10 * low <= high else _steps
        shares = torch.linspace(0, 1, points or _POINTS, dtype=torch.float64).tolist()
        values = [_rounded(cut(low, high, share), low, high) for share in shares]
    if whole:
        values = [round(value) for value in values]
    start = default if isinstance(default, int | float) else values[0]
    return Axis(tuple(dict.fromkeys(values)), start, (low, high), whole)


def _steps(low: float, high: float, share: float) -> float:
    return low + share * (high - low)


def _squares(low: float, high: float, share: float) -> float:
    return low + share**2 * (high - low)


def _ratios(low: float, high: float, share: float) -> float:
    return float(low * (high / low) ** share)


def _rounded(value: float, low: float, high: float) -> float:
    """Return three significant digits of a value, inside its range."""
    return min(max(float(f"{value:.3g}"), low), high)


def _distance_from(start: Any) -> Any:
    """Return a sort key: how far a number lies from the start; others keep their order."""

    def distance(value: Any) -> float:
        both = isinstance(value, int | float) and isinstance(start, int | float)
        return abs(value - start) if both else float(value != start)

    return distance
