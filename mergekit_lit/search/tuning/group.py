"""This file is what is known of a group of experts before any merge of it is scored."""

import math
import statistics
from collections.abc import Sequence

from mergekit_lit.core.experts import Experts
from mergekit_lit.search.predicting.columns import UNKNOWN, Row
from mergekit_lit.search.predicting.looking import known_rows
from mergekit_lit.stages.recipes import Recipe


def facts_of_group(experts: Experts) -> Row:
    """Return what cards and deltas tell of a group: the features of its average, over its tasks.

    Seconds, without an image: one merge, and the angles between the deltas.
    """
    return mean_row(list(known_rows(experts, [Recipe()])))


def mean_row(rows: Sequence[Row]) -> Row:
    """Return the mean of each column that holds numbers, over the rows in which it is known."""
    found = {}
    for name, first in rows[0].items():
        if isinstance(first, float):
            known = [row[name] for row in rows if math.isfinite(row[name])]
            found[name] = statistics.fmean(known) if known else UNKNOWN
    return found
