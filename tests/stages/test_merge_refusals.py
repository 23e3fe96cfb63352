"""The merge stage: bad input is one line, and nothing is written or lost."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from mergekit_lit.core import files
from mergekit_lit.core.expert_files import load_merged, save_expert
from mergekit_lit.core.records import Record
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.merge import merge_files
from mergekit_lit.stages.recipes import Recipe

RESNET, VIT = "timm/test_resnet@random:0", "timm/test_vit@random:0"
TASKS = ("dots", "stripes")


@pytest.fixture(scope="module")
def family(make_family, tmp_path_factory):
    """Files of two experts of a ResNet."""
    return make_family(RESNET).save(tmp_path_factory.mktemp("resnets"))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "method": (
        {"recipe": Recipe(method="avrage")},
        KeyError,
        "No merge method named 'avrage'. Did you mean 'average'?",
    ),
    "parameter": (
        {"recipe": Recipe(method="task_arithmetic", config={"scael": 1})},
        KeyError,
        "No parameter of 'task_arithmetic' named 'scael'. Did you mean 'scale'?",
    ),
    "lambda": (
        {"recipe": Recipe(method="task_arithmetic", config={"scale": -0.5})},
        ValueError,
        "`scale` must be at least 0, but is -0.5.",
    ),
    "lambda nan": (
        {"recipe": Recipe(method="task_arithmetic", config={"scale": float("nan")})},
        TypeError,
        "`scale` of 'task_arithmetic' must be a finite number, but is nan.",
    ),
    "weights": (
        {"recipe": Recipe(method="weighted_average", config={"weights": [1.0]})},
        ValueError,
        "`weights` must hold one number for each of the 2 experts (dots, stripes), but holds 1.",
    ),
    "policy": (
        {"recipe": Recipe(batch_norm="recalibrat")},  # type: ignore[arg-type]
        KeyError,
        "No BatchNorm policy named 'recalibrat'. Did you mean 'recalibrate'?",
    ),
    "no suite": (
        {"recipe": Recipe(batch_norm="recalibrate")},
        ValueError,
        "must be told a suite to take training images from, but got none",
    ),
    "one image": (
        {"calibration": Calibration(suite="embedded8", images=1)},
        ValueError,
        "`images` must be at least 2, to have a variance, but is 1.",
    ),
    "unknown suite": (
        {
            "recipe": Recipe(batch_norm="recalibrate"),
            "calibration": Calibration(suite="embeded8"),
        },
        KeyError,
        "Did you mean 'embedded8'?",
    ),
    "unknown task": (
        {
            "recipe": Recipe(batch_norm="recalibrate"),
            "calibration": Calibration(suite="embedded8"),
        },
        KeyError,
        "No task of suite 'embedded8' named 'dots'.",
    ),
    "unknown base": ({"base": "resnt"}, KeyError, "resnt"),
    "another base": (
        {"base": "timm/test_resnet@random:1"},
        ValueError,
        ". Merge them as they are with `--allow_different_base true`.",
    ),
    "another architecture": (
        {"base": VIT, "allow_different_base": True},
        ValueError,
        "and the base differ in",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_nothing_is_written(family, tmp_path, case):
    options, error, message = BAD[case]
    with pytest.raises(error) as caught:
        merge_files(family.paths, out=tmp_path / "deep" / "m.safetensors", **options)
    text = str(caught.value.args[0])
    assert message in text
    assert "\n" not in text
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.pt", "`out` must end in .safetensors, but is"),
        ("folder.safetensors", "`out` must name a file, but .* is a folder"),
    ],
)
def test_bad_output_names(family, tmp_path, name, message):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match=message):
        merge_files(family.paths, out=tmp_path / name)


def test_a_base_is_never_overwritten(family, tmp_path):
    plain = tmp_path / "base.safetensors"
    save_file(dict(family.base.params), plain)
    before = plain.read_bytes()
    for base in (str(plain), f"{RESNET.partition('@')[0]}@{plain}", str(tmp_path)):
        with pytest.raises(ValueError, match="is one of the experts or the base"):
            merge_files(family.paths, out=plain, base=base)
    assert plain.read_bytes() == before


def test_the_record_of_another_stage_is_never_overwritten(family, tmp_path):
    Record(stage="evaluate", name="m", config={}).write(tmp_path / "m.record.json")
    with pytest.raises(ValueError, match="must not be overwritten: it is of the stage 'evaluate'"):
        merge_files(family.paths, out=tmp_path / "m.safetensors")
    assert names_in(tmp_path) == ["m.record.json"]


def test_an_expert_is_never_overwritten(family):
    before = family.paths[0].read_bytes()
    detour = family.paths[0].parent / "." / ".." / family.paths[0].parent.name / TASKS[0]
    with pytest.raises(ValueError, match="is one of the experts"):
        merge_files(family.paths, out=detour.with_suffix(".safetensors"))
    assert family.paths[0].read_bytes() == before


def test_full_disk(family, tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        merge_files(family.paths, out=tmp_path / "m.safetensors")
    assert names_in(tmp_path) == []


def test_a_record_that_cannot_be_written_keeps_the_model_away(family, tmp_path):
    (tmp_path / "m.record.json").mkdir()
    with pytest.raises(OSError, match=r"m\.record\.json': Is a directory"):
        merge_files(family.paths, out=tmp_path / "m.safetensors")
    assert names_in(tmp_path) == ["m.record.json"]


@pytest.mark.parametrize("earlier", [False, True])
def test_a_model_that_cannot_be_written_leaves_the_earlier_pair(
    family, tmp_path, monkeypatch, earlier
):
    out = tmp_path / "m.safetensors"
    if earlier:
        merge_files(family.paths, out=out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mergekit_lit.stages.merge.save_merged", full)
    with pytest.raises(OSError, match="No space left"):
        merge_files(family.paths, out=out, recipe=Recipe(method="task_arithmetic"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "must name its base, but does not. Give `base`."),
        ("my-base", "The base 'my-base' that the card of .* names must be loadable here"),
    ],
)
def test_cards_whose_base_cannot_be_found(family, tmp_path, spec, message):
    expert = family.experts[0]
    path = tmp_path / "e.safetensors"
    save_expert(path, replace(expert, card=replace(expert.card, base=spec)))
    with pytest.raises(ValueError, match=message):
        merge_files([path], out=tmp_path / "m.safetensors")
    merge_files([path], out=tmp_path / "m.safetensors", base=RESNET)
    assert load_merged(tmp_path / "m.safetensors").tasks == ("dots",)
