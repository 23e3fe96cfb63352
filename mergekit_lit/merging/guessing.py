"""This file guesses a model's structure from names and shapes, where no architecture is known."""

import re
from collections.abc import Container, Mapping

from mergekit_lit.core.specs import Spec
from mergekit_lit.core.structure import POSITIONS, Kind, TensorInfo, block_of

_STEM = re.compile(
    r"embed|token|stem|patch|conv1\b|conv_proj|bn1\b|ln_pre|pre_?layr?norm|norm_pre|features\.0\."
)
_DIGITS = re.compile(r"(\d+)")


def guessed_structure(specs: Mapping[str, Spec]) -> dict[str, TensorInfo]:
    """Return kind, depth and group of each tensor, as far as its name and its shape tell.

    `running_mean` and `running_var` are statistics, whole numbers counters; a weight of two axes
    is linear, of more a convolution, a bias is of its weight's kind, other vectors called weight or
    bias are norms. Blocks are numbered parts of the names, in the order of their numbers; outside
    them, what is called like a stem, an embedding or a token comes first, and the rest last. No
    axes are known: methods that permute units refuse such models.

    Args:
        specs: number type and shape of each tensor, by its name.
    """
    owners = [name.split(".")[:-1] for name in specs]
    parents = {".".join(path[:end]) for path in owners for end in range(1, len(path))}
    groups = {name: _group(name, parents) for name in specs}
    blocks = sorted({block for _, block in groups.values()}, key=_order)
    depths = {block: depth for depth, block in enumerate(blocks)}
    return {
        name: TensorInfo(_kind(name, specs), depths[block], group)
        for name, (group, block) in groups.items()
    }


def _kind(name: str, specs: Mapping[str, Spec]) -> Kind:
    owner, _, leaf = name.rpartition(".")
    if leaf in ("running_mean", "running_var"):
        return "statistic"
    if not specs[name].dtype.is_floating_point:
        return "counter"
    if POSITIONS.search(name) or "embedding" in owner.rpartition(".")[2]:
        return "embedding"
    if not re.search(r"weight$|bias$", leaf):
        return "other"
    # `in_proj_bias` stands beside `in_proj_weight`.
    weight = specs.get(re.sub(r"bias$", "weight", name), specs[name])
    kinds: tuple[Kind, ...] = ("other", "norm", "linear", "convolution")
    return kinds[min(len(weight.shape), 3)]


def _group(name: str, parents: Container[str]) -> tuple[str, str]:
    """Return the group and the block of a tensor."""
    group, block = block_of(name.split(".")[:-1], lambda part: part in parents)
    outside = "stem" if _STEM.search(name) else "final"
    return (group, block) if group else (outside, outside)


def _order(block: str) -> tuple[int, list[str | int]]:
    """Return a key that puts the stem first, the end last, and numbers in their own order."""
    parts = [int(part) if part.isdecimal() else part for part in _DIGITS.split(block)]
    return {"stem": 0, "final": 2}.get(block, 1), parts
