"""The stability experiment runs on a tiny suite, goes on where it stopped, and tells its tables."""

import gzip
import math
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mergekit_lit.core.records import Record

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
    told = "| 0.1 | 6 of 6 | 3.00 (3.00 to 3.00) | 1.00 | - | 0.83 | 2.00 (2.00 to 2.00) |"
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
        assert (
            "| 1.50 [1.50, 1.50] | 1 to 2 | agree | 1.00 |" in cells["learning rate", regime, "1"]
        )
        assert "| -1.00 [-1.00, -1.00] | 0.5 to 1 | disagree |" in cells["batch", regime, "16"]
        assert "| 0.50 [0.50, 0.50] | + | agree |" in cells["effective steps", regime, "1"]
    # Every expert has the same number of images.
    assert not [key for key in cells if key[0] == "training images"]
    assert len(list(exponents.flat(rows))) == 2 * len(rows)


def test_the_table_of_experts_tells_what_the_records_do(experiment, tmp_path, monkeypatch, capsys):
    tables, exponents = experiment("stability_tables"), experiment("stability_exponents")
    steps = (1, 2, 40)
    rows = [
        {**row(k, lr * k, 2 * lr * k), "lr": lr, "backbone": "vit", "seed": 0}
        for lr in (0.25, 0.5)
        for k in steps
    ]
    text = experiment("testbed").csv_of(list(exponents.flat(rows)), ("backbone",))
    table = tmp_path / "stability.csv.gz"
    table.write_bytes(gzip.compress(text.encode()))
    words = ["stability_tables.py", str(table), "--figures", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert experiment("inputs").command(tables.main) == 0
    assert capsys.readouterr().out == f"\n### vit\n\n{tables.told(rows)}\n"
    assert "rounding twin" in (tmp_path / "stability_vit.svg").read_text("utf-8")


def test_the_committed_table_holds_what_the_tables_need(experiment):
    tables = experiment("stability_tables")
    experts = tables.read(FOLDER / "records/stability_seed0.csv.gz")
    rows = tables.nested([each for each in experts if each["backbone"] == "resnet"])
    told = tables.told(rows)
    assert "| learning rate | below one epoch | 1 | 1.31 [0.35, 2.26] | 1 to 2 |" in told
    assert (
        "| 0.001 | 11 of 20 | 1.95 (1.71 to 2.23) | 0.88 | 0.89 | 0.78 | 1.65 (0.57 to 3.14) |"
        in told
    )


def test_the_mean_within_steps_is_rounded_once(experiment):
    """Correlations of .886, .886 and .943 (n = 6) have the mean .90, not the .91 of .89 and .94."""
    tables = experiment("stability_tables")
    orders = {1: (1, 2, 4, 3, 6, 5), 2: (2, 1, 4, 3, 5, 6), 3: (1, 2, 3, 4, 6, 5)}
    rows = []
    for steps, order in orders.items():
        made = row(steps, 0.01)
        made["experts"] = {f"{i}": expert(float(i + 1)) for i in range(6)}
        gaps = {f"{i}": float(order[i]) for i in range(6)}
        made["gaps"] = {"expert": gaps, "merged": gaps, "base": dict.fromkeys(gaps, 0.0)}
        rows.append(made)
    (line,) = [each for each in tables.ranks(rows).splitlines() if each.startswith("| eps, one")]
    within = (1 - 24 / 210 + 1 - 24 / 210 + 1 - 12 / 210) / 3
    assert line.split("|")[3].strip() == f"{within:.2f}"
    assert math.isclose(within, 0.9048, abs_tol=1e-4)


SETTINGS = {
    "backbones": ["vit", "resnet"],
    "tasks": ["dots", "stripes"],
    "seeds": [0],
    "images": 16,
    "twins": [2, 1],
    "replaced": [1, 4],
    "configurations": [{"lr": 0.01, "batch": 8, "steps": [3, 6]}],
}


@pytest.fixture
def call(command, tiny_suite):
    """Runs the command on changed settings; a record that is to be made is rows made up."""

    def make(run):
        rows = [row(steps, 0.01, 0.04) for steps in run.steps]
        rows = [{**each, "seed": run.seed, "lr": run.lr} for each in rows]
        config = {"config": run.config, "metrics": {"rows": rows}}
        Record(stage="stability", name=run.name, **config).write(run.record)
        return run.record

    def run(changed, *words):
        settings = {"suite": tiny_suite, **SETTINGS, **changed}
        return command("stability", settings, *words, make=make)

    return run


def test_the_table_holds_every_backbone_that_is_finished(call, tmp_path, capsys):
    for backbone in ("resnet", "vit", "resnet"):
        assert call({}, "--backbones", backbone) == 0
        assert f"### {backbone}" in capsys.readouterr().out
    rows = (tmp_path / "out/some.csv").read_text().splitlines()[1:]
    assert [line.partition(",")[0] for line in rows] == ["vit"] * 4 + ["resnet"] * 4
    assert call({"images": 8}) == 2
    assert "`images` (16 there, 8 now). Choose another --out." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "words", "told"),
    [
        ({"seeds": None}, [], "must give `seeds`"),
        ({"twins": [2]}, [], "twins"),
        ({"twins": [0, 1]}, [], "`twins` of "),
        ({"replaced": [1, 65]}, [], "`replaced` must be at most 44, the images of task 'dots'"),
        ({"configurations": [{"lr": 0.01, "batch": 8, "steps": 0}]}, [], "`steps` of a conf"),
        ({"configurations": [{"lr": 0.01, "batch": 8, "steps": [6, 3]}]}, [], "each above the"),
        ({"tasks": ["dotts"]}, [], "named 'dotts'. Did you mean 'dots'?"),
        ({}, ["--backbones", "vitt"], "vitt"),
    ],
)
def test_wrong_input_is_refused_before_any_training(call, tmp_path, capsys, changed, words, told):
    assert call(changed, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stability.py: error: ")
    assert told in line
    assert not (tmp_path / "out").exists()


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
