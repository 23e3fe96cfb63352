"""This file tells what a recommended merge is expected to reach on all tasks, with an interval."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_lit.reports.intervals import student_half_width

_LEVEL = 0.95


@dataclass(frozen=True)
class Share:
    """How many of a task's validation images are right.

    Attributes:
        accuracy: the share.
        images: how many there are.
    """

    accuracy: float
    images: int


@dataclass(frozen=True)
class Expected:
    """What a merge of all tasks is expected to reach, on average over them.

    Attributes:
        accuracy: the base's on all tasks, and the mean gain of the tasks that were tried.
        low: lower end of the 95 % interval.
        high: its upper end.
        base: accuracy of the base on all tasks.
        gain: mean gain over the base on the tasks that were tried.
        tried: number of these.
        tasks: number of all.
    """

    accuracy: float
    low: float
    high: float
    base: float
    gain: float
    tried: int
    tasks: int


def expected_accuracy(base: Mapping[str, Share], merged: Mapping[str, Share]) -> Expected:
    """Return what a merge of all tasks is expected to reach.

    The interval has two parts, added in squares: which images were drawn (binomial, normal), and
    which tasks were tried (Student's over the gains, less what a sample without replacement of T
    tasks saves). It knows nothing of the choice among candidates by the same images, nor of what a
    merge of more tasks loses beside one of few.

    Args:
        base: of all T tasks.
        merged: of the tasks that were tried, at least one, some of these.
    """
    gains = [merged[task].accuracy - base[task].accuracy for task in merged]
    before = statistics.fmean(share.accuracy for share in base.values())
    gain, tried, count = statistics.fmean(gains), len(gains), len(base)
    # The image noise of a gain is that of the merge; the base's own, in part the same, is in it.
    drawn = _error_of_images(list(base.values())) ** 2
    if tried == count:
        drawn = _error_of_images(list(merged.values())) ** 2
    width = statistics.NormalDist().inv_cdf((1 + _LEVEL) / 2) ** 2 * drawn
    if 1 < tried < count:
        width += student_half_width(gains, level=_LEVEL) ** 2 * (1 - tried / count)
    value, half = before + gain, math.sqrt(width)
    low, high = (min(max(end, 0.0), 1.0) for end in (value - half, value + half))
    if tried == 1 < count:
        # One task tells nothing of the others.
        low, high = 0.0, 1.0
    return Expected(value, low, high, before, gain, tried, count)


def _error_of_images(shares: Sequence[Share]) -> float:
    """Return the standard error of a mean of accuracies."""
    variances = [s.accuracy * (1 - s.accuracy) / s.images for s in shares]
    return math.sqrt(math.fsum(variances)) / len(shares)
