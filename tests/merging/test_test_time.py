"""AdaMerging and surgery: gradients, entropy and distances on models that one can see through."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mergekit_lit.core.adapters import adapted
from mergekit_lit.core.calibration import Batch, Calibration
from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import load_merged, save_merged
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging import merge
from mergekit_lit.merging.methods.surgery import fitted
from mergekit_lit.merging.methods.test_time import (
    Combination,
    Draws,
    descend,
    mean_entropy,
    trimmed_and_agreed,
)
from mergekit_lit.models.capture import network


class Unlabelled:
    """The inputs of one task; its labels must never be asked for."""

    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return len(self.inputs)

    def take(self, positions):
        return Batch(self.inputs[positions], None)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def family(tasks=3):
    """Return experts of a small network with BatchNorm, and images of each task."""
    module = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4)).double()
    base = {
        name: 0.5 * randn(*tensor.shape, seed=i) if name[-1] == "t" and name[0] != "1" else tensor
        for i, (name, tensor) in enumerate(module.state_dict().items())
    }
    statistics = ("1.running_mean", "1.running_var")
    structure = {name: TensorInfo("linear", 0, "b") for name in base}
    structure |= {name: TensorInfo("statistic", 0, "b") for name in statistics}
    structure["1.num_batches_tracked"] = TensorInfo("counter", 0, "b")
    tuned = [
        {
            name: tensor + 0.4 * randn(*tensor.shape, seed=31 * t + i)
            if structure[name].kind == "linear"
            else tensor
            for i, (name, tensor) in enumerate(base.items())
        }
        for t in range(tasks)
    ]
    names = [f"t{t}" for t in range(tasks)]
    experts = Experts(
        base=base,
        tuned=tuned,
        structure=structure,
        cards=[Card(task=name) for name in names],
        heads=[{"weight": randn(3, 4, seed=80 + t), "bias": torch.zeros(3)} for t in range(tasks)],
        names=names,
    )
    heads = {name: head["weight"] for name, head in zip(names, experts.heads, strict=True)}
    calibration = Calibration(
        split="test-unlabelled",
        samples={name: Unlabelled(randn(40, 5, seed=60 + t)) for t, name in enumerate(names)},
        expert=network(module),
        merged=network(module, batch_statistics=True),
        logits=lambda task, features: features @ heads[task].T,
    )
    return experts, calibration


def entropy_of(calibration, batches, params):
    features = calibration.merged_features(params, batches)
    return sum(mean_entropy(calibration.logits(task, features[task])) for task in batches)


@pytest.mark.parametrize("rows", [1, "layers"])
@pytest.mark.parametrize("pooled", [False, True])
def test_the_gradient_is_autograds_through_the_sum_of_deltas(rows, pooled):
    experts, calibration = family()
    calibration = replace(calibration, pooled=pooled)
    batches = Draws(calibration, experts.names, 16, 0).next()
    deltas = {name: experts.deltas(name) for name in experts.merged_names()}
    count = len(deltas) if rows == "layers" else rows
    coefficients = 0.3 + 0.1 * randn(count, 3, seed=5)

    tracked = coefficients.clone().requires_grad_()
    whole = {
        name: experts.base[name] + torch.einsum("t,t...->...", row, deltas[name])
        for name, row in zip(deltas, tracked.expand(len(deltas), -1), strict=True)
    }
    loss = entropy_of(calibration, batches, {**experts.base, **whole})
    (expected,) = torch.autograd.grad(loss, tracked)

    combination = Combination(experts.base, deltas)
    moving = combination.at(coefficients)
    loss = entropy_of(calibration, batches, {**experts.base, **moving})
    gradients = torch.autograd.grad(loss, list(moving.values()), allow_unused=True)
    torch.testing.assert_close(combination.pull(gradients, coefficients), expected)


def test_descent_is_adams_and_stays_in_the_interval():
    deltas = {"w": torch.tensor([[1.0], [-1.0]], dtype=torch.float64)}
    combination = Combination({"w": torch.zeros(1, dtype=torch.float64)}, deltas)
    start = torch.full((1, 2), 0.5, dtype=torch.float64)
    learned, course = descend(combination, start, lambda p: -p["w"].sum(), steps=3, lr=0.1)
    # A constant gradient moves Adam by its learning rate, up for one delta and down for the other.
    torch.testing.assert_close(learned, torch.tensor([[0.8, 0.2]], dtype=torch.float64))
    assert course == pytest.approx([0.0, -0.2, -0.4])
    far, _ = descend(combination, start, lambda p: -p["w"].sum(), steps=9, lr=0.1)
    assert far.tolist() == [[1.0, 0.0]]
    assert start.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_the_entropy_falls_and_the_coefficients_are_told(granularity):
    experts, calibration = family()
    config = {"granularity": granularity, "steps": 40, "lr": 0.02, "batch": 40}
    merged = merge(experts, "adamerging", config=config, calibration=calibration)
    before, after = merged.facts["entropy"]
    assert after < before - 0.01
    row, rows = merged.facts["coefficients"], merged.facts["coefficients_by_tensor"]
    assert (row is None, rows is None) == (granularity == "layer", granularity == "task")
    learned = rows or dict.fromkeys(experts.merged_names(), row)
    assert list(learned) == experts.merged_names()
    for name, row in learned.items():
        assert all(0 <= value <= 1 for value in row)
        step = torch.einsum("t,t...->...", torch.tensor(row).double(), experts.deltas(name))
        torch.testing.assert_close(merged.shared[name], experts.base[name] + step)


def test_no_steps_is_task_arithmetic_and_the_batches_follow_the_seed():
    experts, calibration = family()
    still = merge(experts, "adamerging", config={"steps": 0}, calibration=calibration)
    plain = merge(experts, "task_arithmetic", config={"scale": 0.3})
    for name, tensor in plain.shared.items():
        torch.testing.assert_close(still.shared[name], tensor)
    config = {"steps": 3, "lr": 0.1, "batch": 5}
    one, other = (
        merge(experts, "adamerging", config=config, calibration=calibration, seed=seed)
        for seed in (0, 1)
    )
    name = "coefficients_by_tensor"
    assert one.facts[name] != other.facts[name]


def test_plus_plus_combines_what_ties_keeps():
    experts, _ = family()
    deltas = {name: experts.deltas(name) for name in experts.merged_names()}
    agreed = trimmed_and_agreed(deltas, density=0.3)
    merged = merge(experts, "ties", config={"density": 0.3, "combine": "sum"})
    for name, of_each in agreed.items():
        torch.testing.assert_close(experts.base[name] + of_each.sum(0), merged.shared[name])


def test_surgery_brings_features_to_the_experts():
    experts, calibration = family()
    config = {"merged_by": "average", "steps": 300, "lr": 0.02, "rank": 3}
    merged = merge(experts, "surgery", config=config, calibration=calibration)
    plain = merge(experts, "average")
    assert all(torch.equal(t, plain.shared[n]) for n, t in merged.shared.items())
    batches = {
        name: samples.take(torch.arange(40)) for name, samples in calibration.samples.items()
    }
    found = calibration.merged_features(merged.shared, batches)
    for t, name in enumerate(experts.names):
        assert merged.adapters[name]["down"].shape == (3, 4)
        target = calibration.expert.features(experts.tuned[t], batches[name].inputs)
        corrected = adapted(merged.adapters[name], found[name])
        assert (corrected - target).abs().mean() < 0.9 * (found[name] - target).abs().mean()
    assert merged.facts["merged_by"] == {"method": "average", "config": {}}
    assert merged.facts["method"] == "surgery"


def test_an_adapter_starts_as_the_identity_and_learns_a_constant_shift():
    z = randn(50, 4).abs() + 1
    none = fitted(z, z - 1, rank=2, steps=0, lr=0.1, batch=9, draw=torch.Generator())
    assert torch.equal(adapted(none, z), z)
    settings = {"rank": 8, "steps": 400, "lr": 0.02, "batch": 50}
    some = fitted(z, z - 1, **settings, draw=torch.Generator().manual_seed(0))
    assert float((adapted(some, z) - (z - 1)).abs().mean()) < 0.25
    assert torch.equal(adapted({}, z), z)


def test_adapters_are_read_as_they_were_written(tmp_path):
    experts, calibration = family()
    merged = merge(experts, "surgery", config={"steps": 3}, calibration=calibration)
    save_merged(tmp_path / "m.safetensors", merged)
    read = load_merged(tmp_path / "m.safetensors")
    assert set(read.adapters) == set(experts.names)
    for name, adapter in merged.adapters.items():
        assert all(torch.equal(read.adapters[name][part], t) for part, t in adapter.items())


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("adamerging", {"steps": -1}, "`steps` must be at least 0, but is -1"),
        ("adamerging", {"lr": 0.0}, "`lr` must be above 0, but is 0.0"),
        ("adamerging", {"batch": 0}, "`batch` must be at least 1, but is 0"),
        ("adamerging", {"start": 1.5}, r"`start` must lie in \[0, 1\], but is 1.5"),
        ("surgery", {"rank": 0}, "`rank` must be at least 1, but is 0"),
        ("surgery", {"merged_by": "emr"}, "one model for all tasks, but 'emr' gives each its own"),
        ("surgery", {"merged_by": "regmean"}, "'regmean' looks at train images"),
    ],
)
def test_values_out_of_range(method, config, message):
    experts, calibration = family(2)
    with pytest.raises(ValueError, match=message):
        merge(experts, method, config=config, calibration=calibration)
