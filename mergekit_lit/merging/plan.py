"""This file is what a merge will do, told from the headers of its files alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from mergekit_lit.core.experts import BLOCK, Experts
from mergekit_lit.core.registry import MERGE_METHODS, Registered
from mergekit_lit.core.specs import Spec, spec_of
from mergekit_lit.merging.configuration import SCALE, resolve, to_json
from mergekit_lit.merging.forms import (
    Config,
    is_elementwise,
    is_homogeneous,
    is_whole,
    setting,
)
from mergekit_lit.merging.precision import compute_dtype, output_dtype
from mergekit_lit.merging.requests import Layer, check_request, layers_of
from mergekit_lit.merging.timing import expected_seconds

# What the first passes of a method that prepares hold: samples and brackets of order statistics.
_PREPARING = 96 * 2**20

# Bytes a second of processor time: reading mapped files, and writing with checksums. Measured on
# one core of a virtual machine with 2.
_READING, _WRITING = 3e9, 5e8

Fate = Literal["merged", "kept", "statistic", "counter", "head"]
"""What becomes of a tensor: merged by the method; kept as it is in the base, since a pattern says
so or its numbers are whole; a BatchNorm statistic, by the policy; a BatchNorm counter, the base's;
or a task's own head."""


@dataclass(frozen=True)
class Row:
    """What becomes of one tensor.

    Attributes:
        name: its name in the result; of heads `heads/TASK.name`.
        fate: what becomes of it.
        shape: of the result.
        dtype: its number type in the base, or of a head in the expert.
        out_dtype: its number type in the result.
        values: the method's parameters that apply to it; empty unless it is merged.
        veneers: names of the veneers that act on it, or on what it is made of, as they follow.
    """

    name: str
    fate: Fate
    shape: tuple[int, ...]
    dtype: str
    out_dtype: str
    values: Mapping[str, Any]
    veneers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a merge will do, and what it will take.

    Attributes:
        method: its name.
        config: the method's configuration, every parameter with its value.
        veneers: `name`, `position` (`before` the method or `after` it) and `config` of each.
        batch_norm: where BatchNorm statistics come from.
        rows: the tensors of the result, in order.
        read_bytes: what is read of base and experts, once; further passes find it in memory.
        written_bytes: tensors of the result, heads included; masks and the like of methods that see
            the model as a whole come on top.
        peak_bytes: memory beside the mapped files, an estimate: the result, and what the method
            works on.
        streamed_bytes: the same of a streamed merge, which does not hold the result, but where the
            method or a veneer needs it whole.
        seconds: processor time, an estimate from a trial of method and veneers on made-up tensors
            and usual speeds of files; None where one of them looks at images or sees the model as a
            whole.
    """

    method: str
    config: Mapping[str, Any]
    veneers: tuple[Mapping[str, Any], ...]
    batch_norm: str
    rows: tuple[Row, ...]
    read_bytes: int
    written_bytes: int
    peak_bytes: int
    streamed_bytes: int
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def plan(
    experts: Experts,
    method: str,
    *,
    config: Mapping[str, Any] | None = None,
    veneers: Sequence[tuple[str, Mapping[str, Any]]] = (),
    batch_norm: str = "base",
    seed: int = 0,
    dtype: str | None = None,
    out_dtype: str = "base",
) -> Plan:
    """Tell what `merge` would do with the same arguments, before any tensor is read.

    Args:
        experts: T experts of one base, opened by `load_raw`, or by `load_experts` with
            `headers_only`.
        method: name of a registered method.
        config: as of `merge`.
        veneers: as of `merge`.
        batch_norm: any policy, those that need images too.
        seed: as of `merge`.
        dtype: as of `merge`.
        out_dtype: as of `merge`.

    Raises:
        KeyError: unknown method, veneer, parameter or number type.
        TypeError: a value of the wrong type.
        ValueError: a pattern that matches nothing, or a number of experts that it cannot take.
    """
    entry = MERGE_METHODS.get(method)
    values = resolve(entry, config or {}, seed=seed)
    layers = layers_of(veneers, seed)
    check_request(entry, [values], experts, layers)
    by_tensor = _values(entry, values, experts)
    kept = output_dtype(out_dtype)
    rows = [*_backbone(experts, by_tensor, kept), *_heads(experts)]
    rows = [replace(row, veneers=_acting(layers, row.fate, batch_norm)) for row in rows]
    wide = compute_dtype(dtype) or torch.float32
    working, result = _working_bytes(entry, by_tensor, experts, wide)
    whole = _wholes(entry, layers)
    read = _read_bytes(experts, rows)
    written = sum(_bytes(row.shape, row.out_dtype) for row in rows)
    seconds = expected_seconds(entry, by_tensor, experts, seed, layers=layers)
    return Plan(
        method=method,
        config=to_json(values),
        veneers=tuple(_told(layer) for layer in layers),
        batch_norm=batch_norm,
        rows=tuple(rows),
        read_bytes=read,
        written_bytes=written,
        peak_bytes=working + max(1, whole) * result,
        streamed_bytes=working + whole * result,
        seconds=None if seconds is None else seconds + read / _READING + written / _WRITING,
    )


def _acting(layers: Sequence[Layer], fate: Fate, batch_norm: str) -> tuple[str, ...]:
    """Return the veneers that act on tensors of a fate: those before the method come first."""
    if fate == "statistic" and batch_norm != "average":
        return ()
    order = sorted(layers, key=lambda layer: layer.veneer.facts["position"] == "after")
    return tuple(
        layer.veneer.name
        for layer in order
        if fate in layer.veneer.facts.get("touches", ("merged",))
    )


def _wholes(entry: Registered[Any], layers: Sequence[Layer]) -> int:
    """Return how many models are held at once, though the result is written tensor by tensor."""
    after = any(layer.veneer.facts["position"] == "after" for layer in layers)
    # A veneer makes another model of the result.
    return 2 if after else int(is_whole(entry))


def _told(layer: Layer) -> dict[str, Any]:
    entry = layer.veneer
    return {
        "name": entry.name,
        "position": entry.facts["position"],
        "config": to_json(layer.config),
    }


def _values(entry: Registered[Any], config: Config, experts: Experts) -> dict[str, Config]:
    """Return by merged tensor every parameter's value."""
    names = experts.merged_names()
    if is_whole(entry):
        return dict.fromkeys(names, config)
    spread = setting(entry, config, experts)
    scaled = is_homogeneous(entry)
    return {
        name: {**spread.values[name], **({SCALE: spread.scales[name]} if scaled else {})}
        for name in names
    }


def _backbone(
    experts: Experts, by_tensor: Mapping[str, Config], kept: torch.dtype | None
) -> list[Row]:
    rows = []
    for name in experts.base:
        spec = spec_of(experts.base, name)
        own = kept if kept and spec.dtype.is_floating_point else spec.dtype
        fate = _fate(experts, name, by_tensor)
        values = by_tensor.get(name, {})
        rows.append(Row(name, fate, spec.shape, _text(spec.dtype), _text(own), dict(values)))
    return rows


def _fate(experts: Experts, name: str, by_tensor: Mapping[str, Config]) -> Fate:
    if name in by_tensor:
        return "merged"
    kind = experts.structure[name].kind
    return kind if kind in ("statistic", "counter") else "kept"


def _heads(experts: Experts) -> list[Row]:
    found = (
        (f"heads/{task}.{name}", spec_of(head, name))
        for task, head in zip(experts.names, experts.heads, strict=True)
        for name in head
    )
    return [
        Row(name, "head", spec.shape, _text(spec.dtype), _text(spec.dtype), {})
        for name, spec in found
    ]


def _read_bytes(experts: Experts, rows: list[Row]) -> int:
    """Return the bytes of the base, of what is merged of each expert, and of the heads."""
    merged = [row.name for row in rows if row.fate == "merged"]
    read = sum(spec_of(experts.base, name).bytes for name in experts.base)
    for tuned in experts.tuned:
        read += sum(spec_of(tuned, name).bytes for name in merged)
    return read + sum(_bytes(row.shape, row.dtype) for row in rows if row.fate == "head")


def _working_bytes(
    entry: Registered[Any], by_tensor: Mapping[str, Config], experts: Experts, wide: torch.dtype
) -> tuple[int, int]:
    """Return the bytes that a method works on at once, and those of its whole result."""
    entries = {name: math.prod(spec_of(experts.base, name).shape) for name in by_tensor}
    result = sum(entries.values()) * wide.itemsize
    if is_whole(entry):
        # The deltas of the largest tensor, and at worst one more model, such as a permuted one.
        return result + (len(experts) + 2) * max(entries.values()) * wide.itemsize, result
    most = 0
    for name, config in by_tensor.items():
        blocks = (3 * len(experts) + 4) * BLOCK * wide.itemsize
        # Matrices are decomposed in float64.
        whole = entries[name] * (len(experts) * wide.itemsize + 6 * torch.float64.itemsize)
        own = blocks if is_elementwise(entry, config) else whole
        most = max(most, own + 2 * entries[name] * wide.itemsize)
    return most + (_PREPARING if "prepare" in entry.facts else 0), result


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return Spec(getattr(torch, dtype), shape).bytes


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
