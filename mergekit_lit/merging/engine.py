"""This file is the merge engine: it alone iterates over tensors, whatever a method's form."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.merging import MergeObserver
from mergekit_lit.core.registry import MERGE_METHODS, Registered, unknown_name
from mergekit_lit.merging.checking import checked
from mergekit_lit.merging.configuration import resolve, to_json
from mergekit_lit.merging.finishing import POLICIES, finished
from mergekit_lit.merging.forms import Config, Setting, is_whole, setting
from mergekit_lit.merging.images import Given, shown
from mergekit_lit.merging.moving import stepped, streamed_model
from mergekit_lit.merging.observing import observed
from mergekit_lit.merging.passes import mean_delta
from mergekit_lit.merging.precision import compute_dtype, computing_in, output_dtype
from mergekit_lit.merging.requests import Layer, check_request, layers_of
from mergekit_lit.merging.steps import moved

_NO_COEFFICIENTS = {"coefficients": None, "coefficients_by_tensor": None}


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
    streamed: bool = False,
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
        streamed: merge each tensor when it is asked for, as writing the model does, once or more:
            memory then does not grow with the model. Methods of the forms `whole` and `experts`,
            and veneers that act on the result, merge all at once nevertheless.

    Returns:
        The merged model. Its `facts` hold method, resolved config, tasks, coefficients lambda (T,)
        of sums of deltas without veneers (`coefficients_by_tensor` where they differ by tensor),
        veneers with resolved configs, base and base_hash,
        backbone, image_size, batch_norm, data, seed, dtype, out_dtype and the tensors kept.

    Raises:
        KeyError: unknown method, veneer, parameter or number type.
        TypeError: a value of the wrong type, NaN or infinite.
        ValueError: a value out of range, a pattern that matches nothing, an unknown policy, a
            number of experts that the method cannot take, experts that do not fit the base or hold
            NaN, missing images, or a result that is not finite in its number type.
    """
    job = _job(experts, method, [config or {}], veneers, batch_norm, calibration, seed)
    job = replace(job, dtype=compute_dtype(dtype), out_dtype=output_dtype(out_dtype))
    job = replace(job, streamed=streamed)
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
    shared where the parameters that they depend on agree, or where only the one differs that the
    method takes many values of at once, as TIES does of its density; and configurations that differ
    in the `scale` of a homogeneous method share its direction, so that a grid of scales costs
    little more than one merge. Methods of the forms `whole` and `experts` run once for each
    configuration.

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
class _Job:
    """What is to be merged how, after all checks."""

    experts: Experts
    entry: Registered[Any]
    configs: Sequence[Config]
    settings: Sequence[Setting]
    layers: Sequence[Layer]
    batch_norm: str
    seed: int
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    streamed: bool = False

    def at(self, position: str) -> list[Layer]:
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
    values = [resolve(entry, config, seed=seed) for config in configs]
    layers = layers_of(veneers, seed)
    check_request(entry, values, experts, layers)
    _check_policy(batch_norm)
    experts = checked(experts)
    return _Job(
        experts=experts,
        entry=shown(entry, experts, calibration),
        configs=values,
        settings=[] if is_whole(entry) else [setting(entry, one, experts) for one in values],
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
            observer.on_merge_start(experts, job.entry.name, to_json(config))
    seen = observed(computing_in(experts, job.dtype), observers)
    for config, result in zip(job.configs, _results(job, seen), strict=True):
        merged = _complete(job, experts, config, result)
        for observer in observers:
            observer.on_merge_end(experts, merged)
        yield merged


def _results(job: _Job, experts: Experts) -> Iterator[tuple[Experts, Merged]]:
    """Yield for each configuration the experts that were merged and what came of them."""
    if job.streamed and not is_whole(job.entry) and not job.at("after"):
        yield experts, streamed_model(job.entry, experts, job.settings[0], job.seed)
        return
    if not is_whole(job.entry):
        models = stepped(job.entry, experts, job.settings, job.seed)
        yield from ((experts, merged) for merged in models)
        return
    for config in job.configs:
        made = job.entry.function(experts, **config)
        if isinstance(made, Experts):
            steps = ((name, mean_delta(made, name)) for name in made.merged_names())
            yield made, Merged(shared=moved(made.base, steps), structure=made.structure)
        else:
            yield experts, made


def _complete(
    job: _Job, experts: Experts, config: Config, result: tuple[Experts, Merged]
) -> Merged:
    """Return the whole model with its facts, under all veneers."""
    seen, merged = result
    for layer in job.at("after"):
        merged = layer.veneer.function(seen, merged, **layer.config)
    merged = finished(
        merged,
        seen,
        experts.base,
        method=job.entry.name,
        batch_norm=job.batch_norm,
        dtype=job.out_dtype,
    )
    return replace(
        merged, facts=_facts(job, experts, config) | dict(merged.facts) | _veneer_facts(job)
    )


def _veneer_facts(job: _Job) -> dict[str, Any]:
    named = [{"name": layer.veneer.name, "config": dict(layer.config)} for layer in job.layers]
    # With a veneer, the method's coefficients are no longer those of the experts' own deltas.
    return {"veneers": named} | (_NO_COEFFICIENTS if named else {})


def _check_policy(batch_norm: str) -> None:
    if batch_norm.startswith("recalibrate"):
        raise ValueError(
            f"`batch_norm` {batch_norm!r} needs images, which `merge` has not. "
            "Merge with 'base', then call `mergekit_lit.lit.recalibration.recalibrate`."
        )
    if batch_norm not in POLICIES:
        raise ValueError(unknown_name("BatchNorm policy", batch_norm, POLICIES))


def _facts(job: _Job, experts: Experts, config: Config) -> dict[str, Any]:
    return {
        "method": job.entry.name,
        "config": to_json(config),
        "data": job.entry.facts.get("data"),
        "tasks": list(experts.names),
        **_NO_COEFFICIENTS,
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
