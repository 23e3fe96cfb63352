"""This file is what is known of a group of experts before any merge of it is scored."""

import math
import statistics
from collections.abc import Sequence

from mergekit_lit.core.experts import Experts
from mergekit_lit.merging.engine import merge
from mergekit_lit.search.predicting.cards import of_cards
from mergekit_lit.search.predicting.columns import UNKNOWN, Row, joined
from mergekit_lit.search.predicting.deltas import angles_of, of_deltas, of_step


def facts_of_group(experts: Experts) -> Row:
    """Return what cards and deltas tell of a group: the features of its average, over its tasks.

    Seconds, without an image: one merge, and the angles between the deltas.
    """
    average = merge(experts, "average")
    angles = of_deltas(experts, angles_of(experts))
    return mean_row(joined(of_cards(experts, average), angles, of_step(experts, average)))


def mean_row(rows: Sequence[Row]) -> Row:
    """Return the mean of each column that holds numbers, over the rows in which it is known."""
    found = {}
    for name, first in rows[0].items():
        if isinstance(first, float):
            known = [row[name] for row in rows if math.isfinite(row[name])]
            found[name] = statistics.fmean(known) if known else UNKNOWN
    return found
