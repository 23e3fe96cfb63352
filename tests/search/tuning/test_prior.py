"""What is believed of merges: alike ones, those of a table, and those that were scored."""

import json

import numpy as np
import pytest
from scipy.stats import norm

from mergekit_lit.search.tuning import prior as priors
from mergekit_lit.search.tuning.beliefs import improvement, posterior
from mergekit_lit.search.tuning.places import Lengths, likeness, places_of
from mergekit_lit.search.tuning.pool import Candidate
from mergekit_lit.search.tuning.prior import Prior, alike_of, measured_of, prior_of

LENGTHS = Lengths(length=0.3, rest=0.5, policy=0.4, across=0.6, words=0.8)
FACTS = {"experts": 4.0, "log_relative_norm": -1.5, "group_cosine": 0.1}
SCALES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2)
POOL = [
    *(Candidate("task_arithmetic", {"scale": scale}, "recalibrate-per-task") for scale in SCALES),
    *(Candidate("ties", {"scale": s, "density": d}, "base") for s in SCALES for d in (0.1, 0.5)),
    Candidate("average", {}, "average"),
    Candidate("ties", {"trim": "tensor"}, "base"),
]


def row(group, merge, method, config, accuracy, **more):
    keys = {"backbone": "vit", "suite": "s", "group": group, "merge": merge, "task": "a"}
    of_merge = {"method": method, "config": json.dumps(config), "test_accuracy": accuracy}
    return {**keys, **of_merge, **FACTS, **more}


def rows_of(group, level=0.5, best=0.5):
    """A group whose accuracies peak at one scale of task arithmetic."""
    first = row(group, 0, "average", {}, level)
    return [
        first,
        *(
            row(group, 1 + i, "task_arithmetic", {"scale": s}, level + 0.05 - (s - best) ** 2)
            for i, s in enumerate(SCALES)
        ),
    ]


def test_likeness_is_a_kernel_and_falls_with_distance():
    places = places_of(POOL)
    like = likeness(places, places, lengths=LENGTHS)
    assert np.diag(like) == pytest.approx(1.0)
    assert like == pytest.approx(like.T)
    assert np.linalg.eigvalsh(like).min() > -1e-10
    arithmetic = like[0, : len(SCALES)]
    assert list(arithmetic) == sorted(arithmetic, reverse=True)
    # Of different methods what is left is `across`, times what lengths and policies leave.
    s, t = np.sqrt(0.05 / 1.5), np.sqrt(0.05 / 3.0)
    shape = np.exp(-0.5 * ((s - t) / 0.3) ** 2) * np.exp(-0.5 * (1 / 0.4) ** 2)
    assert like[0, len(SCALES)] == pytest.approx(0.6 * shape)


def test_blocks_of_likeness_agree_with_the_whole():
    whole = likeness(places_of(POOL), places_of(POOL), lengths=LENGTHS)
    block = likeness(places_of(POOL[:3]), places_of(POOL[5:]), lengths=LENGTHS)
    assert block == pytest.approx(whole[:3, 5:])


def test_without_statistics_policies_are_alike():
    both = [Candidate("ties", {}, policy) for policy in ("base", "recalibrate-per-task")]
    places = places_of(both, statistics=False)
    assert likeness(places, places, lengths=LENGTHS) == pytest.approx(1.0)


def test_the_prior_is_the_process_conditioned_on_the_table():
    measured = measured_of([*rows_of("g"), *rows_of("h", level=0.8, best=0.2)])
    prior = prior_of(POOL, FACTS, measured)
    # The same by the inverse of the whole covariance: its pool block is the inverse of the
    # conditional covariance.
    places = places_of(POOL)
    n, m = len(POOL), len(measured.value)
    cross = likeness(places, measured.places, lengths=priors._LENGTHS)
    near = np.exp(-0.5 * ((alike_of(FACTS)[None] - measured.alike) ** 2).sum(axis=1))
    whole = np.zeros((n + m, n + m))
    whole[:n, :n] = prior_of(POOL, FACTS).covariance
    whole[:n, n:] = cross * (priors._ALL**2 + priors._ALIKE**2 * near)
    whole[n:, :n] = whole[:n, n:].T
    whole[n:, n:] = priors._among(measured)
    precision = np.linalg.inv(whole)
    covariance = np.linalg.inv(precision[:n, :n])
    residual = measured.value - priors._mean(measured.places)
    mean = priors._mean(places) - covariance @ precision[:n, n:] @ residual
    assert prior.covariance == pytest.approx(covariance, rel=1e-4, abs=1e-8)
    assert prior.mean == pytest.approx(mean, rel=1e-4, abs=1e-6)


def test_a_table_tells_which_scales_are_good_and_its_level_does_not_count():
    def best(first, second):
        mean = prior_of(POOL, FACTS, measured_of([*first, *second])).mean
        return SCALES[int(mean[: len(SCALES)].argmax())]

    assert best(rows_of("g", best=0.2), rows_of("h", best=0.2)) == 0.2
    assert best(rows_of("g", best=0.8), rows_of("h", best=0.8)) == 0.8
    low, high = (measured_of(rows_of("g", level=level)) for level in (0.3, 0.9))
    assert prior_of(POOL, FACTS, low).mean == pytest.approx(prior_of(POOL, FACTS, high).mean)


def test_values_of_a_table_are_means_over_tasks_less_the_average_and_not_below_the_floor():
    rows = [
        row("g", 0, "average", {}, 0.5),
        row("g", 0, "average", {}, 0.7, task="b"),
        row("g", 1, "ties", {"scale": 0.5}, 0.6),
        row("g", 1, "ties", {"scale": 0.5}, 0.8, task="b"),
        row("g", 2, "ties", {"scale": 3.0}, 0.1),
        row("h", 1, "ties", {"scale": 3.0}, 0.1),
        row("g", 3, "somebody_elses", {}, 0.1),
    ]
    assert measured_of(rows).value == pytest.approx([0.0, 0.1, -priors.FLOOR])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "column 'backbone'"),
        ([{"backbone": "vit"}], "column 'suite'"),
        ([{k: v for k, v in rows_of("g")[0].items() if k != "experts"}], "column 'experts'"),
        (rows_of("g")[1:], "include the average, but none does"),
    ],
)
def test_a_table_that_tells_nothing_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        measured_of(rows)


def test_the_posterior_goes_through_what_was_seen_and_doubts_what_is_noisy():
    prior = prior_of(POOL, FACTS)
    values = np.array([0.0, 0.04])
    mean, deviation = posterior(prior, [0, 4], values, np.array([1e-12, 1e-12]))
    assert mean[[0, 4]] == pytest.approx(values, abs=1e-6)
    assert deviation[[0, 4]] == pytest.approx(0.0, abs=1e-5)
    doubted, wider = posterior(prior, [0, 4], values, np.array([1e-12, 0.05**2]))
    assert 0 < doubted[4] < mean[4]
    assert wider[4] > deviation[4]


def test_the_posterior_of_two_by_hand():
    prior = Prior(np.array([0.1, 0.2]), np.array([[2.0, 1.0], [1.0, 3.0]]))
    mean, deviation = posterior(prior, [0], np.array([1.1]), np.array([0.5]))
    assert mean == pytest.approx([0.1 + 2 / 2.5, 0.2 + 1 / 2.5])
    assert deviation**2 == pytest.approx([2 - 4 / 2.5, 3 - 1 / 2.5])


def test_the_expected_improvement_is_the_mean_of_the_gains():
    mean, deviation = np.array([0.0, 0.3, 0.1]), np.array([0.5, 0.1, 0.0])
    draws = norm.ppf((np.arange(20000) + 0.5) / 20000)
    expected = np.maximum(mean[:, None] + deviation[:, None] * draws - 0.2, 0).mean(axis=1)
    assert improvement(mean, deviation, 0.2) == pytest.approx(expected, abs=1e-5)
