"""This file is which twins there are, and how far they are from the run that they are twins of."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.twins import Twin
from mergekit_lit.theory.norms import tensor_norms

_STATISTICS = ("statistic", "counter")


@dataclass(frozen=True)
class Place:
    """Which twin this is.

    Attributes:
        m: samples replaced.
        seed: seed of the neighbour.
        rounded: whether its x0 is moved by a unit in the last place.
    """

    m: int
    seed: int = 0
    rounded: bool = False

    @property
    def name(self) -> str:
        """What logs and files call it."""
        if self.m == 0:
            return "rounding" if self.rounded else "null"
        return f"m{self.m}/{self.seed}"


@torch.no_grad()
def squared_distances(module: ExpertModule, twins: Sequence[Twin]) -> tuple[list[str], Tensor]:
    """Return ||x - x'||^2 of each twin (rows), by part (columns), read back at once.

    Args:
        module: the run itself.
        twins: its twins.

    Returns:
        The names of the parts, `backbone` and `head` first; and the table, (twins, parts).
    """
    here = _moved(module)
    columns, parts = _columns(module, list(here))
    rows = []
    for twin in twins:
        apart = torch._foreach_sub(list(_moved(twin.module).values()), list(here.values()))
        squares = tensor_norms(apart).square()
        rows.append(squares @ parts.to(squares))
    return columns, torch.stack(rows).cpu()


def _moved(module: ExpertModule) -> dict[str, Tensor]:
    """Return what the distance is taken over: weights, without statistics, and the head's."""
    weights = {
        f"backbone.{name}": tensor
        for name, tensor in module.tuned().items()
        if module.structure[name].kind not in _STATISTICS
    }
    return weights | {f"head.{name}": tensor for name, tensor in module.head.state_dict().items()}


def _columns(module: ExpertModule, names: Sequence[str]) -> tuple[list[str], Tensor]:
    """Return the parts by name, and indicators (tensors, parts) of what belongs to which."""
    homes = []
    for name in names:
        part, _, below = name.partition(".")
        homes.append("head" if part == "head" else f"group/{module.structure[below].group}")
    columns = ["backbone", "head", *dict.fromkeys(home for home in homes if home != "head")]
    table = torch.zeros(len(names), len(columns), dtype=torch.float64)
    for row, home in enumerate(homes):
        table[row, columns.index(home)] = 1.0
        if home != "head":
            table[row, 0] = 1.0
    return columns, table
