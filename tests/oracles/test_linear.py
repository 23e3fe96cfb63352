"""Linear methods against loops in NumPy, written from the papers' equations."""

import numpy as np
import pytest

from mergekit_lit.merging import merge


def arrays(params):
    return {name: tensor.numpy() for name, tensor in params.items()}


def moved(experts) -> list[str]:
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return [name for name in experts.base if not name.endswith(buffers)]


def reference_average(experts):
    """Theta = (1/T) sum_t theta_t."""
    tuned = [arrays(params) for params in experts.tuned]
    return {name: sum(params[name] for params in tuned) / len(tuned) for name in moved(experts)}


def reference_weighted_average(experts, weights):
    """Theta = sum_t (n_t / n) theta_t."""
    tuned = [arrays(params) for params in experts.tuned]
    total = sum(weights)
    return {
        name: sum(w / total * params[name] for w, params in zip(weights, tuned, strict=True))
        for name in moved(experts)
    }


def reference_task_arithmetic(experts, scale):
    """Theta = theta_0 + lambda sum_t (theta_t - theta_0)."""
    base = arrays(experts.base)
    result = {}
    for name in moved(experts):
        vector = np.zeros_like(base[name])
        for params in experts.tuned:
            vector = vector + (params[name].numpy() - base[name])
        result[name] = base[name] + scale * vector
    return result


def reference_travel_normalised(experts, scale):
    """Theta = theta_0 + scale * sum_t [(1/s_t) / sum_r (1/s_r)] (theta_t - theta_0)."""
    base = arrays(experts.base)
    inverse = [1 / card.travel for card in experts.cards]
    result = {}
    for name in moved(experts):
        vector = np.zeros_like(base[name])
        for t, params in enumerate(experts.tuned):
            share = inverse[t] / sum(inverse)
            vector = vector + share * (params[name].numpy() - base[name])
        result[name] = base[name] + scale * vector
    return result


def reference_metagpt(experts, scale):
    """Theta = theta_0 + scale * sum_t ||tau_t||^2 / (sum_k ||tau_k||^2) tau_t."""
    base = arrays(experts.base)
    taus = [{n: params[n].numpy() - base[n] for n in moved(experts)} for params in experts.tuned]
    squares = [sum((array**2).sum() for array in tau.values()) for tau in taus]
    return {
        name: base[name]
        + scale * sum(q / sum(squares) * tau[name] for q, tau in zip(squares, taus, strict=True))
        for name in moved(experts)
    }


CASES = [
    ("metagpt", {}, reference_metagpt, {"scale": 1.0}),
    ("metagpt", {"scale": 2.5}, reference_metagpt, {"scale": 2.5}),
    ("average", {}, reference_average, {}),
    (
        "weighted_average",
        {"weights": [1, 2, 5]},
        reference_weighted_average,
        {"weights": [1, 2, 5]},
    ),
    ("weighted_average", {}, reference_average, {}),
    ("task_arithmetic", {}, reference_task_arithmetic, {"scale": 0.3}),
    ("task_arithmetic", {"scale": 1.5}, reference_task_arithmetic, {"scale": 1.5}),
    ("travel_normalised", {}, reference_travel_normalised, {"scale": 1.0}),
    ("travel_normalised", {"scale": 2}, reference_travel_normalised, {"scale": 2}),
]


@pytest.mark.parametrize(("method", "config", "reference", "arguments"), CASES)
def test_equals_its_equation(tiny_experts, method, config, reference, arguments):
    merged = arrays(merge(tiny_experts, method, config=config).shared)
    expected = reference(tiny_experts, **arguments)
    for name, array in expected.items():
        np.testing.assert_allclose(merged[name], array, rtol=1e-12, atol=1e-13)
    for name in set(merged) - set(expected):
        np.testing.assert_array_equal(merged[name], tiny_experts.base[name].numpy())
