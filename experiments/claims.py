"""This file is what theory predicts of exponents, and whether a measured one agrees.

It is a module of `experiments/hyperparameters_report.py`, which says what is measured how.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

Prediction: TypeAlias = float | tuple[float, float] | str | None
"""An exponent, a range of exponents, a sign (`+`, `-`), `CLOSED`, or nothing."""

CLOSED = "closed form"
"""The exponent that the formula has over the same grid if the gradient noise stays as it is."""

TOLERANCE = 0.25
"""How far a predicted exponent may lie from a measured one that it agrees with."""


@dataclass(frozen=True)
class Predicted:
    """What is predicted below one epoch and beyond it: by the source, and by our reconstruction."""

    source: tuple[Prediction, Prediction] = (None, None)
    ours: tuple[Prediction, Prediction] = (None, None)


def both(value: Prediction) -> tuple[Prediction, Prediction]:
    """Return the same prediction below one epoch and beyond."""
    return value, value


# The source's summary has stability grow quadratically with the rate and linearly with the batch,
# and does not say whether of eps or of eps^2, as on-average stability often is: hence the ranges.
PREDICTIONS: Mapping[str, Mapping[str, Predicted]] = {
    "learning rate": {
        "test loss": Predicted(both("+"), (None, "+")),
        "train loss": Predicted(ours=(None, "+")),
        "gap": Predicted(both("+"), both("+")),
        "eps_path": Predicted(both((1.0, 2.0)), both(1.0)),
        "displacement": Predicted(ours=both(1.0)),
        "drift": Predicted(ours=both(3.0)),
        "merged noise": Predicted(ours=both(2.0)),
        "generalization_path": Predicted(both("+"), both(1.0)),
        "merged gradient": Predicted(),
    },
    "batch": {
        "test loss": Predicted(both("-"), both("-")),
        "gap": Predicted(both("+"), ("-", None)),
        "eps_path": Predicted(both((0.5, 1.0)), both(CLOSED)),
        "displacement": Predicted(),
        "drift": Predicted(ours=both("-")),
        "merged noise": Predicted(ours=both(-1.0)),
        "merged gradient": Predicted(both("-")),
    },
    "effective steps": {
        "train loss": Predicted(),
        "test loss": Predicted(),
        "gap": Predicted(both("+"), both("+")),
        "eps_path": Predicted(both("+"), both(CLOSED)),
        "displacement": Predicted(ours=both((0.5, 1.0))),
        "drift": Predicted(ours=both((2.0, 3.0))),
        "merged noise": Predicted(ours=both(CLOSED)),
        "generalization_path": Predicted(both("+"), both(CLOSED)),
        "merged gradient": Predicted(both("-")),
    },
    "training images": {
        "test loss": Predicted(both("-"), both("-")),
        # The heads are fitted on these images too: the base's own loss falls with their number.
        "test loss beyond the base's": Predicted(both("-"), both("-")),
        "gap": Predicted(both("-"), both("-")),
        "eps_path": Predicted(both("-"), both(CLOSED)),
        "generalization_path": Predicted(both("-"), both(CLOSED)),
    },
    # Groups of other sizes hold other tasks: only differences to their own experts compare.
    "tasks": {
        "train loss over experts": Predicted(both("+"), both("+")),
        "test loss over experts": Predicted(both("+"), both("+")),
        "gap": Predicted(ours=both("-")),
    },
}


def predicted(prediction: Prediction) -> str:
    """Return a prediction as tables tell it; nothing where there is none."""
    if prediction is None:
        return ""
    if isinstance(prediction, tuple):
        return f"{prediction[0]:g} to {prediction[1]:g}"
    return prediction if isinstance(prediction, str) else f"{prediction:g}"


def verdict(slope: float, bounds: tuple[float, float] | None, prediction: Prediction) -> str:
    """Return whether a measured slope agrees with a prediction: `agree`, `disagree`, `undecided`.

    A sign is undecided while the interval holds 0. An exponent agrees if the predicted one lies in
    the interval, which is at most 1 wide, or within `TOLERANCE` of the slope; it disagrees if it is
    further than that from the whole interval.
    """
    if prediction is None:
        return ""
    if bounds is None:
        return "undecided"
    low, high = bounds
    if isinstance(prediction, str):
        if low <= 0 <= high:
            return "undecided"
        return "agree" if (slope > 0) == (prediction == "+") else "disagree"
    least, most = prediction if isinstance(prediction, tuple) else (prediction, prediction)
    if low - TOLERANCE > most or high + TOLERANCE < least:
        return "disagree"
    inside = low <= most and high >= least
    near = least - TOLERANCE <= slope <= most + TOLERANCE
    return "agree" if (inside or near) and high - low <= 1 else "undecided"
