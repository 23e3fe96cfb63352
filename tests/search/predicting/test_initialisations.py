"""Experts of different bases: a planted permutation is found, and strangers are kept apart."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mergekit_lit.cli import main
from mergekit_lit.core.expert_files import load_expert, save_base, save_expert
from mergekit_lit.core.experts import Base, Expert
from mergekit_lit.core.params import content_hash
from mergekit_lit.core.permutations import permutation_sizes, permute
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.data.suites import load_suite
from mergekit_lit.lit.passes import features_of
from mergekit_lit.models.backbones import load_base
from mergekit_lit.models.heads import fit_ncm
from mergekit_lit.search.predicting.initialisations import predict_initialisations
from mergekit_lit.search.predicting.origins import open_origins
from mergekit_lit.search.predicting.predict import predict_files
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.opening import several_bases
from mergekit_lit.stages.recipes import Recipe

VIT = "timm/test_vit@random:0"
SPLIT = SplitOptions(reserve=4)


def file_base(base: Base, path: Path) -> Base:
    """The same base from a file, under its own name and hash."""
    named = replace(base, name=str(path), content=content_hash(base.params))
    save_base(path, named)
    return named


def fitted(expert: Expert, base: Base, suite: str) -> Expert:
    """An expert whose head suits its features, with losses as a training would leave them."""
    backbone, _ = load_base(VIT, image_size=32)
    backbone.load_state_dict(dict(expert.backbone))
    train = load_suite(suite).task(expert.name).load(SPLIT).train
    head = fit_ncm(*features_of(backbone.eval(), train), 3)
    told = {"base": base.name, "base_hash": base.content, "base_val_loss": 0.5, "val_loss": 0.1}
    return replace(expert, head=head, card=replace(expert.card, **told))


@pytest.fixture(scope="module")
def pairs(make_family, tiny_suite, tmp_path_factory) -> dict[str, list[Path]]:
    """Two experts each: of one base, of it and a permuted copy, of two random bases."""
    folder = tmp_path_factory.mktemp("pairs")
    home, away = (make_family(f"timm/test_vit@random:{seed}", length=0.002) for seed in range(2))
    draw = torch.Generator().manual_seed(5)
    sizes = permutation_sizes(home.base.params, home.base.structure)
    orders = {key: torch.randperm(size, generator=draw) for key, size in sizes.items()}

    def moved(params):
        return permute(params, home.base.structure, orders)

    copied = replace(home.base, params=moved(home.base.params))
    second = home.experts[1]
    givens = {
        "one": (second, home.base),
        "permuted": (replace(second, backbone=moved(second.backbone)), copied),
        "strangers": (away.experts[1], away.base),
    }
    first_base = file_base(home.base, folder / "base.safetensors")
    first = fitted(home.experts[0], first_base, tiny_suite)
    save_expert(folder / "first.safetensors", first)
    found = {}
    for name, (expert, base) in givens.items():
        at = first_base if name == "one" else file_base(base, folder / f"{name}-base.safetensors")
        path = folder / f"{name}.safetensors"
        save_expert(path, fitted(expert, at, tiny_suite))
        found[name] = [folder / "first.safetensors", path]
    return found


def told(record):
    return record.metrics["initialisations"]


def ways_of(record):
    return {way["method"]: way for way in told(record)["ways"]}


def test_bases_are_told_apart_by_their_hash(pairs):
    assert [several_bases(pairs[name]) for name in pairs] == [False, True, True]


def test_a_permuted_copy_is_found_by_its_weights(pairs):
    record = predict_initialisations(pairs["permuted"])
    found, (apart,) = ways_of(record), told(record)["apart"]
    assert apart["aligned"] < 1e-4 * apart["distance"]
    assert found["average"]["stretch"] > 2
    # As of one base with unrelated deltas.
    assert found["git_rebasin"]["stretch"] == pytest.approx(0.5**0.5, rel=0.02)
    assert found["git_rebasin"]["expected_cost"]["high"] == pytest.approx(0.4 / 2, rel=0.04)
    assert told(record)["verdict"]["choice"] == "align"
    assert told(record)["verdict"]["method"] == "git_rebasin"
    assert "--method git_rebasin --allow_different_base true" in told(record)["command"]


def test_strangers_are_kept_apart(pairs):
    record = predict_initialisations(pairs["strangers"])
    (apart,) = told(record)["apart"]
    assert apart["aligned"] > 0.5 * apart["distance"] > apart["travelled"]
    assert told(record)["verdict"]["choice"] == "keep apart"
    assert told(record)["command"] is None
    assert ways_of(record)["average"]["expected_cost"]["high"] > told(record)["chance"]


def test_images_tell_what_merging_costs_and_gains(pairs, tiny_suite):
    calibration = Calibration(suite=tiny_suite, options=SPLIT)
    record = predict_initialisations(pairs["permuted"], level="data", calibration=calibration)
    found = told(record)
    assert found["verdict"]["basis"] == "images"
    for way in found["ways"]:
        lost = found["kept_apart"]["value"] - way["accuracy"]["value"]
        assert way["cost"]["value"] == pytest.approx(lost)
        gained = way["accuracy"]["value"] - found["single_accuracy"]["value"]
        assert way["gain"]["value"] == pytest.approx(gained)
        assert np.mean(list(way["tasks"].values())) == pytest.approx(way["accuracy"]["value"])
    loss = {way["method"]: way["loss_cost"]["value"] for way in found["ways"]}
    assert loss["git_rebasin"] == pytest.approx(0, abs=0.02)
    assert loss["average"] > 0.1


def test_the_command_tells_bases_ways_and_verdict(pairs, tiny_suite, tmp_path, capsys):
    flags = [*map(str, pairs["strangers"]), "--method", "average"]
    assert main(["predict", *flags, "--out", str(tmp_path / "told")]) == 0
    out = capsys.readouterr().out
    for part in (
        "aligned by weights",
        "stretch",
        "Verdict: keep apart",
        "own; where one",
        "Rule: ",
    ):
        assert part in out
    page = (tmp_path / "told" / "report.html").read_text()
    assert "Whether to merge experts of different bases" in page
    assert "keep apart" in page
    images = ["--data.suite", tiny_suite, "--data.reserve", "4", "--json"]
    assert main(["predict", *flags, *images]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]["initialisations"]
    assert found["verdict"]["basis"] == "images"
    assert found["ways"][2]["accuracy"] is not None


def test_a_base_that_is_not_at_hand_leaves_its_cards_facts(pairs, tmp_path):
    first, second = pairs["strangers"]
    expert = load_expert(second)
    for displacement, known in ((2.0, True), (None, False)):
        card = replace(expert.card, base="gone.safetensors", displacement=displacement)
        save_expert(tmp_path / "gone.safetensors", replace(expert, card=card))
        origins = open_origins([first, tmp_path / "gone.safetensors"])
        assert [base["at_hand"] for base in origins.told()] == [True, False]
        assert origins.apart() == []
        assert (origins.geometry("average")["stretch"] is not None) == known


def test_measured_merges_of_one_base_tell_nothing_of_several(pairs):
    with pytest.raises(ValueError, match="predict_initialisations"):
        predict_files(pairs["strangers"], [Recipe()], table=Path("none"), allow_different_base=True)


def test_two_architectures_are_one_line(pairs, make_family, tmp_path, capsys):
    other = make_family("timm/test_resnet@random:0").experts[1]
    save_expert(tmp_path / "other.safetensors", other)
    command = ["predict", str(pairs["one"][0]), str(tmp_path / "other.safetensors")]
    assert main([*command, "--table", "none.parquet"]) == 2
    error = capsys.readouterr().err
    assert "Experts must be of one architecture" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--level", "data"], "`level` 'data' must be told a suite"),
        (["--data.suite", "nowhere"], "nowhere"),
        (["--table", "none.parquet"], "`table` counts for nothing here"),
        (["--json", "--method", "ties", "--table", "a"], "`method` counts for nothing here"),
        (["--table", "a", "--method", "ties"], "`table` counts for nothing here"),
        (["--seed", "1"], "`seed` counts for nothing here"),
        (["--then", "lines"], "`then` counts for nothing here"),
        (["--base", "vit@random:0"], "`base` counts for nothing here"),
        (["--allow_different_base"], "`allow_different_base` counts for nothing here"),
    ],
)
def test_bad_input_is_one_line(pairs, capsys, flags, message):
    command = ["predict", *map(str, pairs["strangers"]), *flags]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
