"""This file makes of a table of merges what predictors learn from, for one outcome and level.

Few features are learned from, most of them ratios: with all that a table has, what was learned of
some tasks told less of others.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

import numpy as np

from mergekit_lit.search.predicting.columns import KEYS, OUTCOMES, Level, Row
from mergekit_lit.search.predicting.rows import Numbers, Rows

Outcome: TypeAlias = Literal["accuracy", "excess_error"]
"""What is predicted of a merge on a task's test images."""


@dataclass(frozen=True)
class Scale:
    """How an outcome is learned.

    Attributes:
        unit: the change up to which differences count in full: about what 200 images leave unsure.
        ends: least and largest value that it can have.
        starts: what it may be told from, the best first: a feature that estimates it for a new
            task, and the outcome that it estimates; without one it is told from 0.
    """

    unit: float
    ends: tuple[float, float]
    starts: tuple[tuple[str, str], ...] = ()


SCALES: Mapping[Outcome, Scale] = MappingProxyType(
    {
        "accuracy": Scale(
            unit=0.02,
            ends=(0.0, 1.0),
            starts=(
                ("own_card_base_accuracy", "test_base_accuracy"),
                ("base_val_accuracy", "test_base_accuracy"),
                ("own_card_val_accuracy", "test_expert_accuracy"),
            ),
        ),
        "excess_error": Scale(unit=0.1, ends=(-np.inf, np.inf)),
    }
)

LEARNED: Mapping[Level, tuple[str, ...]] = MappingProxyType(
    {
        "cards": (
            *(f"own_{name}" for name in ("log_lr", "log_batch", "log_steps", "log_n")),
            *(f"own_{name}" for name in ("log_epochs", "log_displacement", "log_classes")),
            *(f"own_card_{name}" for name in ("base_accuracy", "val_accuracy")),
            *(f"own_card_{name}" for name in ("base_loss", "train_loss", "val_loss")),
            *("log_displacement_beside", "log_relative_norm", "norm_ratio", "experts"),
            *("cosine_mean", "cosine_max", "conflict_mean", "overlap_mean", "leading_share"),
            *("group_cosine", "group_conflict", "cancellation"),
            *("log_step", "step_ratio", "survival", "interference"),
            *(f"layer_survival_{word}" for word in ("mean", "min", "max")),
            *(f"layer_interference_{word}" for word in ("mean", "min", "max")),
            *(f"group_survival_{word}" for word in ("mean", "min", "max")),
            *(f"group_interference_{word}" for word in ("mean", "max")),
            *("scale", "density", "linear"),
            *("bound_log_delta_path", "bound_chi2_lambda", "bound_chi2_w"),
        ),
        "data": (
            *("base_val_accuracy", "base_val_loss", "expert_val_accuracy", "expert_val_loss"),
            *("gradient2", "gradient_noise", "zeta2", "gradient_product", "group_gradient2"),
            *("gradient_step", "gradient_own", "curvature_own", "curvature_average"),
            *("smoothness", "bound_drift", "bound_merged_noise"),
        ),
        "probe": ("probe_val_accuracy", "probe_val_loss", "probe_train_loss"),
    }
)
"""What each level of information adds to what is learned from."""

WORSE: tuple[str, ...] = (
    "bound_log_delta_path",
    "bound_chi2_lambda",
    "bound_chi2_w",
    "bound_drift",
    "bound_merged_noise",
    "interference",
    "layer_interference_mean",
    "group_interference_mean",
)
"""Terms of the bound, and what drives them: all else equal, more of one does not help a merge."""


def learned_names(level: Level) -> list[str]:
    """Return what is learned from at a level: its own features and those of the levels below."""
    below = get_args(Level)[: get_args(Level).index(level) + 1]
    return [name for each in below for name in LEARNED[each]]


def needed_columns(level: Level, more: Sequence[str] = ()) -> list[str]:
    """Return the columns of a table that `rows_of` reads at a level, and further features."""
    told = [column.name for column in (*KEYS, *OUTCOMES)]
    return list(dict.fromkeys([*told, *learned_names(level), *more]))


def rows_of(
    table: Sequence[Row],
    outcome: Outcome,
    *,
    level: Level,
    without: Iterable[str] = (),
    more: Sequence[str] = (),
) -> Rows:
    """Return rows of a table with the features of a level.

    Args:
        table: rows by column, with their outcomes or without.
        outcome: what is to be predicted.
        level: whose features, and those of the levels below, are taken.
        without: features that are left out, as those that are unknown where predictions are made.
        more: features that are taken as well, though nothing is learned from them.
    """
    left_out, taken = set(without), dict.fromkeys([*learned_names(level), *more])
    names = [name for name in taken if name not in left_out]
    groups = ["/".join((row["backbone"], row["suite"], row["group"])) for row in table]
    scale = SCALES[outcome]
    anchor, start = next((pair for pair in scale.starts if pair[0] in names), (None, None))
    return Rows(
        names=tuple(names),
        features=np.stack([_column(table, name) for name in names], axis=1),
        outcome=_column(table, f"test_{outcome}"),
        start=_column(table, start),
        anchor=_column(table, anchor),
        unit=scale.unit,
        ends=scale.ends,
        task=np.array([row["task"] for row in table]),
        merge=np.array([f"{g}/{row['merge']}" for g, row in zip(groups, table, strict=True)]),
        method=np.array([row["method"] for row in table]),
        group=np.array(groups),
        backbone=np.array([row["backbone"] for row in table]),
        real=np.array([row["real"] for row in table], dtype=bool),
    )


def directions_of(outcome: Outcome) -> Mapping[str, int]:
    """Return in which features the outcome must not rise (-1) or fall (1)."""
    worse = -1 if outcome == "accuracy" else 1
    return MappingProxyType(dict.fromkeys(WORSE, worse))


def _column(table: Sequence[Row], name: str | None) -> Numbers:
    """Return a column, NaN where a row lacks it; 0 for no name."""
    if name is None:
        return np.zeros(len(table))
    return np.array([row.get(name, np.nan) for row in table], dtype=np.float64)
