"""This file is the bootstrap: intervals for accuracies, paired where two models saw one image.

What an interval covers: the chance of which images were drawn, with tasks, experts and seeds fixed.
Images are resampled within each task; a mean over tasks averages the draws of its tasks.
"""

import base64
import math
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mergekit_lit.core.seeds import derive_seed
from mergekit_lit.core.student import student_quantile

Draws = NDArray[np.float64]
"""One statistic on each of R resampled test sets, (R,)."""

DRAWS = 2000


def accuracy_draws(correct: ArrayLike, *, seed: int, task: str = "", draws: int = DRAWS) -> Draws:
    """Resample the images of one task and return the accuracy of each resample.

    Counts of right and wrong images are sufficient: drawing N images with replacement draws the
    counts from a multinomial law, so no image is touched twice.

    Args:
        correct: whether each image is right, (N,), N >= 1.
        seed: seed of the resampling.
        task: name that makes the tasks' streams independent of one another.
        draws: number of resamples R.

    Returns:
        Accuracies in [0, 1], (R,).

    Source: Efron 1979, doi:10.1214/aos/1176344552, section 2.
    """
    right = _flags(correct)
    counts = _resample([right, ~right], seed=seed, task=task, draws=draws)
    return counts[:, 0] / len(right)


def normalised_draws(
    correct: ArrayLike, expert: ArrayLike, *, seed: int, task: str = "", draws: int = DRAWS
) -> Draws:
    """Resample images and return accuracy over the expert's accuracy on the same resample.

    Args:
        correct: whether the model has each image right, (N,).
        expert: whether the task's expert has the same images right, (N,).
        seed: seed of the resampling.
        task: name that makes the tasks' streams independent of one another.
        draws: number of resamples R.

    Returns:
        Ratios, (R,); NaN where the expert has every resampled image wrong.
    """
    model, reference = _pair(correct, expert)
    counts = _paired_counts(model, reference, seed=seed, task=task, draws=draws)
    hits, expert_hits = counts[:, 0] + counts[:, 1], counts[:, 0] + counts[:, 2]
    ratio: Draws = np.full(draws, np.nan)
    np.divide(hits, expert_hits, out=ratio, where=expert_hits > 0)
    return ratio


def difference_draws(
    left: ArrayLike, right: ArrayLike, *, seed: int, task: str = "", draws: int = DRAWS
) -> Draws:
    """Resample images and return accuracy(left) - accuracy(right) on the same resample, (R,)."""
    first, second = _pair(left, right)
    counts = _paired_counts(first, second, seed=seed, task=task, draws=draws)
    return (counts[:, 1] - counts[:, 2]) / len(first)


def mean_draws(tasks: Sequence[Draws]) -> Draws:
    """Return the unweighted mean over tasks of each draw, (R,)."""
    mean: Draws = np.stack(tasks).mean(axis=0)
    return mean


def percentile_interval(draws: Draws, *, level: float = 0.95) -> tuple[float, float] | None:
    """Return the equal-tailed percentile interval, or None where a draw is undefined.

    Raises:
        ValueError: `level` lies outside (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"`level` must lie in (0, 1), but is {level!r}.")
    if bool(np.isnan(draws).any()):
        return None
    low, high = np.quantile(draws, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def student_half_width(values: Sequence[float], *, level: float = 0.95) -> float:
    """Return half the width of Student's interval of the mean of N >= 2 independent values.

    t_{N-1} s / sqrt(N), such as over seeds, each with its own split, order and choices.

    Source: Student 1908, doi:10.1093/biomet/6.1.1.
    """
    quantile = student_quantile(level, len(values) - 1)
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def mean_told(values: Sequence[float], form: str = ".3f") -> str:
    """Return `mean [low, high]` with Student's 95 % interval; the mean alone for one value.

    Args:
        values: at least one, independent.
        form: of each number, as `format` takes it.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:{form}}"
    half = student_half_width(values)
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"


def pack_flags(correct: ArrayLike) -> str:
    """Return per-image correctness as base64 text, one bit an image."""
    return base64.b64encode(np.packbits(_flags(correct)).tobytes()).decode("ascii")


def unpack_flags(text: str, n: int) -> NDArray[np.bool_]:
    """Return the `n` flags that `pack_flags` wrote, (n,).

    Raises:
        ValueError: the text holds another number of bytes than `n` flags need.
    """
    packed = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    if len(packed) != (n + 7) // 8:
        raise ValueError(
            f"Packed flags of {n} images must hold {(n + 7) // 8} bytes, but hold {len(packed)}."
        )
    return np.unpackbits(packed, count=n).astype(np.bool_)


def _paired_counts(
    first: NDArray[np.bool_], second: NDArray[np.bool_], *, seed: int, task: str, draws: int
) -> NDArray[np.int64]:
    """Return resampled counts of (both right, only first, only second, neither), (R, 4)."""
    cells = [first & second, first & ~second, ~first & second, ~first & ~second]
    return _resample(cells, seed=seed, task=task, draws=draws)


def _resample(
    cells: Sequence[NDArray[np.bool_]], *, seed: int, task: str, draws: int
) -> NDArray[np.int64]:
    """Draw N images with replacement R times and count them by cell, (R, cells)."""
    counts = np.array([np.count_nonzero(cell) for cell in cells])
    generator = np.random.default_rng(derive_seed(seed, "bootstrap", task))
    return generator.multinomial(counts.sum(), counts / counts.sum(), size=draws)


def _flags(correct: ArrayLike) -> NDArray[np.bool_]:
    """Return the flags as booleans (N,), refusing none at all."""
    flags = np.asarray(correct, dtype=np.bool_)
    if flags.ndim != 1 or len(flags) == 0:
        raise ValueError(
            f"Correctness must be one flag an image, (N,) with N >= 1, but has shape {flags.shape}."
        )
    return flags


def _pair(left: ArrayLike, right: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return both as flags of the same images."""
    first, second = _flags(left), _flags(right)
    if len(first) != len(second):
        raise ValueError(
            "Paired resampling needs flags of the same images, but got "
            f"{len(first)} and {len(second)}. Evaluate both on one split."
        )
    return first, second
