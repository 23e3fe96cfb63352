"""Terms along a training are those of the bound, from what the path tells."""

import pytest
import torch

from mergekit_lit.callbacks import BoundTerms, GradientNoise, GradientNorm, PathLength


def test_terms_are_those_of_the_path(tiny, fit):
    path, meter = PathLength(), GradientNoise(every=1)
    rows = fit(
        tiny(),
        path,
        meter,
        BoundTerms(coefficient=0.25, smoothness=0.01),
        max_steps=6,
    )
    last = rows[-1]
    assert last["bound/a_eff"] == pytest.approx(0.25 * last["path/travel"])
    drift = last["bound/a_eff"] * 0.01**2 / 2 * last["path/mean_squared_displacement"]
    assert last["bound/drift"] == pytest.approx(drift)
    facts = path.facts()
    # The mean over the steps, as the card has it, not the last estimate.
    trace = meter.card_facts()["gradient_noise"]
    assert abs(trace - last["noise/trace"]) > 1e-3 * trace
    noise = 0.01 * 0.25**2 * facts["travel_squared"] * trace / 8
    assert last["bound/merged_noise"] == pytest.approx(noise)
    assert last["bound/delta2_by_path"] == pytest.approx(0.25**2 * last["path/eps"] ** 2)
    assert rows[0]["bound/a_eff"] < last["bound/a_eff"]


def test_without_smoothness_its_terms_are_left_out(tiny, fit):
    rows = fit(tiny(), PathLength(), BoundTerms(), max_steps=2)
    assert {name for name in rows[-1] if name.startswith("bound/")} == {"bound/a_eff"}


def test_an_adaptive_optimizer_has_no_travel(tiny, fit):
    module = tiny(lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    rows = fit(module, PathLength(), GradientNoise(every=1), BoundTerms(smoothness=1.0))
    assert not [name for name in rows[-1] if name.startswith("bound/")]


def test_what_stands_in_for_an_adaptive_optimizer_s_travel_is_called_effective(tiny, fit):
    module = tiny(lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    norm, path = GradientNorm(), PathLength()
    last = fit(module, path, norm, BoundTerms(smoothness=2.0), max_steps=6)[-1]
    travel = path.facts()["path_length"] / norm.card_facts()["gradient_norm"]
    assert last["bound/effective_a_eff"] == pytest.approx(travel)
    drift = travel * 2.0 * path.facts()["mean_squared_displacement"]
    assert last["bound/effective_drift"] == pytest.approx(drift)
    assert not [name for name in last if name.startswith("bound/") and "effective" not in name]


def test_clipped_gradients_make_terms_effective(tiny, fit):
    rows = fit(tiny(), PathLength(), BoundTerms(), max_steps=2, gradient_clip_val=0.5)
    assert {name for name in rows[-1] if name.startswith("bound/")} == {"bound/effective_a_eff"}


def test_bad_input_is_one_line(tiny, fit):
    with pytest.raises(ValueError, match="`coefficient` must be positive, but is 0"):
        BoundTerms(coefficient=0)
    with pytest.raises(ValueError, match="`smoothness` must be positive, but is -1"):
        BoundTerms(smoothness=-1)
    with pytest.raises(ValueError, match="needs a PathLength among"):
        fit(tiny(), BoundTerms(), max_steps=1)
