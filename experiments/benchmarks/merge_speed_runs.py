"""This file runs merges in processes of their own, in turns, and watches their memory."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

_TOOLS = Path(__file__).with_name("merge_speed_tools.py")


def measure(jobs: list[dict[str, Any]], repeats: int, memory: float) -> list[dict[str, Any]]:
    """Run every job `repeats` times in turns; a job that fails is not run again.

    Args:
        jobs: tool, interpreter, method and files of each; `runs` and `failed` are added.
        repeats: how often.
        memory: GB that other tools may take.
    """
    for job in jobs:
        job |= {"runs": [], "failed": ""}
    for _ in range(repeats):
        for job in jobs:
            if not job["failed"]:
                told = run_apart({**job, "runs": [], "memory": memory})
                if "failed" in told:
                    job["failed"] = told["failed"]
                else:
                    job["runs"].append(told)
                print(job["tool"], job["method"], told, file=sys.stderr, flush=True)
    return jobs


def run_apart(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in a process of its own and watch its memory; return its figures, or why not."""
    command = [job["python"], str(_TOOLS), json.dumps(job)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = Peak(process)
    if process.stdout is None:
        raise RuntimeError("The process must have a pipe as its output.")
    for line in process.stdout:
        if line.startswith("started"):
            peak.start()
        elif line.startswith("ended"):
            peak.stop()
            figures: dict[str, Any] = json.loads(line.removeprefix("ended"))
            process.communicate()
            return figures | {"anonymous_mb": peak.above}
    peak.stop()
    _, errors = process.communicate()
    last = (errors.strip().split("\n") or [""])[-1]
    return {"failed": "memory" if "alloc" in last.lower() or "Memory" in last else last[:200]}


def installed(python: str, package: str) -> bool:
    """Return whether an interpreter finds a package."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


class Peak(threading.Thread):
    """Samples the anonymous memory of a process from outside, where its work cannot delay it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{process.pid}/status")
        self._going = True
        self._first = self._now()
        self._most = self._first

    @property
    def above(self) -> float:
        """MB above what the process had after its imports."""
        return round(self._most - self._first, 1)

    def start(self) -> None:
        """Take the process as it is now for the zero."""
        self._first = self._most = self._now()
        super().start()

    def run(self) -> None:
        """Sample every 5 ms."""
        while self._going:
            self._most = max(self._most, self._now())
            time.sleep(0.005)

    def stop(self) -> None:
        """Stop."""
        self._going = False

    def _now(self) -> float:
        try:
            lines = self._status.read_text().splitlines()
        except OSError:
            return 0.0
        found = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
        return found[0] / 1024 if found else 0.0
