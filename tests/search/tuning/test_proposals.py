"""What is tried next depends on the trials and the seed alone."""

import sys

import pytest

from mergekit_lit.core.registry import MERGE_METHODS, Registered
from mergekit_lit.search.tuning.proposals import grid_proposals, optuna_proposals
from mergekit_lit.search.tuning.space import space_of
from mergekit_lit.search.tuning.trials import Trial

SPACE = space_of(MERGE_METHODS.get("ties"), given={"trim": ["model", "tensor"]})


def value_of(config) -> float | None:
    """A peak at scale 0.5 and density 0.3; no model at all for steps beyond 2.5."""
    if config["scale"] > 2.5:
        return None
    return -((config["scale"] - 0.5) ** 2) - (config["density"] - 0.3) ** 2


def searched(propose, finished=(), until=None) -> list[Trial]:
    trials = list(finished)
    while (until is None or len(trials) < until) and (configs := propose(trials)):
        for config in configs:
            value = value_of(config)
            state = "failed" if value is None else "scored"
            trials.append(
                Trial(method="ties", number=len(trials), config=config, state=state, value=value)
            )
    return trials


def test_a_grid_proposes_what_is_left():
    space = space_of(MERGE_METHODS.get("slerp"), points=3)
    propose = grid_proposals(space, trials=None, seed=0)
    whole = propose([])
    assert [config["position"] for config in whole] == [0.5, 0.0, 1.0]
    done = [Trial(method="slerp", number=0, config={"position": 0.0}, state="failed")]
    assert [config["position"] for config in propose(done)] == [0.5, 1.0]


def test_optuna_gives_the_same_trials_again_and_after_a_stop():
    pytest.importorskip("optuna")
    whole = searched(optuna_proposals(SPACE, trials=16, seed=1))
    assert len(whole) == 16
    assert whole[0].config == {"density": 0.2, "scale": 1.0, "trim": "model"}
    begun = searched(optuna_proposals(SPACE, trials=16, seed=1), until=13)
    assert searched(optuna_proposals(SPACE, trials=16, seed=1), begun) == whole
    other = searched(optuna_proposals(SPACE, trials=16, seed=2))
    assert [trial.config for trial in other] != [trial.config for trial in whole]
    for trial in whole:
        assert 0.05 <= trial.config["density"] <= 1.0
        assert 0.0 <= trial.config["scale"] <= 3.0


def test_optuna_takes_whole_numbers_and_fixed_values():
    pytest.importorskip("optuna")

    def method(*, steps: int = 3, kind: str = "a"):
        """A method with a whole number."""

    space = space_of(Registered("m", method, {"search": {"steps": (1, 9)}}), given={"kind": ["b"]})
    propose = optuna_proposals(space, trials=3, seed=0)
    trials = [Trial(method="m", number=0, config=propose([])[0], state="scored", value=0.0)]
    (config,) = propose(trials)
    assert config["kind"] == "b"
    assert isinstance(config["steps"], int)


def test_without_optuna_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mergekit-lit\[tune\]'"):
        optuna_proposals(SPACE, trials=2, seed=0)
