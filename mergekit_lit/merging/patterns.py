"""This file is patterns: which tensors are meant, and values that differ from tensor to tensor."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from inspect import Parameter
from typing import Any

from mergekit_lit.core.experts import Experts
from mergekit_lit.core.structure import Structure

_ENDS = {"stem": 0.0, "final": 1.0}  # places of what is in no block
_REGEX = "re:"
_GLOB_SIGNS = frozenset("*?[")


@dataclass(frozen=True)
class Gradient:
    """Values at even distances over the depth of a model, interpolated linearly in between."""

    points: tuple[float, ...]

    def at(self, place: float) -> float:
        """Return the value at a place from 0 (the first block) to 1 (the last)."""
        position = place * (len(self.points) - 1)
        left = min(int(position), max(0, len(self.points) - 2))
        share = position - left
        if share == 0:
            return self.points[left]
        return (1 - share) * self.points[left] + share * self.points[left + 1]


@dataclass(frozen=True)
class ByPattern:
    """One parameter's values by tensor.

    Attributes:
        parameter: what messages call it, such as "`scale` of 'ties'".
        rules: patterns and values, plain or `Gradient`s; the first pattern that matches wins.
        default: of the tensors that no pattern matches; `Parameter.empty` where there is none.
    """

    parameter: str
    rules: tuple[tuple[str, Any], ...]
    default: Any

    def at(self, names: Sequence[str], structure: Structure) -> dict[str, Any]:
        """Return the value of each tensor.

        Raises:
            ValueError: a pattern matches no tensor, or none that an earlier one leaves; or a tensor
                is left without a value.
        """
        places = depth_places(structure)
        values: dict[str, Any] = {}
        for pattern, value in self.rules:
            found = matching(pattern, names, source=self.parameter)
            if values.keys() >= set(found):
                raise ValueError(
                    f"{self.parameter} must have no pattern without effect, but the patterns "
                    f"before {pattern!r} match all its tensors. Put it before them."
                )
            for name in found:
                own = value.at(places[name]) if isinstance(value, Gradient) else value
                values.setdefault(name, own)
        left = [name for name in names if name not in values]
        if left and self.default is Parameter.empty:
            raise ValueError(
                f"{self.parameter} must be given for every tensor, but no pattern matches "
                f"{left[0]!r}. Add a last pattern '*'."
            )
        return {name: values.get(name, self.default) for name in names}

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rules in their order, in the form that a configuration may give them in."""
        return [
            {"filter": p, "value": list(v.points) if isinstance(v, Gradient) else v}
            for p, v in self.rules
        ]


def matching(pattern: str, names: Iterable[str], *, source: str) -> list[str]:
    """Return the names that a pattern matches, in their order.

    Args:
        pattern: `blocks.*.attn.*` is a glob over the whole name, in which a star crosses dots;
            `attn` or `blocks.3`, without signs of a glob, a run of the name's dotted parts, as
            mergekit's filters nearly are; `re:...` a regular expression over the whole name;
            `head.*|fc.*` either of two.
        names: of tensors.
        source: what messages call the place that the pattern stands in.

    Raises:
        ValueError: it matches none, which the nearest names come with; or is no regular expression.
    """
    every = list(names)
    found = [name for name in every if is_match(pattern, name)]
    if not found:
        parts = {part for name in every for part in name.split(".")}
        near = difflib.get_close_matches(pattern, [*every, *parts], n=3, cutoff=0.4)
        known = near or every[:3]
        raise ValueError(
            f"{source} must have patterns that match a tensor, but {pattern!r} matches none of "
            f"{len(every)}. Near it: {', '.join(known)}."
        )
    return found


def is_match(pattern: str, name: str) -> bool:
    """Return whether a pattern, as `matching` has it, matches one name.

    Raises:
        ValueError: it is no regular expression.
    """
    if pattern.startswith(_REGEX):
        try:
            return re.fullmatch(pattern.removeprefix(_REGEX), name) is not None
        except re.error as error:
            raise ValueError(
                f"{pattern!r} must be a regular expression after {_REGEX!r}, but is not: {error}."
            ) from None
    return any(_is_glob_match(glob.strip(), name) for glob in pattern.split("|"))


def select(
    experts: Experts, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Experts:
    """Return the same experts of which merging moves some tensors only; the others stay the base's.

    Args:
        experts: T experts of one base.
        include: patterns of the tensors to merge; none means all.
        exclude: patterns of those that are not merged, even if they are included.

    Raises:
        ValueError: a pattern matches no tensor, or no tensor is left.
    """
    names = experts.merged_names()
    chosen = {n for p in include for n in matching(p, names, source="`include`")} or set(names)
    chosen -= {n for p in exclude for n in matching(p, names, source="`exclude`")}
    if not chosen:
        raise ValueError(
            f"`include` and `exclude` must leave a tensor to merge, but leave none of "
            f"{len(names)}. Exclude less."
        )
    return replace(experts, kept=experts.kept | (set(names) - chosen))


def depth_places(structure: Structure) -> dict[str, float]:
    """Return each tensor's place: 0 of the first block and of what is before it, 1 of the last."""
    depths = sorted({info.depth for info in structure.values() if info.group not in _ENDS})
    place = {depth: i / max(1, len(depths) - 1) for i, depth in enumerate(depths)}
    return {
        name: _ENDS[info.group] if info.group in _ENDS else place[info.depth]
        for name, info in structure.items()
    }


def rules_of(value: object) -> list[tuple[str, object]] | None:
    """Return patterns and values where a parameter is given by pattern, else None.

    It is given by pattern as `{pattern: value, ...}`, or as mergekit does, `[{filter: pattern,
    value: value}, ..., {value: value}]`.
    """
    if isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value):
        return list(value.items())
    if isinstance(value, (list, tuple)) and value and all(_is_rule(item) for item in value):
        return [(item.get("filter") or "*", item["value"]) for item in value]
    return None


def _is_rule(item: object) -> bool:
    if not isinstance(item, Mapping) or not {"value"} <= item.keys() <= {"filter", "value"}:
        return False
    return isinstance(item.get("filter"), str | None)


def _is_glob_match(glob: str, name: str) -> bool:
    if _GLOB_SIGNS & set(glob):
        return fnmatchcase(name, glob)
    return bool(glob) and f".{glob}." in f".{name}."
