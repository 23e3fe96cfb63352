"""This file runs a sweep on a Ray cluster, or on a Ray of this machine: a task a worker.

The sweep's folder must be on a disk that all nodes share. Ray places the workers by what they need,
and starts one again whose process or node died; the run that it was at goes on from its last
checkpoint, wherever.
"""

import os
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import torch

from mergekit_lit.search.sweeping.watching import watch
from mergekit_lit.search.sweeping.worker import Listen, Sweep, work

# A node that dies takes its workers along; each may be started again so often.
_RESTARTS = 100
# A cluster on the other side of the world answers within one.
_ANSWER_S = 5.0


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
    worker = given.pop("worker", {})
    if not isinstance(worker, Mapping):
        raise ValueError(
            "`launcher_options.worker` must map resources to amounts, such as {num_cpus: 1}, but "
            f"is {worker!r}."
        )
    worker = {"num_cpus": 1, **worker}
    _check_reachable(str(given.get("address") or os.environ.get("RAY_ADDRESS", "")))
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


def _check_reachable(address: str) -> None:
    """Refuse the address of a cluster where nobody answers: Ray itself goes on trying for minutes.

    Raises:
        ValueError: nobody answers.
    """
    place = urlsplit(address if "://" in address else f"//{address}")
    try:
        if place.hostname and place.port:
            socket.create_connection((place.hostname, place.port), timeout=_ANSWER_S).close()
    except OSError as error:
        raise ValueError(
            f"The Ray cluster at {address!r} must be reachable from here, but is not: {error}. "
            "`ray status` tells the address on a node of it; without `address` one is started."
        ) from None


def _work(sweep: Sweep, place: int, workers: int) -> None:
    """Be one worker."""
    torch.set_num_threads(1)
    work(sweep, lambda *_: None, place=place, workers=workers)
