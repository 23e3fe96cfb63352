"""Methods that use moments against NumPy, written from their papers, on models of known answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mergekit_lit.core.calibration import Batch, Calibration
from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging import merge
from mergekit_lit.merging.methods.curvature import conjugate_gradients
from mergekit_lit.merging.methods.regression import solve
from mergekit_lit.models.capture import network

CLASSES = 3


class Rows:
    """Labelled inputs of one task."""

    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return len(self.inputs)

    def take(self, positions):
        return Batch(self.inputs[positions], positions % CLASSES)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experts_of(module, kinds, tasks=3, size=0.3):
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tuned = []
    for t in range(tasks):
        moved = {}
        for i, (name, tensor) in enumerate(base.items()):
            still = not tensor.is_floating_point() or kinds[name][0] == "statistic"
            moved[name] = tensor if still else tensor + size * randn(*tensor.shape, seed=9 * t + i)
        tuned.append(moved)
    names = [f"t{t}" for t in range(tasks)]
    return Experts(
        base=base,
        tuned=tuned,
        structure={
            name: TensorInfo(kind, depth, f"b{depth}") for name, (kind, depth) in kinds.items()
        },
        cards=[Card(task=name) for name in names],
        heads=[{} for _ in names],
        names=names,
    )


def calibration_of(module, experts, inputs, heads=None):
    identity = {name: torch.eye(0) for name in experts.names}
    heads = heads or identity
    return Calibration(
        split="train",
        samples={name: Rows(x) for name, x in zip(experts.names, inputs, strict=True)},
        expert=network(module),
        merged=network(module),
        logits=lambda task, features: features @ heads[task].T if heads[task].numel() else features,
    )


def linear_model(tasks=3):
    """Return experts of one linear layer whose outputs are the logits, and images of each."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # labels that are drawn come near the expectation, how near varies
        module = nn.Linear(4, CLASSES).double()
    experts = experts_of(module, {"weight": ("linear", 0), "bias": ("linear", 0)}, tasks)
    inputs = [randn(30, 4, seed=50 + t) @ randn(4, 4, seed=70 + t) for t in range(tasks)]
    return module, experts, inputs


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def reference_fisher(experts, inputs):
    """Linear-softmax: grad_W log p(y|x) = (1_y - p) x^T, so F = E sum_y p_y (1_y - p)^2 x^2."""
    top, bottom = 0.0, 0.0
    for tuned, x in zip(experts.tuned, [x.numpy() for x in inputs], strict=True):
        w, b = tuned["weight"].numpy(), tuned["bias"].numpy()
        p = softmax(x @ w.T + b)
        # sum_y p_y ((c == y) - p_c)^2 = p_c (1 - p_c)
        variance = p * (1 - p)
        fisher = np.einsum("ic,ij->cj", variance, x**2) / len(x) + 1e-6
        top, bottom = top + fisher * w, bottom + fisher
    return top / bottom


def test_fisher_of_a_linear_softmax_is_its_closed_form():
    module, experts, inputs = linear_model()
    calibration = calibration_of(module, experts, inputs)
    config = {"labels": "enumerated"}
    found = merge(experts, "fisher", config=config, calibration=calibration).shared["weight"]
    np.testing.assert_allclose(found.numpy(), reference_fisher(experts, inputs), rtol=1e-9)


def test_sampled_labels_approach_the_enumerated():
    module, experts, inputs = linear_model(2)
    many = [x.repeat(60, 1) for x in inputs]
    calibration = calibration_of(module, experts, many)
    found = merge(experts, "fisher", config={"samples": 1800}, calibration=calibration)
    np.testing.assert_allclose(
        found.shared["weight"].numpy(), reference_fisher(experts, inputs), atol=0.02
    )
    other = merge(experts, "fisher", config={"samples": 1800}, calibration=calibration, seed=1)
    assert not torch.equal(other.shared["weight"], found.shared["weight"])


def test_true_labels_give_the_empirical_fisher():
    module, experts, inputs = linear_model()
    calibration = calibration_of(module, experts, inputs)
    found = merge(experts, "fisher", config={"labels": "true"}, calibration=calibration)
    top, bottom = 0.0, 0.0
    for tuned, x in zip(experts.tuned, inputs, strict=True):
        b = tuned["bias"].numpy()
        p = softmax(x.numpy() @ tuned["weight"].numpy().T + b)
        y = np.eye(CLASSES)[np.arange(len(x)) % CLASSES]
        fisher = ((y - p) ** 2).mean(0) + 1e-6
        top, bottom = top + fisher * b, bottom + fisher
    np.testing.assert_allclose(found.shared["bias"].numpy(), top / bottom, rtol=1e-9)


def test_equal_norms_let_a_sure_expert_count_for_no_less():
    module, experts, inputs = linear_model(2)
    sure = {name: 20 * tensor for name, tensor in experts.tuned[0].items()}
    experts = replace(experts, tuned=[sure, experts.tuned[1]])
    calibration = calibration_of(module, experts, inputs)
    distances = []
    for equal in (False, True):
        config = {"labels": "enumerated", "equal_norms": equal, "floor": 1e-12}
        merged = merge(experts, "fisher", config=config, calibration=calibration).shared
        distances.append(float((merged["weight"] - sure["weight"]).norm()))
    assert distances[1] < distances[0]


def reference_regmean(deltas, grams, off_diagonal):
    shrunk = [off_diagonal * g + (1 - off_diagonal) * np.diag(np.diag(g)) for g in grams]
    top = sum(d @ g for d, g in zip(deltas, shrunk, strict=True))
    return top @ np.linalg.inv(sum(shrunk))


@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("method", ["regmean", "regmean_plus_plus"])
def test_regmean_of_one_layer_equals_its_paper(method, off_diagonal):
    module, experts, inputs = linear_model()
    calibration = calibration_of(module, experts, inputs)
    config = {"off_diagonal": off_diagonal, "ridge": 1e-12}
    found = merge(experts, method, config=config, calibration=calibration).shared
    weights = [tuned["weight"].numpy() for tuned in experts.tuned]
    grams = [(x.T @ x / len(x)).numpy() for x in inputs]
    expected = reference_regmean(weights, grams, off_diagonal)
    np.testing.assert_allclose(found["weight"].numpy(), expected, rtol=1e-8, atol=1e-10)
    mean = sum(tuned["bias"] for tuned in experts.tuned) / 3
    torch.testing.assert_close(found["bias"], mean)


def test_regmean_gives_each_expert_the_directions_that_it_alone_sees():
    """Experts whose inputs span complementary spaces are both recovered exactly there."""
    module, experts, _ = linear_model(2)
    span = torch.linalg.qr(randn(4, 4, seed=3)).Q
    inputs = [randn(20, 2, seed=t) @ span[:, 2 * t : 2 * t + 2].T for t in range(2)]
    calibration = calibration_of(module, experts, inputs)
    config = {"off_diagonal": 1.0, "ridge": 1e-12}
    found = merge(experts, "regmean", config=config, calibration=calibration).shared["weight"]
    for tuned, x in zip(experts.tuned, inputs, strict=True):
        torch.testing.assert_close(x @ found.T, x @ tuned["weight"].T, rtol=1e-6, atol=1e-8)


def test_inputs_that_are_always_zero_leave_the_average():
    module, experts, inputs = linear_model()
    for x in inputs:
        x[:, 2] = 0
    calibration = calibration_of(module, experts, inputs)
    found = merge(experts, "regmean", calibration=calibration).shared["weight"]
    mean = sum(tuned["weight"] for tuned in experts.tuned) / 3
    torch.testing.assert_close(found[:, 2], mean[:, 2])


class SmallConvolutional(nn.Module):
    """A grouped convolution, BatchNorm, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.out(self.norm(self.conv(x)).relu().mean((2, 3)))


KINDS = {
    "conv.weight": ("convolution", 0),
    "norm.weight": ("norm", 0),
    "norm.bias": ("norm", 0),
    "norm.running_mean": ("statistic", 0),
    "norm.running_var": ("statistic", 0),
    "norm.num_batches_tracked": ("counter", 0),
    "out.weight": ("linear", 1),
    "out.bias": ("linear", 1),
}


def convolutional():
    module = SmallConvolutional().double()
    experts = experts_of(module, KINDS)
    inputs = [randn(12, 4, 5, 5, seed=20 + t) * (1 + t) for t in range(3)]
    return module, experts, inputs


def patches(x):
    """Return the 3 x 3 patches of padded images, group by group: rows (2, r, 2 * 9)."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows = [
        [
            padded[i, c : c + 2, a : a + 3, b : b + 3].ravel()
            for i in range(len(x))
            for a in range(5)
            for b in range(5)
        ]
        for c in (0, 2)
    ]
    return np.array(rows)


def test_regmean_of_a_grouped_convolution_is_a_regression_on_patches():
    module, experts, inputs = convolutional()
    calibration = calibration_of(module, experts, inputs)
    config = {"off_diagonal": 0.9, "ridge": 1e-12}
    found = merge(experts, "regmean", config=config, calibration=calibration)
    assert found.facts["solved_layers"] == 2
    for group in range(2):
        weights = [
            t["conv.weight"].numpy()[3 * group : 3 * group + 3].reshape(3, -1)
            for t in experts.tuned
        ]
        grams = []
        for x in inputs:
            rows = patches(x.numpy())[group]
            grams.append(rows.T @ rows / len(rows))
        expected = reference_regmean(weights, grams, 0.9)
        merged = found.shared["conv.weight"].numpy()[3 * group : 3 * group + 3].reshape(3, -1)
        np.testing.assert_allclose(merged, expected, rtol=1e-7, atol=1e-9)


def test_regmean_plus_plus_looks_through_the_merged_blocks_below():
    """The second layer's inputs are those of the merged first one, not of each expert's."""
    module, experts, inputs = convolutional()
    calibration = calibration_of(module, experts, inputs)
    config = {"off_diagonal": 1.0, "ridge": 1e-12}
    found = merge(experts, "regmean_plus_plus", config=config, calibration=calibration).shared
    below = {name: found[name] for name, (_, depth) in KINDS.items() if depth == 0}
    plain = merge(experts, "regmean", config=config, calibration=calibration).shared
    for name in below:
        torch.testing.assert_close(below[name], plain[name])
    weights, grams = [], []
    for tuned, x in zip(experts.tuned, inputs, strict=True):
        with torch.no_grad():
            _, layers = calibration.expert.capture({**tuned, **below}, x, ["out.weight"])
        rows = layers["out.weight"].input_rows()[0].numpy()
        grams.append(rows.T @ rows / len(rows))
        weights.append(tuned["out.weight"].numpy())
    expected = reference_regmean(weights, grams, 1.0)
    np.testing.assert_allclose(found["out.weight"].numpy(), expected, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(found["out.weight"], plain["out.weight"])


def reference_mats(weights, lefts, rights):
    """Solve (sum_t A_t (x) B_t) vec W = sum_t vec(A_t W_t B_t), row-major vec."""
    system = sum(np.kron(a, b) for a, b in zip(lefts, rights, strict=True))
    target = sum((a @ w @ b).ravel() for a, w, b in zip(lefts, weights, rights, strict=True))
    return np.linalg.solve(system, target).reshape(weights[0].shape)


def random_gram(size, seed):
    root = randn(2 * size, size, seed=seed)
    return root.T @ root / size


def test_conjugate_gradients_solve_the_sum_of_kronecker_products():
    weights = [randn(4, 5, seed=t) for t in range(3)]
    lefts = [random_gram(4, 10 + t) for t in range(3)]
    rights = [random_gram(5, 20 + t) for t in range(3)]
    target = sum(a @ w @ b for a, w, b in zip(lefts, weights, rights, strict=True))
    blocks = [(a[None], b[None]) for a, b in zip(lefts, rights, strict=True)]
    found = conjugate_gradients(blocks, target[None], iterations=200)[0]
    expected = reference_mats(*([x.numpy() for x in group] for group in (weights, lefts, rights)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-9)


def test_mats_is_regmean_where_all_outputs_matter_alike():
    weights = [randn(4, 5, seed=t) for t in range(3)]
    rights = [random_gram(5, 20 + t) for t in range(3)]
    identity = torch.eye(4, dtype=torch.float64)[None]
    target = sum(w @ b for w, b in zip(weights, rights, strict=True))
    found = conjugate_gradients([(identity, b[None]) for b in rights], target[None], iterations=99)
    plain = solve(sum(rights)[None], target[None], ridge=1e-14)
    torch.testing.assert_close(found, plain, rtol=1e-7, atol=1e-9)


def test_mats_of_a_linear_softmax_has_its_blocks_in_closed_form():
    """With sampled labels A_t is close to E[diag(p) - p p^T], and the merge to the exact one."""
    module, experts, inputs = linear_model(2)
    inputs = [x.repeat(100, 1) for x in inputs]
    heads = {name: torch.eye(CLASSES, dtype=torch.float64) for name in experts.names}
    calibration = calibration_of(module, experts, inputs, heads)
    found = merge(experts, "mats", config={"samples": 3000}, calibration=calibration).shared
    weights, lefts, rights = [], [], []
    for tuned, x in zip(experts.tuned, [x.numpy() for x in inputs], strict=True):
        w = tuned["weight"].numpy()
        p = softmax(x @ w.T + tuned["bias"].numpy())
        lefts.append((np.einsum("ic,cd->cd", p, np.eye(CLASSES)) - p.T @ p) / len(x))
        rights.append(x.T @ x / len(x))
        weights.append(w)
    # Adding to all logits changes nothing: the solution is unique up to that direction.
    system = sum(np.kron(a, b) for a, b in zip(lefts, rights, strict=True))
    target = sum((a @ w @ b).ravel() for a, w, b in zip(lefts, weights, rights, strict=True))
    expected = np.linalg.lstsq(system, target, rcond=1e-9)[0].reshape(CLASSES, -1)
    centred = found["weight"].numpy() - found["weight"].numpy().mean(0)
    np.testing.assert_allclose(centred, expected - expected.mean(0), atol=0.05)


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("fisher", {"floor": 0}, "`floor` must be above 0, but is 0"),
        ("fisher", {"samples": 0}, "`samples` must be at least 1, but is 0"),
        ("regmean", {"ridge": 0.0}, "`ridge` must be above 0, but is 0.0"),
        ("regmean", {"off_diagonal": 1.5}, r"`off_diagonal` must lie in \[0, 1\], but is 1.5"),
        ("regmean_plus_plus", {"ridge": -1}, "`ridge` must be above 0, but is -1"),
        ("mats", {"iterations": 0}, "`iterations` must be at least 1, but is 0"),
    ],
)
def test_values_out_of_range(method, config, message):
    module, experts, inputs = linear_model()
    with pytest.raises(ValueError, match=message):
        merge(experts, method, config=config, calibration=calibration_of(module, experts, inputs))
