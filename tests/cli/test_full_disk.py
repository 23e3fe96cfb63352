"""A disk that is full: one line, exit code 2, and no file that is there in part."""

import json
import subprocess
import sys
import textwrap

import pytest

# No file may grow beyond a limit: what a full disk does, in a child process alone.
SCRIPT = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path
    import mergekit_lit.cli.merge, mergekit_lit.cli.train
    from mergekit_lit.cli import main

    suite, folder = sys.argv[1], Path(sys.argv[2])
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def run(limit, *words):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        code = main(words)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        print("code", code, flush=True)

    def train(limit, out, *more):
        words = [f"--data.suite={suite}", "--data.task=all", "--data.reserve=4", "--steps=3"]
        words += ["--model.base=timm/test_resnet@random:0", "--model.image_size=8", "--json"]
        words += ["--model.warmup_steps=0", "--trainer.accelerator=cpu"]
        run(limit, "train", *words, "--trainer.log_every_n_steps=1", f"--out={folder / out}", *more)

    train(0, "config")
    train(1500, "logs")
    train(20_000, "checkpoint", "--checkpoint_every=1")
    train(1_000_000, "expert", "--checkpoint_every=0")
    train(hard, "whole")
    for limit in (0, 1_000_000):
        files = [str(folder / "whole" / f"{task}.safetensors") for task in ("dots", "stripes")]
        run(limit, "merge", *files, f"--out={folder / 'merged' / 'a.safetensors'}")
    """
)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing_in_part(tiny_suite, tmp_path):
    command = [sys.executable, "-c", SCRIPT, tiny_suite, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    codes = [line[-1] for line in done.stdout.splitlines() if line.startswith("code ")]
    assert codes == ["2", "2", "2", "2", "0", "2", "2"]
    told = done.stderr.splitlines()
    places = [
        "config.yaml",
        "metrics.jsonl",
        "last.ckpt",
        "dots.safetensors",
        *2 * ["a.safetensors"],
    ]
    assert len(told) == len(places)
    for line, place in zip(told, places, strict=True):
        assert line.startswith("mergekit-lit: error: Could not write ")
        assert place in line
    for path in tmp_path.rglob("*"):
        assert not path.name.startswith(".")
        if path.suffix == ".jsonl":
            assert all(json.loads(row) for row in path.read_text().splitlines())
    models = {path.parent.name for path in tmp_path.rglob("*.safetensors")}
    assert models == {"whole"}
    assert not list((tmp_path / "merged").iterdir())
