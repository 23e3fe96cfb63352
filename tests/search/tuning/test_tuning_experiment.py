"""The comparison of searches: grids that are scored once, and what is simulated on them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.search.tuning.loop import candidate_of
from mergekit_lit.search.tuning.pool import pool_of
from mergekit_lit.search.tuning.space import space_of

FOLDER = Path(__file__).parents[3] / "experiments"
BACKBONE = "timm/test_resnet@random:0"
FACTS = {"experts": 2.0, "log_relative_norm": -1.0, "group_cosine": 0.0}


@pytest.fixture(scope="module")
def script(experiment):
    return experiment("tuning")


@pytest.fixture
def settings():
    return OmegaConf.to_container(OmegaConf.load(FOLDER / "tuning.yaml"))


def grid_of(script, *, real=False, seed=0):
    """A grid of numbers: who is nearest to a scale of 0.6 has most images right."""
    names = ("task_arithmetic", "ties", "lines")
    spaces = {name: space_of(MERGE_METHODS.get(name), points=4) for name in names}
    pool = pool_of(spaces, ["recalibrate", "base"])
    draw = np.random.default_rng(seed)
    share = [0.9 - 0.2 * abs(c.config.get("scale", 1.0) - 0.6) for c in pool]
    right = draw.random((len(pool), 40)) < np.array(share)[:, None]
    return script.Grid(
        name=f"vit/{'real' if real else 'embedded'}/{seed}",
        backbone="vit",
        real=real,
        facts=FACTS,
        labels={"a": np.arange(40) % 4},
        pool=pool,
        val={"a": right},
        test=np.array(share),
        adapted=0.5,
        seconds=1.0,
    )


def row(*, real, tasks, backbone="vit", group="g"):
    keys = {"backbone": backbone, "suite": "s", "group": group, "real": real, "tasks": tasks}
    rest = {"task": "a", "merge": 0, "method": "average", "config": "{}", "test_accuracy": 0.5}
    return {**keys, **rest, **FACTS}


def test_every_strategy_keeps_to_the_budget_and_repeats_itself(script):
    pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    grid = grid_of(script)
    for name, (strategy, discard, _) in script.STRATEGIES.items():
        stand = script.Stand(grid, discard)
        runs = [script.searched(stand, strategy(stand, 3), 6) for _ in range(2)]
        assert [candidate_of(t).key for t in runs[0]] == [candidate_of(t).key for t in runs[1]], (
            name
        )
        assert sum(trial.images for trial in runs[0]) <= 6 * 40
        scored = [trial for trial in runs[0] if trial.state == "scored"]
        assert grid.on_val[script.chosen(stand, runs[0])] == max(trial.value for trial in scored)


def test_what_is_chosen_is_compared_with_the_grid(script):
    grid = grid_of(script)
    best = 1 + int(grid.on_val[1:].argmax())
    told = script.judged(grid, best)
    assert told["to_choice"] == told["on_val"] == 0
    assert told["to_best"] == pytest.approx(grid.test[1:].max() - grid.test[best])
    assert script.judged(grid, 0)["over_reference"] == 0
    found = script.compared([grid, grid_of(script, seed=1)], None, budget=3, draws=1)
    assert not any("with table" in name for name in found)
    text = script.told([grid, grid_of(script, seed=1)], found)
    assert "all (2 groups)" in text
    assert text.count("| whole grid | 0.00 [0.00, 0.00] |") == 2
    assert found["AdaMerging (test-time adaptation)"][grid.name]["over_reference"] == (
        pytest.approx(0.5 - grid.test[0])
    )


def test_a_prior_knows_no_row_of_the_group_and_a_real_one_no_real_row(script):
    table = [
        row(real=False, tasks="a"),
        row(real=False, tasks="a", backbone="resnet"),
        row(real=False, tasks="a+b", group="h"),
        row(real=True, tasks="c+d", group="k"),
    ]
    known = set(script.known_to(grid_of(script), table).group)
    assert known == {"resnet/s/g", "vit/s/h", "vit/s/k"}
    real = set(script.known_to(grid_of(script, real=True), table).group)
    assert real == {"resnet/s/g", "vit/s/h"}


def test_the_grids_are_of_about_400_candidates_of_8_methods(script, settings):
    works = script.works_of(settings, Path("out"))
    for work in works:
        assert 390 <= len(work.pool) <= 420
        assert len({each.method for each in work.pool}) == 8
        assert settings["budget"] <= 0.0515 * len(work.pool)
        assert work.job.pool.seed == 0
    assert len(works) == 8
    table = OmegaConf.to_container(OmegaConf.load(FOLDER / "merges.yaml"))
    assert table["seed"] not in settings["group_seeds"].values()


@pytest.mark.slow
def test_a_grid_is_made_once_and_read_again(
    script, settings, tiny_suite, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("cmaes")
    pool = {
        "suite": tiny_suite,
        "sizes": [2],
        "each": 1,
        "configurations": [{"lr": 0.01, "batch": 8, "n": 40, "steps": [2, 4]}],
    }
    tiny = settings | {
        "group_seeds": {BACKBONE: 1},
        "pools": {"embedded": pool},
        "methods": [{"method": "task_arithmetic"}, {"method": "ties"}],
        "grids": {
            BACKBONE: {"policies": ["recalibrate", "base"], "one": 3, "scale": 2, "other": 2}
        },
        "warmup_steps": 0,
        "val_images": 12,
        "test_images": 20,
        "effort": {"images": 8},
        "budget": 3,
        "draws": 1,
    }
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    OmegaConf.save(tiny, file)
    words = ["tuning.py", str(file), "--out", str(out), "--limit", "1"]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    assert "all (1 groups)" in capsys.readouterr().out
    (record,) = out.rglob("groups/*.json")
    made = record.stat().st_mtime_ns
    found = json.loads((out / "tuning.json").read_text())
    script.main()
    assert record.stat().st_mtime_ns == made
    assert json.loads((out / "tuning.json").read_text()) == found
    grid = script.read_grid(record)
    assert len(grid.pool) == len(grid.test) == 2 * (4 + 5)
    assert all(
        right.shape == (len(grid.pool), len(grid.labels[t])) for t, right in grid.val.items()
    )
    # At scale 0 every method is the base.
    zero = [i for i, c in enumerate(grid.pool) if c.config["scale"] == 0]
    for policy in ("recalibrate", "base"):
        same = [i for i in zero if grid.pool[i].batch_norm == policy]
        assert len(set(grid.on_val[same])) == 1
