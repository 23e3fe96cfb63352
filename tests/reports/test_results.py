import csv
import io

from mergekit_lit.reports.results import MEAN, csv_text, result_rows, summary


def test_rows_are_tidy_and_hold_every_model_and_task(evaluation):
    rows = result_rows(evaluation())
    assert len({tuple(row) for row in rows}) == 1
    cells = [(row["model"], row["task"]) for row in rows]
    assert len(set(cells)) == len(cells) == 4 * 4
    (base,) = [row for row in rows if row["model"] == "base" and row["task"] == "letters"]
    assert (base["accuracy"], base["accuracy_low"], base["n"]) == (0.3, 0.25, 100)
    assert (base["method"], base["scale"]) == (None, None)


def test_csv_reads_back_with_empty_cells_for_what_is_unknown(evaluation):
    rows = result_rows(evaluation())
    read = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert [row["task"] for row in read] == [row["task"] for row in rows]
    assert [float(row["accuracy"]) for row in read] == [row["accuracy"] for row in rows]
    assert {row["scale"] for row in read} == {""}
    assert csv_text([]) == "\n"


def test_summary_holds_the_means(evaluation):
    rows = result_rows(evaluation())
    told = summary(rows)
    (mean,) = [row for row in rows if row["model"] == "average" and row["task"] == MEAN]
    assert told["accuracy/average"] == mean["accuracy"]
    assert "accuracy/base" in told
