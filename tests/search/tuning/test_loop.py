"""The loop of a search, on a bench of numbers instead of models."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mergekit_lit.search.tuning.loop import score_again, search_method
from mergekit_lit.search.tuning.objective import Objective
from mergekit_lit.search.tuning.race import race, stages_of
from mergekit_lit.search.tuning.trials import TrialLog


@dataclass
class Numbers:
    """A bench on which a configuration's `x` is the share of images that it has right."""

    objective: Objective = field(default_factory=lambda: Objective("mean", "accuracy", {"a": 1.0}))
    made: list[float] = field(default_factory=list)
    batch_norm: str = "recalibrate-per-task"

    def __post_init__(self) -> None:
        self.stages = stages_of({"a": torch.arange(800).numpy() % 4}, seed=0, discard=True)

    def under(self, policy: str) -> "Numbers":
        return self

    def merges(self, method: str, configs: Any) -> Any:
        for config in configs:
            self.made.append(config["x"])
            yield ValueError("too far\nby half") if config["x"] > 1 else config["x"]

    def run(self, merged: float, rival: Any = None) -> Any:
        def answer(stage: Any) -> Any:
            # An image is right for every candidate above its own difficulty.
            difficulty = (stage["a"].float() * 0.618) % 1
            return {"a": (difficulty < merged).float()}

        return race(answer, self.stages, self.objective, rival=rival)


def proposing(*values):
    """All that is left at once, as a grid does."""

    def propose(finished):
        return [{"x": value} for value in values[len(finished) :]]

    return propose


def searched(path, propose, bench=None):
    bench, log, heard = bench or Numbers(), TrialLog(path, {}), []
    search_method(bench, log, "m", propose, heard=heard.append)
    return log, heard, bench


def test_losers_are_discarded_and_each_better_one_is_the_next_rival(tmp_path):
    log, heard, _ = searched(tmp_path / "t", proposing(0.3, 0.1, 0.6, 0.5, 0.9))
    states = [trial.state for trial in log.of("m")]
    assert states == ["scored", "discarded", "scored", "discarded", "scored"]
    assert [bool(trial.answers) for trial in heard] == [True, False, True, False, True]
    assert [trial.number for trial in heard] == [0, 1, 2, 3, 4]
    assert log.of("m")[1].images == 100
    assert log.of("m")[1].upper < log.of("m")[0].value
    assert TrialLog(tmp_path / "t", {}).trials == heard


def test_a_configuration_that_comes_again_costs_nothing(tmp_path):
    steps = iter([[{"x": 0.3}], [{"x": 0.3}], []])
    log, _, bench = searched(tmp_path / "t", lambda _: next(steps))
    first, second = log.of("m")
    assert (second.images, second.note, second.value) == (0, "as trial 0", first.value)
    assert bench.made == [0.3]


def test_what_cannot_be_merged_is_passed_over_unless_it_is_the_start(tmp_path):
    log, _, _ = searched(tmp_path / "t", proposing(0.3, 2.0, 0.4))
    assert [trial.state for trial in log.of("m")] == ["scored", "failed", "scored"]
    assert log.of("m")[1].note == "too far by half"
    with pytest.raises(ValueError, match="too far"):
        searched(tmp_path / "u", proposing(2.0, 0.3))
    assert not (tmp_path / "u").exists()


def test_the_discarded_are_scored_again_once_each(tmp_path):
    log, _, bench = searched(tmp_path / "t", proposing(0.9, 0.1, 0.2))
    before = log.of("m")
    score_again(bench, log, "m", heard=lambda _: None)
    assert log.of("m") == before
    assert [(t.number, t.images, t.answers) for t in log.again("m")] == [(1, 800, {}), (2, 800, {})]
    assert log.again("m")[0].value == pytest.approx(0.1, abs=0.01)
    made = len(bench.made)
    score_again(bench, log, "m", heard=lambda _: None)
    assert len(bench.made) == made


def test_answers_that_are_no_numbers_fail(tmp_path):
    bench = Numbers()
    nothing = SimpleNamespace(images=5, total=float("nan"), upper=None, values={}, answers={})
    bench.run = lambda *_: nothing
    log, _, _ = searched(tmp_path / "t", proposing(0.3), bench)
    assert [(t.state, t.value, t.note) for t in log.trials] == [
        ("failed", None, "Its answers are no numbers.")
    ]
