"""The search on real tiny experts: against brute force, killed, in several ways, and refused."""

import json
from dataclasses import replace

import pytest

from mergekit_lit.core.expert_files import load_merged
from mergekit_lit.core.records import Record
from mergekit_lit.lit.suite_data import MergeDataModule
from mergekit_lit.search.tuning import bench as benches
from mergekit_lit.search.tuning import loading
from mergekit_lit.search.tuning.plan import TuningPlan
from mergekit_lit.search.tuning.scores import Scorer
from mergekit_lit.search.tuning.trials import TrialLog
from mergekit_lit.search.tuning.tune import tune_files
from mergekit_lit.stages.evaluate import evaluate_files
from mergekit_lit.stages.merge import merge_files
from mergekit_lit.stages.recipes import Recipe

SCALES = {"scale": [0.0, 0.3, 0.8, 1.5]}


def tuned(family, out, **options):
    plan = {"method": ["task_arithmetic"], "space": SCALES, "metric": "accuracy", **options}
    return tune_files(
        family.paths, out=out, plan=TuningPlan(**plan), calibration=family.calibration, quiet=True
    )


def lines_of(out):
    """The trials of a folder without what differs from run to run."""
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()[1:]]
    return [{**line, "seconds": None, "cpu_seconds": None} for line in lines]


def evaluated(family, config, tmp_path, policy):
    """Accuracy and loss by task on val, by the commands merge and evaluate."""
    out = tmp_path / "brute.safetensors"
    recipe = Recipe(method="ties", config=config, batch_norm=policy)
    merge_files(family.paths, out=out, recipe=recipe, calibration=family.calibration)
    options = family.calibration.options
    data = MergeDataModule(
        family.calibration.suite,
        split="val",
        val_share=options.val_share,
        reserve=options.reserve,
    )
    record = evaluate_files([out], data=data)
    ((_, told),) = record.metrics["models"].items()
    return told["tasks"]


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("vits", "base"),
        pytest.param("resnets", "recalibrate-per-task", marks=pytest.mark.slow),
    ],
)
def test_a_grid_equals_merging_and_evaluating_each_point(request, tmp_path, kind, policy):
    family = request.getfixturevalue(kind)
    space = {"scale": [0.3, 1.5], "density": [1.0]}
    result = tuned(
        family,
        tmp_path / "run",
        method=["ties"],
        space=space,
        metric="cross_entropy",
        discard=None,
        batch_norm=[policy],
        candidate_images=family.calibration.images,
    )
    trials = lines_of(tmp_path / "run")
    assert [trial["config"] for trial in trials] == [
        {"density": 1.0, "scale": scale} for scale in (0.3, 1.5)
    ]
    for trial in trials:
        rows = evaluated(family, trial["config"], tmp_path, policy)
        for task, row in rows.items():
            assert trial["by_task"][task] == pytest.approx(-row["loss"], rel=1e-5)
    chosen = max(trials, key=lambda trial: trial["value"])
    found = result.record.metrics["methods"]["ties"]
    assert found["chosen"] == chosen["config"]
    best = load_merged(result.best)
    assert best.facts["config"]["scale"] == chosen["config"]["scale"]
    assert result.record.metrics["best"]["value"] == pytest.approx(chosen["value"], rel=1e-5)


def test_a_killed_search_goes_on_to_the_same_end(vits, tmp_path, monkeypatch):
    first = tuned(vits, tmp_path / "whole", discard=0.6).record.metrics["methods"]
    assert first["task_arithmetic"]["discarded"] > 0
    assert first["task_arithmetic"]["regret"] is None
    last = tuned(vits, tmp_path / "whole", discard=0.6, regret=True).record.metrics["methods"]
    assert last["task_arithmetic"]["regret"]["regret"] >= 0
    whole = lines_of(tmp_path / "whole")
    add = TrialLog.add

    def killed(log, trial):
        if len(log.trials) == 2:
            raise KeyboardInterrupt
        add(log, trial)

    monkeypatch.setattr(TrialLog, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        tuned(vits, tmp_path / "killed", discard=0.6, regret=True)
    monkeypatch.undo()
    log = tmp_path / "killed" / "trials.jsonl"
    begun = log.read_bytes()
    log.write_bytes(begun + b'{"method": "task_arithmetic", "numb')
    races = []
    race = benches.race
    monkeypatch.setattr(benches, "race", lambda *a, **k: races.append(1) or race(*a, **k))
    tuned(vits, tmp_path / "killed", discard=0.6, regret=True)
    assert log.read_bytes().startswith(begun)
    assert lines_of(tmp_path / "killed") == whole
    # Beside the trials that were left: the merge that was written, and the base.
    assert len(races) == len(whole) - 2 + 2
    best = [(tmp_path / name / "best.safetensors").read_bytes() for name in ("whole", "killed")]
    assert best[0] == best[1]


def test_several_methods_are_compared_and_one_module_serves_all(vits, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(loading, "Scorer", lambda *a, **k: made.append(Scorer(*a, **k)) or made[-1])
    result = tuned(vits, tmp_path, method=["task_arithmetic", "average", "tall_masks"], points=3)
    assert len(made) == 1
    metrics = result.record.metrics
    assert metrics["methods"]["average"]["space"] == {}
    assert metrics["methods"]["average"]["trials"] == 1
    values = {name: found["value"] for name, found in metrics["methods"].items()}
    assert metrics["best"]["method"] == max(values, key=values.get)
    assert metrics["best"]["value"] == max(values.values())
    zero = next(line for line in lines_of(tmp_path) if line["config"] == {"scale": 0.0})
    assert metrics["base"]["value"] == pytest.approx(zero["value"], abs=1e-6)
    assert metrics["methods"]["tall_masks"]["trials"] == 3
    table = (tmp_path / "trials.csv").read_text().splitlines()
    assert len(table) == 1 + len(lines_of(tmp_path))
    record = Record.read(result.record_path)
    assert (record.stage, record.config["metric"]) == ("tune", "accuracy")
    assert len(record.inputs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vits", "resnets"])
def test_who_looks_at_images_sees_those_of_the_merge_that_is_written(request, tmp_path, kind):
    family = request.getfixturevalue(kind)
    result = tuned(
        family,
        tmp_path,
        method=["regmean"],
        space={"off_diagonal": [0.9, 0.1], "samples": [8]},
        then=[("repair", {"samples": 4})] if kind == "vits" else [],
        candidate_images=family.calibration.images,
        metric="cross_entropy",
    )
    found = result.record.metrics
    assert found["best"]["value"] == pytest.approx(found["methods"]["regmean"]["value"], rel=1e-5)


def test_what_cannot_be_searched_is_refused_before_anything_is_written(vits, tmp_path):
    for options, error, message in (
        ({"method": ["tise"]}, KeyError, "Did you mean 'ties'"),
        ({"method": []}, ValueError, "`method` must name at least one"),
        ({"method": ["adamerging"]}, ValueError, "must not look at test images"),
        ({"method": ["slerp", "ties"], "space": {"dens": [1]}}, KeyError, "Did you mean 'density'"),
        ({"then": [("line", {})]}, KeyError, "Did you mean 'lines'"),
        ({"then": [("equal_norms", {"to": "max"})]}, TypeError, "one of 'min'"),
        ({"search": "gird"}, KeyError, "Did you mean 'grid'"),
        ({"metric": "acuracy"}, KeyError, "Did you mean 'accuracy'"),
        ({"batch_norm": ["bse"]}, KeyError, "Did you mean 'base'"),
        ({"trials": 0}, ValueError, "`trials` must be at least 1"),
        ({"budget": 0}, ValueError, "`budget` must be at least 1"),
        ({"budget_seconds": -1.0}, ValueError, "`budget_seconds` must be above 0"),
        ({"budget": 5, "search": "optuna"}, ValueError, "`search` is for methods that are searche"),
        ({"budget": 5, "trials": 5}, ValueError, "`trials` is for methods that are searched one"),
        ({"batch_norm": ["base", "average"]}, ValueError, "must have a budget, but has none"),
        ({"batch_norm": []}, ValueError, "must name at least one BatchNorm policy"),
        ({"table": tmp_path / "no"}, ValueError, "a `table` must have a budget"),
        ({"budget": 5, "table": tmp_path / "no"}, FileNotFoundError, "No table of merges"),
        ({"candidate_images": 1}, ValueError, "`candidate_images` must be at least 2"),
        ({"discard": 1.0}, ValueError, r"`discard` must lie in \(0, 1\)"),
        ({"objective": "weighted", "weights": {"dot": 1.0}}, KeyError, "Did you mean 'dots'"),
        ({"device": "gpu"}, ValueError, "`device` must be one of this machine"),
    ):
        with pytest.raises(error, match=message):
            tuned(vits, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_tasks_without_validation_images_are_refused(vits, tmp_path):
    options = replace(vits.calibration.options, val_share=0.0)
    family = replace(vits, calibration=replace(vits.calibration, options=options))
    with pytest.raises(ValueError, match="The val split of 'dots' must hold an image"):
        tuned(family, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_search_is_refused_and_kept(vits, tmp_path):
    tuned(vits, tmp_path, space={"scale": [0.3]})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="`out` must be a new folder or that of this very search"):
        tuned(vits, tmp_path, space={"scale": [0.3]}, seed=1)
    fewer = replace(vits, paths=vits.paths[:1])
    with pytest.raises(ValueError, match="had other experts"):
        tuned(fewer, tmp_path, space={"scale": [0.3]})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_budget_is_spent_over_methods_and_policies_at_once(vits, tmp_path):
    options = {
        "method": ["ties", "average"],
        "space": {"scale": [0.3, 0.8], "density": [0.2, 1.0]},
        "budget": 4,
        "batch_norm": ["base", "average"],
        "discard": None,
    }
    result = tuned(vits, tmp_path / "a", **options)
    lines = lines_of(tmp_path / "a")
    assert (lines[0]["method"], lines[0]["config"]) == ("task_arithmetic", {"scale": 0.3})
    assert len(lines) == 4
    # A ViT has no BatchNorm: one policy is enough.
    assert {line["batch_norm"] for line in lines} == {"base"}
    metrics = result.record.metrics
    assert metrics["best"]["value"] == max(line["value"] for line in lines)
    assert metrics["best"]["value"] >= lines[0]["value"]
    assert (metrics["spent"]["evaluations"], metrics["spent"]["trials"]) == (4.0, 4)
    tuned(vits, tmp_path / "b", **options, regret=True)
    assert lines_of(tmp_path / "b") == lines
    with pytest.raises(ValueError, match="`out` must be a new folder"):
        tuned(vits, tmp_path / "a", **{**options, "budget": None, "batch_norm": ["base"]})


@pytest.mark.slow
def test_a_resnet_is_searched_over_policies(resnets, tmp_path):
    policies = ["recalibrate", "average", "base"]
    result = tuned(resnets, tmp_path, budget=12, batch_norm=policies, points=2)
    lines = lines_of(tmp_path)
    assert {line["batch_norm"] for line in lines} == set(policies)
    best = result.record.metrics["best"]
    facts = load_merged(result.best).facts
    assert facts["batch_norm"] == best["batch_norm"]


@pytest.mark.slow
def test_optuna_searches_and_more_trials_go_on(vits, tmp_path):
    pytest.importorskip("optuna")
    options = {"search": "optuna", "space": {}, "method": ["task_arithmetic"]}
    tuned(vits, tmp_path / "few", trials=3, **options)
    few = lines_of(tmp_path / "few")
    tuned(vits, tmp_path / "few", trials=5, **options)
    tuned(vits, tmp_path / "more", trials=5, **options)
    more = lines_of(tmp_path / "more")
    assert lines_of(tmp_path / "few") == more
    assert more[:3] == few
    assert len({trial["config"]["scale"] for trial in more}) == 5


@pytest.mark.slow
def test_a_compiled_model_goes_on_with_a_search_and_gives_the_same_values(resnets, tmp_path):
    options = {"metric": "cross_entropy", "discard": None}
    plain = tuned(resnets, tmp_path / "plain", **options)
    tuned(resnets, tmp_path / "both", trials=2, **options)
    begun = lines_of(tmp_path / "both")
    both = tuned(resnets, tmp_path / "both", compile=True, **options)
    lines = lines_of(tmp_path / "both")
    assert lines[:2] == begun
    values = {line["config"]["scale"]: line["value"] for line in lines}
    expected = {line["config"]["scale"]: line["value"] for line in lines_of(tmp_path / "plain")}
    assert values == pytest.approx(expected, rel=1e-4)
    assert plain.record.metrics["best"]["value"] == pytest.approx(
        both.record.metrics["best"]["value"], rel=1e-4
    )
