"""This file says which merge methods the quickstart compares."""

from collections.abc import Sequence
from typing import Any

from mergekit_lit.core.registry import MERGE_METHODS, Registered
from mergekit_lit.merging.configuration import parameters

ALL = "all"
"""What stands for every method at hand."""

WELL_KNOWN = (
    "average",
    "travel_normalised",
    "task_arithmetic",
    "ties",
    "dare",
    "magmax",
    "tsv_m",
    "iso_c",
    "iso_cts",
)
"""One or two representatives of each family: what fits into a few minutes."""


def methods_at_hand(experts: int) -> list[Registered[Any]]:
    """Return the methods that merge so many experts with nothing beside but their cards.

    Methods that declare `by_default`, the method that they are with their defaults, are left out:
    they would only repeat its scores.
    """
    return [
        method
        for method in MERGE_METHODS
        if method.facts.get("data") in ("none", "cards")
        and "by_default" not in method.facts
        and _takes(method, experts)
        and all(p.default is not p.empty for p in parameters(method.function).values())
    ]


def chosen_methods(names: Sequence[str], *, experts: int) -> tuple[str, ...]:
    """Return the names of the methods to compare, each once; `all` is every method at hand.

    Raises:
        KeyError: no such method.
        ValueError: no name, or a method that needs more than so many experts, or another number.
    """
    known = [method.name for method in methods_at_hand(experts)]
    if list(names) == [ALL]:
        return tuple(known)
    if not names:
        raise ValueError(f"`methods` must name at least one method, or be {ALL!r}, but is empty.")
    for name in names:
        if MERGE_METHODS.get(name).name not in known:
            raise ValueError(
                f"`methods` must need no data and no settings and take {experts} experts, "
                f"but {name!r} does not. Choose among: {', '.join(known)}."
            )
    return tuple(dict.fromkeys(names))


def _takes(method: Registered[Any], experts: int) -> bool:
    low, high = method.facts.get("experts", (1, None))
    return low <= experts and (high is None or experts <= high)
