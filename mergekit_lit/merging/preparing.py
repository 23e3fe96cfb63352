"""This file is what kernels ask for before the first step: facts about all tensors at once."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

from mergekit_lit.core.experts import Experts
from mergekit_lit.core.registry import Registered
from mergekit_lit.merging.passes import Pairs

Config = Mapping[str, Any]
Stats = Mapping[str, Any]


def prepared(
    entry: Registered[Any],
    experts: Experts,
    settings: Sequence[tuple[Mapping[str, Config], set[str]]],
) -> list[dict[str, Stats]]:
    """Return of each setting, by tensor, what the method's `prepare` found.

    Tensors whose values differ where `prepare` looks at them are prepared apart, each group as if
    it were a model of its own. Settings that agree there share what is found; those that differ
    only in the parameter that the method declares as `together` share the passes.

    Args:
        entry: a method of the form `kernel`.
        experts: T experts of one base.
        settings: of each, every tensor's values, and the tensors that are seen in blocks.
    """
    if "prepare" not in entry.facts:
        return [{} for _ in settings]
    groups = [list(_groups(entry, values, in_blocks)) for values, in_blocks in settings]
    together = entry.facts.get("together")
    pools: dict[str, dict[str, _Group]] = {}
    for group in (group for each in groups for group in each):
        pools.setdefault(group.key(without=together), {})[group.key()] = group
    found: dict[str, Stats] = {}
    for pool in pools.values():
        found |= zip(pool, _found(entry, experts, list(pool.values())), strict=True)
    return [{name: found[group.key()] for group in each for name in group.names} for each in groups]


@dataclass(frozen=True)
class _Group:
    """Tensors that agree in the values that `prepare` looks at."""

    names: list[str]
    config: Config
    in_blocks: bool

    def key(self, *, without: str | None = None) -> str:
        """Return what stands for the group, or for all that differ in one parameter only."""
        seen = sorted((name, value) for name, value in self.config.items() if name != without)
        return repr((self.names, seen, self.in_blocks))


def _groups(
    entry: Registered[Any], values: Mapping[str, Config], in_blocks: Collection[str]
) -> Iterator[_Group]:
    """Cut the tensors of one setting into groups."""
    wanted = signature(entry.facts["prepare"]).parameters
    groups: dict[str, _Group] = {}
    for name, config in values.items():
        seen = {parameter: value for parameter, value in config.items() if parameter in wanted}
        alone = _Group([], seen, name in in_blocks)
        groups.setdefault(alone.key(), alone).names.append(name)
    yield from groups.values()


def _found(entry: Registered[Any], experts: Experts, pool: Sequence[_Group]) -> Sequence[Stats]:
    """Return what `prepare` finds for groups of the same tensors."""
    prepare, together, first = entry.facts["prepare"], entry.facts.get("together"), pool[0]
    others = set(experts.merged_names()) - set(first.names)
    pairs = Pairs(replace(experts, kept=experts.kept | others), in_blocks=first.in_blocks)
    if together is None:
        return [prepare(pairs, **first.config)]
    values = [group.config[together] for group in pool]
    found: Sequence[Stats] = prepare(pairs, **{**first.config, together: values})
    return found
