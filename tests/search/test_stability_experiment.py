"""The stability experiment runs on a tiny suite, goes on where it stopped, and tells its tables."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

FOLDER = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def script(experiment):
    return experiment("stability")


def test_the_file_covers_below_one_epoch_and_many(script):
    settings = OmegaConf.to_container(OmegaConf.load(FOLDER / "stability.yaml"))
    runs = list(script.runs_of(settings, "vit", Path("out")))
    assert len(runs) == len(settings["configurations"]) == 6
    assert len({run.name for run in runs}) == len(runs)
    centre = runs[0].steps
    assert min(centre) * 32 < 1376 < max(centre) * 32 / 10


def test_the_terms_are_measured_on_experts_that_this_makes(script):
    settings = OmegaConf.to_container(OmegaConf.load(FOLDER / "stability.yaml"))
    terms = OmegaConf.load(FOLDER / "terms.yaml")
    kept = next(run for run in script.runs_of(settings, "vit", Path()) if run.export)
    names = [f"vit/mnist-{kept.name}/mnist-step{steps}.safetensors" for steps in kept.steps]
    assert terms.experts.format(backbone="vit", task="mnist", steps=terms.steps) in names


def expert(eps2, *, above=True, **facts):
    return {
        "eps2": {"1": eps2, "16": 2 * eps2},
        "above": {"1": above, "16": above},
        "rounding": 0.0,
        "eps_path": 3 * eps2**0.5,
        "displacement": 1.0,
        "train_accuracy": 0.5,
        "n": 40,
        **facts,
    }


def row(steps, *eps2, above=True):
    tasks = "ab"[: len(eps2)]
    gaps = {task: value**0.5 for task, value in zip(tasks, eps2, strict=True)}
    return {
        "lr": 0.1,
        "batch": 8,
        "train_share": 1.0,
        "steps": steps,
        "experts": {t: expert(e, above=above) for t, e in zip(tasks, eps2, strict=True)},
        "gaps": {
            "expert": {task: 1 + gap for task, gap in gaps.items()},
            "merged": {task: 1 - gap for task, gap in gaps.items()},
            "base": dict.fromkeys(tasks, 1.0),
        },
    }


def test_the_tables_tell_what_the_rows_hold(experiment):
    """Gaps of experts are made to grow with eps, those of merges to fall."""
    tables = experiment("stability_tables")
    rows = [row(1, 0.01, 0.04), row(1, 0.09, 0.16), row(2, 0.25, 0.36)]
    assert "| eps, one sample | 1.00 | 1.00 | -1.00 | - |" in tables.ranks(rows)
    # Training accuracy never differs, so it ranks nothing.
    assert "| training accuracy (null) | - | - | - | - |" in tables.ranks(rows)
    told = "| 0.1 | 6 of 6 | 3.00 (3.00 to 3.00) | 1.00 | 2.00 (2.00 to 2.00) |"
    assert told in tables.calibration(rows)
    assert "| rate 0.1, batch 8 | 2 | 0.55 | 0.778 | 0 | 2 of 2 | 1.65 | 0.550 |" in (
        tables.distances(rows)
    )
    lost = [row(1, 0.01, 0.04, above=False), *rows[1:]]
    assert tables.ranks(lost).startswith("4 experts and 2 merges are measured.")


def test_exponents_are_those_that_the_rows_were_made_with(experiment):
    """eps = lr^1.5 sqrt(K) / b: a power each, of measured experts alone, and a regime each."""
    exponents = experiment("stability_exponents")
    rows = []
    for lr in (0.1, 0.2):
        for batch in (2, 4):
            for steps in (5, 10, 40, 80):
                eps2 = lr**3 * steps / batch**2
                made = row(steps, eps2, 4 * eps2)
                rows.append({**made, "lr": lr, "batch": batch, "backbone": "vit"})
    far = row(5, 1e6, 1e6, above=False)
    told = exponents.exponents([*rows, {**far, "lr": 0.1, "batch": 2}]).splitlines()
    cells = {tuple(c.strip() for c in line.strip("|").split("|")[:3]): line for line in told}
    for regime in ("below one epoch", "beyond"):
        assert "| 1.50 [1.50, 1.50] | 2 | disagree | 1 |" in cells["learning rate", regime, "1"]
        assert "| -1.00 [-1.00, -1.00] | 1 | disagree |" in cells["batch", regime, "16"]
        assert "| 0.50 [0.50, 0.50] | + | agree |" in cells["effective steps", regime, "1"]
    # Every expert has the same number of images.
    assert not [key for key in cells if key[0] == "training images"]
    assert len(list(exponents.flat(rows))) == 2 * len(rows)


@pytest.mark.slow
def test_runs_become_tables(script, tiny_suite, tmp_path, monkeypatch, capsys):
    settings = {
        "suite": tiny_suite,
        "backbones": ["vit@random:0"],
        "tasks": ["dots", "stripes"],
        "seeds": [0],
        "images": 16,
        "twins": [2, 1],
        "replaced": [1, 4],
        "configurations": [
            {"lr": 0.01, "batch": 8, "steps": [3, 6], "export": True},
            {"lr": 0.003, "batch": 8, "steps": [3]},
        ],
    }
    file = tmp_path / "tiny.yaml"
    OmegaConf.save(settings, file)
    words = ["stability.py", str(file), "--out", str(tmp_path / "out"), "--jobs", "1"]
    words += ["--figures", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    first = capsys.readouterr().out
    assert first.count("| rate 0.01, batch 8 |") == 2
    assert first.count("| rate 0.003, batch 8 |") == 1
    assert "rounding twin" in (tmp_path / "stability_vit@random:0.svg").read_text("utf-8")
    table = (tmp_path / "out/tiny.csv").read_text("utf-8").splitlines()
    assert len(table) == 1 + 3 * len(settings["tasks"])
    twins = tmp_path / "out/vit@random:0/dots-lr0.01-b8-0/dots-step6.twins"
    assert len(list(twins.glob("*.safetensors"))) == 3
    script.main()
    # Nothing is made again: the paths of what is made are not told.
    assert capsys.readouterr().out == first[first.index("\n###") :]
