"""This file finishes a merge: what no method touches, number types, and the last checks."""

from dataclasses import replace

import torch
from torch import Tensor

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.params import Params, is_finite
from mergekit_lit.core.specs import Computed, Spec, check_same_names_and_shapes, spec_of
from mergekit_lit.merging.precision import cast

POLICIES = ("average", "base")
"""BatchNorm policies that need no images; `lit.recalibration` has those that do."""


def finished(
    result: Merged,
    experts: Experts,
    base: Params,
    *,
    method: str,
    batch_norm: str,
    dtype: torch.dtype | None,
) -> Merged:
    """Return a whole model: integers of the base, statistics by the policy, heads; all checked.

    Args:
        result: the merged tensors; others that it holds are not looked at. Where they are
            computed when they are asked for, so is everything here.
        experts: what was merged.
        base: tells the number types, and gives what is not merged.
        method: what messages call the maker of `result`.
        batch_norm: one of `POLICIES`.
        dtype: number type of every floating-point tensor; None is each tensor's own in the base.

    Raises:
        ValueError: other names or shapes than the base's, a number that is not finite, or too large
            for the number type.
    """
    merged = set(experts.merged_names())

    def shared(name: str) -> Tensor:
        if name in merged:
            tensor = _finite(method, name, result.shared[name])
        elif batch_norm == "average" and experts.structure[name].kind == "statistic":
            tensor = _mean(experts, name)
        else:
            tensor = base[name]
        return cast(name, tensor, own(name))

    def own(name: str) -> torch.dtype:
        spec = spec_of(base, name)
        return dtype if dtype and spec.dtype.is_floating_point else spec.dtype

    specs = {name: Spec(own(name), spec_of(base, name).shape) for name in base}
    every = Computed(specs, shared)
    whole: Params = every
    if not isinstance(result.shared, Computed):
        rest = {name: base[name] for name in base if name not in merged}
        source = f"The result of {method!r}"
        check_same_names_and_shapes({**result.shared, **rest}, base, source=source)
        whole = dict(every)
    return replace(
        result,
        shared=whole,
        base={name: cast(name, tensor, own(name)) for name, tensor in result.base.items()},
        own={
            task: {name: cast(name, tuned[name], own(name)) for name in sorted(experts.apart)}
            for task, tuned in zip(experts.names, experts.tuned, strict=True)
            if experts.apart
        },
        statistics={
            task: {name: cast(name, tensor, own(name)) for name, tensor in tensors.items()}
            for task, tensors in result.statistics.items()
        },
        heads=result.heads or dict(zip(experts.names, experts.heads, strict=True)),
    )


def _mean(experts: Experts, name: str) -> Tensor:
    """Return the mean over experts of one BatchNorm statistic; a variance is at least 0."""
    mean = torch.stack([tuned[name].double() for tuned in experts.tuned]).mean(dim=0)
    # A sum scaled like the weights can fall below 0, which BatchNorm turns into NaN.
    return mean.clamp(min=0) if name.endswith("var") else mean


def _finite(method: str, name: str, tensor: Tensor) -> Tensor:
    if not is_finite(tensor):
        raise ValueError(
            f"The result of {method!r} must be finite, but {name!r} is not in {tensor.dtype}. "
            "Merge with a smaller scale, or look for NaN in the experts."
        )
    return tensor
