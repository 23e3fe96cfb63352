import pytest

from mergekit_lit.core.experts import load_expert, load_merged
from mergekit_lit.core.records import Record
from mergekit_lit.search import quickstart
from mergekit_lit.search.quickstart import methods_at_hand, run_quickstart

BACKBONE = "vit@random:0"


@pytest.fixture
def two_methods(monkeypatch):
    """Leave the average, which has no scale, and task arithmetic, which has one."""
    names = ("average", "task_arithmetic")
    chosen = [method for method in methods_at_hand() if method.name in names]
    monkeypatch.setattr(quickstart, "methods_at_hand", lambda: chosen)


@pytest.mark.slow
@pytest.mark.usefixtures("two_methods")
@pytest.mark.parametrize("jobs", [1, 2])
def test_whole_path_writes_experts_merges_record_and_page(tmp_path, tiny_suite, capsys, jobs):
    out = tmp_path / "run"
    result = run_quickstart(
        backbone=BACKBONE, out=out, suite=tiny_suite, steps=4, lr=0.01, jobs=jobs
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
    page = result.report_path.read_text("utf-8")
    assert page.count('class="curve gradient"') == 2
    assert "How λ was chosen" in page
    shown = capsys.readouterr().out
    assert "Accuracy by task" in shown
    assert "Report: " in shown


@pytest.mark.slow
@pytest.mark.usefixtures("two_methods")
def test_same_seed_same_scores(tmp_path, tiny_suite):
    def scores(name):
        result = run_quickstart(
            backbone=BACKBONE,
            out=tmp_path / name,
            suite=tiny_suite,
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
    ):
        with pytest.raises(error):
            run_quickstart(out=tmp_path / "run", quiet=True, **wrong)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_methods_at_hand_need_no_images():
    names = {method.name for method in methods_at_hand()}
    assert {"average", "task_arithmetic", "travel_normalised"} <= names
    assert {method.facts["data"] for method in methods_at_hand()} <= {"none", "cards"}
