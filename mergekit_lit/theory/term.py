"""This file is a term of the bound: a number with its provenance, or why there is none."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Provenance: TypeAlias = Literal["measured", "closed form", "vacuous", "unknown"]


@dataclass(frozen=True)
class Term:
    """One term of the bound.

    Attributes:
        name: what it is.
        value: the number; None where unknown or vacuous.
        provenance: where the number comes from.
        note: why it is unknown or vacuous, or what it rests on.
    """

    name: str
    value: float | None
    provenance: Provenance
    note: str = ""


def term_of(
    name: str,
    needs: Mapping[str, float | None],
    formula: Callable[..., float],
    note: str = "",
) -> Term:
    """Return a term by its formula, or say what is missing."""
    missing = [symbol for symbol, value in needs.items() if value is None]
    if missing:
        return Term(name, None, "unknown", f"needs {', '.join(missing)}")
    return Term(name, formula(*needs.values()), "measured", note)


def joined(*notes: str) -> str:
    """Return notes as one, without those that are empty."""
    return "; ".join(note for note in notes if note)


def weighted(weights: Sequence[float] | None, values: Sequence[float | None]) -> float | None:
    """Return sum_i w_i v_i, or None where something of it is unknown."""
    if weights is None:
        return None
    return sum_of([None if v is None else w * v for w, v in zip(weights, values, strict=True)])


def sum_of(values: Sequence[float | None]) -> float | None:
    """Return the sum of all values, or None where one is unknown."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None
