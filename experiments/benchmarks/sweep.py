"""Experts per core-hour: one `mergekit-lit sweep` against a `mergekit-lit train` for each expert.

    python experiments/benchmarks/sweep.py --base resnet --rounds 2

The grid is 3 learning rates x 3 weight decays x 3 seeds x 4 step counts (100, 200, 300, 400) on two
tasks: 216 experts, of 54 trajectories. A round draws one trajectory, runs it as a sweep of its own,
and trains each of its four experts by a process of its own; both ways must give the same bytes.
Processor time is counted, of one thread, so that other work on the machine matters little. What
the whole grid costs follows: separately, 216 times the mean of a process; as a sweep, 54 times the
mean of a trajectory, and a start of each worker, which is measured by a sweep with nothing to do.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

STEPS = (100, 200, 300, 400)
TASKS = ("mnist", "letters")
GRID = {
    "model.lr": (0.01, 0.02, 0.03),
    "model.weight_decay": (0.0, 1e-4, 1e-3),
    "model.seed": (0, 1, 2),
}
COMMAND = (sys.executable, "-m", "mergekit_lit")


def main() -> None:
    """Time the rounds and print what follows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="resnet", help="spec of the base")
    parser.add_argument("--image_size", type=int, default=32, help="of the network, in pixels")
    parser.add_argument("--rounds", type=int, default=2, help="trajectories to time")
    parser.add_argument("--workers", type=int, default=2, help="of the sweep, each with a start")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of trajectories")
    given = parser.parse_args()
    drawn = random.Random(given.seed).sample(
        [dict(zip(GRID, point, strict=True)) for point in product(*GRID.values())], given.rounds
    )
    rounds = []
    for number, point in enumerate(drawn):
        common = {"data.task": TASKS[number % len(TASKS)], **point}
        common |= {"model.base": given.base, "model.image_size": given.image_size}
        common |= {"model.schedule": "constant", "trainer.accelerator": "cpu"}
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(timed(common, Path(folder)))
        print(json.dumps({**common, **rounds[-1]}), flush=True)
    report(rounds, workers=given.workers)


def timed(common: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return processor seconds of a trajectory as a sweep, and of its experts one by one."""
    # JSON is YAML.
    (folder / "sweep.yaml").write_text(json.dumps(config(common, folder / "swept")))
    sweep = ["sweep", str(folder / "sweep.yaml"), "--jobs=1"]
    whole = seconds(sweep)
    start = seconds(sweep)
    flags = [f"--{key}={value}" for key, value in common.items()]
    apart = {}
    for steps in STEPS:
        out = folder / str(steps)
        apart[steps] = seconds(["train", *flags, f"--steps={steps}", f"--out={out}"])
        (alone,) = out.glob("*.safetensors")
        (shared,) = (folder / "swept").rglob(f"*-step{steps}.safetensors")
        if alone.read_bytes() != shared.read_bytes():
            raise ValueError(f"Both ways must give the same expert, but differ at {steps} steps.")
    return {"start": start, "trajectory": whole - start, "separate": apart}


def config(common: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return the sweep of one trajectory: all its step counts, and one value for all else."""
    axes = {key: [value] for key, value in common.items()}
    return {"out": str(out), "steps": STEPS[0], "axes": {**axes, "steps": list(STEPS)}}


def seconds(words: list[str]) -> float:
    """Return the processor time of a command with all its processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*COMMAND, *words], check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def report(rounds: list[dict[str, Any]], *, workers: int) -> None:
    """Print what the whole grid costs both ways."""
    trajectories = len(TASKS) * len(list(product(*GRID.values())))
    experts = trajectories * len(STEPS)
    start = fmean(each["start"] for each in rounds)
    ratios = []
    for each in rounds:
        apart = experts * fmean(each["separate"].values())
        swept = workers * start + trajectories * each["trajectory"]
        ratios.append(apart / swept)
        print(
            f"{experts} experts: {apart / 3600:.2f} core-hours separately, {swept / 3600:.2f} "
            f"swept; {experts * 3600 / apart:.0f} and {experts * 3600 / swept:.0f} experts per "
            f"core-hour, ratio {ratios[-1]:.2f}"
        )
    print(
        f"start {start:.1f} s; ratio {fmean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
