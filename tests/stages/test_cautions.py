"""Tests of mergekit_lit.stages.cautions: each caution appears for its cause, and only then."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import save_expert
from mergekit_lit.core.experts import Base, Expert
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.stages.advice import expert_cautions, nearest_travel, uncarded
from mergekit_lit.stages.cautions import cautions

STRUCTURE = {
    "weight": TensorInfo("linear", 0, "stem"),
    "bn.running_mean": TensorInfo("statistic", 0, "stem"),
}


def _expert(task, size=1.0):
    params = {"weight": torch.full((4,), size), "bn.running_mean": torch.full((4,), 100 * size)}
    card = Card(task=task, base_hash="abc", split_hash="s", head="frozen-ncm", displacement=size)
    return Expert(params, {}, STRUCTURE, card)


def _case():
    """Two like experts that beat their base, as the stage would hand them over."""
    params = {"weight": torch.zeros(4), "bn.running_mean": torch.zeros(4)}
    base = Base("tiny", "tiny", 8, params, STRUCTURE, content="abc")
    row = {"accuracy": 0.8, "confidence": 0.7, "not_finite": 0, "n": 10}
    table = {
        "base": {"tasks": {"a": row | {"accuracy": 0.5}, "b": row | {"accuracy": 0.5}}},
        "experts": {"tasks": {"a": dict(row), "b": dict(row)}},
    }
    experts = [_expert("a"), _expert("b")]
    data = [SimpleNamespace(name=name, split_hash="s") for name in ("a", "b")]
    return SimpleNamespace(base=base, experts=experts, table=table, data=data)


def _told(case, split="val"):
    models = {"base": case.base, "experts": case.experts}
    if case.base is None:
        models, case.table = {"experts": case.experts}, {"experts": case.table["experts"]}
    return cautions(case.table, models, case.data, split=split)


def _card(case, **facts):
    expert = case.experts[0]
    case.experts[0] = replace(expert, card=replace(expert.card, **facts))


def _weak(case):
    case.table["experts"]["tasks"]["a"]["accuracy"] = 0.4


def _long(case):
    case.experts[0] = _expert("a", size=3.0)


def _unsure(case):
    case.table["experts"]["tasks"]["b"]["confidence"] = 0.3


def _overflown(case):
    case.table["experts"]["tasks"]["b"] |= {"not_finite": 3, "confidence": None}


def _twice(case):
    case.experts.append(_expert("a"))


CASES = {
    "weak": (_weak, "expert of 'a' is below the base on its own task: 0.400 < 0.500"),
    "long": (_long, "delta norms are unequal: 'a' 6, 'b' 2"),
    "unsure": (_unsure, "confidences are unequal: 'a' 0.7, 'b' 0.3"),
    "overflown": (_overflown, "'experts' has logits that are not finite on 3 of 10 images of 'b'"),
    "other base": (lambda c: _card(c, base_hash="x"), "1 experts, first 'a', started from another"),
    "trained": (
        lambda c: _card(c, head="trained"),
        "trained with their experts (1 tasks, first 'a')",
    ),
    "split": (lambda c: _card(c, split_hash="x"), "first 'a', were trained on another split"),
    "twice": (_twice, "1 tasks, first 'a', have several experts"),
}


@pytest.mark.parametrize(("spoil", "message"), CASES.values(), ids=CASES)
def test_each_cause_has_its_caution(spoil, message):
    case = _case()
    assert _told(case) == []
    spoil(case)
    (line,) = _told(case)
    assert message in line
    assert "\n" not in line


def test_unknown_facts_and_test_images_raise_no_caution():
    case = _case()
    _card(case, base_hash=None, split_hash=None, head=None)
    assert _told(case) == []
    _card(case, split_hash="x")
    assert _told(case, split="test") == []


def test_without_a_base_the_cards_tell_the_norms():
    case = _case()
    case.base = None
    _card(case, displacement=2.5)
    assert "delta norms are unequal: 'a' 2.5, 'b' 1" in _told(case)[0]
    _card(case, displacement=None)
    assert _told(case) == []


def _written(folder, task, steps, travel, **facts):
    """Write an expert after some steps of a training that left several."""
    expert = _expert(task, size=facts.pop("size", 1.0))
    told = {"steps": steps, "travel": travel, "lr": 0.1, "seed": 0, **facts}
    path = folder / f"{task}-step{steps}.safetensors"
    save_expert(path, replace(expert, card=replace(expert.card, **told)))
    return path


def test_experts_that_are_alike_give_no_line(tmp_path):
    files = [_written(tmp_path, task, 100, 5.0, val_loss=0.5, base_val_loss=1.0) for task in "abc"]
    assert expert_cautions(files) == []


def test_an_expert_that_went_too_far_names_the_checkpoint_to_take_instead(tmp_path):
    others = [_written(tmp_path, task, 100, 5.0) for task in "bc"]
    _written(tmp_path, "a", 25, 1.0)
    earlier = _written(tmp_path, "a", 90, 4.5)
    far = _written(tmp_path, "a", 900, 45.0)
    unequal, line = expert_cautions([far, *others])
    assert "travels are unequal" in unequal
    assert "--method travel_normalised" in unequal
    assert line == (
        f"The expert of 'a' travelled 45, more than twice the others' 5. Merge its earlier "
        f"checkpoint instead: {earlier}"
    )


def test_without_an_earlier_checkpoint_it_is_to_be_trained_again(tmp_path):
    files = [_written(tmp_path, task, 100, 5.0) for task in "bc"]
    files.append(_written(tmp_path, "a", 900, 45.0))
    assert expert_cautions(files)[-1].endswith(
        "Train it again for fewer steps or at a lower rate, or distil it so: mergekit-lit train "
        f"--data.suite None --data.task a --model.teacher {files[-1]} --steps K --out FOLDER."
    )


def test_one_of_two_can_have_gone_too_far(tmp_path):
    files = [_written(tmp_path, "a", 900, 45.0), _written(tmp_path, "b", 100, 5.0)]
    assert "travelled 45, more than twice the others' 5" in expert_cautions(files)[-1]


def test_an_expert_below_its_base_went_past_what_is_good(tmp_path):
    files = [_written(tmp_path, task, 100, 5.0) for task in "bc"]
    files.append(_written(tmp_path, "a", 100, 5.0, val_loss=1.5, base_val_loss=1.0))
    (line,) = expert_cautions(files)
    assert "validation loss of 1.5, above the base's 1" in line
    assert "teacher" not in line


def test_unequal_norms_name_the_veneer(tmp_path):
    files = [_written(tmp_path, "a", 100, 5.0), _written(tmp_path, "b", 100, 5.0, size=3.0)]
    (line,) = expert_cautions(files)
    assert "delta norms are unequal: 'b' 3, 'a' 1" in line
    assert "--then '{name: equal_norms, config: {to: min}}'" in line


def test_cards_that_know_nothing_give_no_line(tmp_path):
    files = [_written(tmp_path, task, 100, None, lr=None) for task in "ab"]
    assert expert_cautions(files) == []
    assert uncarded(files) == [
        f"The card of {str(file)!r} does not tell travel, val_loss: whether it went further than "
        "the others cannot be said."
        for file in files
    ]
    save_file({"w": torch.zeros(2)}, tmp_path / "plain.safetensors")
    (line,) = uncarded([tmp_path / "plain.safetensors"])
    assert "has no card" in line


def test_the_nearest_travel_is_by_ratio():
    assert nearest_travel({10: 1.0, 20: 10.0}, 4.0) == 20
    assert nearest_travel({10: 1.0, 20: 10.0}, 3.0) == 10
