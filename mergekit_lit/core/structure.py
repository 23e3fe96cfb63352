"""This file is the structure of a model: what names and shapes do not tell."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

Kind = Literal["linear", "convolution", "norm", "embedding", "statistic", "counter", "other"]


@dataclass(frozen=True)
class TensorInfo:
    """What one named tensor is.

    Attributes:
        kind: the layer's kind; `statistic` is a running mean or variance, `counter` an integer
            buffer, `other` anything that no rule knows (class tokens, layer scales).
        depth: position of its block from the input, 0 to the number of blocks - 1.
        group: name of its block, under which callbacks report norms (`stem`, `layer1`, `blocks.0`).
        axes: for each axis the name of the permutation that acts on it, or None.
    """

    kind: Kind
    depth: int
    group: str
    axes: tuple[str | None, ...] = ()

    @property
    def is_merged(self) -> bool:
        """Whether merging moves it: statistics and counters follow the BatchNorm policy instead."""
        return self.kind not in ("statistic", "counter")


Structure: TypeAlias = Mapping[str, TensorInfo]


POSITIONS = re.compile(
    r"pos_embed|pos_embedding|position_embedding|positional_embedding|relative_position_bias|rel_pos"
)
"""What position embeddings are called."""

_NO_BLOCK = re.compile(r"(conv|bn|norm|ln|stem|fc|patch)\w*$")


def block_of(path: Sequence[str], has_children: Callable[[str], bool]) -> tuple[str, str]:
    """Return the group and the block that a layer belongs to, or two empty strings.

    Blocks are the numbered parts of an encoder: `layer1.0`, `blocks.3`, `stages.0.blocks.1`; the
    group is a block's outermost numbered part: `layer1`, `blocks.3`, `stages.0`.

    Args:
        path: the parts of the layer's dotted name.
        has_children: tells of a part of the model, by its dotted name, whether it has parts itself.
    """
    for i, part in enumerate(path):
        name = ".".join(path[: i + 1])
        if _NO_BLOCK.match(part):
            return "", ""
        if part.isdecimal() or (part[-1:].isdecimal() and has_children(name)):
            return name, _inner_block(name, path[i + 1 :], has_children)
    return "", ""


def _inner_block(group: str, rest: Sequence[str], has_children: Callable[[str], bool]) -> str:
    """Return the numbered block inside a group, or the group where it has none."""
    inner = rest[1:] if rest[:1] == ["blocks"] else rest
    if inner and inner[0].isdecimal():
        block = ".".join([group, *rest[: len(rest) - len(inner) + 1]])
        if has_children(block):
            return block
    return group


def structure_to_json(structure: Structure) -> dict[str, Any]:
    """Return plain JSON values, sorted by name."""
    return {name: asdict(structure[name]) for name in sorted(structure)}


def structure_from_json(value: Mapping[str, Mapping[str, Any]]) -> dict[str, TensorInfo]:
    """Return the structure that `structure_to_json` wrote.

    Raises:
        ValueError: an unknown kind.
    """
    structure = {}
    for name, info in value.items():
        if info["kind"] not in get_args(Kind):
            known = ", ".join(get_args(Kind))
            raise ValueError(f"Kind of {name!r} must be one of {known}, but is {info['kind']!r}.")
        structure[name] = TensorInfo(
            kind=info["kind"],
            depth=int(info["depth"]),
            group=str(info["group"]),
            axes=tuple(info["axes"]),
        )
    return structure
