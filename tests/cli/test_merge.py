"""`mergekit-lit merge`: what it imports, and what goes before and after a method."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mergekit_lit.cli import main
from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import Base, Expert, Experts, load_merged, save_expert
from mergekit_lit.core.params import add
from mergekit_lit.core.records import Record
from mergekit_lit.merging import load_experts, merge
from mergekit_lit.models.backbones import load_base

TASKS = ("dots", "stripes")
HEAVY = ("lightning", "timm", "torchvision", "torchmetrics", "wandb", "pandas", "matplotlib")


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("vit")[1]


@pytest.fixture(scope="module")
def files(base, tmp_path_factory) -> list[str]:
    """Files of two experts of the shipped ViT."""
    folder = tmp_path_factory.mktemp("vits")
    for seed, task in enumerate(TASKS):
        draw = torch.Generator().manual_seed(seed)
        step = {n: 0.02 * torch.randn(t.shape, generator=draw) for n, t in base.params.items()}
        card = Card(
            task=task,
            base="vit",
            base_hash=base.content,
            backbone=base.backbone,
            image_size=base.image_size,
        )
        head = {"weight": torch.randn(3, 128, generator=draw), "bias": torch.zeros(3)}
        expert = Expert(add(base.params, step), head, base.structure, card)
        save_expert(folder / f"{task}.safetensors", expert)
    return [str(folder / f"{task}.safetensors") for task in TASKS]


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


def test_methods_lists_the_veneers(capsys):
    assert main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["git_rebasin"]["form"], rows["git_rebasin"]["position"]) == ("veneer", "before")
    assert [parameter["name"] for parameter in rows["lines"]["parameters"]] == ["alpha", "beta"]
    assert main(["methods"]) == 0
    assert "--then VENEER" in capsys.readouterr().out
