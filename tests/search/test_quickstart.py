import csv
import json

import pytest
import torch

from mergekit_lit.cli import main
from mergekit_lit.core.expert_files import load_expert, load_merged
from mergekit_lit.core.records import Record
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging import merge
from mergekit_lit.search.candidates import WELL_KNOWN, chosen_methods, methods_at_hand
from mergekit_lit.search.quickstart import run_quickstart

BACKBONE = "vit@random:0"
# One without a scale, and one with.
METHODS = ("average", "task_arithmetic")


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_whole_path_writes_experts_merges_record_and_page(tmp_path, tiny_suite, capsys, jobs):
    out = tmp_path / "run"
    result = run_quickstart(
        backbone=BACKBONE,
        out=out,
        suite=tiny_suite,
        methods=METHODS,
        steps=4,
        lr=0.01,
        jobs=jobs,
    )
    assert [load_expert(path).card.steps for path in result.experts] == [4, 4]
    assert set(result.merged) == {"average", "task_arithmetic"}
    chosen = result.record.metrics["coefficients"]["task_arithmetic"]["chosen"]
    merged = load_merged(result.merged["task_arithmetic"])
    assert merged.facts["config"]["scale"] == chosen
    models = Record.read(result.record_path).metrics["models"]
    assert list(models) == ["average", "base", "experts", "task_arithmetic"]
    assert all(row["n"] == 30 for row in models["base"]["tasks"].values())
    assert models["average"]["val"] > 0
    assert models["task_arithmetic"]["val"] == max(
        result.record.metrics["coefficients"]["task_arithmetic"]["normalised_accuracy"]
    )
    with result.table_path.open() as file:
        table = {(row["model"], row["task"]): row for row in csv.DictReader(file)}
    assert len(table) == len(models) * (2 + 1)
    accuracy = models["average"]["tasks"]["stripes"]["accuracy"]
    assert float(table["average", "stripes"]["accuracy"]) == accuracy
    page = result.report_path.read_text("utf-8")
    assert page.count('class="curve gradient"') == 2
    assert "How λ was chosen" in page
    shown = capsys.readouterr().out
    assert "Accuracy by task" in shown
    assert "Report: " in shown


@pytest.mark.slow
def test_same_seed_same_scores(tmp_path, tiny_suite):
    def scores(name):
        result = run_quickstart(
            backbone=BACKBONE,
            out=tmp_path / name,
            suite=tiny_suite,
            methods=METHODS,
            steps=2,
            lr=0.01,
            jobs=1,
            quiet=True,
        )
        return result.record.metrics["models"], result.merged["average"].read_bytes()

    assert scores("first") == scores("second")


def test_quiet_prints_nothing_and_bad_input_writes_nothing(tmp_path, capsys):
    for wrong, error in (
        ({"steps": 0}, ValueError),
        ({"suite": "embeded8"}, KeyError),
        ({"jobs": 0}, ValueError),
        ({"tasks": ["mnits"]}, KeyError),
        ({"tasks": ["mnist", "mnist"]}, ValueError),
        ({"tasks": []}, ValueError),
        ({"methods": ["tise"]}, KeyError),
        ({"methods": []}, ValueError),
        ({"logger": "wanbd"}, ValueError),
    ):
        with pytest.raises(error):
            run_quickstart(out=tmp_path / "run", quiet=True, **wrong)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_unknown_names_are_told_with_the_nearest(tiny_suite):
    with pytest.raises(KeyError, match="Did you mean 'stripes'"):
        run_quickstart(suite=tiny_suite, tasks=["stripe"], quiet=True)
    with pytest.raises(KeyError, match="Did you mean 'ties'"):
        chosen_methods(["tise"], experts=2)


def test_methods_at_hand_need_no_images():
    names = {method.name for method in methods_at_hand(8)}
    assert set(WELL_KNOWN) <= names
    assert {method.facts["data"] for method in methods_at_hand(8)} <= {"none", "cards"}
    assert chosen_methods(["all"], experts=8) == tuple(sorted(names))
    assert chosen_methods(["ties", "average", "ties"], experts=8) == ("ties", "average")


def test_methods_for_two_experts_are_compared_on_two_alone():
    assert "slerp" in chosen_methods(["all"], experts=2)
    assert "slerp" not in chosen_methods(["all"], experts=8)
    with pytest.raises(ValueError, match="take 8 experts, but 'slerp' does not"):
        chosen_methods(["slerp"], experts=8)


def test_what_a_method_is_by_default_is_true_and_not_shown_twice(tiny_experts):
    declared = [method for method in MERGE_METHODS if "by_default" in method.facts]
    assert "weighted_average" in {method.name for method in declared}
    for method in declared:
        assert method.name not in chosen_methods(["all"], experts=3)
        one, other = (merge(tiny_experts, m) for m in (method.name, method.facts["by_default"]))
        assert all(torch.equal(one.shared[name], t) for name, t in other.shared.items())


@pytest.mark.slow
def test_the_command_speaks_json_of_some_tasks_in_their_order(tmp_path, tiny_suite, capfd):
    words = ["quickstart", f"--suite={tiny_suite}", "--tasks=stripes,dots", "--methods=average"]
    words += [f"--backbone={BACKBONE}", "--steps=2", "--lr=0.01", f"--out={tmp_path}", "--jobs=1"]
    assert main([*words, "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["config"]["tasks"] == ["stripes", "dots"]
    assert record["config"]["methods"] == ["average"]
    assert list(record["metrics"]["models"]["base"]["tasks"]) == ["stripes", "dots"]
    assert (tmp_path / "config.yaml").is_file()


@pytest.mark.slow
def test_wandb_gets_one_run_an_expert_and_one_of_the_results(tmp_path, tiny_suite):
    run_quickstart(
        backbone=BACKBONE,
        out=tmp_path,
        suite=tiny_suite,
        tasks=["dots"],
        methods=["average"],
        steps=2,
        lr=0.01,
        jobs=1,
        logger="wandb",
        quiet=True,
    )
    runs = [path.parents[1].name for path in tmp_path.glob("logs/*/wandb/offline-run-*")]
    assert sorted(runs) == ["dots", "results"]
