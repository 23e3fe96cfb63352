"""ZipIt against the paper's matrices and a literal greedy search, REPAIR against its equation."""

import numpy as np
import pytest
import torch

from mergekit_lit.core.experts import Experts
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging import merge
from mergekit_lit.merging.methods.matching import correlations, group_units
from mergekit_lit.merging.methods.zipping import zipped

MLP = {
    "0.weight": TensorInfo("linear", 0, "0", ("hidden", None)),
    "0.bias": TensorInfo("linear", 0, "0", ("hidden",)),
    "1.weight": TensorInfo("linear", 1, "1", (None, "hidden")),
}


def reference_groups(similarity, models, alpha, beta):
    """Merge the most similar pair until n groups are left, by lists and loops."""
    units = len(similarity) // models
    groups = [[i] for i in range(len(similarity))]
    close = {(i, j): similarity[i, j] for i in range(len(groups)) for j in range(i)}
    close = {frozenset(pair): value for pair, value in close.items()}
    budget = [int(beta * units)] * models

    def owners(g):
        return {i // units for i in groups[g]}

    def allowed(pair):
        both = set().union(*(owners(g) for g in pair))
        return len(both) > 1 or budget[both.pop()] > 0

    alive = set(range(len(groups)))
    while len(alive) > units:
        pairs = [frozenset((i, j)) for i in alive for j in alive if j < i]
        best = max((p for p in pairs if allowed(p)), key=lambda p: close[p])
        kept, gone = sorted(best)
        joint = owners(kept) | owners(gone)
        if len(joint) == 1:
            budget[next(iter(joint))] -= 1
        groups[kept] += groups[gone]
        alive.discard(gone)
        for g in alive - {kept}:
            value = min(close[frozenset((kept, g))], close[frozenset((gone, g))])
            close[frozenset((kept, g))] = value * (alpha if owners(g) & joint and value > 0 else 1)
    found = np.empty(len(similarity), dtype=int)
    for number, g in enumerate(sorted(alive)):
        found[groups[g]] = number
    return found.reshape(models, units)


@pytest.mark.parametrize("models", [2, 3])
def test_groups_are_those_of_the_literal_search(models):
    for seed in range(6):
        draw = np.random.default_rng(seed)
        rows = draw.standard_normal((50, 4)) @ draw.standard_normal((4, 5 * models))
        rows += 0.3 * draw.standard_normal(rows.shape)
        similarity = np.corrcoef(rows.T)
        for alpha, beta in ((0.1, 0.0), (0.3, 0.0), (0.3, 0.4), (1.0, 1.0)):
            found = group_units(torch.from_numpy(similarity), models, alpha=alpha, beta=beta)
            np.testing.assert_array_equal(
                found.numpy(), reference_groups(similarity, models, alpha, beta)
            )
            assert sorted(set(found.flatten().tolist())) == list(range(5))
        alone = group_units(torch.from_numpy(abs(similarity)), models, alpha=0.0, beta=0.0)
        if models == 2:
            assert all(sorted(row.tolist()) == list(range(5)) for row in alone)


def test_correlations_are_numpys_and_0_where_nothing_varies():
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:, 2] = 7.1
    found = correlations(torch.tensor(40.0), rows.sum(dim=0), rows.T @ rows)
    varying = [0, 1, 3, 4]
    expected = np.corrcoef(rows[:, varying].T)
    np.testing.assert_allclose(found[varying][:, varying].numpy(), expected, atol=1e-12)
    assert not found[2].any()


def test_weights_are_merged_and_read_by_the_papers_matrices():
    """W = M_out W_blocks U_in, with M the mean over each group and U its pseudo-inverse."""
    draw = np.random.default_rng(0)
    shapes = {"0.weight": (4, 3), "0.bias": (4,), "1.weight": (2, 4)}
    nets = [{n: draw.standard_normal(s) for n, s in shapes.items()} for _ in range(2)]
    group = torch.tensor([[0, 1, 2, 2], [1, 0, 3, 0]])
    merge_matrix = np.zeros((4, 8))
    for unit, g in enumerate(group.flatten()):
        merge_matrix[g, unit] = 1
    merge_matrix /= merge_matrix.sum(axis=1, keepdims=True)
    read = np.linalg.pinv(merge_matrix)
    expected = {
        "0.weight": merge_matrix @ np.vstack([net["0.weight"] for net in nets]),
        "0.bias": merge_matrix @ np.concatenate([net["0.bias"] for net in nets]),
        "1.weight": np.hstack([net["1.weight"] for net in nets]) @ read / 2,
    }
    tuned = [{n: torch.from_numpy(a) for n, a in net.items()} for net in nets]
    experts = Experts(
        base=tuned[0], tuned=tuned, structure=MLP, cards=[], heads=[{}, {}], names=["a", "b"]
    )
    merged = merge(zipped(experts, {"hidden": group}), "average")
    for name, array in expected.items():
        np.testing.assert_allclose(merged.shared[name].numpy(), array, atol=1e-12)
