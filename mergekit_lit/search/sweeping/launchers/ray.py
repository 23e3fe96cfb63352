"""This file runs a sweep on a Ray cluster, or on a Ray of this machine: a task a worker.

The sweep's folder must be on a disk that all nodes share. Ray places the workers by what they need,
and starts one again whose process or node died; the run that it was at goes on from its last
checkpoint, wherever.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch

from mergekit_lit.search.sweeping.watching import watch
from mergekit_lit.search.sweeping.worker import Listen, Sweep, work

# A node that dies takes its workers along; each may be started again so often.
_RESTARTS = 100


def ray_cluster(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Connect to Ray, before anything is written, and return what each worker needs.

    Args:
        options: `address` of a cluster (`auto` for the one of this machine; without it one is
            started) and other arguments of `ray.init`; and `worker`, resources of each worker as
            Ray names them, such as {num_cpus: 1, num_gpus: 0.5}.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: the cluster cannot be reached, or an option is unknown.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "The launcher 'ray' needs the extra: pip install 'mergekit-lit[ray]'. "
            "'local' needs nothing."
        ) from None
    given = dict(options)
    worker = {"num_cpus": 1, **given.pop("worker", {})}
    try:
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", **given)
        ray.remote(**worker)(_work)
    except (ConnectionError, RuntimeError, ValueError, TypeError, ray.exceptions.RayError) as error:
        told = " ".join(str(error).split())
        if "authentication" in told.lower():
            # From 2.60 on a cluster asks for one; Ray's own words go on about it at length.
            told = (
                f"{told.partition('.')[0]}. Put the cluster's token into RAY_AUTH_TOKEN, or into "
                "~/.ray/auth_token, here and on each node; RAY_AUTH_MODE=disabled, for all of "
                "them, does without."
            )
        raise ValueError(f"Ray cannot start workers with {dict(options)!r}: {told}") from None
    return worker


def run_ray(sweep: Sweep, listen: Listen, *, jobs: int, worker: Mapping[str, Any]) -> None:
    """Run a sweep in tasks of Ray, and wait for them.

    Args:
        sweep: what to do.
        listen: is told of each run that is done, or has failed.
        jobs: number of workers, at least 1.
        worker: what each needs, from `ray_cluster`.

    Raises:
        ChildProcessError: workers ended with an error of their own.
    """
    import ray

    task = ray.remote(max_retries=_RESTARTS, **worker)(_work)
    tasks = [task.remote(sweep, place, jobs) for place in range(jobs)]
    try:
        watch(sweep, listen, lambda: not ray.wait(tasks, num_returns=jobs, timeout=0)[1])
        ray.get(tasks)
    except ray.exceptions.RayError as error:
        told = str(error).splitlines()[-1]
        raise ChildProcessError(f"Ray's workers must live, but one ended: {told}") from error
    except KeyboardInterrupt:
        for each in tasks:
            ray.cancel(each, force=True)
        raise


def _work(sweep: Sweep, place: int, workers: int) -> None:
    """Be one worker."""
    torch.set_num_threads(1)
    work(sweep, lambda *_: None, place=place, workers=workers)
