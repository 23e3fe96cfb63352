"""Tests of exponents, verdicts and tables of the sweep, on rows whose exponents are known."""

import csv
import gzip
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

FOLDER = Path(__file__).parents[2] / "experiments"
GROUPS = ("a+b", "a+c", "a+d", "b+c", "b+d")


@pytest.fixture(scope="module")
def exponents(experiment):
    return experiment("exponents")


@pytest.fixture(scope="module")
def claims(experiment):
    return experiment("claims")


@pytest.fixture(scope="module")
def script(experiment):
    return experiment("hyperparameters_report")


def row(seed=0, lr=0.01, batch=32.0, share=1.0, steps=10.0, group="a+b", noise=0.0):
    """Return a row with eps ~ lr^2 steps, displacement ~ lr, and a loss that is U-shaped in lr."""
    n = 1000.0 * share
    level = 1.0 + GROUPS.index(group)
    eps = level * lr**2 * steps * math.exp(noise)
    return {
        "backbone": "net",
        "schedule": "constant",
        "group": group,
        "size": 2.0,
        "seed": seed,
        "lr": lr,
        "batch": batch,
        "train_share": share,
        "steps": steps,
        "n": n,
        "travel": lr * steps,
        "displacement": lr * level,
        "eps_path": eps,
        "drift": lr**3,
        "merged_noise": lr**2 / batch,
        "delta2_path": eps**2,
        "generalization_path": eps,
        "merged_gradient": -lr,
        "total_path": lr,
        "gap": 0.3 + lr,
        "base_gap": 0.2,
        "base_test_loss": 1.5,
        "test_loss": 1 + math.log(lr / 0.01) ** 2,
        "train_loss": 1.0,
        "accuracy": 0.5,
        "experts_train_loss": lr,
        "experts_test_loss": lr,
        "experts_accuracy": 1 - lr,
    }


def rows_of(seeds=(0,), noise=0.0):
    draw = np.random.default_rng(0)
    return [
        row(seed, lr, batch, share, steps, group, noise * draw.standard_normal())
        for seed in seeds
        for lr, batch, share in [
            *((lr, 32.0, 1.0) for lr in (0.003, 0.01, 0.03)),
            (0.01, 8.0, 1.0),
            (0.01, 32.0, 0.5),
        ]
        for steps in (10.0, 20.0, 100.0)
        for group in GROUPS
    ]


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
@pytest.mark.parametrize(
    ("factor", "quantity", "slope"),
    [
        ("learning rate", "eps_path", 2.0),
        ("learning rate", "displacement", 1.0),
        ("effective steps", "eps_path", 1.0),
        ("batch", "merged noise", -1.0),
        ("batch", "eps_path", 0.0),
        ("training images", "eps_path", 0.0),
    ],
)
def test_exponents_of_power_laws_are_exact(exponents, seeds, factor, quantity, slope):
    rows = exponents.varying(rows_of(seeds), factor)
    found, (low, high) = exponents.measured(rows, factor, quantity)
    assert found == pytest.approx(slope, abs=1e-9)
    assert low == pytest.approx(high, abs=1e-9)


def test_the_interval_holds_the_truth_under_noise(exponents):
    rows = exponents.varying(rows_of((0, 1, 2), noise=0.2), "learning rate")
    found, (low, high) = exponents.measured(rows, "learning rate", "eps_path")
    assert low < 2.0 < high
    assert high - low < 1
    assert low < found < high


def test_few_groups_of_one_seed_make_no_interval(claims, exponents):
    few = [row for row in rows_of(noise=0.2) if row["group"] != "b+d"]
    found, bounds = exponents.measured(few, "learning rate", "eps_path")
    assert bounds is None
    assert claims.verdict(found, bounds, 2.0) == "undecided"
    assert exponents.measured(rows_of(noise=0.2), "learning rate", "eps_path")[1] is not None


def test_rows_that_do_not_know_a_number_do_not_count(exponents):
    rows = exponents.varying(rows_of(), "effective steps")
    lost = {**rows[0], "travel": math.nan, "eps_path": 9.0}
    found, _ = exponents.measured([*rows, lost], "effective steps", "eps_path")
    assert found == pytest.approx(1.0, abs=1e-9)


def test_another_table_is_refused(script, experiment, monkeypatch, capsys):
    table = "experiments/records/heterogeneous_seed0.csv.gz"
    monkeypatch.setattr(sys, "argv", ["report.py", str(Path(__file__).parents[2] / table)])
    assert experiment("inputs").command(script.main) == 2
    told = capsys.readouterr()
    assert "must be a table of experiments/hyperparameters.py, but lacks" in told.err
    assert told.err.count("\n") == 1
    assert not told.out


def test_a_factor_that_does_not_vary_has_no_exponent(exponents):
    rows = [one for one in rows_of() if one["lr"] == 0.01]
    assert (
        exponents.measured(exponents.varying(rows, "learning rate"), "learning rate", "drift")
        is None
    )


@pytest.mark.parametrize(
    ("slope", "bounds", "prediction", "told"),
    [
        (1.0, (0.9, 1.1), 1.0, "agree"),
        (1.0, (0.9, 1.1), 2.0, "disagree"),
        (1.0, (0.2, 1.8), 1.0, "undecided"),
        (0.7, (0.6, 0.8), (0.5, 1.0), "agree"),
        (0.7, (0.6, 0.8), "+", "agree"),
        (0.7, (0.6, 0.8), "-", "disagree"),
        (0.7, (-0.6, 1.8), "-", "undecided"),
        (0.7, None, "-", "undecided"),
        (0.7, (0.6, 0.8), None, ""),
    ],
)
def test_verdicts(claims, slope, bounds, prediction, told):
    assert claims.verdict(slope, bounds, prediction) == told


def test_a_regime_holds_only_what_lies_in_it(exponents):
    assert exponents.epochs(row(steps=20.0)) == pytest.approx(0.64)
    assert exponents.epochs(row(steps=20.0, share=0.5)) == pytest.approx(1.28)


def test_tables_and_figures(script, exponents, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exponents, "DRAWS", 50)
    table = tmp_path / "rows.csv.gz"
    with gzip.open(table, "wt", newline="") as file:
        writer = csv.DictWriter(file, list(row()))
        writer.writeheader()
        writer.writerows(rows_of())
    words = ["report", str(table), "--figures", str(tmp_path / "figures")]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    told = capsys.readouterr().out
    assert "### constant rate" in told
    assert "| factor | quantity | source | ours | net, below an epoch | net, beyond |" in told
    found = "2.000 [2.000, 2.000] (a/d)"
    assert f"| learning rate | eps_path | 1 to 2 | 1 | {found} | {found} |" in told
    # Ours says nothing of batches beyond an epoch, the source nothing of noise.
    assert "| batch | gap | + | -, none |" in told
    assert "-1.000 [-1.000, -1.000] (-/a)" in told
    # log(0.003 / 0.01)^2 > 0 at both ends, and the base lies in between; one seed decides nothing.
    assert told.count("| 0.01 | undecided | ours | undecided |") == 3
    assert "| displacement (null) | 0.00 |" not in told
    drawn = (tmp_path / "figures" / "hyperparameters_net_constant.svg").read_text()
    assert "Merged test loss, by batch" in drawn


@pytest.mark.parametrize(
    ("curves", "told"),
    [
        ([(3.0, 2.0, 1.0), (3.1, 2.0, 1.0), (3.0, 2.1, 1.0)], (3, "falls")),
        ([(1.0, 2.0, 3.0), (1.0, 2.0, 3.1), (1.0, 2.1, 3.0)], (1, "rises")),
        ([(3.0, 2.0, 3.0), (3.1, 2.0, 3.0), (3.0, 2.1, 3.1)], (2, "U")),
        # It rises after the least in two of three seeds.
        ([(3.0, 2.0, 2.3), (3.0, 2.0, 2.3), (3.0, 2.0, 1.8)], (2, "undecided")),
        ([(3.0, 2.0, 3.0)], (2, "undecided")),
    ],
)
def test_shapes(script, curves, told):
    of_seed = [dict(zip((1, 2, 3), curve, strict=True)) for curve in curves]
    assert script.shape(of_seed, [1, 2, 3]) == told


def test_the_closed_form_follows_the_schedule_of_the_sweep(exponents, experiment):
    closed = experiment("closed_form")
    for name in ("hyperparameters", "hyperparameters_cosine", "hyperparameters_real8"):
        settings = OmegaConf.load(FOLDER / f"{name}.yaml")
        assert settings.warmup_steps == closed.WARMUP_STEPS
    # What cards told of these trainings.
    for steps, travel in ((10, 0.27762), (20, 1.0732), (40, 2.9771)):
        assert sum(closed.weights("constant", 0.01, steps)) == pytest.approx(travel, rel=1e-4)
    of = exponents.CLOSED_FORMS["eps_path"]
    # Below an epoch as the root of n, far beyond it as n.
    few, many = (row(steps=steps, batch=1.0) for steps in (40.0, 40000.0))
    assert of(few) / of(few | {"n": 4 * few["n"]}) == pytest.approx(2.0, rel=0.1)
    assert of(many) / of(many | {"n": 4 * many["n"]}) == pytest.approx(4.0, rel=0.05)
    noise = exponents.CLOSED_FORMS["merged noise"]
    assert noise(few) == pytest.approx(4 * noise(few | {"batch": 4.0}))


def test_the_closed_form_is_told_as_the_exponent_that_it_has_over_the_rows(claims, exponents):
    rows = exponents.varying(rows_of((0, 1)), "batch")
    found = exponents.predicted_of(claims.CLOSED, rows, "batch", "merged noise")
    assert found == pytest.approx(-1.0)
    assert exponents.predicted_of("+", rows, "batch", "merged noise") == "+"


def test_numbers_of_tasks_are_compared_by_what_is_lost_against_the_experts(exponents):
    # Larger groups hold harder tasks, which says nothing of merging.
    rows = [
        row(group=group)
        | {"size": size, "test_loss": 3 * size + math.log(size), "experts_test_loss": 3 * size}
        for size in (2.0, 4.0, 8.0)
        for group in GROUPS
    ]
    assert exponents.measured(rows, "tasks", "test loss over experts")[0] == pytest.approx(1.0)
