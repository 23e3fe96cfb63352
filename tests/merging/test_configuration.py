"""Configuration: types, unknown names and what messages say."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import pytest

from mergekit_lit.core.registry import Registry
from mergekit_lit.merging.configuration import accepts, in_words, parameter_help, resolve


def sample(
    experts: object,
    *,
    density: float,
    rank: int = 2,
    mode: Literal["sum", "mean"] = "sum",
    exact: bool = False,
    weights: list[float] | None = None,
) -> None:
    """Do nothing.

    Args:
        experts: the experts.
        density: share kept, in (0, 1]:
            smaller keeps less.
        rank: rank kept.
        mode: how
            they are joined.

    Returns:
        Nothing: never.
    """


METHODS: Registry[Any] = Registry("merge method", "mergekit_lit.nothing")
METHODS.add(form="linear")(sample)
SAMPLE = METHODS.get("sample")


def test_defaults_are_filled_in():
    assert resolve(SAMPLE, {"density": 0.2, "mode": "mean"}) == {
        "density": 0.2,
        "rank": 2,
        "mode": "mean",
        "exact": False,
        "weights": None,
    }


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, ValueError, "`density` of 'sample' must be given, but is not."),
        (
            {"densty": 0.1},
            KeyError,
            "No parameter of 'sample' named 'densty'. Did you mean 'density'? "
            "Known: density, exact, mode, rank, weights.",
        ),
        (
            {"density": math.nan},
            TypeError,
            "`density` of 'sample' must be a finite number, but is nan.",
        ),
        (
            {"density": "x"},
            TypeError,
            "`density` of 'sample' must be a finite number, but is 'x'.",
        ),
        (
            {"density": 1, "rank": 1.5},
            TypeError,
            "`rank` of 'sample' must be a whole number, but is 1.5.",
        ),
        (
            {"density": 1, "mode": "max"},
            TypeError,
            "`mode` of 'sample' must be one of 'sum', 'mean', but is 'max'.",
        ),
        (
            {"density": 1, "exact": 1},
            TypeError,
            "`exact` of 'sample' must be true or false, but is 1.",
        ),
        (
            {"density": 1, "weights": [1, None]},
            TypeError,
            "`weights` of 'sample' must be a list (each item a finite number) or null, but is "
            "[1, None].",
        ),
    ],
)
def test_bad_configuration_gets_one_line(config, error, message):
    with pytest.raises(error) as caught:
        resolve(SAMPLE, config)
    assert caught.value.args[0] == message


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (float, [0, -1, 2.5, 1e300], [True, "1", None, math.inf, -math.inf, math.nan, [1.0]]),
        (int, [0, -3, 10**30], [1.0, True, "1", None]),
        (bool, [True, False], [0, 1, "true"]),
        (str, ["", "a"], [1, None]),
        (float | None, [None, 1.0], [False, math.nan]),
        (list[int], [[], [1, 2], (3,)], [[1.5], 1, "12", [True]]),
        (Sequence[str], [["a"]], ["a", [1]]),
        (Literal[1, "one"], [1, "one"], [True, 1.0, "two"]),
        (dict[str, float], [{}, {"a": 1.0}], [[], 1]),
        (Any, [None, object(), math.nan], []),
    ],
)
def test_accepts(annotation, good, bad):
    assert [value for value in good if not accepts(annotation, value)] == []
    assert [value for value in bad if accepts(annotation, value)] == []
    assert in_words(annotation)


def test_help_is_read_from_the_docstring():
    assert parameter_help(sample) == {
        "experts": "the experts.",
        "density": "share kept, in (0, 1]: smaller keeps less.",
        "rank": "rank kept.",
        "mode": "how they are joined.",
    }
    assert parameter_help(lambda: None) == {}
