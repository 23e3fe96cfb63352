"""Weight matching against a search over all permutations, and against its own definition."""

import itertools

import numpy as np
import torch

from mergekit_lit.core.permutations import permute
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging.methods.alignment import match_weights

MLP = {
    "0.weight": TensorInfo("linear", 0, "0", ("first", None)),
    "0.bias": TensorInfo("linear", 0, "0", ("first",)),
    "1.weight": TensorInfo("linear", 1, "1", ("second", "first")),
    "1.bias": TensorInfo("linear", 1, "1", ("second",)),
    "2.weight": TensorInfo("linear", 2, "2", (None, "second")),
}


def mlp(seed, first=5, second=4):
    draw = np.random.default_rng(seed)
    shapes = [(first, 3), (first,), (second, first), (second,), (2, second)]
    return {n: draw.standard_normal(s) for n, s in zip(MLP, shapes, strict=True)}


def tensors(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def moved(b, p, q):
    """The second network with its hidden units in the orders p and q, written out."""
    return {
        "0.weight": b["0.weight"][p],
        "0.bias": b["0.bias"][p],
        "1.weight": b["1.weight"][q][:, p],
        "1.bias": b["1.bias"][q],
        "2.weight": b["2.weight"][:, q],
    }


def overlap(a, b):
    return sum(float((a[name] * b[name]).sum()) for name in a)


def orders(n):
    return [np.array(order) for order in itertools.permutations(range(n))]


def test_one_permutation_is_the_best_of_all():
    """With the second layer's units fixed by size 1, the problem is one linear assignment."""
    for seed in range(5):
        a, b = mlp(seed, second=1), mlp(100 + seed, second=1)
        best = max(orders(5), key=lambda p: overlap(a, moved(b, p, np.array([0]))))
        found = match_weights(tensors(a), tensors(b), MLP)
        np.testing.assert_array_equal(found["first"].numpy(), best)


def test_two_permutations_are_each_the_best_given_the_other():
    exact = 0
    for seed in range(8):
        a, b = mlp(seed), mlp(100 + seed)
        found = match_weights(tensors(a), tensors(b), MLP)
        p, q = found["first"].numpy(), found["second"].numpy()
        reached = overlap(a, moved(b, p, q))
        by_ours = permute(tensors(b), MLP, found)
        assert np.isclose(reached, overlap(a, {n: t.numpy() for n, t in by_ours.items()}))
        assert all(overlap(a, moved(b, other, q)) <= reached + 1e-9 for other in orders(5))
        assert all(overlap(a, moved(b, p, other)) <= reached + 1e-9 for other in orders(4))
        assert reached >= overlap(a, b)
        best = max(overlap(a, moved(b, x, y)) for x in orders(5) for y in orders(4))
        exact += bool(np.isclose(best, reached))
    assert exact >= 2  # a local optimum: not always the best of all
