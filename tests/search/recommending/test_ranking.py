"""Ranking and confirming, on merges of a law whose best number of steps is known."""

import math
from types import SimpleNamespace

import pytest

from mergekit_lit.search.recommending import confirming
from mergekit_lit.search.recommending.budget import IN_STEPS, Budget, Shares
from mergekit_lit.search.recommending.confirming import Confirmation, Log
from mergekit_lit.search.recommending.expecting import Share, expected_accuracy
from mergekit_lit.search.recommending.points import Constants, OfExpert, Point, Probed
from mergekit_lit.search.recommending.ranking import Ranking
from mergekit_lit.search.recommending.recommend import asked_steps
from mergekit_lit.search.recommending.site import TaskScore
from mergekit_lit.search.recommending.space import Candidate, Space, Way
from mergekit_lit.theory.travel import step_l1

TASKS = ("a", "b")
SPACE = Space(
    optimizer=["sgd"],
    lr=[0.001, 0.003, 0.01],
    batch=[32],
    steps=[25, 50, 100, 200, 400],
    share=[1.0],
    warmup_steps=0,
)
# Training loss 1 - 0.05 ln(1 + s / 0.5), gap 0.005 s: least where s is 0.05 / 0.005 - 0.5.
GAIN, TURN, RISE = 0.05, 0.5, 0.005
BEST = GAIN / RISE - TURN


def travel_of(way, steps):
    return way.lr * step_l1(steps, momentum=0.9)


def loss_of(travel):
    train = 1 - GAIN * math.log1p(travel / TURN)
    return train, train + RISE * travel


def score(train, val):
    return TaskScore(train_loss=train, val_loss=val, accuracy=1 - val / 2, right="", images=100)


def point(way, steps):
    travel = travel_of(way, steps)
    train, val = loss_of(travel)
    # An expert's gap is as many times the merge's as there are tasks.
    gap = len(TASKS) * (val - train)
    rows = tuple(
        OfExpert(
            task=task,
            n=1000,
            travel=travel,
            noise=400.0,
            d2=travel**2,
            train_loss=train,
            val_loss=train + gap,
        )
        for task in TASKS
    )
    return Point(way=way, steps=steps, experts=rows, scores={t: score(train, val) for t in TASKS})


@pytest.fixture
def constants():
    return Constants(
        base={task: score(1.0, 1.0) for task in TASKS},
        base_loss=dict.fromkeys(TASKS, 1.0),
        noise=dict.fromkeys(TASKS, 400.0),
        zeta2=dict.fromkeys(TASKS, 1.0),
        gradient2=0.5,
        gram=[[1.0, 0.0], [0.0, 1.0]],
        smoothness=2.0,
        sample_gradient2=400.0,
    )


@pytest.fixture
def probes():
    return [point(way, k) for way in SPACE.probes for k in (20, 40)]


def test_travel_is_that_of_the_closed_form(constants):
    way = Way("sgd", 0.01, 32, 1.0)
    ranking = Ranking(SPACE, constants, [point(way, 20)])
    assert ranking.sums(way, 100).travel == pytest.approx(0.01 * step_l1(100, momentum=0.9))


def test_short_probes_see_how_the_training_loss_goes_on(constants, probes):
    ranking = Ranking(SPACE, constants, probes)
    far = Candidate(Way("sgd", 0.01, 32, 1.0), 100)
    found = ranking.outlook(far)
    assert not found.measured
    expected = loss_of(travel_of(far.way, far.steps))[0]
    assert 1 - found.progress + found.noise == pytest.approx(expected, abs=0.02)


def test_what_was_measured_is_told_as_it_is(constants, probes):
    ranking = Ranking(SPACE, constants, probes)
    way = SPACE.probes[0]
    assert ranking.outlook(Candidate(way, 40)).val_loss == point(way, 40).val_loss
    assert ranking.outlook(Candidate(way, 40)).measured


def test_ways_of_other_rates_go_before_other_batches_of_one():
    ways = [Way("sgd", lr, batch, 1.0) for lr, batch in ((1, 8), (1, 32), (2, 32), (1, 4), (3, 8))]
    order = [SimpleNamespace(candidate=Candidate(way, k)) for way in ways for k in (5, 6)]
    found = confirming.best_ways(order, 4)
    assert found == [ways[0], ways[2], ways[4], ways[1]]


def test_rates_that_nobody_probed_are_not_ranked(constants, probes):
    known = [p for p in probes if p.way.lr < 0.01]
    order = Ranking(SPACE, constants, known).ranked(SPACE.candidates)
    assert {each.candidate.way.lr for each in order} == {0.001, 0.003}


def test_the_bound_alone_asks_for_the_least_training(constants, probes):
    order = Ranking(SPACE, constants, probes).ranked(SPACE.candidates)
    least = min(order, key=lambda each: each.bound["total"]).candidate
    assert (least.way.lr, least.steps) == (0.001, 25)


def test_more_images_and_larger_batches_look_no_worse(constants, probes):
    space = Space(
        optimizer=["sgd"], lr=[0.01], batch=[8, 32], share=[0.5, 1.0], steps=[100], warmup_steps=0
    )
    ranking = Ranking(space, constants, probes)

    def gap(batch, share):
        return ranking.outlook(Candidate(Way("sgd", 0.01, batch, share), 100)).generalization

    assert gap(32, 0.5) > gap(32, 1.0)
    assert gap(8, 1.0) > gap(32, 1.0)


@pytest.fixture
def confirmation(monkeypatch, tmp_path):
    """A validation run whose merges follow the law, and what it measured."""
    seen = []

    def measured(_site, way, _tasks, _steps, wanted):
        seen.extend((way, k) for k in wanted)
        return iter([point(way, k) for k in wanted])

    monkeypatch.setattr(confirming, "measured", measured)
    budget = Budget(space=SPACE, tasks=4, sample=2, ways=3, shares=Shares(), pace=IN_STEPS)
    parts = budget.parts(4 * 400 / 0.75)
    site = type("Site", (), {"setting": type("Setting", (), {"space": SPACE, "coefficient": None})})
    steps = asked_steps(SPACE, parts)

    def make():
        log = Log(tmp_path / "points.json")
        return Confirmation(site, TASKS, budget, parts, steps, log)

    return make, seen


def test_the_best_number_of_steps_is_found_and_not_passed_far(confirmation, constants, probes):
    make, seen = confirmation
    found = make().run(constants, probes)
    ways = {p.way for p in found.points}
    best = min((loss_of(travel_of(way, k))[1], way, k) for way in ways for k in SPACE.lengths)
    assert found.chosen.val_loss == pytest.approx(best[0], abs=0.002)
    assert travel_of(found.chosen.way, found.chosen.steps) == pytest.approx(BEST, rel=0.6)
    # No merge was made twice, although rounds share them.
    assert len(seen) == len(set(seen))


def test_a_killed_run_goes_on_to_the_same_answer(confirmation, constants, probes):
    make, seen = confirmation
    first = make().run(constants, probes)
    count = len(seen)
    again = make().run(constants, probes)
    assert again.chosen == first.chosen
    assert again.rounds == first.rounds
    assert len(seen) == count


def test_a_way_that_diverges_is_dropped_and_told(confirmation, constants, probes, monkeypatch):
    make, _ = confirmation

    def measured(_site, way, _tasks, _steps, wanted):
        if way.lr == 0.01:
            raise ValueError("The loss must be finite, but is nan.")
        return iter([point(way, k) for k in wanted])

    monkeypatch.setattr(confirming, "measured", measured)
    found = make().run(constants, probes)
    assert found.chosen.way.lr < 0.01
    told = {name: why for each in found.rounds for name, why in each.dropped.items()}
    assert "must be finite" in told[Way("sgd", 0.01, 32, 1.0).name]


def test_other_errors_are_not_taken_for_divergence(confirmation, constants, probes, monkeypatch):
    make, _ = confirmation

    def measured(*_):
        raise ValueError("Something else.")

    monkeypatch.setattr(confirming, "measured", measured)
    with pytest.raises(ValueError, match="Something else"):
        make().run(constants, probes)


def test_probes_survive_their_file(constants, probes):
    probed = Probed(constants, tuple(probes), {"x": "why"})
    assert Probed.from_json(probed.to_json()) == probed


def test_the_expected_accuracy_is_the_base_and_the_mean_gain():
    base = {task: Share(0.6, 100) for task in "abcd"}
    found = expected_accuracy(base, {"a": Share(0.7, 100), "b": Share(0.66, 100)})
    assert found.accuracy == pytest.approx(0.68)
    assert found.low < 0.6 < 0.76 < found.high  # two tasks tell little of four
    whole = expected_accuracy(base, {task: Share(0.68, 100) for task in "abcd"})
    half = 1.96 * math.sqrt(0.68 * 0.32 / 100 / 4)
    assert (whole.low, whole.high) == pytest.approx((0.68 - half, 0.68 + half), abs=1e-3)
    one = expected_accuracy(base, {"a": Share(0.7, 100)})
    assert (one.low, one.high) == (0.0, 1.0)
