"""This file is the rules that tell what each tensor of an encoder is."""

import re
from typing import Any

from torch import Tensor, nn

from mergekit_lit.core.structure import Kind, TensorInfo
from mergekit_lit.models.axes import axes_of

_POSITIONS = re.compile(
    r"pos_embed|pos_embedding|position_embedding|relative_position_bias|rel_pos"
)
_KINDS: tuple[tuple[Any, Kind], ...] = (
    (nn.modules.conv._ConvNd, "convolution"),
    ((nn.Linear, nn.MultiheadAttention), "linear"),
)
_NO_BLOCK = re.compile(r"(conv|bn|norm|ln|stem|fc|patch)\w*$")


def structure_of(module: nn.Module) -> dict[str, TensorInfo]:
    """Return kind, depth, group and axes of each tensor in the module's state dict.

    The kind follows from the type of the layer that owns the tensor. Blocks are the numbered parts
    of the encoder in the order of its state dict: `layer1.0`, `blocks.3`, `stages.0.blocks.1`; what
    comes before the first is `stem` at depth 0, what comes after the last is `final`, one deeper.
    The group is the block's outermost numbered part: `layer1`, `blocks.3`, `stages.0`.

    Axes are known for ResNets and ViTs (`axes_of`); other encoders have none.
    """
    modules = dict(module.named_modules())
    tensors = module.state_dict(keep_vars=True)
    axes = axes_of(module)
    structure = {}
    depths: dict[str, int] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        group, block = _place(owner.split("."), modules)
        if not group:
            group = block = "final" if set(depths) - {"stem"} else "stem"
        structure[name] = TensorInfo(
            kind=_kind(modules[owner], name, leaf, tensor),
            depth=depths.setdefault(block, len(depths)),
            group=group,
            axes=axes.get(name, ()),
        )
    return structure


def _kind(owner: nn.Module, name: str, leaf: str, tensor: Tensor) -> Kind:
    """Return what a tensor is, from its owner's type first and its name second."""
    if leaf in ("running_mean", "running_var"):
        return "statistic"
    if not tensor.is_floating_point():
        return "counter"
    if isinstance(owner, nn.Embedding) or _POSITIONS.search(name):
        return "embedding"
    is_norm = "norm" in type(owner).__name__.lower()
    return "norm" if is_norm else next((k for t, k in _KINDS if isinstance(owner, t)), "other")


def _place(path: list[str], modules: dict[str, nn.Module]) -> tuple[str, str]:
    """Return the group and the block that a layer belongs to, or two empty strings."""
    for i, part in enumerate(path):
        name = ".".join(path[: i + 1])
        is_leaf = not any(True for _ in modules[name].children())
        if _NO_BLOCK.match(part):
            return "", ""
        if part.isdecimal() or (part[-1:].isdecimal() and not is_leaf):
            return name, _inner_block(name, path[i + 1 :], modules)
    return "", ""


def _inner_block(group: str, rest: list[str], modules: dict[str, nn.Module]) -> str:
    """Return the numbered block inside a group, or the group where it has none."""
    inner = rest[1:] if rest[:1] == ["blocks"] else rest
    if inner and inner[0].isdecimal():
        block = ".".join([group, *rest[: len(rest) - len(inner) + 1]])
        if any(True for _ in modules[block].children()):
            return block
    return group
