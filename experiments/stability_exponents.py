"""This file is how measured stability grows with each hyperparameter, beside what is predicted.

It is a module of `experiments/stability.py`. An exponent is the slope of log eps over log x within
one task (and number of steps, or configuration), of experts that count as measured alone; the mean
over the tasks, with Student's interval over them. Tasks share the seed and the base.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from claims import PREDICTIONS, predicted, verdict
from closed_form import eps_at_constant_noise
from exponents import epochs, grouped

from mergekit_lit.reports.curves import Plot
from mergekit_lit.reports.intervals import student_half_width

Row: TypeAlias = Mapping[str, Any]

# What varies, its name among the predictions, and what is held beside the task.
FACTORS = {
    "lr": ("learning rate", ("batch", "train_share", "steps")),
    "batch": ("batch", ("lr", "train_share", "steps")),
    "steps": ("effective steps", ("lr", "batch", "train_share")),
    "n": ("training images", ("lr", "batch", "steps")),
}


def flat(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield one row for each expert: what its twins, card and gaps tell."""
    shared = ("backbone", "lr", "batch", "train_share", "seed", "steps")
    for row in rows:
        for task, expert in row["experts"].items():
            yield {
                **{name: row[name] for name in shared if name in row},
                "task": task,
                "n": expert["n"],
                **{f"eps2_{m}": value for m, value in expert["eps2"].items()},
                **{f"measured_{m}": bool(value) for m, value in expert["above"].items()},
                "eps2_rounding": expert["rounding"],
                **{name: expert[name] for name in ("eps_path", "displacement", "train_accuracy")},
                **{f"gap_{name}": found[task] for name, found in row["gaps"].items()},
            }


def exponents(rows: Sequence[Row]) -> str:
    """Return a table of measured exponents of eps, of one and of many replaced samples."""
    experts = list(flat(rows))
    numbers = sorted(next(iter(rows[0]["experts"].values()))["eps2"], key=int)
    lines = [
        "| factor | regime | m | eps grows as | source | | ours (closed form) | "
        "| eps_path grows as |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for factor, (name, held) in FACTORS.items():
        source = PREDICTIONS[name]["eps_path"].source
        for place, regime in enumerate(("below one epoch", "beyond")):
            chosen = [e for e in experts if (epochs(e) > 1.05) == bool(place)]
            for m in numbers:
                kept = [e for e in chosen if e[f"measured_{m}"] and e[f"eps2_{m}"] > 0]
                found = exponent(kept, factor, held, lambda e, m=m: math.sqrt(e[f"eps2_{m}"]))
                if found is None:
                    continue
                beside = exponent(kept, factor, held, lambda e: e["eps_path"])
                ours = exponent(kept, factor, held, _closed_form)
                cells = [name, regime, m, _told(found)]
                cells += [predicted(source[place]), verdict(*found, source[place])]
                cells += [f"{ours[0]:.2f}", verdict(*found, ours[0])] if ours else ["", ""]
                lines.append(f"| {' | '.join([*cells, _told(beside)])} |")
    return "\n".join(lines)


def _closed_form(expert: Row) -> float:
    """Return what eps_path would be at a constant rate without warm-up, as the noise stays."""
    return eps_at_constant_noise({**expert, "schedule": "constant", "warmup_steps": 0})


def plots(rows: Sequence[Row]) -> list[Plot]:
    """Return curves over the steps, one for each rate at the commonest batch and share of images.

    Medians over the tasks of eps, of the rounding twin's distance and of the path estimate, and the
    merge's gap beyond the base's.
    """
    experts = list(flat(rows))
    least = min((name for name in experts[0] if name.startswith("measured_")), key=_number)
    eps2 = least.replace("measured", "eps2")
    middle = [statistics.mode(e[name] for e in experts) for name in ("batch", "train_share")]
    kept = [e for e in experts if [e["batch"], e["train_share"]] == middle]
    drawn: dict[str, Callable[[Row], float]] = {
        "Distance of a twin, one sample replaced": lambda e: math.sqrt(e[eps2]),
        "Distance of the rounding twin": lambda e: math.sqrt(e["eps2_rounding"]),
        "Path estimate": lambda e: float(e["eps_path"]),
        "Gap of the merge beyond the base's": lambda e: float(e["gap_merged"] - e["gap_base"]),
    }
    return [
        Plot(
            title,
            "steps K",
            {
                f"{rate:g}": [
                    (steps, statistics.median(map(value, at)))
                    for (steps,), at in sorted(grouped(each, "steps").items())
                ]
                for (rate,), each in sorted(grouped(kept, "lr").items())
            },
            log="Gap" not in title,
        )
        for title, value in drawn.items()
    ]


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def exponent(
    experts: Sequence[Row], factor: str, held: Sequence[str], value: Any
) -> tuple[float, tuple[float, float] | None] | None:
    """Return the mean slope over tasks with its interval; None where the factor does not vary.

    Every task counts alike, one with a single pair of experts as much as one with twelve: the
    interval over tasks, not the mean's weights, says how sure the slope is.
    """
    slopes = []
    for each in grouped(experts, "task").values():
        across, up = [], []
        for same in grouped(each, *held).values():
            x, y = (np.log([of(e) for e in same]) for of in (lambda e: e[factor], value))
            across += list(x - x.mean())
            up += list(y - y.mean())
        spread = float(np.dot(across, across))
        if spread > 1e-9:
            slopes.append(float(np.dot(across, up)) / spread)
    if not slopes:
        return None
    mean = statistics.fmean(slopes)
    if len(slopes) < 2:
        return mean, None
    half = student_half_width(slopes)
    return mean, (mean - half, mean + half)


def _told(found: tuple[float, tuple[float, float] | None] | None) -> str:
    if found is None:
        return ""
    slope, bounds = found
    return f"{slope:.2f}" + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")
