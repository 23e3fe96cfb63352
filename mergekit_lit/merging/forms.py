"""This file is what a method of each form does to one tensor, under one setting or under many."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergekit_lit.core.experts import Experts
from mergekit_lit.core.merging import Slice
from mergekit_lit.core.registry import Registered
from mergekit_lit.merging.configuration import SCALE, check_scale
from mergekit_lit.merging.passes import Blocks, Deltas, blockwise
from mergekit_lit.merging.patterns import ByPattern
from mergekit_lit.merging.preparing import prepared
from mergekit_lit.merging.steps import weighted_sum

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """One configuration, spread over the tensors.

    A method that declares `homogeneous` gives scale times a direction: it is run at a scale of 1,
    and its step is multiplied afterwards, so that settings which differ in scale share a direction.

    Attributes:
        values: by tensor, the value of every parameter; `scale` is 1 for homogeneous methods.
        scales: by tensor, what the step is multiplied by; empty for other methods.
        direction: the same for settings whose steps are multiples of one another.
    """

    values: Mapping[str, Config]
    scales: Mapping[str, float]
    direction: str

    def told(self, rows: Mapping[str, Tensor] | None) -> dict[str, Any]:
        """Return a merge's facts of lambda: one row (T,) for all tensors, or a row for each.

        Args:
            rows: lambda of the direction by tensor; None where the method is not linear.
        """
        if rows is None:
            return {"coefficients": None}
        scaled = {name: (self.scales.get(name, 1.0) * row).tolist() for name, row in rows.items()}
        first = next(iter(scaled.values()))
        if all(row == first for row in scaled.values()):
            return {"coefficients": first}
        return {"coefficients": None, "coefficients_by_tensor": scaled}


def setting(entry: Registered[Any], config: Config, experts: Experts) -> Setting:
    """Spread a configuration, as `resolve` returns it, over the tensors that are merged.

    Raises:
        ValueError: a pattern matches no tensor, or a scale is below 0.
    """
    names = experts.merged_names()
    varying = {
        parameter: value.at(names, experts.structure)
        for parameter, value in config.items()
        if isinstance(value, ByPattern)
    }
    plain = {parameter: value for parameter, value in config.items() if parameter not in varying}
    scales: dict[str, float] = {}
    if is_homogeneous(entry):
        scales = varying.pop(SCALE, {}) or dict.fromkeys(names, plain[SCALE])
        for scale in set(scales.values()):
            check_scale(scale)
        plain[SCALE] = 1.0
    values = {
        name: {**plain, **{parameter: by[name] for parameter, by in varying.items()}}
        for name in names
    }
    return Setting(values, scales, repr((sorted(plain.items()), sorted(varying.items()))))


def is_homogeneous(entry: Registered[Any]) -> bool:
    """Return whether a method declares that its step is its parameter `scale` times a direction."""
    return bool(entry.facts.get("homogeneous", False))


def is_whole(entry: Registered[Any]) -> bool:
    """Return whether a method sees the model as a whole, and not tensor by tensor."""
    return entry.facts["form"] in ("whole", "experts")


def is_per_task(entry: Registered[Any], config: Config) -> bool:
    """Return whether a method under a configuration makes each task a model of its own."""
    return _declared(entry.facts.get("per_task", False), config)


def has_adapters(entry: Registered[Any]) -> bool:
    """Return whether a method gives each task an adapter between backbone and head."""
    return bool(entry.facts.get("adapters", False))


def is_elementwise(entry: Registered[Any], config: Config) -> bool:
    """Return whether a method under a configuration takes entries one by one, in blocks."""
    declared = entry.facts["form"] == "linear" or entry.facts.get("elementwise", False)
    return _declared(declared, config)


def _declared(fact: Any, config: Config) -> bool:
    """Return a fact that a method declares for all configurations, or as a function of each."""
    return bool(fact(config) if callable(fact) else fact)


class Steps:
    """The steps of one method under several settings, tensor by tensor."""

    def __init__(
        self, entry: Registered[Any], experts: Experts, settings: Sequence[Setting], seed: int
    ) -> None:
        """Find what must be known of all tensors before the first step; alike settings share it.

        Args:
            entry: a method of the form `linear` or `kernel`.
            experts: T experts of one base.
            settings: of which the steps are asked for.
            seed: of the merge.
        """
        self._experts = experts
        self._seed = seed
        form = _linear if entry.facts["form"] == "linear" else _kernels
        self._kernels = form(entry, experts, [setting.values for setting in settings])

    @property
    def coefficients(self) -> list[Mapping[str, Tensor] | None]:
        """Of each setting, lambda (T,) of a linear method by tensor; None of another."""
        return [kernel.coefficients for kernel in self._kernels]

    def of(self, name: str, ends: Sequence[Callable[[Tensor, Tensor], Tensor]]) -> list[Tensor]:
        """Return of each setting end(base, step), (*s), of one tensor.

        Args:
            name: of the tensor.
            ends: of each setting, what is made of the base and the step, entry by entry; it gets
                blocks of entries from elementwise methods, and then is called many times.
        """
        flat = self._experts.base[name].reshape(-1)
        in_blocks = [k for k, kernel in enumerate(self._kernels) if kernel.elementwise(name)]
        functions = [self._blocks(name, flat, self._kernels[k], ends[k]) for k in in_blocks]
        made = dict(zip(in_blocks, self._joined(name, functions), strict=True))
        return [
            made[k] if k in made else self._whole(name, kernel, ends[k])
            for k, kernel in enumerate(self._kernels)
        ]

    def _joined(self, name: str, functions: Sequence[Blocks]) -> list[Tensor]:
        return blockwise(self._experts, name, functions) if functions else []

    def _blocks(
        self, name: str, flat: Tensor, kernel: "_Kernel", end: Callable[[Tensor, Tensor], Tensor]
    ) -> Blocks:
        info = self._experts.structure[name]

        def function(deltas: Tensor, start: int) -> Tensor:
            base = flat[start : start + deltas.shape[1]]
            part = Slice(name, base, deltas, info, kernel.stats(name), self._seed, start)
            return end(base, kernel.step(part))

        return function

    def _whole(
        self, name: str, kernel: "_Kernel", end: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        base, info = self._experts.base[name], self._experts.structure[name]
        each = Deltas(self._experts, name)
        step = kernel.step(Slice(name, base, each, info, kernel.stats(name), self._seed))
        if step.shape != base.shape:
            raise ValueError(
                f"The step of {name!r} must have shape {tuple(base.shape)}, but has "
                f"{tuple(step.shape)}."
            )
        return end(base, step)


@dataclass(frozen=True)
class _Kernel:
    """A method under one setting."""

    step: Callable[[Slice], Tensor]
    elementwise: Callable[[str], bool]
    stats: Callable[[str], Mapping[str, Any]]
    coefficients: Mapping[str, Tensor] | None = None


def _linear(
    entry: Registered[Any], experts: Experts, settings: Sequence[Mapping[str, Config]]
) -> list[_Kernel]:
    """Return of each setting the weighted sum of the deltas, by every tensor's coefficients."""
    known: dict[str, Mapping[str, Tensor]] = {}

    def kernel(values: Mapping[str, Config]) -> _Kernel:
        keys = {name: repr(sorted(config.items())) for name, config in values.items()}
        for name, key in keys.items():
            if key not in known:
                known[key] = _coefficients(entry, experts, values[name])
        own = {name: known[key][name] for name, key in keys.items()}
        return _Kernel(
            step=lambda tensor: _combination(own[tensor.name], tensor.deltas),
            elementwise=lambda _: True,
            stats=lambda _: {},
            coefficients=own,
        )

    return [kernel(values) for values in settings]


def _combination(coefficients: Tensor, deltas: Tensor) -> Tensor:
    """Return sum_t lambda_t tau_t, (*s); with one lambda for all as a multiple of their sum."""
    if bool((coefficients == coefficients[0]).all()):
        return coefficients[0].to(deltas.dtype) * deltas.sum(dim=0)
    return weighted_sum(coefficients, deltas)


def _coefficients(entry: Registered[Any], experts: Experts, config: Config) -> Mapping[str, Tensor]:
    """Return lambda (T,) by tensor, whether the method gave one row or a row for each."""
    found: Tensor | Mapping[str, Tensor] = entry.function(experts, **config)
    rows = dict.fromkeys(experts.merged_names(), found) if isinstance(found, Tensor) else found
    wrong = next((row for row in rows.values() if row.shape != (len(experts),)), None)
    if wrong is not None:
        raise ValueError(
            f"{entry.name!r} must return {len(experts)} coefficients, one per expert, but "
            f"returned a tensor of shape {tuple(wrong.shape)}."
        )
    return rows


def _kernels(
    entry: Registered[Any], experts: Experts, settings: Sequence[Mapping[str, Config]]
) -> list[_Kernel]:
    """Return of each setting a per-tensor kernel with what passes over all tensors found."""
    in_blocks = [
        {name for name, config in values.items() if is_elementwise(entry, config)}
        for values in settings
    ]
    stats = prepared(entry, experts, list(zip(settings, in_blocks, strict=True)))

    def kernel(
        values: Mapping[str, Config], blocks: set[str], found: Mapping[str, Mapping[str, Any]]
    ) -> _Kernel:
        return _Kernel(
            step=lambda tensor: entry.function(tensor, **values[tensor.name]),
            elementwise=lambda name: name in blocks,
            stats=lambda name: found.get(name, {}),
        )

    return [kernel(*parts) for parts in zip(settings, in_blocks, stats, strict=True)]


def base_plus(scale: float | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function (base, step) -> base + scale * step, in the dtype of the step."""
    if scale is None:
        return lambda base, step: base.to(step.dtype) + step
    return lambda base, step: (scale * step).add_(base.to(step.dtype))


def step_alone(_base: Tensor, step: Tensor) -> Tensor:
    """Return the step."""
    return step
