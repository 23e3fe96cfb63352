"""This file is the base of callbacks that observe merging."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from mergekit_lit.core.experts import Experts, Merged


class MergeCallback(pl.Callback):
    """Sees every tensor of a merge, and may change the deltas. Override what you need.

    It acts in `mergekit-lit merge --callbacks+=my.Class`, in `merge(..., observers=[MyClass()])`,
    and under a Trainer whose `MergeModule` runs the merge. A subclass that has `to_json()` finds
    its result in the record of the merge.
    """

    def on_merge_start(self, experts: Experts, method: str, config: Mapping[str, Any]) -> None:
        """Called once, before any tensor is read, with the resolved configuration."""

    def on_merge_tensor(self, name: str, deltas: Tensor) -> Tensor | None:
        """Called once for each tensor that merging moves, in the order of the names.

        Args:
            name: the tensor's name.
            deltas: tau_t = theta_t - theta_0, (T, *s), float32 or better; yours to read.

        Returns:
            Other deltas of the same shape, held in memory until the merge ends; or None to leave
            them as they are.
        """

    def on_merge_end(self, experts: Experts, merged: Merged) -> None:
        """Called once, with the result."""
