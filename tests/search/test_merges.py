"""The benchmark of merges: its design, features that see no outcome, and a run that goes on."""

import json
import math
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from mergekit_lit.core.files import file_hash, read_json
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.data.suites import load_suite
from mergekit_lit.models.backbones import load_base
from mergekit_lit.search.predicting.columns import KEYS, OUTCOMES
from mergekit_lit.search.predicting.table import COLUMNS, feature_names, read_table

FOLDER = Path(__file__).parents[2] / "experiments"
BACKBONE = "timm/test_resnet@random:0"


@pytest.fixture(scope="module")
def script(experiment):
    return experiment("merges")


@pytest.fixture
def settings():
    return OmegaConf.to_container(OmegaConf.load(FOLDER / "merges.yaml"))


@pytest.fixture
def tiny(settings, tiny_suite):
    pool = {
        "suite": tiny_suite,
        "sizes": [2],
        "each": 1,
        "configurations": [
            {"lr": 0.01, "batch": 8, "n": 40, "steps": [2, 4]},
            {"lr": 0.003, "batch": 8, "n": 30, "steps": [2]},
        ],
    }
    small = {"micro_batches": 2, "batch": 8, "hessian_images": 4, "images": 8}
    return settings | {
        "backbones": [BACKBONE],
        "pools": {"embedded": pool},
        "methods": [{"method": "ties"}, {"method": "lines"}],
        "warmup_steps": 0,
        "effort": small,
        "test_images": 20,
        "val_images": 10,
    }


def test_the_design_is_balanced_and_the_same_everywhere(script, settings):
    jobs = script.jobs_of(settings, Path("out"))
    assert jobs == script.jobs_of(settings, Path("out"))
    own = [job for job in jobs if job.pool.backbone == "resnet"]
    assert [job.group for job in own] == [j.group for j in jobs if j.pool.backbone == "vit"]
    kinds = Counter((len(job.group.members), job.group.uniform) for job in own)
    assert len(set(kinds.values())) == 1
    assert set(kinds) == {(size, alike) for size in range(2, 9) for alike in (True, False)}
    seen = [task for job in own for task, _ in job.group.members]
    counts = Counter(seen).values()
    assert max(counts) - min(counts) <= 6
    assert len({job.group.name for job in own}) == len(own)
    for job in own:
        tasks, cells = zip(*job.group.members, strict=True)
        assert len(set(tasks)) == len(tasks)
        assert not job.group.uniform or len(set(cells)) == 1
        (first, _), (second, arguments) = job.group.merges[:2]
        assert (first, second, arguments) == ("average", "task_arithmetic", {"scale": 0.3})
        assert len(job.group.merges) == 8
    drawn = Counter(method for job in own for method, _ in job.group.merges[2:])
    assert len(drawn) >= 10
    assert max(drawn.values()) - min(drawn.values()) <= 6


def test_tasks_that_a_base_has_seen_are_left_out(script):
    tasks = script.unseen("embedded20")
    suite = load_suite("embedded20")
    assert tasks
    assert all(not suite.task(name).seen_by for name in tasks)
    assert set(suite.names) - set(tasks) == {t.name for t in suite.tasks if t.seen_by}


def test_configurations_lie_in_the_declared_ranges(script, settings):
    merges = [merge for job in script.jobs_of(settings, Path("out")) for merge in job.group.merges]
    scales = {config["scale"] for method, config in merges if method == "ties"}
    assert len(scales) > 5
    for method, config in merges:
        for name, (low, high) in MERGE_METHODS.get(method).facts.get("search", {}).items():
            assert low <= config[name] <= high
            assert name != "scale" or config[name] > 0
        json.dumps(config)


def test_a_pool_too_small_is_refused(script, settings, tiny_suite):
    with pytest.raises(ValueError, match="must hold 8 tasks for the largest group, but holds 2"):
        script.jobs_of(settings, Path("out"), suite=tiny_suite)


def scrambled(suite, folder):
    """Return a copy of a suite whose test images and labels are noise."""
    shutil.copytree(suite, folder)
    draw = np.random.default_rng(5)
    for path in folder.glob("*.npz"):
        parts = dict(np.load(path))
        test = parts["split"] == 1
        parts["x"][test] = draw.integers(0, 256, parts["x"][test].shape)
        parts["y"][test] = draw.permutation(parts["y"][test])
        np.savez(path, **parts)
    return str(folder)


def test_no_feature_depends_on_test_images(
    script, tiny, resnets, tmp_path, monkeypatch, tiny_suite
):
    by_task = {path.stem: path for path in resnets.paths}
    monkeypatch.setattr(script, "expert_file", lambda _, task, __: by_task[task])
    monkeypatch.setattr(script, "load_base", lambda spec: load_base(spec, image_size=32))
    (job, _) = script.jobs_of({**tiny, "always": tiny["always"][:1], "drawn": 1}, tmp_path)
    other = replace(job, pool=replace(job.pool, suite=scrambled(tiny_suite, tmp_path / "noise")))
    plain, noisy = list(script.rows_of(job)), list(script.rows_of(other))
    assert len(plain) == 2 * 2
    assert all(set(row) == {column.name for column in COLUMNS} for row in plain)
    for one, two in zip(plain, noisy, strict=True):
        for name in feature_names("probe"):
            assert one[name] == two[name] or (math.isnan(one[name]) and math.isnan(two[name])), name
        # They do look at these images where they should.
        assert one["test_loss"] != two["test_loss"]
        assert one["test_excess_error"] == one["test_loss"] - one["test_expert_loss"]
    known = [name for name in feature_names("probe") if not math.isnan(plain[0][name])]
    assert {"survival", "gradient2", "probe_val_accuracy"} <= set(known)


@pytest.mark.slow
def test_a_run_becomes_a_table_and_goes_on(script, tiny, tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    OmegaConf.save(tiny, file)

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["merges.py", str(file), "--out", str(out), *more])
        script.main()
        return capsys.readouterr().out

    assert "8 rows of 1 groups" in run("--limit", "1")
    first = sorted(out.rglob("groups/*.json"))
    before = [path.stat().st_mtime_ns for path in first]
    assert "16 rows of 2 groups" in run()
    assert [path.stat().st_mtime_ns for path in first] == before
    rows = read_table(out / "merges.parquet")
    told = read_json(out / "merges.json")
    assert told["sha256"] == file_hash(out / "merges.parquet")
    assert (told["rows"], told["merges"], told["groups"]) == (16, 8, 2)
    assert {row["method"] for row in rows} == {"average", "task_arithmetic", "ties", "lines"}
    assert sum(row["uniform"] for row in rows) == 8
    assert list(rows[0]) == [column.name for column in COLUMNS]
    assert not any(row["real"] for row in rows)
    average = next(row for row in rows if row["method"] == "average")
    assert not [column.name for column in OUTCOMES if average[column.name] is None]
    assert {column.name for column in KEYS} <= set(average)
    (record,) = (read_json(path) for path in first)
    assert record["config"]["group"]["members"]


def test_columns_are_printed(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["merges.py", "--columns"])
    script.main()
    assert "| `test_excess_error` | outcome |" in capsys.readouterr().out
