"""This file is the geometry of task vectors: how long they are and how they disagree."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from mergekit_lit.callbacks.merge_callback import MergeCallback
from mergekit_lit.core.experts import Experts, Merged

_LOG = logging.getLogger(__name__)

# Columns in float64 at a time: bounds the memory on large tensors.
_CHUNK = 1 << 18


class DeltaGeometry(MergeCallback):
    """Measure the norms, cosines and sign conflicts of the experts' deltas.

    For experts s and t, over the whole backbone and over each layer group:
    norm_t = ||tau_t||, cosine_st = <tau_s, tau_t> / (||tau_s|| ||tau_t||),
    sign_conflict_st = share of the entries moved by both that they move in opposite directions
    (1/2 for unrelated experts), and
    cancellation = 1 - sum_p |sum_t tau_tp| / sum_p sum_t |tau_tp|, the share of all movement that
    a sum of the deltas loses: 0 if all agree, 1 if nothing remains.

    Streams tensor by tensor with sums in float64; changes nothing.
    """

    def __init__(self) -> None:
        self._experts: tuple[str, ...] = ()
        self._groups: dict[str, str] = {}
        self._sums: dict[str, _Sums] = {}
        self._loggers: list[Any] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember where a merge under this Trainer is logged."""
        self._loggers = list(trainer.loggers)

    def on_merge_start(self, experts: Experts, method: str, config: Mapping[str, Any]) -> None:
        """Start anew."""
        self._experts = tuple(experts.names)
        self._groups = {name: experts.structure[name].group for name in experts.merged_names()}
        self._sums = {group: _Sums(len(experts)) for group in sorted(set(self._groups.values()))}

    def on_merge_tensor(self, name: str, deltas: Tensor) -> None:
        """Add one tensor to the sums of its group."""
        flat = deltas.detach().reshape(len(deltas), deltas[0].numel())  # (T, n)
        for start in range(0, flat.shape[1], _CHUNK):
            self._sums[self._groups[name]].add(flat[:, start : start + _CHUNK].double())

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
            "global": _total(self._sums.values(), len(self._experts)).to_json(),
            "groups": {group: sums.to_json() for group, sums in sorted(self._sums.items())},
        }

    def _metrics(self) -> dict[str, float]:
        values = self.to_json()["global"]
        norms = dict(zip(self._experts, values["norms"], strict=True))
        metrics = {f"delta/norm/{name}": norm for name, norm in norms.items()}
        means = {
            "delta/cosine": _mean_over_pairs(values["cosine"]),
            "delta/sign_conflict": _mean_over_pairs(values["sign_conflict"]),
            "delta/cancellation": values["cancellation"],
        }
        return metrics | {name: mean for name, mean in means.items() if mean is not None}


class _Sums:
    """Sums over entries, from which all figures of one group follow."""

    def __init__(self, experts: int) -> None:
        self.products = torch.zeros(experts, experts, dtype=torch.float64)  # <tau_s, tau_t>
        self.signs = torch.zeros(experts, experts, dtype=torch.float64)  # agreeing - opposite
        self.both = torch.zeros(experts, experts, dtype=torch.float64)  # entries moved by both
        self.moved = 0.0  # sum_p sum_t |tau_tp|
        self.kept = 0.0  # sum_p |sum_t tau_tp|

    def add(self, deltas: Tensor) -> None:
        """Add entries (T, n) in float64."""
        signs = deltas.sign()
        self.products += (deltas @ deltas.T).cpu()
        self.signs += (signs @ signs.T).cpu()
        self.both += (signs.abs() @ signs.abs().T).cpu()
        self.moved += float(deltas.abs().sum())
        self.kept += float(deltas.sum(dim=0).abs().sum())

    def to_json(self) -> dict[str, Any]:
        norms = self.products.diagonal().sqrt()
        cosine = self.products / torch.outer(norms, norms)
        conflict = (self.both - self.signs) / (2 * self.both)
        return {
            "norms": norms.tolist(),
            "cosine": _matrix(cosine.clamp(-1, 1)),
            "sign_conflict": _matrix(conflict),
            "cancellation": 1 - self.kept / self.moved if self.moved else None,
        }


def _total(groups: Iterable[_Sums], experts: int) -> _Sums:
    total = _Sums(experts)
    for sums in groups:
        total.products += sums.products
        total.signs += sums.signs
        total.both += sums.both
        total.moved += sums.moved
        total.kept += sums.kept
    return total


def _matrix(values: Tensor) -> list[list[float | None]]:
    """Return rows of numbers, None for NaN (0 / 0)."""
    return [[x if x == x else None for x in row] for row in values.tolist()]


def _mean_over_pairs(matrix: list[list[float | None]]) -> float | None:
    """Return the mean above the diagonal, over the pairs where it is defined."""
    pairs = [x for i, row in enumerate(matrix) for x in row[i + 1 :] if x is not None]
    return sum(pairs) / len(pairs) if pairs else None
