"""This file runs a sweep on a SLURM cluster: an array of jobs, each of them a worker.

The sweep's folder must be on a disk that all nodes share. A job that is preempted, or comes to its
time limit, is queued again and goes on with whatever run is next; the run that it was at goes on
from its last checkpoint, wherever. The launcher only watches: should it be killed, the jobs go on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mergekit_lit.search.sweeping.watching import watch
from mergekit_lit.search.sweeping.worker import Listen, Sweep, work

# submitit's own default, 3, would leave the runs of a long sweep undone.
_TIMES = 10**6
_DEFAULTS: Mapping[str, Any] = {"name": "sweep", "timeout_min": 240, "cpus_per_task": 1}


def slurm_executor(folder: Path, options: Mapping[str, Any]) -> Any:
    """Return submitit's executor, before anything is written.

    Args:
        folder: where submitit keeps what jobs are given, and what they print.
        options: parameters of the executor, such as `timeout_min`, `mem_gb`, `gpus_per_node` or
            `slurm_partition`; `slurm_max_num_timeout`, how often a job that comes to its time limit
            is queued again, by default as often as it takes; and `cluster`, which is `slurm` by
            default, or `local` for processes of this machine.

    Raises:
        ModuleNotFoundError: submitit is not installed.
        ValueError: there is no SLURM here, or an option is none of submitit's.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "The launcher 'slurm' needs the extra: pip install 'mergekit-lit[slurm]'. "
            "'local' needs nothing."
        ) from None
    given = {**_DEFAULTS, **options}
    cluster = given.pop("cluster", "slurm")
    times = given.pop("slurm_max_num_timeout", _TIMES)
    made = {"cluster": cluster, "slurm_max_num_timeout": times, "local_max_num_timeout": times}
    try:
        # Some executors make their folder before they look at what they are given.
        with TemporaryDirectory() as trial:
            for place in (trial, folder):
                executor = submitit.AutoExecutor(folder=place, **made)
                executor.update_parameters(**given)
    except (RuntimeError, ValueError, TypeError, NameError, AssertionError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"submitit cannot start jobs on {cluster!r}: {told}") from None
    return executor


def run_slurm(sweep: Sweep, listen: Listen, *, jobs: int, executor: Any) -> None:
    """Run a sweep in jobs of a batch system, and wait for them.

    Args:
        sweep: what to do.
        listen: is told of each run that is done, or has failed.
        jobs: number of jobs, at least 1.
        executor: what `slurm_executor` returns.
    """
    with executor.batch():
        submitted = [executor.submit(SlurmWorker(sweep, n, jobs)) for n in range(jobs)]
    try:
        watch(sweep, listen, lambda: all(job.done() for job in submitted))
    except KeyboardInterrupt:
        for job in submitted:
            job.cancel()
        raise


@dataclass(frozen=True)
class SlurmWorker:
    """One job: a worker that submitit queues again when it is told to leave.

    Attributes:
        sweep: what to do.
        place: number of the job.
        workers: how many there are.
    """

    sweep: Sweep
    place: int
    workers: int

    def __call__(self) -> None:
        """Work until nothing is left."""
        torch.set_num_threads(1)
        work(self.sweep, lambda *_: None, place=self.place, workers=self.workers)

    def checkpoint(self) -> Any:
        """Return what to queue again: this job as it was, since the folder knows the rest."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
