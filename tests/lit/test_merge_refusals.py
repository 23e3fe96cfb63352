"""Models and data that cannot be evaluated, each told in one line."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mergekit_lit.core.experts import Merged
from mergekit_lit.lit.merge import MergeModule
from mergekit_lit.stages.evaluate import evaluate_models


def _head(expert, classes):
    weight = torch.zeros(classes, expert.head["weight"].shape[1])
    return replace(expert, head={"weight": weight, "bias": torch.zeros(classes)})


BAD_MODELS = {
    "label out of range": (
        lambda of: ({"experts": [of.expert]}, of.task(label=4)),
        ValueError,
        r"Labels of 'dots' must lie in \[0, 3\), .* but one is 3",
    ),
    "head of other classes": (
        lambda of: ({"experts": [_head(of.expert, 2)]}, of.task()),
        ValueError,
        r"head of 'experts' for 'dots' must have shape \(3, \d+\).*has \(2, ",
    ),
    "no head": (
        lambda of: ({"base": of.base}, of.task()),
        KeyError,
        "'base' needs a head for task 'dots', but there are heads for: none",
    ),
    "merged without head": (
        lambda of: (
            {"m": Merged(of.base.params, of.base.structure, heads={"dogs": of.expert.head})},
            of.task(),
        ),
        KeyError,
        "'m' needs a head for task 'dots', but there are heads for: dogs",
    ),
    "empty split": (
        lambda of: ({"experts": [of.expert]}, replace(of.task(), val=of.task(0).val)),
        ValueError,
        "val split of 'dots' must hold an image, but is empty",
    ),
    "other names": (
        lambda of: (
            {"experts": [replace(of.expert, backbone={"a": torch.zeros(1)})]},
            of.task(),
        ),
        ValueError,
        "Model 'experts' and the base differ in .* parameter names",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_models_are_told_in_one_line(family, make, error, message, small_task):
    backbone, base, experts = family
    models, task = make(SimpleNamespace(base=base, expert=experts[0], task=small_task))
    with pytest.raises(error, match=message) as caught:
        evaluate_models(backbone, models, [task])
    assert "\n" not in str(caught.value)


BAD_DATA = {
    "unknown task": ({"tasks": ["dot"]}, KeyError, "Did you mean 'dots'"),
    "unknown split": ({"split": "tests"}, KeyError, "No split named 'tests'. Did you mean 'test'"),
    "no task": ({"tasks": []}, ValueError, "must name each task once"),
    "twice": ({"tasks": ["dots", "dots"]}, ValueError, "must name each task once"),
    "batch": ({"batch": 0}, ValueError, "`batch` must be at least 1, but is 0"),
    "empty val": ({"val_share": 0.0, "split": "val"}, ValueError, "val split of 'dots' must hold"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_is_told_in_one_line(options, error, message, merge_data):
    with pytest.raises(error, match=message) as caught:
        merge_data(**options)
    assert "\n" not in str(caught.value)


def test_unknown_policy_and_split_are_told(family, small_task):
    backbone, _, experts = family
    with pytest.raises(KeyError, match=r"named 'store'\. Did you mean 'stored'"):
        evaluate_models(backbone, {"experts": experts}, [small_task()], batch_norm="store")
    with pytest.raises(KeyError, match="No split named 'valid'"):
        evaluate_models(backbone, {"experts": experts}, [small_task()], split="valid")


def test_another_data_module_is_refused(family, scored):
    with pytest.raises(TypeError, match="must be tested on a MergeDataModule"):
        scored(MergeModule(family[0], {"experts": family[2]}), None)
