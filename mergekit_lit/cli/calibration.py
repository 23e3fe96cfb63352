"""This file is the flags that say where images come from: `--data.*` of several commands."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.lit.recalibration import CALIBRATION_IMAGES
from mergekit_lit.stages.images import Calibration


# Each argument is one flag of the command line, hence so many.
def calibration(  # noqa: PLR0913
    *,
    suite: str | None = None,
    root: Path | None = None,
    images: int = CALIBRATION_IMAGES,
    n: int | None = None,
    train_share: float = 1.0,
    val_share: float = 0.1,
    reserve: int = 64,
    split_seed: int = 0,
    size: int | None = None,
    download: bool = False,
) -> Calibration | None:
    """Say where the images come from that a method looks at, or BatchNorm statistics are made of.

    Args:
        suite: suite, or folder of tasks, whose images the method looks at, if any, and whose
            training images the `recalibrate` policies use.
        root: folder of the downloaded data sets; null for the default one.
        images: largest number of images of one task, at least 2.
        n: number of training samples that the experts used; null for all.
        train_share: share of the training samples that the experts used, in (0, 1].
        val_share: share of the training samples carved out for validation, in [0, 1).
        reserve: training samples carved out that no run trains on.
        split_seed: seed of the carve-outs and the subset.
        size: largest side to which images are decoded, in pixels; null keeps the source's.
        download: whether missing images may be fetched.

    Raises:
        ValueError: images are described, but no suite is named.
    """
    if suite is None:
        _refuse_homeless(locals())
        return None
    splits = SplitOptions(
        val_share=val_share, reserve=reserve, train_share=train_share, n=n, seed=split_seed
    )
    return Calibration(
        suite=suite, root=root, options=splits, images=images, size=size, download=download
    )


def _refuse_homeless(given: Mapping[str, Any]) -> None:
    """Refuse values of `--data.*` that would do nothing, since no suite is named."""
    for name, parameter in inspect.signature(calibration).parameters.items():
        if given[name] != parameter.default:
            raise ValueError(
                f"`data.{name}` must come with `data.suite`, whose images it describes, but there "
                "is none. Name the suite, or leave it out."
            )
