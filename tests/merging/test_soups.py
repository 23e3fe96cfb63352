"""The greedy soup finds planted soups."""

import pytest
import torch
from torch import nn

from mergekit_lit.core.calibration import Batch, Calibration
from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.merging import merge
from mergekit_lit.models.capture import network

TRUTH = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)


class Signs:
    """Inputs whose class is the sign of a fixed linear map; labels may be withheld."""

    def __init__(self, seed, *, labelled=True):
        draw = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(300, 3, generator=draw, dtype=torch.float64)
        self.labelled = labelled

    def __len__(self):
        return len(self.inputs)

    def take(self, positions):
        x = self.inputs[positions]
        return Batch(x, (x @ TRUTH.T)[:, 0].gt(0).long() if self.labelled else None)


def planted(errors, **options):
    """Return experts of a linear map, each the truth plus an error, and images of their tasks."""
    module = nn.Linear(3, 1, bias=False).double()
    names = [f"t{t}" for t in range(len(errors))]
    experts = Experts(
        base={"weight": torch.zeros(1, 3, dtype=torch.float64)},
        tuned=[{"weight": TRUTH + torch.tensor([error]).double()} for error in errors],
        structure={"weight": TensorInfo("linear", 0, "b")},
        cards=[Card(task=name) for name in names],
        heads=[{} for _ in names],
        names=names,
    )
    calibration = Calibration(
        split="val",
        samples={name: Signs(t, **options) for t, name in enumerate(names)},
        expert=network(module),
        merged=network(module),
        logits=lambda _task, features: torch.cat([-features, features], dim=1),
    )
    return experts, calibration


@pytest.mark.parametrize(
    ("errors", "members"),
    [
        # Two errors that cancel, and a map that is wrong everywhere.
        ([[0.0, 0.6, 0.0], [0.0, -0.6, 0.0], [-3.0, 0.0, 3.0]], {0, 1}),
        # One expert is right; the others pull to one side together.
        ([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0], [0.0, 3.5, 0.0]], {1}),
        # Three errors that sum to zero: each helps.
        ([[0.0, 0.9, 0.0], [0.0, -0.45, 0.0], [0.0, -0.45, 0.0]], None),
    ],
)
def test_planted_soups_are_found(errors, members):
    experts, calibration = planted(errors)
    merged = merge(experts, "greedy_soup", calibration=calibration)
    coefficients = merged.facts["coefficients"]
    chosen = {t for t, value in enumerate(coefficients) if value}
    assert sum(coefficients) == pytest.approx(1)
    assert all(value in (0, 1 / len(chosen)) for value in coefficients)
    if members is not None:
        assert chosen == members
    best = max(_accuracy(experts.tuned[t]["weight"], calibration) for t in range(3))
    assert _accuracy(merged.shared["weight"], calibration) >= best


def test_equal_experts_all_go_in():
    experts, calibration = planted([[0.0, 0.0, 0.0]] * 3)
    merged = merge(experts, "greedy_soup", calibration=calibration)
    assert merged.facts["coefficients"] == pytest.approx([1 / 3] * 3)


def test_images_without_labels_are_refused():
    experts, calibration = planted([[0.0, 0.0, 0.0]] * 2, labelled=False)
    with pytest.raises(ValueError, match="`greedy_soup` needs labels, but the images come without"):
        merge(experts, "greedy_soup", calibration=calibration)


def _accuracy(weight, calibration):
    shares = []
    for samples in calibration.samples.values():
        batch = samples.take(torch.arange(len(samples)))
        shares.append(((batch.inputs @ weight.T)[:, 0].gt(0) == batch.labels).double().mean())
    return float(sum(shares))
