"""This file is how a method that looks at images comes to them, or why it does not."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias, get_args

from mergekit_lit.core.calibration import Calibration, DataSplit
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.registry import Registered
from mergekit_lit.core.threads import one_thread

Given: TypeAlias = Calibration | Sequence[Calibration] | None
"""Images of one split, of several (a method's and its veneers' need not be the same), or none."""


def shown(entry: Registered[Any], experts: Experts, given: Given) -> Registered[Any]:
    """Return a method or veneer that takes no images: one that looks at some is given them.

    It then runs on one thread, so that its passes over images give the same bytes for any number.

    Args:
        entry: a registered method, f(experts, *, config), or f(experts, calibration, *, config)
            where the data that it declares are images; or a veneer, which takes the merged model
            last if it acts on it.
        experts: what is merged.
        given: images of each task; not looked at by methods that need none. Of several splits the
            declared one is taken.

    Raises:
        ValueError: the images are missing, of another split than declared, or not of every task.
    """
    calibration = check_shown(entry, given)
    if calibration is None:
        return entry
    missing = sorted(set(experts.names) - set(calibration.samples))
    if missing:
        raise ValueError(
            f"{entry.name!r} looks at images of every task, but {missing[0]!r} has none. "
            "Name a suite that has all tasks."
        )

    @one_thread()
    def function(seen: Experts, *merged: Merged, **config: Any) -> Any:
        # Veneers before it may have changed what the calibration says of the experts.
        given = calibration if seen is experts else calibration.renewed(seen)
        return entry.function(seen, given, *merged, **config)

    return replace(entry, function=function)


def check_shown(entry: Registered[Any], given: Given) -> Calibration | None:
    """Return the images that a method or veneer declares, or None for one that looks at none.

    Raises:
        ValueError: the images are missing, or of another split.
    """
    split = entry.facts.get("data")
    if split not in get_args(DataSplit):
        return None
    several = [given] if isinstance(given, Calibration) else list(given or ())
    if not several:
        raise ValueError(
            f"{entry.name!r} looks at {split} images of every task, but got none. Name the suite "
            "that has them (--data.suite), or choose a method that needs no data."
        )
    for calibration in several:
        if calibration.split == split:
            return calibration
    raise ValueError(
        f"{entry.name!r} looks at {split} images, but got {several[0].split} images. "
        "Give it those that it declares."
    )
