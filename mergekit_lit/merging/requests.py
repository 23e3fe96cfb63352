"""This file is what is refused before any tensor is read: by method, form, values and headers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, get_args

from mergekit_lit.core.experts import Experts
from mergekit_lit.core.merging import Form
from mergekit_lit.core.registry import VENEERS, Registered, unknown_name
from mergekit_lit.merging.configuration import resolve
from mergekit_lit.merging.forms import Config, is_whole
from mergekit_lit.merging.patterns import ByPattern

_POSITIONS = ("after", "before")


@dataclass(frozen=True)
class Layer:
    """One veneer with every parameter's value."""

    veneer: Registered[Any]
    config: Config


def layers_of(veneers: Sequence[tuple[str, Mapping[str, Any]]], seed: int) -> list[Layer]:
    """Return veneers with every parameter's value, in the order given.

    Raises:
        KeyError: unknown veneer or parameter.
        TypeError: a value of the wrong type.
        ValueError: a veneer of unknown position, or a value by pattern.
    """
    return [_layer(name, given, seed) for name, given in veneers]


def _layer(name: str, given: Mapping[str, Any], seed: int) -> Layer:
    veneer = VENEERS.get(name)
    position = str(veneer.facts.get("position"))
    if position not in _POSITIONS:
        raise ValueError(unknown_name(f"position (declared by {name!r})", position, _POSITIONS))
    values = resolve(veneer, given, seed=seed)
    _refuse_patterns(veneer, values)
    return Layer(veneer, values)


def check_request(
    entry: Registered[Any],
    configs: Sequence[Config],
    experts: Experts,
    layers: Sequence[Layer] = (),
) -> None:
    """Refuse what a method or a veneer cannot do with experts, by their headers alone.

    Args:
        entry: a registered method.
        configs: values of all its parameters, of one merge or of several.
        experts: T experts, of which no tensor is read.
        layers: the veneers.

    Raises:
        KeyError: a `check` that method or veneer declares names something unknown.
        ValueError: a method of unknown form, values by pattern where it takes one, a number of
            experts that it does not take, or what a declared `check` refuses.
    """
    form = str(entry.facts.get("form"))
    if form not in get_args(Form):
        known = get_args(Form)
        raise ValueError(unknown_name(f"form (declared by {entry.name!r})", form, known))
    for config in configs if is_whole(entry) else ():
        _refuse_patterns(entry, config)
    _check_count(entry, experts)
    for each, config in [
        *((entry, config) for config in configs),
        *((layer.veneer, layer.config) for layer in layers),
    ]:
        _check_declared(each, config, experts)


def _check_declared(entry: Registered[Any], config: Config, experts: Experts) -> None:
    """Call what a method or veneer declares as its own `check`, with the values that it takes."""
    check = entry.facts.get("check")
    if check is not None:
        taken = signature(check).parameters
        check(experts, **{name: value for name, value in config.items() if name in taken})


def _refuse_patterns(entry: Registered[Any], config: Config) -> None:
    for name, value in config.items():
        if isinstance(value, ByPattern):
            raise ValueError(
                f"{value.parameter} must be one value, since {entry.name!r} treats the model as a "
                f"whole, but `{name}` is given by pattern or depth. Give one value."
            )


def _check_count(entry: Registered[Any], experts: Experts) -> None:
    low, high = entry.facts.get("experts", (1, None))
    count = len(experts)
    if count < low or (high is not None and count > high):
        wanted = (
            str(low) if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        )
        raise ValueError(
            f"{entry.name!r} takes {wanted} experts, but got {count} ({', '.join(experts.names)}). "
            "Give it so many, or choose another method."
        )
