"""This file is the merge engine: it alone iterates over tensors, whatever a method's form."""

from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import torch
from torch import Tensor

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.merging import Form, MergeObserver
from mergekit_lit.core.params import Params, is_finite
from mergekit_lit.core.registry import MERGE_METHODS, VENEERS, Registered, unknown_name
from mergekit_lit.core.specs import check_same_names_and_shapes
from mergekit_lit.merging.configuration import parameters, resolve
from mergekit_lit.merging.forms import (
    Config,
    Setting,
    Steps,
    base_plus,
    mean_step,
    setting,
    step_alone,
)
from mergekit_lit.merging.images import Given, shown
from mergekit_lit.merging.patterns import ByPattern
from mergekit_lit.merging.precision import compute_dtype, computing_in, kept_in, output_dtype
from mergekit_lit.merging.steps import moved

_POSITIONS = ("after", "before")

POLICIES = ("average", "base")
"""BatchNorm policies that need no images; `lit.recalibration` has those that do."""


# Each argument is one choice of the merge, hence so many.
def merge(  # noqa: PLR0913
    experts: Experts,
    method: str,
    *,
    config: Mapping[str, Any] | None = None,
    veneers: Sequence[tuple[str, Mapping[str, Any]]] = (),
    batch_norm: str = "base",
    observers: Sequence[MergeObserver] = (),
    seed: int = 0,
    calibration: Given = None,
    dtype: str | None = None,
    out_dtype: str = "base",
) -> Merged:
    """Merge experts by a registered method.

    theta = theta_0 + step(tau_1, ..., tau_T), over all floating-point tensors but BatchNorm's
    statistics and those that `patterns.select` keeps, in float32 or better and cast once. Integers
    are the base's.

    Args:
        experts: T experts of one base; never changed.
        method: name of a registered method.
        config: values for the method's parameters; the others keep their defaults. A value may
            differ by pattern or depth, as `configuration.resolve` says.
        veneers: names and configs of registered veneers. Those that act on the experts do so in
            this order before anything else, those that act on the result in this order after it.
        batch_norm: statistics of `base`, or the `average` of the experts' with equal weights
            (variances at least 0).
        observers: see every tensor's deltas before the method does, in this order.
        seed: of methods that draw at random, and of what has a `seed` that its config leaves open.
        calibration: images, for methods and veneers that look at some; of several splits, several.
        dtype: number type of the computation, `float32` or `float64`; None is float32, or the
            base's where that is better.
        out_dtype: number type of the result: each tensor's own in the `base`, `float32`, `float16`
            or `bfloat16`.

    Returns:
        The merged model. Its `facts` hold method, resolved config, tasks, coefficients lambda (T,)
        for linear methods without veneers, veneers with resolved configs, base and base_hash,
        backbone, image_size, batch_norm, data, seed, dtype, out_dtype and the tensors kept.

    Raises:
        KeyError: unknown method, veneer, parameter or number type.
        TypeError: a value of the wrong type, NaN or infinite.
        ValueError: a value out of range, a pattern that matches nothing, an unknown policy, a
            number of experts that the method cannot take, missing images, or a result that is not
            finite in its number type.
    """
    job = _job(experts, method, [config or {}], veneers, batch_norm, calibration, seed)
    job = replace(job, dtype=compute_dtype(dtype), out_dtype=output_dtype(out_dtype))
    (merged,) = _merges(job, observers)
    return merged


# Each argument is one choice of the merges, hence so many.
def merge_many(  # noqa: PLR0913
    experts: Experts,
    method: str,
    configs: Sequence[Mapping[str, Any]],
    *,
    veneers: Sequence[tuple[str, Mapping[str, Any]]] = (),
    batch_norm: str = "base",
    seed: int = 0,
    calibration: Given = None,
    dtype: str | None = None,
    out_dtype: str = "base",
) -> Iterator[Merged]:
    """Merge the same experts under many configurations, in one pass over their tensors.

    Each result has the same bytes as `merge` gives for that configuration. Preparing passes are
    shared where the parameters that they depend on agree; and configurations that differ in the
    `scale` of a homogeneous method share its direction, so that a grid of scales costs little more
    than one merge. Methods of the forms `whole` and `experts` run once for each configuration.

    Args:
        experts: T experts of one base; never changed.
        method: name of a registered method.
        configs: one for each merge, as `merge` takes them.
        veneers: as of `merge`, of every result.
        batch_norm: as of `merge`.
        seed: as of `merge`.
        calibration: as of `merge`.
        dtype: as of `merge`.
        out_dtype: as of `merge`.

    Returns:
        The merged models in the order of `configs`, each made when it is asked for. What is held
        in memory is one model for each direction that is still needed, and the one yielded.

    Raises:
        KeyError: as `merge`, before anything is read; so the others.
        TypeError: as `merge`.
        ValueError: as `merge`.
    """
    job = _job(experts, method, configs, veneers, batch_norm, calibration, seed)
    return _merges(replace(job, dtype=compute_dtype(dtype), out_dtype=output_dtype(out_dtype)), ())


@dataclass(frozen=True)
class _Layer:
    """One veneer with every parameter's value."""

    veneer: Registered[Any]
    config: Config


@dataclass(frozen=True)
class _Job:
    """What is to be merged how, after all checks."""

    experts: Experts
    entry: Registered[Any]
    configs: Sequence[Config]
    settings: Sequence[Setting]
    layers: Sequence[_Layer]
    batch_norm: str
    seed: int
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None

    def at(self, position: str) -> list[_Layer]:
        return [layer for layer in self.layers if layer.veneer.facts["position"] == position]


def _job(
    experts: Experts,
    method: str,
    configs: Sequence[Mapping[str, Any]],
    veneers: Sequence[tuple[str, Mapping[str, Any]]],
    batch_norm: str,
    calibration: Given,
    seed: int,
) -> _Job:
    """Return the job, or refuse it before anything is read."""
    entry = MERGE_METHODS.get(method)
    values = [_values(entry, config, seed) for config in configs]
    layers = [_layer(name, given, seed) for name, given in veneers]
    _check_form(entry, values)
    _check_policy(batch_norm)
    _check_count(entry, experts)
    return _Job(
        experts=experts,
        entry=shown(entry, experts, calibration),
        configs=values,
        settings=[] if _is_whole(entry) else [setting(entry, one, experts) for one in values],
        layers=[replace(x, veneer=shown(x.veneer, experts, calibration)) for x in layers],
        batch_norm=batch_norm,
        seed=seed,
    )


def _merges(job: _Job, observers: Sequence[MergeObserver]) -> Iterator[Merged]:
    experts = job.experts
    for layer in job.at("before"):
        experts = layer.veneer.function(experts, **layer.config)
    for observer in observers:
        for config in job.configs:
            observer.on_merge_start(experts, job.entry.name, _plain(config))
    seen = _observed(computing_in(experts, job.dtype), observers)
    for config, result in zip(job.configs, _results(job, seen), strict=True):
        merged = _finished(job, experts, config, result)
        for observer in observers:
            observer.on_merge_end(experts, merged)
        yield merged


def _results(job: _Job, experts: Experts) -> Iterator[tuple[Experts, Merged]]:
    """Yield for each configuration the experts that were merged and what came of them."""
    if not _is_whole(job.entry):
        yield from ((experts, merged) for merged in _stepped(job, experts))
        return
    for config in job.configs:
        made = job.entry.function(experts, **config)
        if isinstance(made, Experts):
            steps = ((name, mean_step(made, name)) for name in made.merged_names())
            yield made, Merged(shared=moved(made.base, steps), structure=made.structure)
        else:
            yield experts, made


def _stepped(job: _Job, experts: Experts) -> Iterator[Merged]:
    """Yield the base moved by the step of each configuration; alike ones share a direction."""
    users = Counter(one.direction for one in job.settings)
    firsts = {one.direction: one for one in reversed(job.settings)}
    steps = Steps(job.entry, experts, list(firsts.values()), job.seed)
    made: dict[str, dict[str, Tensor]] = {direction: {} for direction in firsts}
    for name in experts.merged_names():
        # A direction that one configuration alone needs is put onto the base at once.
        ends = [
            base_plus(one.scales.get(name)) if users[one.direction] == 1 else step_alone
            for one in firsts.values()
        ]
        for direction, tensor in zip(made, steps.of(name, ends), strict=True):
            made[direction][name] = tensor
    found = dict(zip(firsts, steps.coefficients, strict=True))
    shared_directions = {direction for direction, count in users.items() if count > 1}
    for one in job.settings:
        users[one.direction] -= 1
        tensors = made[one.direction] if users[one.direction] else made.pop(one.direction)
        if one.direction in shared_directions:
            tensors = {
                name: base_plus(one.scales.get(name))(experts.base[name], step)
                for name, step in tensors.items()
            }
        shared = {
            name: tensors[name] if name in tensors else experts.base[name] for name in experts.base
        }
        facts = {"coefficients": one.scaled(found[one.direction])}
        yield Merged(shared=shared, structure=experts.structure, facts=facts)


def _finished(
    job: _Job, experts: Experts, config: Config, result: tuple[Experts, Merged]
) -> Merged:
    """Return the whole model: veneers, statistics, heads, number types, facts; all checked."""
    seen, merged = result
    for layer in job.at("after"):
        merged = layer.veneer.function(seen, merged, **layer.config)
    merged = _complete(merged, seen, experts.base, job.batch_norm)
    _check_result(job.entry.name, merged.shared, experts.base)
    merged = kept_in(merged, experts.base, job.out_dtype)
    return replace(
        merged, facts=_facts(job, experts, config) | dict(merged.facts) | _veneer_facts(job)
    )


def _values(entry: Registered[Any], config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return every parameter's value; a `seed` that is not given is the merge's."""
    default = {"seed": seed} if "seed" in parameters(entry.function) else {}
    return resolve(entry, {**default, **config})


def _plain(config: Config) -> dict[str, Any]:
    """Return a configuration as plain JSON values, from which it can be made again."""
    return {p: v.to_json() if isinstance(v, ByPattern) else v for p, v in config.items()}


def _layer(name: str, given: Mapping[str, Any], seed: int) -> _Layer:
    veneer = VENEERS.get(name)
    position = str(veneer.facts.get("position"))
    if position not in _POSITIONS:
        raise ValueError(unknown_name(f"position (declared by {name!r})", position, _POSITIONS))
    values = _values(veneer, given, seed)
    _refuse_patterns(veneer, values)
    return _Layer(veneer, values)


def _veneer_facts(job: _Job) -> dict[str, Any]:
    named = [{"name": layer.veneer.name, "config": dict(layer.config)} for layer in job.layers]
    # With a veneer, the method's coefficients are no longer those of the experts' own deltas.
    return {"veneers": named} | ({"coefficients": None} if named else {})


def _check_form(entry: Registered[Any], values: Sequence[Config]) -> None:
    form = str(entry.facts.get("form"))
    if form not in get_args(Form):
        known = get_args(Form)
        raise ValueError(unknown_name(f"form (declared by {entry.name!r})", form, known))
    for config in values if _is_whole(entry) else ():
        _refuse_patterns(entry, config)


def _is_whole(entry: Registered[Any]) -> bool:
    """Return whether a method sees the model as a whole, and not tensor by tensor."""
    return entry.facts["form"] in ("whole", "experts")


def _refuse_patterns(entry: Registered[Any], config: Config) -> None:
    for name, value in config.items():
        if isinstance(value, ByPattern):
            raise ValueError(
                f"{value.parameter} must be one value, since {entry.name!r} treats the model as a "
                f"whole, but `{name}` is given by pattern or depth. Give one value."
            )


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


def _check_policy(batch_norm: str) -> None:
    if batch_norm.startswith("recalibrate"):
        raise ValueError(
            f"`batch_norm` {batch_norm!r} needs images, which `merge` has not. "
            "Merge with 'base', then call `mergekit_lit.lit.recalibration.recalibrate`."
        )
    if batch_norm not in POLICIES:
        raise ValueError(unknown_name("BatchNorm policy", batch_norm, POLICIES))


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


def _complete(result: Merged, experts: Experts, base: Params, batch_norm: str) -> Merged:
    """Return the result with integers of the base, statistics by the policy, and every head."""
    merged_names = set(experts.merged_names())
    kept = {name: base[name] for name in base if name not in merged_names}
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


def _facts(job: _Job, experts: Experts, config: Config) -> dict[str, Any]:
    return {
        "method": job.entry.name,
        "config": _plain(config),
        "data": job.entry.facts.get("data"),
        "tasks": list(experts.names),
        "coefficients": None,
        "base": experts.base_name,
        "base_hash": experts.base_hash,
        "backbone": experts.backbone,
        "image_size": experts.image_size,
        "batch_norm": job.batch_norm,
        "seed": job.seed,
        "dtype": _type_name(job.dtype),
        "out_dtype": _type_name(job.out_dtype) or "base",
        "kept": sorted(experts.kept),
    }


def _type_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
