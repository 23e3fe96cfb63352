"""`mergekit-lit merge`: what it imports, and what goes before and after a method."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mergekit_lit.cli import main
from mergekit_lit.core.expert_files import load_expert, load_merged
from mergekit_lit.core.experts import Base, Experts
from mergekit_lit.core.records import Record
from mergekit_lit.merging import load_experts, merge
from mergekit_lit.merging.patterns import select
from mergekit_lit.merging.plan import plan
from mergekit_lit.reports.commands import command_line

TASKS = ("dots", "stripes")
HEAVY = ("lightning", "timm", "torchvision", "torchmetrics", "wandb", "pandas", "matplotlib")


@pytest.fixture(scope="module")
def family(make_family, tmp_path_factory):
    """Files of two experts of the shipped ViT."""
    return make_family("vit", image_size=None).save(tmp_path_factory.mktemp("vits"))


@pytest.fixture(scope="module")
def base(family) -> Base:
    return family.base


@pytest.fixture(scope="module")
def files(family) -> list[str]:
    return [str(path) for path in family.paths]


@pytest.fixture(scope="module")
def experts(base, files) -> Experts:
    return load_experts([Path(path) for path in files], base=base)


def equal(path: Path, shared: dict[str, torch.Tensor]) -> bool:
    found = load_merged(path).shared
    return all(torch.equal(found[name], tensor) for name, tensor in shared.items())


def test_merging_imports_no_network_library(files, tmp_path):
    words = ["merge", *files, "--out", str(tmp_path / "m.safetensors")]
    code = (
        "import sys; from mergekit_lit.cli import main; code = main(sys.argv[1:]); "
        f"print([name for name in {HEAVY!r} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")


def test_veneers_by_flags_in_their_order(files, experts, tmp_path):
    out = tmp_path / "m.safetensors"
    words = ["merge", *files, "--out", str(out), "--method", "task_arithmetic"]
    steep = "{name: lines, config: {alpha: 0.1, beta: 0.4}}"
    assert main([*words, "--then", "equal_norms", f"--then={steep}"]) == 0
    veneers = [("equal_norms", {}), ("lines", {"alpha": 0.1, "beta": 0.4})]
    expected = merge(experts, "task_arithmetic", veneers=veneers)
    assert equal(out, expected.shared)
    facts = load_merged(out).facts
    assert facts == expected.facts
    assert [veneer["name"] for veneer in facts["veneers"]] == ["equal_norms", "lines"]
    record = Record.read(tmp_path / "m.record.json")
    assert record.config["recipe"]["veneers"] == facts["veneers"]


def test_veneers_from_a_file_and_flags_that_win(files, experts, tmp_path):
    config = tmp_path / "merge.yaml"
    veneers = ["equal_norms", {"name": "lines", "config": {"alpha": 0.5}}]
    config.write_text(yaml.safe_dump({"method": "ties", "then": veneers}))
    words = ["merge", "--config", str(config), *files, "--out"]
    assert main([*words, str(tmp_path / "a.safetensors")]) == 0
    both = merge(experts, "ties", veneers=[("equal_norms", {}), ("lines", {"alpha": 0.5})])
    assert equal(tmp_path / "a.safetensors", both.shared)
    assert main([*words, str(tmp_path / "b.safetensors"), "--then=lines"]) == 0
    assert equal(tmp_path / "b.safetensors", merge(experts, "ties", veneers=[("lines", {})]).shared)
    again = ["merge", "--config", str(tmp_path / "a.config.yaml"), "--out"]
    assert main([*again, str(tmp_path / "c.safetensors")]) == 0
    assert equal(tmp_path / "c.safetensors", both.shared)


def test_a_veneer_that_looks_at_images_is_given_them(files, tiny_suite, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    words = ["merge", *files, "--out", str(out), "--then=repair"]
    assert main(words) == 2
    assert "'repair' looks at train images of every task, but got none" in capsys.readouterr().err
    assert not out.exists()
    suite = ["--data.suite", tiny_suite, "--data.reserve=8", "--data.images=20"]
    # The method looks at another split than the veneer.
    assert main([*words, "--method=greedy_soup", *suite]) == 0, capsys.readouterr().err
    facts = load_merged(out).facts
    assert (facts["method"], facts["data"]) == ("greedy_soup", "val")
    assert [veneer["name"] for veneer in facts["veneers"]] == ["repair"]


BAD_VENEERS = {
    "unknown": (["--then=line"], "No veneer named 'line'. Did you mean 'lines'?"),
    "a method": (["--then=ties"], "No veneer named 'ties'."),
    "unknown parameter": (
        ["--then={name: lines, config: {alfa: 1}}"],
        "No parameter of 'lines' named 'alfa'. Did you mean 'alpha'?",
    ),
    "unknown key": (["--then={name: lines, alpha: 1}"], "`then` must hold names of veneers, or"),
    "no name": (["--then={config: {}}"], "`then` must hold names of veneers, or `name` and"),
    "out of range": (["--then={name: lines, config: {alpha: -1}}"], "`alpha` must be at least 0"),
}


@pytest.mark.parametrize("case", BAD_VENEERS)
def test_bad_veneers_get_one_line_and_nothing_is_written(files, tmp_path, capsys, case):
    words, message = BAD_VENEERS[case]
    assert main(["merge", *files, "--out", str(tmp_path / "m.safetensors"), *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_the_plan_and_writes_nothing(files, experts, tmp_path, capsys):
    words = ["merge", *files, "--out", str(tmp_path / "m.safetensors"), "--dry_run"]
    assert main([*words, "--exclude=norm1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    kept = {row["name"] for row in told["rows"] if row["fate"] != "merged"}
    expected = plan(select(experts, exclude=["norm1"]), "average")
    assert kept == {row.name for row in expected.rows if row.fate != "merged"}
    assert "blocks.0.norm1.weight" in kept
    assert main(words) == 0
    assert "average, BatchNorm base: reads" in capsys.readouterr().out
    assert main([*words, "--then=lines", "--then=equal_norms"]) == 0
    told = capsys.readouterr().out
    assert "equal_norms, then average, then lines, BatchNorm base: reads" in told
    assert "equal_norms lines" in told.replace(",", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method=fisher"], "'fisher' looks at train images"),
        (["--batch_norm=recalibrate"], "a suite to take training images from"),
        (["--max_shard_bytes=0"], "`max_shard_bytes` must be above 0"),
        (["--callbacks=json.nothing"], "`callbacks` must name classes"),
        (["--out=m.bin"], "must end in .safetensors"),
        (["--method=tall_masks", "--threshold=-1"], "`threshold` must be at least 0"),
        (["--method=git_rebasin", "--sweeps=0"], "`sweeps` must be at least 1"),
        (["--then={name: git_rebasin, config: {sweeps: 0}}"], "`sweeps` must be at least 1"),
        (["--method=zipit", "--until=layer9", "--data.suite=embedded8"], "stage to zip `until`"),
        (["--method=lines", "--alpha=-1"], "`alpha` must be at least 0"),
        (["--method=fisher", "--data.suite=embeded8"], "Did you mean 'embedded8'?"),
        (["--method=fisher", "--data.suite=embedded8"], "No task of suite 'embedded8' named"),
        (
            ["--method=emr", "--batch_norm=recalibrate", "--data.suite=embedded8"],
            "Use 'recalibrate-per-task'",
        ),
    ],
)
def test_a_dry_run_refuses_what_the_merge_would(files, tmp_path, capsys, words, message):
    out = ["--out", str(tmp_path / "m.safetensors")]
    for more in ([], ["--dry_run"]):
        assert main(["merge", *files, *out, *words, *more]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def plain(base, files, tmp_path_factory) -> list[str]:
    """Plain weight files: a base, and two of others that were tuned from it."""
    folder = tmp_path_factory.mktemp("plain")
    models = [base.params, *(load_expert(Path(path)).backbone for path in files)]
    paths = [folder / f"{name}.safetensors" for name in ("base", "one", "two")]
    for path, weights in zip(paths, models, strict=True):
        save_file(dict(weights), path)
    return [str(path) for path in paths]


PLAIN = {
    "emr": "'emr' gives each task a part of its own",
    "tall_masks": "'tall_masks' gives each task a part of its own",
    "git_rebasin": "plain weights have no known architecture",
    "zipit": "plain weights have no known architecture",
    "regmean": "looks at images, for which it needs a network",
}


@pytest.mark.parametrize("method", PLAIN)
def test_what_plain_weights_cannot_be_merged_by_is_refused_unread(
    plain, tmp_path, capsys, monkeypatch, method
):
    def unread(*_arguments):
        pytest.fail("a tensor was read")

    monkeypatch.setattr("mergekit_lit.core.tensorfiles.TensorFile.__getitem__", unread)
    words = ["merge", *plain[1:], f"--base={plain[0]}", f"--method={method}"]
    words += ["--out", str(tmp_path / "m.safetensors"), "--data.suite=embedded8"]
    for more in ([], ["--dry_run"]):
        assert main([*words, *more]) == 2
        told = capsys.readouterr().err
        assert PLAIN[method] in told
        assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["git_rebasin", "zipit"])
def test_experts_of_unknown_symmetries_are_refused_before_they_are_read(
    make_family, tmp_path, capsys, monkeypatch, method
):
    monkeypatch.setattr("mergekit_lit.stages.merge.read_through", lambda _: pytest.fail("was read"))
    deep = make_family("timm/test_resnet@random:0").save(tmp_path / "experts")
    words = ["merge", *map(str, deep.paths), f"--method={method}", "--data.suite=embedded8"]
    for more in ([], ["--dry_run"]):
        assert main([*words, "--out", str(tmp_path / "m.safetensors"), *more]) == 2
        assert "of 'timm/test_resnet' names none (those do of plain ViTs" in capsys.readouterr().err


def test_a_base_that_is_not_there_is_told_whatever_the_experts_are(plain, files, tmp_path, capsys):
    out = ["--out", str(tmp_path / "m.safetensors")]
    for experts in (plain[1:], files):
        for base in ("typo/base.safetensors", "typo/base.pt", "vit@typo/base.safetensors"):
            assert main(["merge", *experts, *out, f"--base={base}"]) == 2
            told = capsys.readouterr().err
            assert f"No file {base.removeprefix('vit@')!r}, which `base` names." in told
    for base, came in ([], "but got none"), (["--base=typo"], "but 'typo' is no file or folder"):
        assert main(["merge", *plain[1:], *out, *base]) == 2
        told = capsys.readouterr().err
        assert "need `--base FILE`" in told
        assert came in told


def test_the_first_expert_may_be_a_file_of_others(plain, files, tmp_path):
    words = ["merge", plain[1], files[1], "--allow_different_base=true"]
    out = tmp_path / "m.safetensors"
    assert main([*words, "--out", str(out)]) == 0
    assert load_merged(out).tasks == ("one", TASKS[1])


def test_patterns_choose_the_tensors(files, experts, base, tmp_path):
    out = tmp_path / "m.safetensors"
    words = ["merge", *files, "--out", str(out), "--include=blocks.*", "--exclude=norm1,norm2"]
    assert main(words) == 0
    chosen = select(experts, include=["blocks.*"], exclude=["norm1", "norm2"])
    assert equal(out, merge(chosen, "average").shared)
    shared = load_merged(out).shared
    kept = {name for name, tensor in shared.items() if torch.equal(tensor, base.params[name])}
    assert {"blocks.0.norm1.weight", "pos_embed"} <= kept
    assert "blocks.0.attn.qkv.weight" not in kept


@pytest.mark.parametrize(
    "flags",
    [
        ["--method=ties", "--scale={norm1: 0.5, '*': 0.2}", "--out_dtype=bfloat16"],
        ["--then={name: lines, config: {alpha: 0.5}}", "--then=equal_norms", "--dtype=float64"],
        ["--method=dare", "--seed=3", "--include=blocks.*", "--exclude=norm1,norm2"],
        ["--callbacks=mergekit_lit.callbacks.DeltaGeometry", "--max_shard_bytes=2000000"],
        [
            "--method=weighted_average",
            "--base=vit",
            "--allow_different_base",
            "--batch_norm=average",
        ],
    ],
)
def test_the_command_that_a_record_tells_makes_the_same_bytes(files, tmp_path, capsys, flags):
    folder = tmp_path / "a b"
    assert main(["merge", *files, f"--out={folder / 'm.safetensors'}", *flags, "--json"]) == 0
    record = Record(**json.loads(capsys.readouterr().out))
    first = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    shutil.rmtree(folder)
    assert main(shlex.split(command_line(record))[1:]) == 0
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == first


SCALES = {
    "over the depth": ("0.1,0.5", [0.1, 0.5]),
    "by pattern": ('{"blocks.*": 0.5, "*": 0.3}', {"blocks.*": 0.5, "*": 0.3}),
    "mergekit's list": (
        '[{"filter": "attn", "value": 0.2}, {"value": [0.3, 0.4]}]',
        [{"filter": "attn", "value": 0.2}, {"value": [0.3, 0.4]}],
    ),
}


@pytest.mark.parametrize("case", SCALES)
def test_values_that_differ_from_tensor_to_tensor(files, experts, tmp_path, case):
    text, value = SCALES[case]
    out = tmp_path / "a.safetensors"
    words = ["merge", *files, "--method=task_arithmetic"]
    assert main([*words, "--scale", text, "--out", str(out)]) == 0
    assert equal(out, merge(experts, "task_arithmetic", config={"scale": value}).shared)
    # What the record says runs again, as a flag and from a file.
    scale = Record.read(tmp_path / "a.record.json").config["recipe"]["config"]["scale"]
    config = tmp_path / "again.yaml"
    config.write_text(yaml.safe_dump({"scale": scale}))
    for again in (f"--scale={json.dumps(scale)}", f"--config={config}"):
        assert main([*words, again, "--out", str(tmp_path / "b.safetensors")]) == 0
        assert (tmp_path / "b.safetensors").read_bytes() == out.read_bytes()


def test_parts_of_half_precision(files, experts, tmp_path):
    words = ["merge", *files, "--out_dtype=float16", "--max_shard_bytes=400000"]
    assert main([*words, "--out", str(tmp_path / "m.safetensors")]) == 0
    assert len(list(tmp_path.glob("m*.safetensors"))) > 1
    assert equal(tmp_path / "m.safetensors", merge(experts, "average", out_dtype="float16").shared)


def test_plain_weights_of_others(base, plain, tmp_path):
    inputs = {path: load_file(path) for path in plain[1:]}
    out = tmp_path / "m.safetensors"
    words = ["merge", *plain[1:], "--base", plain[0], "--method=task_arithmetic"]
    assert main([*words, "--scale=0.5", "--out", str(out)]) == 0
    found = load_file(out)
    mean = {name: sum(w[name] for w in inputs.values()) / 2 for name in base.params}
    assert found.keys() == mean.keys()
    assert all(torch.allclose(found[name], mean[name], atol=1e-6) for name in mean)
    assert main([*words, "--out", plain[0]]) == 2
    assert torch.equal(load_file(plain[0])["pos_embed"], base.params["pos_embed"])


def test_a_callback_without_a_path_is_told_what_one_is(files, tmp_path, capsys):
    words = ["merge", *files, "--out", str(tmp_path / "m.safetensors")]
    assert main([*words, "--callbacks+=DeltaGeometry"]) == 2
    told = capsys.readouterr().err
    assert "such as mergekit_lit.callbacks.DeltaGeometry, or hold" in told
    assert "but one is 'DeltaGeometry'" in told


def test_methods_lists_the_veneers(capsys):
    assert main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["git_rebasin"]["form"], rows["git_rebasin"]["position"]) == ("veneer", "before")
    assert [parameter["name"] for parameter in rows["lines"]["parameters"]] == ["alpha", "beta"]
    assert main(["methods"]) == 0
    assert "--then VENEER" in capsys.readouterr().out
