"""This file chooses results: `model.lr>=0.01,task=mnist,letters` holds conditions, and no code."""

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mergekit_lit.core.registry import unknown_name

Row: TypeAlias = Mapping[str, Any]
"""Settings and measures of one result, by name."""

_ORDERS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"\s*([^<>=!\s]+)\s*(<=|>=|!=|==|=|<|>)\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """What the value under one name must be.

    Attributes:
        name: of a setting or a measure, such as `model.lr`; its last part will do if it is unique.
        sign: `=` (one of the values), `!=` (none of them), `<`, `<=`, `>` or `>=` (a number).
        values: what it is compared with.
    """

    name: str
    sign: str
    values: tuple[str, ...]

    def holds(self, value: Any) -> bool:
        """Return whether a value meets the condition; one that is not known is `null`."""
        if self.sign in _ORDERS:
            number = _number(value)
            return number is not None and _ORDERS[self.sign](number, float(self.values[0]))
        found = any(_same(value, text) for text in self.values)
        return found == (self.sign == "=")


def read_conditions(text: str) -> tuple[Condition, ...]:
    """Read conditions apart by commas; a part without a sign is one more value of the one before.

    Raises:
        ValueError: the text holds no conditions, or an order without a number.
    """
    found: list[Condition] = []
    for part in text.split(","):
        match = _CONDITION.fullmatch(part)
        if match:
            name, sign, value = match.groups()
            found.append(Condition(name, "=" if sign == "==" else sign, (value.strip(),)))
        elif found and part.strip():
            last = found.pop()
            found.append(Condition(last.name, last.sign, (*last.values, part.strip())))
        else:
            raise ValueError(
                "`where` must hold conditions such as 'model.lr>=0.01,task=mnist,letters', "
                f"but is {text!r}."
            )
    for condition in found:
        _check(condition)
    return tuple(found)


def chosen(rows: Sequence[Row], conditions: Iterable[Condition]) -> list[Row]:
    """Return the rows that meet every condition.

    Raises:
        KeyError: no row has a name, or several have what it may be short for.
        ValueError: no row is left.
    """
    left = list(rows)
    for condition in conditions:
        name = full_name(condition.name, rows)
        kept = [row for row in left if condition.holds(row.get(name))]
        if not kept:
            values = sorted({str(row[name]) for row in left if name in row})
            few = ", ".join(values[:8]) + (", ..." if len(values) > 8 else "")
            told = f"{condition.name}{condition.sign}{','.join(condition.values)}"
            raise ValueError(
                f"`where` must leave some results, but none has {told}; its values: {few or '-'}."
            )
        left = kept
    return left


def full_name(name: str, rows: Iterable[Row]) -> str:
    """Return the name that rows have for a name, a last part of theirs, or the last part of it.

    Raises:
        KeyError: no row has it, or it may be short for several.
    """
    known = {key for row in rows for key in row}
    if name in known:
        return name
    # A result tells its own task as `task`, whatever the axis that set it is called.
    last = name.rpartition(".")[2]
    ends = sorted(key for key in known if key == last or key.rpartition(".")[2] == name)
    if len(ends) > 1:
        raise KeyError(f"{name!r} must name one setting, but may be any of {', '.join(ends)}.")
    if not ends:
        raise KeyError(unknown_name("setting or measure", name, known))
    return ends[0]


def _check(condition: Condition) -> None:
    if condition.sign not in _ORDERS:
        return
    told = f"{condition.name}{condition.sign}{','.join(condition.values)}"
    if len(condition.values) > 1 or _number(condition.values[0]) is None:
        raise ValueError(f"`where` must compare with one number by {condition.sign}, not {told!r}.")


def _same(value: Any, text: str) -> bool:
    """Return whether a text stands for a value: numbers by value, all else by its letters."""
    if value is None:
        return text == "null"
    if isinstance(value, bool):
        return text.lower() == str(value).lower()
    number = _number(value)
    return str(value) == text or (number is not None and number == _number(text))


def _number(value: Any) -> float | None:
    """Return a finite number; None for all else, true and false included."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
