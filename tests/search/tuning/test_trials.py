"""The log of a search: lines that a crash cut short, logs of other searches, exact answers."""

import pytest
import torch

from mergekit_lit.search.tuning.trials import (
    Trial,
    TrialLog,
    best_of,
    pack_answers,
    unpack_answers,
)

FACTS = {"metric": "accuracy", "space": {"scale": (0.0, 1.0)}}


def trial(number: int, value: float | None, scale: float = 0.5, **more) -> Trial:
    state = "scored" if value is not None else "failed"
    more = {"state": state, **more}
    return Trial(method="ties", number=number, config={"scale": scale}, value=value, **more)


def test_trials_come_back_as_they_were_written(tmp_path):
    log = TrialLog(tmp_path / "run" / "trials.jsonl", FACTS)
    trials = [trial(0, 0.5, answers={"a": "AAAA"}), trial(1, None, note="too long")]
    for each in trials:
        log.add(each)
    again = TrialLog(tmp_path / "run" / "trials.jsonl", FACTS)
    assert again.trials == trials
    assert again.of("ties") == trials
    assert again.of("dare") == []


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_cut_short_is_dropped_and_the_next_one_whole(tmp_path, cut):
    path = tmp_path / "trials.jsonl"
    log = TrialLog(path, FACTS)
    log.add(trial(0, 0.5))
    log.add(trial(1, 0.6))
    path.write_bytes(path.read_bytes()[:-cut])
    log = TrialLog(path, FACTS)
    assert [each.number for each in log.trials] == [0]
    log.add(trial(1, 0.6))
    assert [each.number for each in TrialLog(path, FACTS).trials] == [0, 1]


def test_another_search_is_refused_and_its_log_left_alone(tmp_path):
    path = tmp_path / "trials.jsonl"
    TrialLog(path, FACTS).add(trial(0, 0.5))
    before = path.read_bytes()
    with pytest.raises(ValueError, match='had metric "accuracy" and this one has metric "loss"'):
        TrialLog(path, {**FACTS, "metric": "loss"})
    long = {"experts": {"a": "0" * 64}}
    with pytest.raises(ValueError, match="had experts null and this one has other experts"):
        TrialLog(path, {**FACTS, **long})
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{}\n", "no json\n", '{"search": {}}\n{"x": 1}\n'])
def test_a_file_that_is_no_log_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "trials.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="must be the log of a search, but is not"):
        TrialLog(path, {})
    assert path.read_text() == text


def test_answers_are_kept_exactly():
    draw = torch.Generator().manual_seed(0)
    answers = {"a": torch.randn(33, generator=draw), "b": torch.zeros(0)}
    back = unpack_answers(pack_answers(answers))
    assert all(torch.equal(back[task], each) for task, each in answers.items())


def test_the_best_is_the_highest_then_the_shortest_step_then_the_first():
    assert best_of([]) is None
    assert best_of([trial(0, None)]) is None
    assert best_of([trial(0, 0.5), trial(1, 0.9, state="discarded"), trial(2, 0.6)]).number == 2
    assert best_of([trial(0, 0.6, 0.7), trial(1, 0.6, 0.2), trial(2, 0.6, 0.2)]).number == 1
    assert best_of([trial(0, -0.5), trial(1, -0.7)]).number == 0
