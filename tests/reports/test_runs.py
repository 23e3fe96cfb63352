import pytest

from mergekit_lit.core.files import write_text
from mergekit_lit.reports.runs import read_metrics, read_run


def test_reads_records_oldest_first_and_curves(run_folder):
    run = read_run(run_folder)
    assert [record.stage for record in run.records] == ["train"] * 3 + ["evaluate"]
    assert [record.name for record in run.of_stage("evaluate")] == ["evaluation"]
    assert list(run.curves) == ["task0", "task1", "task2"]
    assert [card.travel for card in run.cards.values()] == [4.5] * 3
    assert run.curves["task0"]["gradient/norm"][:2] == [(0, 1.0), (1, 0.5)]


def test_csv_and_json_lines_agree(tmp_path):
    write_text(tmp_path / "metrics.csv", "epoch,loss,step,norm\n0,1.5,0,\n0,,0,3\n0,0.5,10,nan\n")
    write_text(
        tmp_path / "metrics.jsonl",
        '{"step": 0, "loss": 1.5}\n{"step": 0, "norm": 3, "a": "x"}\n{"step": 10, "loss": 0.5}\n',
    )
    expected = {"loss": [(0, 1.5), (10, 0.5)], "norm": [(0, 3.0)]}
    assert read_metrics(tmp_path / "metrics.csv") == expected
    assert read_metrics(tmp_path / "metrics.jsonl") == expected


@pytest.mark.parametrize("text", ['{"loss": 1}\n', "not json\n", "[1]\n"])
def test_damaged_log_is_one_clear_line(tmp_path, text):
    write_text(tmp_path / "metrics.jsonl", text)
    with pytest.raises(ValueError, match=r"metrics.jsonl.*must be a log of metrics") as caught:
        read_metrics(tmp_path / "metrics.jsonl")
    assert "\n" not in str(caught.value)


def test_missing_folder_and_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="none at"):
        read_run(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="must hold records"):
        read_run(tmp_path)


def test_other_json_is_left_alone_and_damaged_records_are_told(run_folder):
    write_text(run_folder / "other.record.json", '{"a": 1}')
    assert len(read_run(run_folder).records) == 4
    write_text(run_folder / "bad.record.json", "{")
    with pytest.raises(ValueError, match=r"bad.record.json"):
        read_run(run_folder)


def test_an_expert_that_was_moved_away_has_no_card(run_folder):
    (run_folder / "task1.safetensors").unlink()
    assert list(read_run(run_folder).cards) == ["task0", "task2"]
