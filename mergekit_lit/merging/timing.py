"""This file expects how long a merge takes, from trials of the method on made-up tensors."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch

from mergekit_lit.core.calibration import DataSplit
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.registry import Registered
from mergekit_lit.core.seeds import generator
from mergekit_lit.core.specs import spec_of
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging.forms import Config, Setting, Steps, is_elementwise, is_whole, step_alone
from mergekit_lit.merging.requests import Layer

# Most entries of the made-up tensor of a method whose time grows with their number alone.
_ENTRIES = 1 << 19

_NAME = "trial"

# Sides of the made-up matrices of the others: from both, how the time grows.
_SIDES = (48, 96)


def expected_seconds(
    entry: Registered[Any],
    by_tensor: Mapping[str, Config],
    experts: Experts,
    seed: int,
    *,
    layers: Sequence[Layer] = (),
) -> float | None:
    """Return the processor time of the method's steps on all tensors, an estimate.

    The method is tried on small tensors of random numbers, as many experts as there are; its time
    is taken to grow with the entries of elementwise methods, and with a power between 2 and 3 of a
    matrix's side in others; so are veneers that take entries one by one. Reading and writing files
    comes on top.

    Args:
        entry: a registered method.
        by_tensor: by merged tensor, every parameter's value.
        experts: T experts, of which no tensor is read.
        seed: of the merge.
        layers: the veneers.

    Returns:
        Seconds, or None where a method looks at images or sees the model as a whole, or a veneer
        does not declare that it is `elementwise`.
    """
    whole = is_whole(entry) or entry.facts["data"] in get_args(DataSplit)
    if whole or not all(layer.veneer.facts.get("elementwise") for layer in layers):
        return None
    matrices: dict[tuple[int, int], list[str]] = {}
    others: list[str] = []
    for name, config in by_tensor.items():
        shape = spec_of(experts.base, name).shape
        matrix = experts.structure[name].kind in ("linear", "convolution") and len(shape) > 1
        if matrix and not is_elementwise(entry, config):
            matrices.setdefault((shape[0], math.prod(shape[1:])), []).append(name)
        else:
            others.append(name)

    def trial(name: str, shape: tuple[int, ...]) -> float:
        return _trial(entry, by_tensor[name], experts, experts.structure[name], shape, seed)

    seconds = sum(
        len(names) * _of_matrix(shape, partial(trial, names[0]))
        for shape, names in matrices.items()
    )
    entries = sum(math.prod(spec_of(experts.base, name).shape) for name in others)
    if entries:
        tried = min(entries, _ENTRIES)
        seconds += entries / tried * trial(others[0], (tried,))
    entries = sum(math.prod(spec_of(experts.base, name).shape) for name in by_tensor)
    tried = min(entries, _ENTRIES)
    for layer in layers if entries else ():
        info = experts.structure[next(iter(by_tensor))]
        seconds += entries / tried * _veneer_trial(layer, experts, info, tried, seed)
    return seconds


def _of_matrix(shape: tuple[int, int], trial: Callable[[tuple[int, ...]], float]) -> float:
    """Return the time of one matrix, from two smaller ones of its proportions."""
    short, long = (tuple(max(1, round(side * of / max(shape))) for of in shape) for side in _SIDES)
    first, second = trial(short), trial(long)
    ratio = math.log(max(second, 1e-9) / max(first, 1e-9)) / math.log(_SIDES[1] / _SIDES[0])
    return float(second * (max(shape) / _SIDES[1]) ** min(max(ratio, 2.0), 3.0))


def _trial(
    entry: Registered[Any],
    config: Config,
    experts: Experts,
    info: TensorInfo,
    shape: tuple[int, ...],
    seed: int,
) -> float:
    """Return the time of one made-up tensor."""
    small = _made_up(experts, info, shape, seed)
    setting = Setting({_NAME: config}, {}, "")
    return _shortest(lambda: Steps(entry, small, [setting], seed).of(_NAME, [step_alone]))


def _veneer_trial(layer: Layer, experts: Experts, info: TensorInfo, size: int, seed: int) -> float:
    """Return the time of a veneer on made-up entries."""
    small = _made_up(experts, info, (size,), seed)
    merged = Merged(shared=small.tuned[0], structure=small.structure)
    if layer.veneer.facts["position"] == "after":
        return _shortest(lambda: layer.veneer.function(small, merged, **layer.config))

    def before() -> None:
        for tuned in layer.veneer.function(small, **layer.config).tuned:
            tuned[_NAME]

    return _shortest(before)


def _made_up(experts: Experts, info: TensorInfo, shape: tuple[int, ...], seed: int) -> Experts:
    """Return as many experts of one tensor of random numbers."""
    tuned = [
        {_NAME: 1e-3 * torch.randn(shape, generator=generator(seed, "trial", t))}
        for t in range(len(experts))
    ]
    base = {_NAME: torch.zeros(shape)}
    return replace(experts, base=base, tuned=tuned, structure={_NAME: info}, kept=frozenset())


def _shortest(trial: Callable[[], object]) -> float:
    """Return the processor time of the shorter of two runs."""
    seconds = []
    for _ in range(2):
        start = time.process_time()
        trial()
        seconds.append(time.process_time() - start)
    return min(seconds)
