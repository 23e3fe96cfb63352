"""What no predictor of merges could tell, from accuracies whose noise is known."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def script(experiment):
    return experiment("prediction_limits")


def merges_of(task, *, groups, noise, seed=0):
    draw = np.random.default_rng(seed)
    for group in range(groups):
        level = draw.normal(0.6, 0.03)
        for method, step in (("average", 0), ("ties", 0.05), ("dare", -0.05)):
            yield {
                "task": task,
                "group": str(group),
                "method": method,
                "test_accuracy": level + step + draw.normal(0, noise),
                "probe_val_accuracy": level + draw.normal(0, 2 * noise),
            }


def test_noise_is_what_validation_images_do_not_share(script):
    tasks = [list(merges_of(t, groups=400, noise=0.02, seed=t)) for t in range(4)]
    assert script.noise_of(tasks) == pytest.approx(0.02, rel=0.15)


def test_variance_lies_between_groups_and_between_methods(script):
    groups, methods = script.shares(list(merges_of(0, groups=400, noise=0.0)))
    between = 0.03**2 / (0.03**2 + 0.05**2 * 2 / 3)
    assert groups == pytest.approx(between, abs=0.05)
    assert groups + methods == pytest.approx(1)


def test_noise_bounds_the_rank_that_can_be_reached(script):
    draw = np.random.default_rng(0)
    truth = draw.normal(0, 0.05, 800)
    ranks = [script.best_rank(truth + draw.normal(0, noise, 800), noise) for noise in (0.002, 0.05)]
    assert ranks[0] > 0.97
    # Of normal values as noisy as they differ: 6 / pi asin(1 / 2 sqrt 2).
    assert ranks[1] == pytest.approx(6 / np.pi * np.arcsin(0.5**1.5), abs=0.06)
