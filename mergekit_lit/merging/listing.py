"""This file is the tables of merge methods and veneers that people and programs read."""

import inspect
from typing import Any

from mergekit_lit.core.registry import MERGE_METHODS, VENEERS, Registered
from mergekit_lit.merging.configuration import in_words, parameter_help, parameters


def methods_table() -> list[dict[str, Any]]:
    """Return one row of plain JSON values for every registered method, plug-ins included.

    Each row holds `name`, `family`, `form`, `data`, `source`, `order` (why the order of the
    experts matters, or None), `experts` (fewest and most experts that it takes; None has no
    bound), `summary` and `parameters`: a list of `name`, `type`, `default`
    (None also where one must be given), `required`, `help` and `search` (the range to search, or
    None).
    """
    return [_row(method) for method in MERGE_METHODS]


def veneers_table() -> list[dict[str, Any]]:
    """Return one row of plain JSON values for every registered veneer, plug-ins included.

    Each row holds `name`, `form` (which is `veneer`), `position` (`before` the method or `after`
    it), `data`, `source`, `summary` and `parameters`, as `methods_table` does.
    """
    return [
        {
            "name": veneer.name,
            "form": "veneer",
            "position": veneer.facts.get("position"),
            "data": veneer.facts.get("data", "none"),
            "source": veneer.facts.get("source"),
            "summary": veneer.summary,
            "parameters": _parameter_rows(veneer),
        }
        for veneer in VENEERS
    ]


def _row(method: Registered[Any]) -> dict[str, Any]:
    declared = {key: method.facts.get(key) for key in ("family", "form", "data", "source", "order")}
    return {
        "name": method.name,
        **declared,
        "experts": list(method.facts.get("experts", (1, None))),
        "summary": method.summary,
        "parameters": _parameter_rows(method),
    }


def _parameter_rows(entry: Registered[Any]) -> list[dict[str, Any]]:
    described = parameter_help(entry.function)
    search = entry.facts.get("search", {})
    rows = []
    for name, parameter in parameters(entry.function).items():
        required = parameter.default is inspect.Parameter.empty
        rows.append(
            {
                "name": name,
                "type": in_words(parameter.annotation),
                "default": None if required else parameter.default,
                "required": required,
                "help": described.get(name, ""),
                "search": list(search[name]) if name in search else None,
            }
        )
    return rows
