"""Experts of different initialisations on the command line: refused, told how, and then merged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergekit_lit.cli import main
from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import load_merged, save_expert
from mergekit_lit.core.experts import Expert
from mergekit_lit.models.backbones import load_base

_ASK = "What merging them costs, and whether to: mergekit-lit predict"


@pytest.fixture(scope="module")
def strangers(tmp_path_factory) -> list[str]:
    """Files of two experts that share the architecture alone."""
    folder = tmp_path_factory.mktemp("strangers")
    paths = []
    for seed, task in enumerate(("dots", "stripes")):
        backbone, base = load_base(f"resnet@random:{seed}")
        card = Card(task=task, base=base.name, base_hash=base.content, image_size=32)
        head = {"weight": torch.randn(2, backbone.features), "bias": torch.zeros(2)}
        paths.append(folder / f"{task}.safetensors")
        save_expert(paths[-1], Expert(base.params, head, base.structure, card))
    return [str(path) for path in paths]


def test_the_refusal_names_flags_that_work(strangers, tmp_path, capsys):
    out = tmp_path / "merged.safetensors"
    command = ["merge", *strangers, "--out", str(out)]
    assert main(command) == 2
    message = capsys.readouterr().err
    flags = next(part for part in message.split("`")[1::2] if "git_rebasin" in part).split()
    assert flags == ["--method", "git_rebasin", "--allow_different_base", "true"]
    assert main([*command, *flags]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert f"of several bases, whose units need not match. {_ASK} {' '.join(strangers)}" in told
    assert load_merged(out).facts["method"] == "git_rebasin"


@pytest.mark.slow
def test_same_bytes_in_processes_with_different_hash_seeds(strangers, tmp_path: Path):
    written = []
    for hash_seed, threads in (("1", "1"), ("2", "2")):
        out = tmp_path / f"{hash_seed}.safetensors"
        command = [sys.executable, "-m", "mergekit_lit", "merge", *strangers, "--out", str(out)]
        command += ["--method=git_rebasin", "--allow_different_base=true", "--seed=3"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        written.append(out.read_bytes())
    assert written[0] == written[1]
