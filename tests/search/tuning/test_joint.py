"""The search to a budget, on a bench of numbers instead of models."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.search.tuning.budget import Budget
from mergekit_lit.search.tuning.joint import expected_best, search_jointly
from mergekit_lit.search.tuning.loop import candidate_of
from mergekit_lit.search.tuning.objective import Objective
from mergekit_lit.search.tuning.pool import pool_of
from mergekit_lit.search.tuning.prior import prior_of
from mergekit_lit.search.tuning.race import race, stages_of
from mergekit_lit.search.tuning.space import space_of
from mergekit_lit.search.tuning.trials import TrialLog

SPACES = {name: space_of(MERGE_METHODS.get(name)) for name in ("task_arithmetic", "ties", "tsv_m")}
POOL = pool_of(SPACES, ["recalibrate", "base"])
IMAGES = 800


def worth(method: str, config: Any, policy: str) -> float:
    """What a candidate has right: TSV-M at 1.35 is best, under its own statistics."""
    peak = {"task_arithmetic": 0.3, "ties": 0.9, "tsv_m": 1.35}[method]
    height = {"task_arithmetic": 0.6, "ties": 0.62, "tsv_m": 0.7}[method]
    return height - 0.05 * (policy == "base") - 0.1 * (config["scale"] - peak) ** 2


@dataclass
class Numbers:
    """A bench on which a candidate is the share of images that it has right."""

    objective: Objective = field(default_factory=lambda: Objective("mean", "accuracy", {"a": 1.0}))
    batch_norm: str = "recalibrate"
    made: list[Any] = field(default_factory=list)
    broken: str = ""
    count: int = IMAGES

    def __post_init__(self) -> None:
        self.stages = stages_of({"a": torch.arange(IMAGES).numpy() % 4}, seed=0, discard=True)

    def under(self, policy: str) -> "Numbers":
        return Numbers(self.objective, policy, self.made, self.broken)

    def merges(self, method: str, configs: Any) -> Any:
        for config in configs:
            self.made.append((method, config, self.batch_norm))
            broken = method == self.broken
            yield ValueError("no") if broken else worth(method, config, self.batch_norm)

    def run(self, merged: float, rival: Any = None) -> Any:
        def answer(stage: Any) -> Any:
            return {"a": (((stage["a"].float() * 0.618) % 1) < merged).float()}

        return race(answer, self.stages, self.objective, rival=rival)


def searched(path, evaluations, bench=None, pool=POOL):
    bench = bench or Numbers()
    log = TrialLog(path, {})
    propose = expected_best(pool, prior_of(pool, {}), bench.objective, confidence=0.99)
    search_jointly(bench, log, propose, Budget(evaluations=evaluations), heard=lambda _: None)
    return log


def seen(log):
    return [(candidate_of(t).key, t.state, t.value, t.images) for t in log.trials]


def test_the_reference_comes_first_and_the_budget_is_never_overspent(tmp_path):
    log = searched(tmp_path / "t", 6)
    assert candidate_of(log.trials[0]) == POOL[0]
    assert (log.trials[0].state, log.trials[0].images) == ("scored", IMAGES)
    assert 5 * IMAGES < sum(trial.images for trial in log.trials) <= 6 * IMAGES
    assert len(log.trials) >= 6
    keys = [candidate_of(trial).key for trial in log.trials]
    assert len(set(keys)) == len(keys)


def test_a_small_part_of_the_pool_is_enough_to_come_near_its_best(tmp_path):
    log = searched(tmp_path / "t", 12)
    best = max(trial.value for trial in log.trials if trial.state == "scored")
    assert best > max(worth(c.method, c.config, c.batch_norm) for c in POOL) - 0.02
    assert len(log.trials) < len(POOL) / 2


def test_a_search_goes_on_in_the_middle_of_its_budget_and_with_a_larger_one(tmp_path):
    whole = seen(searched(tmp_path / "whole", 8))
    assert seen(searched(tmp_path / "again", 8)) == whole
    few = seen(searched(tmp_path / "parts", 3))
    bench = Numbers()
    assert seen(searched(tmp_path / "parts", 8, bench)) == whole
    assert whole[: len(few)] == few
    assert len(bench.made) == len(whole) - len(few)


def test_one_evaluation_is_the_reference_alone(tmp_path):
    assert len(searched(tmp_path / "t", 1).trials) == 1


def test_an_empty_pool_ends_the_search(tmp_path):
    log = searched(tmp_path / "t", 100, pool=POOL[:4])
    assert {candidate_of(trial).key for trial in log.trials} == {each.key for each in POOL[:4]}


def test_what_cannot_be_merged_is_avoided_unless_it_is_the_reference(tmp_path):
    log = searched(tmp_path / "t", 8, Numbers(broken="tsv_m"))
    failed = [trial for trial in log.trials if trial.state == "failed"]
    assert all(trial.note == "no" and trial.images == 0 for trial in failed)
    assert len(failed) < len(log.trials)
    with pytest.raises(ValueError, match="no"):
        searched(tmp_path / "u", 8, Numbers(broken="task_arithmetic"))


def test_cross_entropies_are_searched_too(tmp_path):
    bench = Numbers(Objective("mean", "cross_entropy", {"a": 1.0}))
    assert len(searched(tmp_path / "t", 4, bench).trials) >= 4
