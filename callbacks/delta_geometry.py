"""This file is the geometry of task vectors: how long they are and how they disagree."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from mergekit_lit.callbacks.merge_callback import MergeCallback
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.theory.geometry import DeltaSums, mean_over_pairs

_LOG = logging.getLogger(__name__)


class DeltaGeometry(MergeCallback):
    """Measure the norms, cosines and sign conflicts of the experts' deltas.

    `theory.geometry.DeltaSums` says what they are; here they are taken over the whole backbone and
    over each layer group.

    Streams tensor by tensor with sums in float64; changes nothing.
    """

    def __init__(self) -> None:
        self._experts: tuple[str, ...] = ()
        self._groups: dict[str, str] = {}
        self._sums: dict[str, DeltaSums] = {}
        self._loggers: list[Any] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember where a merge under this Trainer is logged."""
        self._loggers = list(trainer.loggers)

    def on_merge_start(self, experts: Experts, method: str, config: Mapping[str, Any]) -> None:
        """Start anew."""
        self._experts = tuple(experts.names)
        self._groups = {name: experts.structure[name].group for name in experts.merged_names()}
        self._sums = {
            group: DeltaSums(len(experts)) for group in sorted(set(self._groups.values()))
        }

    def on_merge_tensor(self, name: str, deltas: Tensor) -> None:
        """Add one tensor to the sums of its group."""
        self._sums[self._groups[name]].add(deltas)

    def on_merge_end(self, experts: Experts, merged: Merged) -> None:
        """Log norms and means over pairs, to the Trainer's loggers or to Python's log."""
        metrics = self._metrics()
        for logger in self._loggers:
            logger.log_metrics(metrics)
        _LOG.info("%s", metrics)

    def to_json(self) -> dict[str, Any]:
        """Return `experts`, `global` and `groups`, as plain JSON values.

        `global` and each group hold `norms` (T), `cosine` (T x T), `sign_conflict` (T x T) and
        `cancellation`; null where it is undefined, as is the cosine with an expert that did not
        move.
        """
        return {
            "experts": list(self._experts),
            "global": _told(self._total()),
            "groups": {group: _told(sums) for group, sums in sorted(self._sums.items())},
        }

    def _total(self) -> DeltaSums:
        return DeltaSums.total(self._sums.values(), len(self._experts))

    def _metrics(self) -> dict[str, float]:
        total = self._total()
        norms = dict(zip(self._experts, total.norms.tolist(), strict=True))
        means = {
            "delta/cosine": mean_over_pairs(total.cosine),
            "delta/sign_conflict": mean_over_pairs(total.sign_conflict),
            "delta/cancellation": _number(total.cancellation),
        }
        return {
            **{f"delta/norm/{name}": norm for name, norm in norms.items()},
            **{name: mean for name, mean in means.items() if mean is not None},
        }


def _told(sums: DeltaSums) -> dict[str, Any]:
    return {
        "norms": sums.norms.tolist(),
        "cosine": _matrix(sums.cosine),
        "sign_conflict": _matrix(sums.sign_conflict),
        "cancellation": _number(sums.cancellation),
    }


def _matrix(values: Tensor) -> list[list[float | None]]:
    """Return rows of numbers, None for NaN (0 / 0)."""
    return [[_number(x) for x in row] for row in values.tolist()]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
