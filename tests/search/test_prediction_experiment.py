"""The comparison of predictors: every part is judged once, and told as it was."""

import json
import math

import numpy as np
import pytest

from mergekit_lit.search.predicting import judging
from mergekit_lit.search.predicting.columns import KEYS, OUTCOMES
from mergekit_lit.search.predicting.table import COLUMNS, write_table

pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")

METHODS = ("average", "ties", "dare")


@pytest.fixture(scope="module")
def script(experiment):
    return experiment("prediction")


def measured(groups):
    draw = np.random.default_rng(0)
    words = {"string": "x", "bool": False, "int64": 200}
    told = {column.name for column in (*KEYS, *OUTCOMES)}
    for group in range(groups):
        for place, method in enumerate(METHODS):
            for task in draw.choice(6, size=2, replace=False):
                lost = float(draw.uniform(0, 0.3))
                row = {
                    column.name: words.get(column.type, math.nan)
                    if column.name in told
                    else float(draw.normal())
                    for column in COLUMNS
                }
                yield {
                    **row,
                    "real": group % 2 == 0,
                    "backbone": "vit" if group % 3 else "resnet",
                    "group": str(group),
                    "merge": place,
                    "method": method,
                    "task": f"t{task}",
                    "own_card_base_accuracy": 0.8,
                    "interference": lost,
                    "test_base_accuracy": 0.8,
                    "test_accuracy": 0.8 - lost,
                }


def test_each_part_is_judged_once_and_told_again(script, tmp_path, monkeypatch, capsys):
    table, out = tmp_path / "merges.parquet", tmp_path / "out"
    write_table(table, measured(24))
    flags = ["--table", str(table), "--out", str(out), "--levels", "cards", "--splits"]
    flags += ["embedded to real"]
    monkeypatch.setattr(script, "Boosting", lambda _: script.alone("interference", sign=-1))
    monkeypatch.setattr(script, "linear", script.constant)
    monkeypatch.setattr(judging, "_DRAWS", 5)
    monkeypatch.setattr("sys.argv", ["prediction.py", *flags])
    script.main()
    first = capsys.readouterr().out
    (line,) = (each for each in first.splitlines() if each.startswith("| trees, cards"))
    assert float(line.split("|")[2].split()[0]) >= 0.99
    assert "| always the average" in first
    monkeypatch.setattr(script, "judged", None)
    script.main()
    assert capsys.readouterr().out == first
    page = tmp_path / "page.html"
    monkeypatch.setattr("sys.argv", ["prediction.py", *flags, "--page", str(page)])
    script.main()
    capsys.readouterr()
    written = page.read_text()
    assert "trees, cards 1.000 [" in written
    assert written.count("<svg") == 2
    kept = json.loads((out / "accuracy-embedded-to-real-cards.json").read_text())
    assert len(kept["about"]["table"]) == 64
    write_table(table, measured(25))
    with pytest.raises(TypeError, match="not callable"):
        script.main()
