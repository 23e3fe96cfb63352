"""The bound: its terms by hand, and what they must do."""

import dataclasses
import math

import pytest
import torch

from mergekit_lit.theory import bound as module
from mergekit_lit.theory.bound import TOTAL
from mergekit_lit.theory.coefficients import Block
from mergekit_lit.theory.facts import ALL, ExpertFacts, MergeFacts

EXPERT = ExpertFacts(
    travel=0.2,
    travel_squared=0.004,
    plain_sgd=(0.02, 10),
    d2=0.5,
    batch=8,
    noise=3.0,
    zeta2=0.7,
    eps2=0.01,
    eps2_head=0.002,
    base_loss=2.0,
    slope=-0.4,
    train_loss=1.5,
    lr=0.02,
)
MERGE = MergeFacts(
    smoothness=1.25,
    gram={ALL: ()},
    merged_gradient2=0.3,
    sample_gradient2=4.0,
    step2={ALL: 0.6},
)


def bound(experts, merge, coefficients):
    """The bound; the gradients of `MERGE` are one of squared norm 0.9 for all tasks."""
    if merge.gram == MERGE.gram:
        same = [[0.9] * len(experts)] * len(experts)
        merge = dataclasses.replace(merge, gram={ALL: same})
    return module.bound(experts, merge, coefficients)


def test_progress_gains_nothing_where_no_gain_is_proved():
    def progress(smoothness):
        merge = dataclasses.replace(MERGE, smoothness=smoothness)
        return bound([EXPERT, EXPERT], merge, [0.5, 0.5]).terms["progress"]

    edge = 0.5 / EXPERT.travel
    assert progress(0.99 * edge).value < EXPERT.base_loss
    assert progress(1.01 * edge).value == EXPERT.base_loss
    assert "without a gain" in progress(1e6).note


def test_a_step_that_is_too_long_pays_for_its_length():
    """f = x^2 / 2 from x0 = 1, one step of 3: the loss at -2 is 2, and no bound may lie below."""
    facts = dataclasses.replace(
        EXPERT,
        travel=3.0,
        travel_squared=9.0,
        batch=1,
        noise=0.0,
        d2=0.0,
        eps2=0.0,
        eps2_head=0.0,
        base_loss=0.5,
        train_loss=2.0,
        slope=-3.0,
    )
    merge = MergeFacts(smoothness=1.0, gram={ALL: [[1.0]]}, sample_gradient2=4.0, step2={ALL: 9.0})
    found = module.bound([facts], merge, [1.0])
    assert found.terms["overshoot"].value == pytest.approx((1 - 1 / 3) / 2 * 9)
    assert found.total >= 2.0
    assert found.total_by_step == pytest.approx(2.0)
    short = module.bound([facts], dataclasses.replace(merge, smoothness=0.3), [1.0])
    assert short.terms["overshoot"].value == 0.0
    # Half of it is left if the block that goes too far is half of the step.
    blocks = [Block("low", (1.0,), (0.5,)), Block("high", (0.1,), (0.5,))]
    parts = {"low": 4.5, "high": 0.045}
    grams = {name: [[0.5]] for name in parts}
    cut = dataclasses.replace(merge, gram=grams, step2=parts)
    by_block = module.bound([facts], cut, blocks)
    assert by_block.terms["overshoot"].value == pytest.approx((1 - 1 / 3) / 2 * 4.5)
    whole = dataclasses.replace(cut, step2={ALL: 9.0})
    assert module.bound([facts], whole, blocks).terms["overshoot"].value is None


def test_coefficients_below_0_have_no_terms_of_the_path():
    for coefficients in ([-0.5, -0.5], [-0.5, 1.5]):
        found = bound([EXPERT, EXPERT], MERGE, coefficients)
        for name in ("progress", "drift", "divergence"):
            assert found.terms[name].value is None
        assert found.total is None
        assert found.weighing.tv_w is not None


def test_a_merge_that_is_no_sum_has_no_total_by_the_path():
    merge = dataclasses.replace(MERGE, linear=False, delta2_of_merge=0.01)
    found = bound([EXPERT, EXPERT], merge, [0.5, 0.5])
    assert found.total is None
    # The formulas would give the plain average's.
    for name in ("progress", "drift", "merged_noise", "divergence", "delta2_by_path"):
        assert found.terms[name].value is None
        assert found.terms[name].note == "the merge is no sum of scaled deltas"
    assert {row["drift"] for row in found.by_task} == {None}
    assert {row["merged_noise"] for row in found.by_task} == {None}
    assert found.weighing.a_eff is found.weighing.chi2_w is found.weighing.chi2_lambda is None
    assert "A_eff" not in " ".join(found.violated)
    assert found.total_by_step == pytest.approx(
        found.terms["descent"].value + found.terms["generalization"].value
    )


@pytest.mark.parametrize("travel", [EXPERT.travel, None])
def test_a_merge_that_is_the_base_costs_its_loss_alone(travel):
    still = dataclasses.replace(EXPERT, travel=travel, slope=0.0, eps2_head=0.0)
    merge = dataclasses.replace(MERGE, step2={ALL: 0.0})
    found = bound([still, still], merge, [0.0, 0.0])
    for name in (*(n for n in TOTAL if n != "progress"), "delta2"):
        assert found.terms[name].value == 0.0, name
    assert found.total == found.total_by_step == pytest.approx(EXPERT.base_loss)
    assert found.weighing.chi2_w == 0.0
    assert "All coefficients are 0" in " ".join(found.violated)
    assert "All coefficients" not in " ".join(bound([EXPERT] * 2, MERGE, [0.5, 0.5]).violated)


def test_a_closed_form_is_not_below_0():
    odd = dataclasses.replace(EXPERT, zeta2=-30.0, noise=-1.0)
    term = bound([odd, odd], MERGE, [0.5, 0.5]).terms["drift_closed_form"]
    assert (term.value, term.provenance) == (0.0, "closed form")
    assert "below 0" in term.note


def test_equal_blocks_keep_the_closed_form():
    parts = [Block("low", (0.5, 0.5), (0.25, 0.5)), Block("high", (0.5, 0.5), (0.75, 0.5))]
    grams = {name: [[0.45, 0.45]] * 2 for name in ("low", "high")}
    cut = dataclasses.replace(MERGE, gram=grams, step2={"low": 0.2, "high": 0.4})
    one = bound([EXPERT] * 2, MERGE, [0.5, 0.5]).terms["drift_closed_form"].value
    assert module.bound([EXPERT] * 2, cut, parts).terms["drift_closed_form"].value == one
    other = [parts[0], dataclasses.replace(parts[1], coefficients=(0.4, 0.5))]
    assert module.bound([EXPERT] * 2, cut, other).terms["drift_closed_form"].value is None


@pytest.mark.parametrize("drift", [[math.nan, 1.0], [-1.0, 1.0], [math.inf, 1.0]])
def test_a_drift_of_gradients_is_a_mean_square(drift):
    merge = dataclasses.replace(MERGE, gradient_drift=drift)
    with pytest.raises(ValueError, match="`gradient_drift` must be at least 0 and finite"):
        bound([EXPERT] * 2, merge, [0.5, 0.5])


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"clipped": True}, "Gradients of 1 of 2 experts were clipped"),
        ({"trained_head": True}, "The heads of 1 of 2 experts were trained"),
        ({"own_objective": "weight decay 0.1"}, "another loss than the one that is measured: weig"),
    ],
)
def test_what_a_training_had_of_its_own_is_said(changed, sentence):
    found = bound([EXPERT, dataclasses.replace(EXPERT, **changed)], MERGE, [0.5, 0.5])
    assert [line for line in found.violated if sentence in line]
    assert not [
        line for line in bound([EXPERT] * 2, MERGE, [0.5, 0.5]).violated if sentence in line
    ]
    assert found.effective == ("clipped" in changed)


def test_terms_by_hand():
    other = dataclasses.replace(
        EXPERT, travel=0.1, d2=0.2, train_loss=0.5, eps2=0.03, zeta2=0.1, slope=-0.1
    )
    found = bound([EXPERT, other], MERGE, [0.25, 0.75])
    terms = {name: term.value for name, term in found.terms.items()}
    a_eff = 0.25 * 0.2 + 0.75 * 0.1
    w = [0.25 * 0.2 / a_eff, 0.75 * 0.1 / a_eff]
    assert terms["progress"] == pytest.approx(2.0 - a_eff / 4 * 0.9)
    d2 = w[0] * 0.5 + w[1] * 0.2
    assert terms["drift"] == pytest.approx(a_eff * 1.25**2 / 2 * d2)
    zeta = w[0] * 0.7 + w[1] * 0.1
    noise = 2 * 0.02**2 * 9 * 3.0 / 8
    apart = [16 / 3 * s**2 * (2 * z + 2 * zeta) for s, z in ((0.2, 0.7), (0.1, 0.1))]
    closed = a_eff * 1.25**2 / 2 * (noise + w[0] * apart[0] + w[1] * apart[1])
    assert terms["drift_closed_form"] == pytest.approx(closed)
    assert found.terms["drift_closed_form"].provenance == "closed form"
    assert terms["merged_noise"] == pytest.approx(1.25 * (0.25**2 + 0.75**2) * 0.004 * 3 / 8)
    assert terms["merged_gradient"] == 0.3
    assert terms["overshoot"] == 0.0
    # By the tasks' weights p, not by the shares w.
    assert terms["descent"] == pytest.approx(2.0 - (0.4 + 0.1) / 2 + 1.25 / 2 * 0.6)
    for name in ("drift", "merged_noise", "delta2"):
        assert sum(row[name] for row in found.by_task) == pytest.approx(terms[name])
    assert sum(row["descent"] for row in found.by_task) / 2 == pytest.approx(terms["descent"])
    assert found.total_by_step == pytest.approx(terms["descent"] + terms["generalization"])
    mean = w[0] * 1.5 + w[1] * 0.5
    variance = w[0] * (1.5 - mean) ** 2 + w[1] * (0.5 - mean) ** 2
    chi2 = sum((0.5 - share) ** 2 / share for share in w)
    assert terms["divergence"] == pytest.approx(math.sqrt(chi2 * variance))
    delta2 = 0.5 * (0.25**2 * 0.01 + 0.002) + 0.5 * (0.75**2 * 0.03 + 0.002)
    assert terms["delta2"] == pytest.approx(delta2)
    by_loss = math.sqrt(2 * 1.25 * 1.0 * delta2) + 1.25 * delta2 / 2
    by_gradient = 2 * math.sqrt(delta2) + 1.25 * delta2 / 2
    assert terms["generalization_by_loss"] == pytest.approx(by_loss)
    assert terms["generalization_by_gradient"] == pytest.approx(by_gradient)
    assert terms["generalization"] == pytest.approx(min(by_loss, by_gradient))
    assert found.total == pytest.approx(sum(terms[name] for name in TOTAL))


def test_a_total_needs_each_of_its_terms_and_says_what_is_missing():
    for name in ("smoothness", "gram"):
        found = bound([EXPERT] * 2, dataclasses.replace(MERGE, **{name: None}), [0.5, 0.5])
        assert found.total is None
    for name in ("base_loss", "d2", "noise", "eps2"):
        found = bound([dataclasses.replace(EXPERT, **{name: None})] * 2, MERGE, [0.5, 0.5])
        assert found.total is None
    assert found.terms["delta2"].note == "needs eps^2"
    assert found.terms["generalization"].provenance == "unknown"
    assert found.terms["drift"].value is not None


def test_cards_alone_give_the_closed_forms():
    cards = [ExpertFacts(travel=s, lr=0.01) for s in (1.0, 2.0)]
    found = bound(cards, MergeFacts(), [0.5, 0.5])
    assert found.weighing.chi2_w == pytest.approx(
        1 / 9 * 0.25 / (1 / 3) + 1 / 36 / (2 / 3) - 0, abs=1
    )
    known = [name for name, term in found.terms.items() if term.value is not None]
    assert known == ["mismatch"]
    assert found.total is None


def test_the_closed_form_is_vacuous_where_it_is_not_proved():
    far = dataclasses.replace(EXPERT, travel=10.0)
    term = bound([far] * 2, MERGE, [0.5, 0.5]).terms["drift_closed_form"]
    assert (term.value, term.provenance) == (None, "vacuous")
    assert "eta K L = 12.5" in term.note


@pytest.mark.parametrize(
    ("name", "larger"),
    [
        ("d2", "drift"),
        ("zeta2", "drift_closed_form"),
        ("noise", "merged_noise"),
        ("noise", "drift_closed_form"),
        ("travel_squared", "merged_noise"),
        ("eps2", "generalization"),
        ("eps2_head", "generalization"),
        ("train_loss", "generalization_by_loss"),
    ],
)
def test_terms_grow_with_their_constants(name, larger):
    before = bound([EXPERT] * 3, MERGE, [1 / 3] * 3)
    more = dataclasses.replace(EXPERT, **{name: getattr(EXPERT, name) * 1.3})
    after = bound([more] * 3, MERGE, [1 / 3] * 3)
    assert after.terms[larger].value > before.terms[larger].value


@pytest.mark.parametrize("larger", ["drift", "merged_noise", "generalization"])
def test_terms_grow_with_the_smoothness(larger):
    rough = dataclasses.replace(MERGE, smoothness=1.4)
    before, after = (bound([EXPERT] * 2, m, [0.5, 0.5]) for m in (MERGE, rough))
    assert after.terms[larger].value > before.terms[larger].value


def test_terms_are_zero_where_they_must_be():
    still = dataclasses.replace(EXPERT, d2=0.0, noise=0.0, eps2=0.0, eps2_head=0.0)
    terms = bound([still] * 2, MERGE, [0.5, 0.5]).terms
    for name in ("drift", "merged_noise", "divergence", "delta2", "generalization"):
        assert terms[name].value == 0


def test_averaging_more_experts_lowers_noise_and_delta():
    few, many = (bound([EXPERT] * n, MERGE, [1 / n] * n) for n in (2, 8))
    assert many.terms["merged_noise"].value == pytest.approx(few.terms["merged_noise"].value / 4)
    backbone = dataclasses.replace(EXPERT, eps2_head=0.0)
    few, many = (bound([backbone] * n, MERGE, [1 / n] * n) for n in (2, 8))
    assert many.terms["delta2"].value == pytest.approx(few.terms["delta2"].value / 16)


def test_a_merge_that_is_not_linear_takes_its_own_stability():
    linear = dataclasses.replace(MERGE, linear=False)
    found = bound([EXPERT] * 2, linear, [0.5, 0.5])
    assert found.terms["delta2"].provenance == "unknown"
    measured = dataclasses.replace(linear, delta2_of_merge=0.04)
    assert bound([EXPERT] * 2, measured, [0.5, 0.5]).terms["delta2"].value == pytest.approx(0.042)


def test_coefficients_that_images_gave_need_the_refits():
    found = dataclasses.replace(MERGE, looks_at="images")
    told = bound([EXPERT] * 2, found, [0.5, 0.5])
    assert told.terms["delta2"].note == "needs Delta_M^2 of refits"
    for linear in (True, False):
        measured = dataclasses.replace(found, delta2_of_merge=0.04, linear=linear)
        told = bound([EXPERT] * 2, measured, [0.5, 0.5])
        assert told.terms["delta2"].value == pytest.approx(0.042)
        assert "found on images" in " ".join(told.violated)
        for name in ("delta2", "delta2_by_refits"):
            assert "through the experts alone" in told.terms[name].note


def test_refits_of_coefficients_from_cards_keep_the_cards():
    found = dataclasses.replace(MERGE, looks_at="cards", delta2_of_merge=0.04)
    told = bound([EXPERT] * 2, found, [0.5, 0.5])
    assert told.terms["delta2_by_refits"].note.endswith("refits see the same cards")
    assert "images" not in " ".join(told.violated)
    assert told.terms["delta2"].note == ""


def test_statistics_from_training_images_are_outside_the_theory():
    for again in (False, True):
        told = bound([EXPERT] * 2, dataclasses.replace(MERGE, recalibrated=again), [0.5, 0.5])
        assert ("BatchNorm statistics" in " ".join(told.violated)) == again


def test_twins_within_reach_of_the_rounding_tell_nothing():
    lost = dataclasses.replace(EXPERT, eps2=None, chaotic=True)
    for merge in (MERGE, dataclasses.replace(MERGE, linear=False, delta2_of_merge=0.04)):
        told = bound([EXPERT, lost], merge, [0.5, 0.5])
        for name in ("delta2", "delta2_by_refits"):
            assert told.terms[name].value is None
            assert "further off than the rounding twin" in told.terms[name].note
        assert "1 of 2 experts" in " ".join(told.violated)


def test_twins_without_a_rounding_twin_are_said_to_be_unchecked():
    alone = dataclasses.replace(EXPERT, unchecked=True)
    for linear in (True, False):
        merge = dataclasses.replace(MERGE, linear=linear, delta2_of_merge=0.04)
        for experts, said in (([EXPERT, alone], True), ([EXPERT, EXPERT], False)):
            told = bound(experts, merge, [0.5, 0.5])
            for name in ("delta2", "delta2_by_refits"):
                note = told.terms[name].note
                assert ("no rounding twin: of 1 of 2 experts" in note) == said


def test_gradients_along_the_path_replace_the_smoothness():
    facts = dataclasses.replace(MERGE, smoothness=None, gradient_drift=[0.2, 0.4])
    found = bound([EXPERT] * 2, facts, [0.5, 0.5])
    assert found.terms["drift"].value == pytest.approx(0.2 / 2 * 0.3)
    assert found.terms["drift"].note == "by gradients"


def test_broken_assumptions_are_said():
    steep = dataclasses.replace(MERGE, smoothness=150.0)
    found = bound([dataclasses.replace(EXPERT, adaptive=True)] * 2, steep, [0.5, 0.7])
    text = " ".join(found.violated)
    for part in ("sum to 1.2", "eta L = 3 exceeds 2", "exceeds 0.306", "exceeds 0.5", "adaptive"):
        assert part in text
    assert found.effective
    assert bound([EXPERT] * 2, MERGE, [0.5, 0.5]).violated == ()


@pytest.mark.parametrize(
    ("expert", "merge", "message"),
    [
        ({"eps2": -1.0}, {}, "`eps2` must be at least 0 and finite"),
        ({"train_loss": math.nan}, {}, "`train_loss` must be at least 0 and finite"),
        ({}, {"smoothness": math.inf}, "`smoothness` must be at least 0 and finite"),
        ({"noise": math.nan}, {}, "`noise` must be finite"),
        ({"slope": math.inf}, {}, "`slope` must be finite"),
        ({"batch": 0}, {}, "`batch` must be at least 1 and finite"),
        ({}, {"gram": {ALL: [[math.nan] * 2] * 2}}, "Products of gradients must be finite"),
        ({}, {"step2": {ALL: -1.0}}, "squared lengths of steps at least 0"),
    ],
)
def test_constants_out_of_range_are_refused(expert, merge, message):
    facts = dataclasses.replace(EXPERT, **expert)
    with pytest.raises(ValueError, match=message):
        bound([facts] * 2, dataclasses.replace(MERGE, **merge), [0.5, 0.5])


OTHER = dataclasses.replace(EXPERT, travel=0.1, d2=0.2, train_loss=0.5, base_loss=1.0, eps2=0.03)
GRAM = {"low": [[0.9, 0.2], [0.2, 0.6]], "high": [[0.3, 0.1], [0.1, 0.2]]}
PARTS = {"low": (0.3, 0.8), "high": (0.7, 0.2)}


def by_block(low, high, gram=GRAM):
    """The bound of two experts whose coefficients are `low` in one block and `high` in another."""
    rows = {"low": low, "high": high}
    blocks = [Block(name, row, PARTS[name]) for name, row in rows.items()]
    facts = dataclasses.replace(MERGE, gram=gram, step2={"low": 0.2, "high": 0.4})
    return bound([EXPERT, OTHER], facts, blocks)


def test_equal_coefficients_in_every_block_give_the_global_terms():
    both = [
        [sum(pair) for pair in zip(*rows, strict=True)] for rows in zip(*GRAM.values(), strict=True)
    ]
    one = bound([EXPERT, OTHER], dataclasses.replace(MERGE, gram={ALL: both}), [0.3, 0.7])
    many = by_block((0.3, 0.7), (0.3, 0.7))
    assert many.terms["mismatch"].value == 0
    for name in set(one.terms) - {"drift_closed_form", "delta2_by_refits", "delta2_by_path"}:
        assert many.terms[name].value == pytest.approx(one.terms[name].value, rel=1e-12)
    assert many.total == pytest.approx(one.total, rel=1e-12)


def test_cutting_a_block_in_two_changes_nothing():
    whole = by_block((0.2, 0.3), (0.5, 0.4))
    rows = [
        Block("low", (0.2, 0.3), PARTS["low"]),
        Block("left", (0.5, 0.4), (0.5, 0.05)),
        Block("right", (0.5, 0.4), (0.2, 0.15)),
    ]
    half = [[entry / 2 for entry in row] for row in GRAM["high"]]
    gram = {"low": GRAM["low"], "left": half, "right": half}
    cut = bound([EXPERT, OTHER], dataclasses.replace(MERGE, gram=gram), rows)
    for name in TOTAL:
        if name != "mismatch":
            assert cut.terms[name].value == pytest.approx(whole.terms[name].value, rel=1e-12)
    # The sum of the blocks' products of two norms is at most the product of the norms of the sums.
    assert cut.terms["mismatch"].value <= whole.terms["mismatch"].value


def test_blocks_by_hand():
    found = by_block((0.2, 0.3), (0.5, 0.4))
    terms = {name: term.value for name, term in found.terms.items()}
    mean = [0.3 * 0.2 + 0.7 * 0.5, 0.8 * 0.3 + 0.2 * 0.4]
    square = [0.3 * 0.2**2 + 0.7 * 0.5**2, 0.8 * 0.3**2 + 0.2 * 0.4**2]
    a_eff = mean[0] * 0.2 + mean[1] * 0.1
    assert found.weighing.a_eff == pytest.approx(a_eff)
    drift = 1.25**2 / 2 * (0.2 * mean[0] * 0.5 + 0.1 * mean[1] * 0.2)
    assert terms["drift"] == pytest.approx(drift)
    assert terms["merged_noise"] == pytest.approx(1.25 * sum(square) * 0.004 * 3 / 8)
    w = torch.tensor([mean[0] * 0.2 / a_eff, mean[1] * 0.1 / a_eff], dtype=torch.float64)
    slope, apart = 0.0, 0.0
    for name, row in (("low", (0.2, 0.3)), ("high", (0.5, 0.4))):
        gram = torch.tensor(GRAM[name], dtype=torch.float64)
        far = row[0] * 0.2 + row[1] * 0.1
        own = torch.tensor([row[0] * 0.2 / far, row[1] * 0.1 / far], dtype=torch.float64)
        slope += far * float(w @ gram @ w)
        off = float((own - w) @ gram @ (own - w)) ** 0.5
        inside = (
            1.25
            * sum(o * m * d for o, m, d in zip(own, PARTS[name], (0.5, 0.2), strict=True)) ** 0.5
        )
        apart += far / 2 * (2 * inside * off + off**2)
    assert terms["progress"] == pytest.approx(float(2.0 * w[0] + w[1]) - slope / 4)
    assert terms["mismatch"] == pytest.approx(apart)


@pytest.mark.parametrize("name", ["drift", "merged_noise", "delta2"])
def test_terms_grow_with_every_coefficient_and_stay_below_their_limits(name):
    before = by_block((0.2, 0.3), (0.5, 0.4))
    for low, high in (((0.25, 0.3), (0.5, 0.4)), ((0.2, 0.3), (0.5, 0.45))):
        assert by_block(low, high).terms[name].value > before.terms[name].value
    limit = bound([EXPERT, OTHER], MERGE, before.weighing.largest).terms[name].value
    assert before.terms[name].value < limit
    assert f"at most {limit:.3g}" in before.terms[name].note


def test_a_block_that_stays_at_the_base_costs_nothing_and_gains_nothing():
    found = by_block((0.0, 0.0), (0.5, 0.5))
    assert found.weighing.blocks["low"].a_eff == 0
    assert found.weighing.coefficients == pytest.approx((0.35, 0.1))
    assert found.total is not None


def test_blocks_say_what_they_lack():
    assert by_block((0.2, 0.3), (0.5, 0.4), gram=None).terms["mismatch"].provenance == "unknown"
    assert by_block((-0.2, 0.3), (0.5, 0.4)).total is None
    text = " ".join(by_block((0.5, 0.5), (0.9, 0.9)).violated)
    assert "sum to 1.8" in text
    with pytest.raises(ValueError, match="must sum to 1, but sum to"):
        bound([EXPERT], MERGE, [Block("low", (0.5,), (0.4,))])
