"""This file makes of a table of merges what predictors learn from, for one outcome and level."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np

from mergekit_lit.search.predicting.columns import Level, Row
from mergekit_lit.search.predicting.rows import Rows
from mergekit_lit.search.predicting.table import feature_names

Outcome: TypeAlias = Literal["accuracy", "excess_error"]
"""What is predicted of a merge on a task's test images."""

_ENDS: Mapping[Outcome, tuple[float, float]] = {
    "accuracy": (0.0, 1.0),
    "excess_error": (-np.inf, np.inf),
}
_EXPERT = "own_card_val_accuracy"

WORSE: tuple[str, ...] = (
    "bound_log_delta_path",
    "bound_chi2_lambda",
    "bound_chi2_w",
    "bound_drift",
    "bound_drift_closed_form",
    "bound_merged_noise",
    "interference",
)
"""Terms of the bound, and what drives them: all else equal, more of one does not help a merge."""


def rows_of(
    table: Sequence[Row], outcome: Outcome, *, level: Level, without: Sequence[str] = ()
) -> Rows:
    """Return rows of a table with the features of a level.

    Args:
        table: rows by column, with their outcomes or without.
        outcome: what is to be predicted.
        level: whose features, and those of the levels below, are taken.
        without: features that are left out, as those that are unknown where predictions are made.
    """
    names = [name for name in feature_names(level) if name not in without]
    values = np.array([[row[name] for name in names] for row in table], dtype=np.float64)
    groups = ["/".join((row["backbone"], row["suite"], row["group"])) for row in table]
    anchored = outcome == "accuracy" and _EXPERT in names
    anchor = values[:, names.index(_EXPERT)] if anchored else np.zeros(len(table))
    return Rows(
        names=tuple(names),
        features=values,
        outcome=np.array([row.get(f"test_{outcome}", np.nan) for row in table], dtype=np.float64),
        anchor=np.nan_to_num(anchor),
        ends=_ENDS[outcome],
        task=np.array([row["task"] for row in table]),
        merge=np.array([f"{g}/{row['merge']}" for g, row in zip(groups, table, strict=True)]),
        group=np.array(groups),
        backbone=np.array([row["backbone"] for row in table]),
        real=np.array([row["real"] for row in table], dtype=bool),
    )


def directions_of(outcome: Outcome) -> Mapping[str, int]:
    """Return in which features the outcome must not rise (-1) or fall (1)."""
    worse = -1 if outcome == "accuracy" else 1
    return MappingProxyType(dict.fromkeys(WORSE, worse))
