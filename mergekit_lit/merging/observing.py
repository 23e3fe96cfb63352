"""This file shows a merge's deltas to its observers, and takes what they make of them."""

from collections import ChainMap
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor

from mergekit_lit.core.experts import Experts
from mergekit_lit.core.merging import MergeObserver


def observed(experts: Experts, observers: Sequence[MergeObserver]) -> Experts:
    """Show every tensor's deltas to the observers; return experts with the deltas they returned.

    Raises:
        ValueError: an observer returns deltas of another shape.
    """
    replaced: list[dict[str, Tensor]] = [{} for _ in experts.tuned]
    for name in experts.merged_names() if observers else ():
        before = deltas = experts.deltas(name)
        for observer in observers:
            deltas = _shown(observer, name, deltas)
        if deltas is before:
            continue
        for tensors, delta in zip(replaced, deltas, strict=True):
            tensors[name] = experts.base[name].to(delta.dtype) + delta
    if not replaced or not replaced[0]:
        return experts
    # ChainMap is typed for mutable mappings alone, but only ever writes to the first.
    tuned = [
        ChainMap(tensors, cast("MutableMapping[str, Tensor]", before))
        for tensors, before in zip(replaced, experts.tuned, strict=True)
    ]
    return replace(experts, tuned=tuned)


def _shown(observer: MergeObserver, name: str, deltas: Tensor) -> Tensor:
    changed = observer.on_merge_tensor(name, deltas)
    if changed is None:
        return deltas
    if changed.shape != deltas.shape:
        raise ValueError(
            f"{type(observer).__name__} must return deltas of {name!r} of shape "
            f"{tuple(deltas.shape)}, but returned {tuple(changed.shape)}."
        )
    return changed
