"""The command tune: what it writes, prints and refuses."""

import json
import shlex
from pathlib import Path

import pytest

from mergekit_lit.cli import main
from mergekit_lit.core.expert_files import load_merged
from mergekit_lit.core.locks import sole_writer
from mergekit_lit.core.records import Record
from mergekit_lit.reports.commands import command_line
from mergekit_lit.search.tuning.trials import TrialLog

BASE = "timm/test_vit@random:0"


@pytest.fixture(autouse=True)
def told_in_one_line(monkeypatch):
    monkeypatch.delenv("MERGEKIT_LIT_TRACEBACK", raising=False)


@pytest.fixture(scope="module")
def words(tmp_path_factory, tiny_suite, make_family) -> list[str]:
    """The command on two experts that moved a little, on images that they know nothing of."""
    family = make_family(BASE).save(tmp_path_factory.mktemp("experts"))
    data = [f"--data.suite={tiny_suite}", "--data.reserve=4", "--data.val_share=0.2"]
    return ["tune", *map(str, family.paths), *data, "--metric=cross_entropy"]


def test_a_table_for_people_and_a_record_for_programs(words, tmp_path, capsys):
    command = [
        *words,
        "--method=task_arithmetic,average",
        "--space.scale=0.3,1",
        f"--out={tmp_path}",
    ]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "task_arithmetic" in table
    assert "scale=" in table
    assert "'average' has nothing to search" in table
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"best.safetensors", "best.record.json", "trials.jsonl", "trials.csv"}
    assert written >= {"tune.record.json", "config.yaml"}
    assert main(["tune", "--config", str(tmp_path / "config.yaml"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "tune.record.json").read_text())
    assert record["metrics"]["methods"]["task_arithmetic"]["trials"] == 2
    assert record["config"]["space"] == {"scale": [0.3, 1]}
    again = shlex.split(command_line(Record(**record)))[1:]
    before = (tmp_path / "trials.jsonl").read_bytes()
    assert main(again) == 0
    assert (tmp_path / "trials.jsonl").read_bytes() == before


def test_a_budget_with_a_table_is_told_and_goes_on(words, tmp_path, capsys):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    known = {"backbone": "b", "suite": "s", "group": "g", "task": "a", "experts": 2.0}
    known |= {"log_relative_norm": -1.0, "group_cosine": 0.0, "merge": 0, "method": "average"}
    rows = [
        {**known, "config": "{}", "test_accuracy": 0.5},
        {**known, "merge": 1, "method": "ties", "config": '{"scale": 2.0}', "test_accuracy": 0.6},
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "table.parquet")
    out = tmp_path / "run"
    command = [*words, "--method=ties,average", "--batch_norm=base,average", f"--out={out}"]
    command += [f"--table={tmp_path / 'table.parquet'}"]
    assert main([*command, "--budget=2"]) == 0
    told = capsys.readouterr().out
    assert "Spent: 2.0 evaluations on 2 trials" in told
    assert "task_arithmetic" in told
    begun = (out / "trials.jsonl").read_bytes()
    assert main([*command, "--budget=3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (out / "trials.jsonl").read_bytes().startswith(begun)
    assert record["metrics"]["spent"]["trials"] >= 3
    before = (out / "trials.jsonl").read_bytes()
    assert main(shlex.split(command_line(Record(**record)))[1:]) == 0
    assert (out / "trials.jsonl").read_bytes() == before
    parquet.write_table(arrow.Table.from_pylist([{"backbone": "b"}]), tmp_path / "table.parquet")
    assert main([*command, "--budget=4"]) == 2
    assert "`table` must hold merges with the column 'suite'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method=tise"], "No merge method named 'tise'. Did you mean 'ties'"),
        (["--method=ties", "--metric=acuracy"], "acuracy"),
        (["--method=ties", "--space.dens=1"], "No parameter of ties named 'dens'"),
        (["--method=ties", "--objective=weighted", "--weights=dot=2"], "Did you mean 'dots'"),
        (["--method=ties", "--objective=weighted", "--weights=dots"], "TASK=NUMBER"),
        (["--method=ties", "--data.val_share=0"], "The val split of 'dots' must hold an image"),
        (["--method=adamerging"], "must not look at test images"),
        (["--method=ties", "--trails=3"], "trials"),
        (["--method=ties", "--then=line"], "No veneer named 'line'. Did you mean 'lines'?"),
        (["--method=ties", "--then={name: lines, config: {alfa: 1}}"], "named 'alfa'"),
        (["--method=ties", "--logger=wandbb"], "wandb"),
        (["--method=ties", "--data.images=1"], "`images` must be at least 2"),
        (["--method=ties", "--budget=0"], "`budget` must be at least 1, but is 0"),
        (["--method=ties", "--budget=2", "--batch_norm=bse"], "Did you mean 'base'"),
        (["--method=ties", "--table=no.parquet"], "a `table` must have a budget"),
        (["--method=ties", "--device=gpu"], "`device` must be one of this machine"),
        ([], "method"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(words, tmp_path, capsys, flags, message):
    out = tmp_path / "run"
    assert main([*words, *flags, f"--out={out}"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told
    assert not out.exists()


def test_a_suite_must_be_named(words, tmp_path, capsys):
    rest = [word for word in words if not word.startswith("--data")]
    assert main([*rest, "--method=ties", f"--out={tmp_path}"]) == 2
    assert "`data.suite` must name the suite" in capsys.readouterr().err


def test_another_search_in_the_folder_is_kept(words, tmp_path, capsys):
    log = tmp_path / "trials.jsonl"
    log.write_text('{"search": {"metric": "accuracy"}}\n')
    assert TrialLog(log, {"metric": "accuracy"}).trials == []
    assert main([*words, "--method=ties", f"--out={tmp_path}"]) == 2
    assert "`out` must be a new folder or that of this very search" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [log.name]


def test_veneers_go_to_every_candidate_and_to_the_merge_that_is_written(words, tmp_path, capsys):
    halved = "{name: lines, config: {alpha: 0.5, beta: 0}}"
    common = [*words, "--method=task_arithmetic", "--batch_norm=base", "--json"]
    assert main([*common, "--space.scale=0.8", f"--then={halved}", f"--out={tmp_path / 'a'}"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert main([*common, "--space.scale=0.4", f"--out={tmp_path / 'b'}"]) == 0
    half = json.loads(capsys.readouterr().out)
    for of in ("best", "base"):
        assert record["metrics"][of]["value"] == pytest.approx(half["metrics"][of]["value"])
    facts = load_merged(tmp_path / "a" / "best.safetensors").facts
    assert facts["veneers"] == [{"name": "lines", "config": {"alpha": 0.5, "beta": 0}}]
    # The command that the record tells finds the same search, and nothing left to do.
    before = (tmp_path / "a" / "trials.jsonl").read_bytes()
    assert main(shlex.split(command_line(Record(**record)))[1:]) == 0
    assert (tmp_path / "a" / "trials.jsonl").read_bytes() == before
    assert main([*common, "--space.scale=0.8", f"--out={tmp_path / 'a'}"]) == 2
    assert "had then" in capsys.readouterr().err


def test_a_second_process_is_refused_in_one_line(words, tmp_path, capsys):
    with sole_writer(tmp_path / "tune.lock"):
        assert main([*words, "--method=ties", f"--out={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "must be written by one process at a time" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_weights_and_biases_is_told_offline(words, tmp_path, capsys):
    flags = ["--method=task_arithmetic,average", "--space.scale=0.3,1", "--logger=wandb"]
    assert main([*words, *flags, f"--out={tmp_path}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["best"]
    (run,) = (tmp_path / "logs" / "tune").glob("wandb/offline-run-*")
    (table,) = run.glob("files/media/table/trials_*.table.json")
    rows = json.loads(table.read_text())
    assert [row[rows["columns"].index("method")] for row in rows["data"]] == [
        *["task_arithmetic"] * 2,
        "average",
    ]


@pytest.mark.slow
def test_weights_are_are_taken_from_a_line_and_from_a_file(words, tmp_path, capsys):
    config = tmp_path / "tune.yaml"
    config.write_text("objective: weighted\nweights: {dots: 2}\nspace: {scale: 0.5}\n")
    common = [*words, "--method=task_arithmetic", "--json"]
    line = ["--objective=weighted", "--weights=dots=2,stripes=1", "--space.scale=0.5"]
    values = []
    for flags in (line, [f"--config={config}"]):
        out = Path(tmp_path / str(len(values)))
        assert main([*common, *flags, f"--out={out}"]) == 0
        values.append(json.loads(capsys.readouterr().out)["metrics"]["best"]["value"])
    assert values[0] == values[1]
