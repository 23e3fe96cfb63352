"""Predictions of merges of experts in files, from a table whose law is known."""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from mergekit_lit.cli import main
from mergekit_lit.core.expert_files import load_expert, save_expert
from mergekit_lit.data.splits import SplitOptions
from mergekit_lit.search.predicting import predict
from mergekit_lit.search.predicting.columns import KEYS, OUTCOMES
from mergekit_lit.search.predicting.gaps import Gaps, gaps_of
from mergekit_lit.search.predicting.learning import SCALES, learned_names
from mergekit_lit.search.predicting.looking import (
    EFFORT,
    VAL_IMAGES,
    known_rows,
    open_experts,
)
from mergekit_lit.search.predicting.nearest import nearest
from mergekit_lit.search.predicting.predict import predict_files
from mergekit_lit.search.predicting.predictors import Boosting
from mergekit_lit.search.predicting.table import COLUMNS, feature_names, write_table
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.recipes import Recipe
from mergekit_lit.theory.effort import Effort

pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")

WORDS = {"string": "x", "bool": False, "int64": 0}
STARTS = [name for scale in SCALES.values() for pair in scale.starts for name in pair]
NAMES = {column.name for column in (*KEYS, *OUTCOMES)}


def measured(rows, seed=0):
    """Rows whose accuracy falls with the interference alone, whatever else is known."""
    draw = np.random.default_rng(seed)
    for place in range(rows):
        row = {
            column.name: WORDS.get(column.type, math.nan)
            if column.name in NAMES
            else float(draw.normal())
            for column in COLUMNS
        }
        row["interference"] = float(draw.uniform(0, 4))
        accuracy = float(np.clip(0.9 - 0.2 * row["interference"], 0, 1))
        yield {
            **row,
            **dict.fromkeys(STARTS, 0.9),
            "group": str(place // 8),
            "merge": place // 4 % 2,
            "task": f"t{(place // 8 * 3 + place % 4) % 7}",
            "test_accuracy": accuracy,
            "test_excess_error": 3 * (0.9 - accuracy),
        }


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    monkeypatch.setattr(predict, "Boosting", partial(Boosting, trees=8))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "merges.parquet"
    write_table(path, measured(480))
    return path


@pytest.fixture(scope="module")
def experts(make_family, tmp_path_factory):
    return make_family("vit@random:0", image_size=8).save(tmp_path_factory.mktemp("experts")).paths


RECIPES = [Recipe(), Recipe(method="task_arithmetic", config={"scale": 4.0})]


def test_a_merge_is_predicted_with_its_tasks_and_what_is_like_it(experts, table, tmp_path):
    record = predict_files(experts, RECIPES, table=table, out=tmp_path / "p.record.json")
    average, longer = record.metrics["merges"]
    for found in (average, longer):
        for outcome in ("accuracy", "excess_error"):
            each = [found[outcome], *(task[outcome] for task in found["tasks"].values())]
            assert all(one["low"] <= one["value"] <= one["high"] for one in each)
        assert len(found["nearest"]) == 3
        mean = np.mean([task["accuracy"]["value"] for task in found["tasks"].values()])
        assert found["accuracy"]["value"] == pytest.approx(mean)
    # Four times each delta: more of the others for each of the tasks.
    assert longer["accuracy"]["value"] < average["accuracy"]["value"]
    assert longer["excess_error"]["value"] > average["excess_error"]["value"]
    assert json.loads((tmp_path / "p.record.json").read_text())["stage"] == "predict"


def test_the_command_tells_methods_side_by_side(experts, table, capsys):
    flags = [*map(str, experts), "--table", str(table), "--method", "average,ties"]
    assert main(["predict", *flags]) == 0
    out = capsys.readouterr().out
    assert "mean accuracy" in out
    assert "nearest measured" in out
    assert "features are unknown" in out
    assert "warning" not in out
    assert main(["predict", *flags[:-1], "ties", "--density", "0.5", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["metrics"]["merges"]
    assert found["config"]["density"] == 0.5


def test_what_makes_experts_merge_badly_is_said_too(experts, table, tmp_path, capsys):
    far = load_expert(experts[1])
    save_expert(tmp_path / "far.safetensors", replace(far, card=replace(far.card, travel=9.0)))
    flags = [str(experts[0]), str(tmp_path / "far.safetensors"), "--table", str(table)]
    assert main(["predict", *flags, "--out", str(tmp_path / "told")]) == 0
    (line,) = (
        line for line in capsys.readouterr().out.splitlines() if "travels are unequal" in line
    )
    assert line.startswith("warning: ")
    assert "travels are unequal" in (tmp_path / "told" / "report.html").read_text()


@pytest.mark.parametrize("level", ["data", "probe"])
def test_images_and_a_probe_tell_more(experts, table, tiny_suite, tmp_path, capsys, level):
    out = tmp_path / "told"
    flags = ["--table", str(table), "--data.suite", tiny_suite, "--data.reserve", "4"]
    flags += ["--method", "average,regmean", "--level", level, "--out", str(out)]
    assert main(["predict", *map(str, experts), *flags]) == 0
    assert "what drives it" in capsys.readouterr().out
    record = json.loads((out / "predict.record.json").read_text())
    unknown = set(record["metrics"]["unknown"])
    assert not unknown & {"base_val_loss", "gradient_step", "curvature_own"}
    assert ("probe_val_loss" in feature_names(level)) == (level == "probe")
    assert "probe_val_loss" not in unknown
    average, regmean = record["metrics"]["merges"]
    assert average["terms"]["a_eff"] == pytest.approx(1.5)
    assert regmean["terms"]["a_eff"] is None
    page = (out / "report.html").read_text()
    assert "What merges are expected to reach" in page
    assert "mergekit-lit predict" in page
    assert f"--level {level}" in page


def test_what_images_tell_rests_on_no_test_image(experts, tiny_suite, tmp_path):
    noisy = tmp_path / Path(tiny_suite).name
    noisy.mkdir()
    for file in Path(tiny_suite).glob("*.npz"):
        arrays = dict(np.load(file))
        arrays["x"] = np.where(arrays["split"][:, None, None, None] == 1, 0, arrays["x"])
        np.savez(noisy / file.name, **arrays)
    rows = [
        list(known_rows(opened, RECIPES, looked))
        for opened, looked in (
            open_experts(
                experts,
                "probe",
                Calibration(suite=str(suite), options=SplitOptions(reserve=4)),
                base=None,
                allow_different_base=False,
            )
            for suite in (tiny_suite, noisy)
        )
    ]
    assert repr(rows[0]) == repr(rows[1])


def test_a_look_takes_as_much_as_the_table_did():
    file = Path(__file__).parents[3] / "experiments" / "merges.yaml"
    settings = OmegaConf.to_container(OmegaConf.load(file))
    assert Effort(**settings["effort"]) == EFFORT
    assert settings["val_images"] == VAL_IMAGES


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "regmean"], "images"),
        (["--level", "data"], "`level` 'data' must be told a suite"),
        (["--method", "tis"], "Did you mean 'ties'?"),
        (["--table", "none.parquet"], "No table of merges 'none.parquet'. Build one"),
        (["--method", "average,average"], "each once"),
    ],
)
def test_bad_input_is_one_line(experts, table, capsys, flags, message):
    given = flags if "--table" in flags else [*flags, "--table", str(table)]
    assert main(["predict", *map(str, experts), *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_too_few_measured_rows_are_refused(experts, tmp_path):
    write_table(tmp_path / "few.parquet", measured(40))
    with pytest.raises(ValueError, match="200 measured rows or more"):
        predict_files(experts, RECIPES, table=tmp_path / "few.parquet")


@pytest.mark.slow
def test_the_shipped_table_is_learned_from_by_default(experts, capsys):
    flags = [*map(str, experts), "--method", "average,ties"]
    assert main(["predict", *flags]) == 0
    assert "1792 merges of 224 groups of experts (shipped)" in capsys.readouterr().out


def test_what_a_method_does_not_have_is_not_unknown():
    row = {**dict.fromkeys(learned_names("data"), 0.5), "task": "a", "linear": 1.0}
    plain = {**row, "scale": math.nan, "density": math.nan}
    ties = {**row, "linear": 0.0, "scale": math.nan, "bound_chi2_w": math.nan}
    gap = {**plain, "task": "b", "own_card_base_accuracy": math.nan, "bound_chi2_w": math.nan}
    assert gaps_of([plain], "data") == Gaps(("scale", "density"), {"a": ()})
    assert gaps_of([plain, ties], "data") == Gaps(("scale",), {"a": ()})
    found = gaps_of([plain, gap, ties], "data")
    assert found.absent == ("scale",)
    assert found.names == ["own_card_base_accuracy", "bound_chi2_w"]
    assert found.parts() == {(): ["a"], tuple(found.names): ["b"]}


HYPERPARAMETERS = {"lr": 0.01, "batch": 8, "steps": 50, "n": 100}
LOSSES = {"train_loss": 0.2, "val_loss": 0.3, "base_val_loss": 0.9}
SCORES = {"val_accuracy": 0.8, "base_val_accuracy": 0.4}
FULL = {**HYPERPARAMETERS, **LOSSES, **SCORES, "eps_path": 0.01, "displacement": 2.0, "classes": 3}


@pytest.fixture(scope="module")
def whole(experts, tmp_path_factory):
    """The experts with all facts that are learned from on their cards."""
    folder, paths = tmp_path_factory.mktemp("whole"), []
    for path in experts:
        expert = load_expert(path)
        paths.append(folder / path.name)
        card = replace(expert.card, suite="tiny", **FULL)
        save_expert(paths[-1], replace(expert, card=card))
    return paths


@pytest.fixture(scope="module")
def mixed(whole, tmp_path_factory):
    """The same, the second without hyperparameters and without the name of its suite."""
    folder = tmp_path_factory.mktemp("mixed")
    expert = load_expert(whole[1])
    stripped = dict.fromkeys((*HYPERPARAMETERS, "suite"))
    save_expert(folder / "b.safetensors", replace(expert, card=replace(expert.card, **stripped)))
    return [whole[0], folder / "b.safetensors"]


def counted(monkeypatch):
    """The features that each fit learns from, in order."""
    fits = []

    class Counted(Boosting):
        def __call__(self, rows):
            fits.append(rows.names)
            return super().__call__(rows)

    monkeypatch.setattr(predict, "Boosting", partial(Counted, trees=8))
    return fits


def test_whole_cards_cost_one_fit_and_its_calibration(whole, table, monkeypatch, capsys):
    fits = counted(monkeypatch)
    flags = ["--table", str(table), "--method", "average,ties,task_arithmetic"]
    assert main(["predict", *map(str, whole), *flags]) == 0
    assert "unknown" not in capsys.readouterr().out
    # Of each of two outcomes: one fit, and one for each of the table's seven tasks.
    assert len(fits) == 2 * (1 + 7)


def test_a_task_of_which_less_is_known_is_told_by_its_own_fit(
    whole, mixed, table, monkeypatch, tmp_path, capsys
):
    before = predict_files(whole, RECIPES, table=table)
    fits = counted(monkeypatch)
    found = predict_files(mixed, RECIPES, table=table)
    assert found.metrics == predict_files(mixed, RECIPES, table=table).metrics
    first, second = before.metrics["merges"][0]["tasks"]
    assert set(found.metrics["unknown_of"]) == {second}
    assert found.metrics["unknown"] == found.metrics["unknown_of"][second]
    assert {"own_log_lr", "own_log_n", "own_log_epochs"} <= set(found.metrics["unknown"])
    assert {"own_log_lr" in names for names in fits} == {True, False}
    for old, new in zip(before.metrics["merges"], found.metrics["merges"], strict=True):
        assert list(new["tasks"]) == [first, second]
        # Its rows are predicted as if all were known of both.
        assert new["tasks"][first] == old["tasks"][first]
        for outcome in ("accuracy", "excess_error"):
            mean = np.mean([task[outcome]["value"] for task in new["tasks"].values()])
            assert new[outcome]["value"] == pytest.approx(mean)
            assert new[outcome]["low"] <= new[outcome]["value"] <= new[outcome]["high"]
    flags = ["--table", str(table), "--out", str(tmp_path / "told")]
    assert main(["predict", *map(str, mixed), *flags]) == 0
    page = (tmp_path / "told" / "report.html").read_text()
    assert f"unknown of {second!r}" in capsys.readouterr().out
    assert "features are unknown of" in page


def test_missing_scikit_learn_is_told_before_any_work(whole, table, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    monkeypatch.setattr(predict, "open_experts", lambda *_, **__: pytest.fail("it looked"))
    assert main(["predict", *map(str, whole), "--table", str(table)]) == 2
    error = capsys.readouterr().err
    assert 'needs scikit-learn: pip install -e ".[predict]"' in error
    assert error.count("\n") == 1


def test_cases_of_other_backbones_are_told(whole, table, tmp_path, capsys):
    flags = ["--table", str(table), "--out", str(tmp_path / "told")]
    assert main(["predict", *map(str, whole), *flags]) == 0
    # The table's backbone is x.
    line = "3 of the 3 nearest measured cases are of another one (x)"
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "told" / "predict.record.json").read_text())
    assert line in out
    assert "backbone" in next(text for text in out.splitlines() if "nearest measured" in text)
    assert line in (tmp_path / "told" / "report.html").read_text()
    assert record["metrics"]["backbone"] == "vit"
    assert {one["backbone"] for one in record["metrics"]["merges"][0]["nearest"]} == {"x"}


def test_the_nearest_merge_is_the_same_one(table):
    from mergekit_lit.search.predicting.learning import rows_of
    from mergekit_lit.search.predicting.table import read_table

    rows = rows_of(read_table(table), "accuracy", level="cards")
    own = rows.at(rows.merge == rows.merge[40])
    found = nearest(rows, own)
    assert rows.merge[found[0]] == rows.merge[40]
    assert len({rows.merge[place] for place in found}) == 3
