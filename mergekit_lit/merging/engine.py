"""This file is the merge engine: it alone iterates over tensors, whatever a method's form."""

from collections import ChainMap
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Calibration
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.merging import MergeObserver, Slice
from mergekit_lit.core.params import Params, check_same_names_and_shapes, is_finite
from mergekit_lit.core.registry import MERGE_METHODS, VENEERS, Registered, unknown_name
from mergekit_lit.merging.configuration import parameters, resolve
from mergekit_lit.merging.images import shown
from mergekit_lit.merging.passes import Deltas, Pairs, blockwise
from mergekit_lit.merging.steps import moved, weighted_sum

_POSITIONS = ("after", "before")

POLICIES = ("average", "base")
"""BatchNorm policies that need no images; `lit.recalibration` has those that do."""


def merge(
    experts: Experts,
    method: str,
    *,
    config: Mapping[str, Any] | None = None,
    veneers: Sequence[tuple[str, Mapping[str, Any]]] = (),
    batch_norm: str = "base",
    observers: Sequence[MergeObserver] = (),
    seed: int = 0,
    calibration: Calibration | None = None,
) -> Merged:
    """Merge experts by a registered method.

    theta = theta_0 + step(tau_1, ..., tau_T), over all floating-point tensors but BatchNorm's
    statistics, in float32 or better and cast once to the base's dtypes. Integers are the base's.

    Args:
        experts: T experts of one base; never changed.
        method: name of a registered method.
        config: values for the method's parameters; the others keep their defaults.
        veneers: names and configs of registered veneers. Those that act on the experts do so in
            this order before anything else, those that act on the result in this order after it.
        batch_norm: statistics of `base`, or the `average` of the experts' with equal weights
            (variances at least 0).
        observers: see every tensor's deltas before the method does, in this order.
        seed: of methods that draw at random, and of what has a `seed` that its config leaves open.
        calibration: images, for methods that look at them.

    Returns:
        The merged model. Its `facts` hold method, resolved config, tasks, coefficients lambda (T,)
        for linear methods without veneers, veneers with resolved configs, base and base_hash,
        backbone, image_size, batch_norm, data and seed.

    Raises:
        KeyError: unknown method, veneer or parameter.
        TypeError: a value of the wrong type, NaN or infinite.
        ValueError: a value out of range, unknown policy, a number of experts that the method cannot
            take, missing images, or a step that is not finite.
    """
    entry = MERGE_METHODS.get(method)
    values = _values(entry, config or {}, seed)
    layers = [_layer(name, given, seed) for name, given in veneers]
    run = _form(entry)
    _check_policy(batch_norm)
    _check_count(entry, experts)
    entry = shown(entry, experts, calibration)
    layers = [replace(layer, veneer=shown(layer.veneer, experts, calibration)) for layer in layers]
    for layer in _at("before", layers):
        experts = layer.veneer.function(experts, **layer.config)
    for observer in observers:
        observer.on_merge_start(experts, method, values)
    seen = _transformed(entry, _observed(experts, observers), values)
    result = run(entry, seen, values, seed)
    for layer in _at("after", layers):
        result = layer.veneer.function(seen, result, **layer.config)
    merged = _complete(result, seen, batch_norm)
    _check_result(method, merged.shared, experts.base)
    facts = _facts(entry, experts, values) | {"batch_norm": batch_norm, "seed": seed}
    merged = replace(merged, facts=facts | dict(result.facts) | _veneer_facts(layers))
    for observer in observers:
        observer.on_merge_end(experts, merged)
    return merged


@dataclass(frozen=True)
class _Layer:
    """One veneer with every parameter's value."""

    veneer: Registered[Any]
    config: Mapping[str, Any]


def _values(entry: Registered[Any], config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return every parameter's value; a `seed` that is not given is the merge's."""
    default = {"seed": seed} if "seed" in parameters(entry.function) else {}
    return resolve(entry, {**default, **config})


def _layer(name: str, given: Mapping[str, Any], seed: int) -> _Layer:
    veneer = VENEERS.get(name)
    position = str(veneer.facts.get("position"))
    if position not in _POSITIONS:
        raise ValueError(unknown_name(f"position (declared by {name!r})", position, _POSITIONS))
    return _Layer(veneer, _values(veneer, given, seed))


def _at(position: str, layers: Sequence[_Layer]) -> list[_Layer]:
    return [layer for layer in layers if layer.veneer.facts["position"] == position]


def _veneer_facts(layers: Sequence[_Layer]) -> dict[str, Any]:
    named = [{"name": layer.veneer.name, "config": dict(layer.config)} for layer in layers]
    # With a veneer, the method's coefficients are no longer those of the experts' own deltas.
    return {"veneers": named} | ({"coefficients": None} if named else {})


def _check_count(entry: Registered[Any], experts: Experts) -> None:
    low, high = entry.facts.get("experts", (1, None))
    count = len(experts)
    if count < low or (high is not None and count > high):
        wanted = (
            str(low) if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        )
        raise ValueError(
            f"{entry.name!r} takes {wanted} experts, but got {count} ({', '.join(experts.names)}). "
            "Give it so many, or choose another method."
        )


def _linear(
    entry: Registered[Any], experts: Experts, config: Mapping[str, Any], _seed: int
) -> Merged:
    coefficients: Tensor = entry.function(experts, **config)
    if coefficients.shape != (len(experts),):
        raise ValueError(
            f"{entry.name!r} must return {len(experts)} coefficients, one per expert, but "
            f"returned a tensor of shape {tuple(coefficients.shape)}."
        )
    steps = (
        (name, blockwise(experts, name, lambda deltas, _: weighted_sum(coefficients, deltas)))
        for name in experts.merged_names()
    )
    facts = {"coefficients": coefficients.tolist()}
    return Merged(shared=moved(experts.base, steps), structure=experts.structure, facts=facts)


def _kernel(
    entry: Registered[Any], experts: Experts, config: Mapping[str, Any], seed: int
) -> Merged:
    elementwise = _is_elementwise(entry, config)
    stats = _prepared(entry, experts, config, elementwise=elementwise)

    def step(name: str) -> Tensor:
        base, info = experts.base[name], experts.structure[name]
        if not elementwise:
            each = Deltas(experts, name)
            return cast(
                "Tensor", entry.function(Slice(name, base, each, info, stats, seed), **config)
            )
        flat = base.reshape(-1)
        return blockwise(
            experts,
            name,
            lambda deltas, start: entry.function(
                Slice(name, flat[start:][: deltas.shape[1]], deltas, info, stats, seed, start),
                **config,
            ),
        )

    steps = ((name, step(name)) for name in experts.merged_names())
    return Merged(shared=moved(experts.base, steps), structure=experts.structure)


def _whole(
    entry: Registered[Any], experts: Experts, config: Mapping[str, Any], _seed: int
) -> Merged:
    merged: Merged = entry.function(experts, **config)
    return merged


def _transformed(entry: Registered[Any], experts: Experts, config: Mapping[str, Any]) -> Experts:
    """Return the experts that a method of the form `experts` makes of these; else these."""
    if entry.facts["form"] != "experts":
        return experts
    transformed: Experts = entry.function(experts, **config)
    return transformed


def _averaged(
    _entry: Registered[Any], experts: Experts, _config: Mapping[str, Any], _seed: int
) -> Merged:
    steps = (
        (name, blockwise(experts, name, lambda deltas, _: deltas.mean(dim=0)))
        for name in experts.merged_names()
    )
    return Merged(shared=moved(experts.base, steps), structure=experts.structure)


_Runner = Callable[[Registered[Any], Experts, Mapping[str, Any], int], Merged]
_FORMS: dict[str, _Runner] = {
    "linear": _linear,
    "kernel": _kernel,
    "whole": _whole,
    "experts": _averaged,
}


def _form(entry: Registered[Any]) -> _Runner:
    form = str(entry.facts.get("form"))
    if form not in _FORMS:
        raise ValueError(unknown_name(f"form (declared by {entry.name!r})", form, _FORMS))
    return _FORMS[form]


def _check_policy(batch_norm: str) -> None:
    if batch_norm.startswith("recalibrate"):
        raise ValueError(
            f"`batch_norm` {batch_norm!r} needs images, which `merge` has not. "
            "Merge with 'base', then call `mergekit_lit.lit.recalibration.recalibrate`."
        )
    if batch_norm not in POLICIES:
        raise ValueError(unknown_name("BatchNorm policy", batch_norm, POLICIES))


def _is_elementwise(entry: Registered[Any], config: Mapping[str, Any]) -> bool:
    declared = entry.facts.get("elementwise", False)
    return bool(declared(config) if callable(declared) else declared)


def _prepared(
    entry: Registered[Any], experts: Experts, config: Mapping[str, Any], *, elementwise: bool
) -> Mapping[str, Any]:
    """Return what a kernel's first pass over all tensors found, if it declares one."""
    prepare = entry.facts.get("prepare")
    if prepare is None:
        return {}
    wanted = signature(prepare).parameters
    some = {name: value for name, value in config.items() if name in wanted}
    stats: Mapping[str, Any] = prepare(Pairs(experts, in_blocks=elementwise), **some)
    return stats


def _observed(experts: Experts, observers: Sequence[MergeObserver]) -> Experts:
    """Show every tensor's deltas to the observers; return experts with the deltas they returned."""
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


def _complete(result: Merged, experts: Experts, batch_norm: str) -> Merged:
    """Return the result with integers of the base, statistics by the policy, and every head."""
    merged_names = set(experts.merged_names())
    kept = {name: t for name, t in experts.base.items() if name not in merged_names}
    if batch_norm == "average":
        kept |= {name: _mean(experts, name) for name in kept if _is_statistic(experts, name)}
    heads = result.heads or dict(zip(experts.names, experts.heads, strict=True))
    return replace(result, shared={**result.shared, **kept}, heads=heads)


def _is_statistic(experts: Experts, name: str) -> bool:
    return experts.structure[name].kind == "statistic"


def _mean(experts: Experts, name: str) -> Tensor:
    """Return the mean over experts of one BatchNorm statistic; a variance is at least 0."""
    mean = torch.stack([tuned[name].double() for tuned in experts.tuned]).mean(dim=0)
    # A sum scaled like the weights can fall below 0, which BatchNorm turns into NaN.
    mean = mean.clamp(min=0) if name.endswith("var") else mean
    return mean.to(experts.base[name].dtype)


def _check_result(method: str, shared: Params, base: Params) -> None:
    check_same_names_and_shapes(shared, base, source=f"The result of {method!r}")
    for name, tensor in shared.items():
        if not is_finite(tensor):
            raise ValueError(
                f"The result of {method!r} must be finite, but {name!r} is not in "
                f"{tensor.dtype}. Merge with a smaller scale, or from a base in float32."
            )


def _facts(entry: Registered[Any], experts: Experts, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "method": entry.name,
        "config": dict(config),
        "data": entry.facts.get("data"),
        "tasks": list(experts.names),
        "coefficients": None,
        "base": experts.base_name,
        "base_hash": experts.base_hash,
        "backbone": experts.backbone,
        "image_size": experts.image_size,
    }
