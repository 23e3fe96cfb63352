"""This file is the structure of a model: what names and shapes do not tell."""

from collections.abc import Mapping
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
