"""Runs that are killed, told to end, or short of disk, wherever that falls: the same files."""

import json
import subprocess
import sys
import textwrap

import pytest

SCRIPT = textwrap.dedent(
    """
    import json, os, random, signal, sys, time
    from pathlib import Path

    import torch
    from mergekit_lit.callbacks import BoundTerms, GradientNoise, StabilityTwins
    from mergekit_lit.lit.data import TaskDataModule
    from mergekit_lit.lit.expert import ExpertModule
    from mergekit_lit.models.backbones import load_base
    from mergekit_lit.stages.train import train_expert

    torch.set_num_threads(1)
    suite, folder, base, seed, rounds = sys.argv[1:]
    draw = random.Random(int(seed))
    load_base(base, image_size=8)

    def train(out):
        train_expert(
            data=TaskDataModule(suite, "dots", batch=12, reserve=8, augment="crop-flip"),
            model=ExpertModule(
                base, image_size=8, lr=0.002, schedule="constant", warmup_steps=3, head="trained"
            ),
            steps=[9, 17, 30],
            out=Path(folder, out),
            trainer={"accelerator": "cpu", "log_every_n_steps": 1, "accumulate_grad_batches": 2},
            callbacks=[
                GradientNoise(every=7), StabilityTwins(twins=1, export=True), BoundTerms()
            ],
            resume=True,
            checkpoint_every=4,
        )

    def begin(out, dies_at=None):
        # A process of its own, which need not import anything again.
        child = os.fork()
        if child:
            return child
        if dies_at is not None:
            sync, left = os.fsync, [dies_at]
            def fsync(handle):
                # As a file that is whole, or half of it, waits to take its place.
                left[0] -= 1
                if left[0] < 0:
                    if draw.random() < 0.5:
                        os.truncate(handle, os.fstat(handle).st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                sync(handle)
            os.fsync = fsync
        try:
            train(out)
            code = 0
        except SystemExit as request:
            code = request.code
        except BaseException as error:
            print(repr(error), flush=True)
            code = 1
        sys.stdout.flush()
        os._exit(code)

    def code_of(child):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    begun = time.monotonic()
    assert code_of(begin("whole")) == 0
    lasts = time.monotonic() - begun
    ends = []
    for kind in draw.sample(3 * ["kill", "term", "write"], int(rounds)):
        child = begin("cut", draw.randrange(8) if kind == "write" else None)
        if kind != "write":
            time.sleep(lasts * draw.uniform(0.15, 0.6))
            os.kill(child, signal.SIGKILL if kind == "kill" else signal.SIGTERM)
        ends.append((kind, code_of(child)))
        if ends[-1][1] == 0:
            # From the beginning, until all rounds are done.
            os.rename(Path(folder, "cut"), Path(folder, f"cut{len(ends)}"))
    ends.append(("last", code_of(begin("cut"))))
    print("ends", json.dumps(ends))
    """
)

VOLATILE = ("seconds", "cpu_seconds", "peak_memory_mb", "finished", "git_commit")


def contents(folder):
    """Every file below a folder, without what differs from run to run."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name.endswith(".record.json"):
            record = json.loads(content)
            content = {key: record[key] for key in record if key not in VOLATILE}
        found[str(path.relative_to(folder))] = content
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "seed"), [("timm/test_resnet@random:0", 1), ("vit@random:0", 2)], ids=["resnet", "vit"]
)
def test_kills_anywhere_leave_no_trace(base, seed, tiny_suite, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, tiny_suite, tmp_path, base, str(seed), "9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stderr
    told = done.stdout.strip().splitlines()
    assert told[0].startswith("ends"), done.stdout
    ends = json.loads(told[0].removeprefix("ends "))
    # Some come after the run has ended.
    assert {code for _, code in ends} <= {0, -9, 143}, told
    assert ["write", -9] in ends
    assert ends[-1] == ["last", 0]
    whole = contents(tmp_path / "whole")
    assert len([name for name in whole if name.endswith("safetensors")]) == 6
    for cut in tmp_path.glob("cut*"):
        found = contents(cut)
        assert found.keys() == whole.keys()
        for name in whole:
            assert found[name] == whole[name], name
