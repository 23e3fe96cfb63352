"""This file is the rules that tell what each tensor of an encoder is."""

from typing import Any

from torch import Tensor, nn

from mergekit_lit.core.structure import POSITIONS, Kind, TensorInfo, block_of
from mergekit_lit.models.axes import axes_of

_KINDS: tuple[tuple[Any, Kind], ...] = (
    (nn.modules.conv._ConvNd, "convolution"),
    ((nn.Linear, nn.MultiheadAttention), "linear"),
)


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

    def has_children(name: str) -> bool:
        return any(True for _ in modules[name].children())

    structure = {}
    depths: dict[str, int] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        group, block = block_of(owner.split("."), has_children)
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
    if isinstance(owner, nn.Embedding) or POSITIONS.search(name):
        return "embedding"
    is_norm = "norm" in type(owner).__name__.lower()
    return "norm" if is_norm else next((k for t, k in _KINDS if isinstance(owner, t)), "other")
