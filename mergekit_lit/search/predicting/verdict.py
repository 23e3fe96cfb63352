"""This file is the rule by which experts of different bases are merged, aligned, or kept apart.

It reads measured numbers alone, so that it can be judged by itself
(`experiments/initialisations.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mergekit_lit.search.predicting.predict import Interval

WAYS = ("average", "git_rebasin", "zipit")
"""Methods that experts of different bases are merged by, the simplest first."""

MOST_STRETCH = 1.0
"""Largest stretch at which weights alone speak for a merge: beyond it the base is nearer."""

Choice = Literal["merge", "align", "keep apart"]

RULES = {
    "images": (
        "the way with the best mean accuracy on validation images is taken, if the 90 % interval "
        "of what it gains over the best single network lies above 0"
    ),
    "weights": (
        f"the first way with a stretch of at most {MOST_STRETCH:g} is taken: there each expert "
        "lies nearer to the merge than to its own base"
    ),
}


ADVICE: dict[Choice, str] = {
    "merge": "merge them as they are, and estimate BatchNorm statistics again",
    "align": "align them first, and estimate BatchNorm statistics again",
    "keep apart": (
        "keep every expert and send each task to its own; where one network must do, take the best "
        "single one and fit new heads to it"
    ),
}


@dataclass(frozen=True)
class Way:
    """What is known of one way to merge.

    Attributes:
        method: name of the method.
        stretch: distance of the experts to the merge over that to their bases, in the quadratic
            mean; None where weights do not tell it.
        gain: mean accuracy on validation images less that of the best single network, with its
            90 % interval; None where no image was looked at.
    """

    method: str
    stretch: float | None = None
    gain: Interval | None = None


@dataclass(frozen=True)
class Verdict:
    """What to do with experts.

    Attributes:
        choice: `merge` them as they are, `align` them first, or `keep apart`.
        method: the way to merge; None where they are kept apart.
        basis: `images` or `weights`, what the verdict rests on.
        reason: the numbers that decided, in words.
        rule: what they were held against.
        advice: what follows from it.
    """

    choice: Choice
    method: str | None
    basis: Literal["images", "weights"]
    reason: str
    rule: str
    advice: str


def verdict(ways: Sequence[Way]) -> Verdict:
    """Return what to do with experts of different bases.

    Images decide where they were looked at, else weights; where neither tells, the experts are kept
    apart. Of ways that are equal the first wins.

    Args:
        ways: the simplest first.

    Raises:
        ValueError: there is none.
    """
    if not ways:
        raise ValueError("A verdict needs at least one way to merge, but got none.")
    gains = [(way, way.gain) for way in ways if way.gain is not None]
    return _by_images(gains) if gains else _by_weights(ways)


def _by_images(gains: Sequence[tuple[Way, Interval]]) -> Verdict:
    best, gain = max(gains, key=lambda each: each[1].value)
    beside = (
        f"{best.method} is the best way, and gains {gain.value:+.3f} "
        f"[{gain.low:+.3f}, {gain.high:+.3f}] over the best single network"
    )
    if gain.low > 0:
        return _verdict(best.method, "images", beside)
    open_ = ": more validation images may tell" if gain.high > 0 else ""
    return _verdict(None, "images", f"{beside}{open_}")


def _by_weights(ways: Sequence[Way]) -> Verdict:
    known = [(way, way.stretch) for way in ways if way.stretch is not None]
    for way, stretch in known:
        if stretch <= MOST_STRETCH:
            return _verdict(way.method, "weights", f"{way.method} has a stretch of {stretch:.3g}")
    told = ", ".join(f"{way.method} {stretch:.3g}" for way, stretch in known) or "none is known"
    return _verdict(None, "weights", f"no way has a small stretch ({told}); images may tell more")


def _verdict(method: str | None, basis: Literal["images", "weights"], reason: str) -> Verdict:
    choice: Choice = "keep apart" if method is None else "align" if method != WAYS[0] else "merge"
    return Verdict(choice, method, basis, reason, RULES[basis], ADVICE[choice])
