"""The page of a sweep: self-contained, small, and true to its records."""

import re
import xml.etree.ElementTree as ET

import pytest

from mergekit_lit.cli import main
from mergekit_lit.core.files import write_text
from mergekit_lit.core.records import Record
from mergekit_lit.reports.index import INDEX, Entry
from mergekit_lit.reports.sweep_figures import score_map
from mergekit_lit.reports.sweep_page import sweep_page
from mergekit_lit.stages.report import build_report


def write_training(folder, lr, seed, task):
    value = 0.5 + 2 * lr + 0.01 * seed + 0.1 * (task == "mnist")
    card = {"task": task, "steps": 5, "val_accuracy": value, "val_loss": 1 - value}
    Record(
        stage="train",
        name=task,
        config={"model": {"lr": lr, "seed": seed}, "data": {"task": task}},
        metrics={"experts": {task: card}},
        finished="2026-01-01",
    ).write(folder / f"runs/{lr}-{seed}-{task}/{task}.record.json")


@pytest.fixture
def sweep(tmp_path):
    """A sweep of two rates, two seeds and two tasks, one of which has an odd name."""
    folder = tmp_path / "my sweep"
    for lr in (0.01, 0.1):
        for seed in (0, 1):
            for task in ("mnist", "<b>odd"):
                write_training(folder, lr, seed, task)
    write_text(folder / "sweep.yaml", "axes: {model.lr: [0.01, 0.1]}\n")
    failed = {"abc": "The disk is <full>."}
    Record(stage="sweep", name="s", config={}, metrics={"failed": failed}).write(
        folder / "sweep.record.json"
    )
    return folder


def drawings(page):
    return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_page_is_self_contained_and_holds_the_numbers(sweep):
    page = build_report(sweep).read_text("utf-8")
    assert re.findall(r"(?:https?:)?//[a-z]|@import|url\(|<img|<link|src=|href=", page) == []
    assert "default-src 'none'" in page
    titles = [drawn.findtext("title") for drawn in drawings(page)]
    # The rate moves means by 0.18, the task by 0.1, the seed by 0.01.
    assert titles == ["By model.lr", "By task", "By model.seed"]
    assert "8 results of 8 records, compared by val_accuracy; larger is better" in page
    assert "<b>0.755</b>" in page
    assert "Each is a mean over" in page
    assert "The disk is &lt;full&gt;." in page
    assert "<b>odd" not in page
    assert "axes: {model.lr: [0.01, 0.1]}" in page
    assert (sweep / INDEX).is_file()


def test_same_folder_same_bytes_with_and_without_the_index(sweep):
    first = build_report(sweep).read_bytes()
    assert build_report(sweep).read_bytes() == first
    (sweep / INDEX).unlink()
    assert build_report(sweep).read_bytes() == first


def test_filters_from_the_command_line_all_hold(sweep, capsys):
    words = ["--where", "model.lr>=0.05", "--where=seed=1", "--objective", "val_loss"]
    assert main(["report", str(sweep), *words]) == 0
    page = (sweep / "report.html").read_text("utf-8")
    assert "2 results of 2 records where model.lr&gt;=0.05,seed=1, compared by val_loss" in page
    assert [drawn.findtext("title") for drawn in drawings(page)] == ["By task"]
    assert capsys.readouterr().out.strip().endswith("report.html")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--where", "model.lrr=1"], "Did you mean 'model.lr'?"),
        (["--where", "nonsense"], "`where` must hold conditions"),
        (["--where", "model.lr>9"], "must leave some results"),
        (["--objective", "val_los"], "Did you mean 'val_loss'?"),
    ],
)
def test_wrong_input_is_one_clear_line(sweep, capsys, monkeypatch, words, message):
    monkeypatch.delenv("MERGEKIT_LIT_TRACEBACK", raising=False)
    assert main(["report", str(sweep), *words]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told
    assert "\n" not in told
    assert not (sweep / "report.html").exists()


def test_a_damaged_record_is_told_and_the_others_are_reported(sweep):
    write_text(sweep / "runs/bad/bad.record.json", "{")
    write_text(sweep / "sweep.record.json", "[]")
    page = build_report(sweep).read_text("utf-8")
    assert "runs/bad/bad.record.json is left out" in page
    assert "8 results of 8 records" in page


def test_a_sweep_without_results_is_told(tmp_path):
    write_text(tmp_path / "sweep.yaml", "")
    with pytest.raises(ValueError, match="needs results"):
        build_report(tmp_path)


def test_a_large_sweep_makes_a_small_page():
    entries = [
        Entry(
            f"runs/{index:016x}/expert-step100.record.json",
            "train",
            "expert",
            "2026-01-01",
            {f"model.factor{k}": (index * (k + 3)) % 997 / 7 for k in range(30)},
            ({"task": f"task {index % 20}", "val_accuracy": index / 2000},),
        )
        for index in range(2000)
    ]
    entries += [Entry(f"{n}.record.json", "", "", "", {}, (), "x" * 200) for n in range(500)]
    page = sweep_page(entries, title="large", failed=dict.fromkeys(map(str, range(500)), "y" * 200))
    assert len(page.encode()) < 1_000_000
    assert "488 more failed runs" in page


def test_methods_are_drawn_by_task_where_merges_were_scored():
    entries = [
        Entry(
            f"runs/{method}/scores.record.json",
            "evaluate",
            "scores",
            "",
            {},
            tuple(
                {"task": task, "method": method, "accuracy": value}
                for task, value in (("a", value), ("b", 0.5), ("(mean)", (value + 0.5) / 2))
            ),
        )
        for method, value in (("ties", 0.4), ("average", 0.3))
    ]
    drawn = drawings(sweep_page(entries, title="merges"))[-1]
    cells = [node.text for node in drawn.iter("text")]
    assert cells == ["a", "b", "ties", "0.40", "0.50", "average", "0.30", "0.50"]


def test_a_cell_of_a_map_without_a_number_is_blank():
    drawn = ET.fromstring(score_map(["m"], ["a", "b"], [[0.2, None]]))
    classes = [node.get("class") for node in drawn.iter("rect")]
    assert classes == ["cell positive", "cell own"]
