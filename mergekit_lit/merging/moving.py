"""This file is models moved by the steps of a method: one as it is written, or many in one pass."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.registry import Registered
from mergekit_lit.core.specs import Computed, spec_of
from mergekit_lit.merging.forms import Setting, Steps, base_plus, step_alone


def streamed_model(entry: Registered[Any], experts: Experts, one: Setting, seed: int) -> Merged:
    """Return the base moved by the step of one setting, each tensor made when it is asked for."""
    steps = Steps(entry, experts, [one], seed)
    specs = {name: spec_of(experts.base, name) for name in experts.merged_names()}
    shared = Computed(specs, lambda name: steps.of(name, [base_plus(one.scales.get(name))])[0])
    facts = one.told(steps.coefficients[0])
    return Merged(shared=shared, structure=experts.structure, facts=facts)


def stepped(
    entry: Registered[Any], experts: Experts, settings: Sequence[Setting], seed: int
) -> Iterator[Merged]:
    """Yield the base moved by the step of each setting; one pass serves all.

    Settings that share a direction are made from it one by one, when they are asked for.

    Args:
        entry: a method of the form `linear` or `kernel`.
        experts: T experts of one base.
        settings: of the method.
        seed: of the merge.
    """
    users = Counter(one.direction for one in settings)
    firsts = {one.direction: one for one in reversed(settings)}
    steps = Steps(entry, experts, list(firsts.values()), seed)
    # What one setting alone needs is put onto the base at once, block by block.
    alone = {direction for direction, count in users.items() if count == 1}
    made = _made(experts, steps, firsts, alone)
    found = dict(zip(firsts, steps.coefficients, strict=True))
    base = experts.base
    for one in settings:
        users[one.direction] -= 1
        tensors = made[one.direction] if users[one.direction] else made.pop(one.direction)
        if one.direction not in alone:
            tensors = {n: base_plus(one.scales.get(n))(base[n], tensors[n]) for n in tensors}
        shared = {name: tensors[name] if name in tensors else base[name] for name in base}
        facts = one.told(found[one.direction])
        yield Merged(shared=shared, structure=experts.structure, facts=facts)


def _made(
    experts: Experts, steps: Steps, firsts: Mapping[str, Setting], alone: Collection[str]
) -> dict[str, dict[str, Tensor]]:
    """Return by direction the steps, or where it stands alone the base moved by its step."""
    made: dict[str, dict[str, Tensor]] = {direction: {} for direction in firsts}
    for name in experts.merged_names():
        ends = [
            base_plus(one.scales.get(name)) if direction in alone else step_alone
            for direction, one in firsts.items()
        ]
        for direction, tensor in zip(made, steps.of(name, ends), strict=True):
            made[direction][name] = tensor
    return made
