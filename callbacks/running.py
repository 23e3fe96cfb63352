"""This file keeps mean, deviation and maximum of named numbers, without leaving the device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class RunningStatistics:
    """Mean, standard deviation and maximum of a row of named numbers, one row a step.

    m_k = m_{k-1} + (y_k - m_{k-1}) / k,  s_k = s_{k-1} + (y_k - m_{k-1}) (y_k - m_k)

    NaN and infinity enter no statistic. Names may come and go; what was seen is kept.

    Attributes:
        names: the names, in the order of the columns.

    Source: Welford 1962, Technometrics 4(3).
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._table = _empty(0)  # count, mean, sum of squared deviations, maximum: (4, names)

    def update(self, names: Sequence[str], row: Tensor) -> None:
        """Add one step: numbers (names,) by their names. Nothing is read back from the device."""
        if self._table.device != row.device or self._table.dtype != row.dtype:
            self._table = self._table.to(row)
        if tuple(names) != self.names:
            row = self._placed(names, row)
        seen = row.isfinite()
        count, mean, spread, top = self._table.unbind()
        value = torch.where(seen, row, mean)
        count = count + seen
        moved = mean + (value - mean) / count.clamp(min=1)
        spread = spread + (value - mean) * (value - moved)
        top = torch.where(seen, torch.maximum(top, row), top)
        self._table = torch.stack([count, moved, spread, top])

    def rows(self) -> Tensor:
        """Return mean, standard deviation (divisor k) and maximum, (3, names), on the device."""
        count, mean, spread, top = self._table.unbind()
        return torch.stack([mean, (spread / count.clamp(min=1)).sqrt(), top])

    def state_dict(self) -> dict[str, Any]:
        """Return names and table."""
        return {"names": list(self.names), "table": self._table.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.names = tuple(state["names"])
        self._table = state["table"].clone()

    def _placed(self, names: Sequence[str], row: Tensor) -> Tensor:
        """Return the row over all names ever seen, NaN where this step has none."""
        new = [name for name in names if name not in set(self.names)]
        self.names = (*self.names, *new)
        self._table = torch.cat([self._table, _empty(len(new)).to(row)], dim=1)
        columns = {name: i for i, name in enumerate(self.names)}
        at = torch.tensor([columns[name] for name in names], device=row.device)
        return row.new_full((len(self.names),), torch.nan).index_copy(0, at, row)


def _empty(columns: int) -> Tensor:
    table = torch.zeros(4, columns, dtype=torch.float64)
    table[3] = -torch.inf
    return table
