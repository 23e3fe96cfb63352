"""This file is how a method that looks at images comes to them, or why it does not."""

from dataclasses import replace
from typing import Any, get_args

from mergekit_lit.core.calibration import Calibration, DataSplit
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.registry import Registered


def shown(
    entry: Registered[Any], experts: Experts, calibration: Calibration | None
) -> Registered[Any]:
    """Return a method or veneer that takes no images: one that looks at some is given them.

    Args:
        entry: a registered method, f(experts, *, config), or f(experts, calibration, *, config)
            where the data that it declares are images; or a veneer, which takes the merged model
            last if it acts on it.
        experts: what is merged.
        calibration: images of each task; not looked at by methods that need none.

    Raises:
        ValueError: the images are missing, of another split than declared, or not of every task.
    """
    check_shown(entry, calibration)
    if calibration is None or entry.facts.get("data") not in get_args(DataSplit):
        return entry
    missing = sorted(set(experts.names) - set(calibration.samples))
    if missing:
        raise ValueError(
            f"{entry.name!r} looks at images of every task, but {missing[0]!r} has none. "
            "Name a suite that has all tasks."
        )

    def function(seen: Experts, *merged: Merged, **config: Any) -> Any:
        return entry.function(seen, calibration, *merged, **config)

    return replace(entry, function=function)


def check_shown(entry: Registered[Any], calibration: Calibration | None) -> None:
    """Refuse a method that looks at images without them, or with those of another split.

    Raises:
        ValueError: the images are missing, or of another split than declared.
    """
    split = entry.facts.get("data")
    if split not in get_args(DataSplit):
        return
    if calibration is None:
        raise ValueError(
            f"{entry.name!r} looks at {split} images of every task, but got none. Name the suite "
            "that has them (--data.suite), or choose a method that needs no data."
        )
    if calibration.split != split:
        raise ValueError(
            f"{entry.name!r} looks at {split} images, but got {calibration.split} images. "
            "Give it those that it declares."
        )
