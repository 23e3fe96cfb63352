"""This file says which merge methods the quickstart compares."""

from collections.abc import Sequence
from typing import Any

from mergekit_lit.core.registry import MERGE_METHODS, Registered, unknown_name
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


def methods_at_hand() -> list[Registered[Any]]:
    """Return the methods that need only experts and their cards, and whose config has defaults.

    Methods that declare `by_default`, the method that they are with their defaults, are left out:
    they would only repeat its scores.
    """
    return [
        method
        for method in MERGE_METHODS
        if method.facts.get("data") in ("none", "cards")
        and "by_default" not in method.facts
        and all(p.default is not p.empty for p in parameters(method.function).values())
    ]


def chosen_methods(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the methods to compare, each once; `all` is every method at hand.

    Raises:
        KeyError: no such method at hand; the message offers the nearest and lists all.
        ValueError: no name.
    """
    known = [method.name for method in methods_at_hand()]
    if list(names) == [ALL]:
        return tuple(known)
    if not names:
        raise ValueError(f"`methods` must name at least one method, or be [{ALL!r}], but is empty.")
    for name in names:
        if name not in known:
            raise KeyError(unknown_name("method for the quickstart", name, [*known, ALL]))
    return tuple(dict.fromkeys(names))
