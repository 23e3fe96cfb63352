"""This file is the loop of a search: propose, merge, score, write down."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

from mergekit_lit.core.experts import Merged
from mergekit_lit.search.tuning.bench import Bench
from mergekit_lit.search.tuning.pool import Candidate
from mergekit_lit.search.tuning.proposals import Propose
from mergekit_lit.search.tuning.race import Run
from mergekit_lit.search.tuning.trials import (
    Trial,
    TrialLog,
    best_of,
    pack_answers,
    unpack_answers,
)

Heard: TypeAlias = Callable[[Trial], None]
"""Hears of each trial that is done."""


def search_method(
    bench: Bench, log: TrialLog, method: str, propose: Propose, *, heard: Heard
) -> None:
    """Try what is proposed of one method until nothing is; each trial goes to the log at once.

    Args:
        bench: makes and scores candidates.
        log: holds the trials of earlier runs, which are not made again.
        method: name of the method.
        propose: what to try next.
        heard: called with each new trial.

    Raises:
        ValueError: the configuration that the search starts from cannot be merged.
    """
    while configs := propose(log.of(method)):
        merges = bench.merges(method, configs)
        for config in configs:
            candidate = Candidate(method, config, bench.batch_norm)
            trial = tried(bench, candidate, log.of(method), merges)
            log.add(trial)
            heard(trial)


def score_again(bench: Bench, log: TrialLog, method: str, *, heard: Heard) -> None:
    """Score each discarded candidate of a method on all images too, so that the regret is known.

    Args:
        bench: makes and scores candidates.
        log: what is in it already is not done again.
        method: name of the method.
        heard: called with each new trial.
    """
    done = {trial.number for trial in log.again(method)}
    out = [t for t in log.of(method) if t.state == "discarded" and t.number not in done]
    for policy in dict.fromkeys(trial.batch_norm for trial in out):
        left = [trial for trial in out if trial.batch_norm == policy]
        merges = bench.under(policy).merges(method, [trial.config for trial in left])
        for trial in left:
            blank = replace(trial, state="failed", value=None, upper=None, by_task={}, again=True)
            scored = replace(_scored(bench, blank, merges, rival=None), answers={})
            log.add(scored)
            heard(scored)


def tried(
    bench: Bench,
    candidate: Candidate,
    finished: Sequence[Trial],
    merges: Iterator[Merged | ValueError] | None = None,
) -> Trial:
    """Return the trial of one candidate; one that was tried before costs nothing.

    Args:
        bench: makes and scores it.
        candidate: what is tried.
        finished: earlier trials, the best of which is its rival.
        merges: yields its merge; None makes it alone.

    Raises:
        ValueError: it cannot be merged, and nothing else could so far.
    """
    method, policy = candidate.method, candidate.batch_norm
    number = sum(trial.method == method for trial in finished)
    for earlier in finished:
        if candidate_of(earlier).key == candidate.key:
            again = replace(earlier, number=number, note=f"as trial {earlier.number}", answers={})
            return replace(again, images=0, seconds=0.0, cpu_seconds=0.0)
    if merges is None:
        merges = bench.under(policy).merges(method, [candidate.config])
    blank = Trial(
        method=method, number=number, config=candidate.config, batch_norm=policy, state="failed"
    )
    return _scored(bench, blank, merges, rival=_rival(bench, finished))


def candidate_of(trial: Trial) -> Candidate:
    """Return the candidate that a trial is of."""
    return Candidate(trial.method, trial.config, trial.batch_norm)


def _scored(
    bench: Bench, blank: Trial, merges: Iterator[Merged | ValueError], *, rival: Run | None
) -> Trial:
    """Return a trial with what the next of the merges did, and how long it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    trial = _judged(bench, blank, next(merges), rival)
    return replace(
        trial,
        seconds=round(time.perf_counter() - wall, 3),
        cpu_seconds=round(time.process_time() - cpu, 3),
    )


def _judged(bench: Bench, blank: Trial, merged: Merged | ValueError, rival: Run | None) -> Trial:
    if isinstance(merged, ValueError):
        # Where nothing can be merged yet, there is nothing to tune.
        if rival is None:
            raise merged
        return replace(blank, note=" ".join(str(merged).split()))
    run = bench.run(merged, rival)
    if not math.isfinite(run.total):
        return replace(blank, images=run.images, note="Its answers are no numbers.")
    return replace(
        blank,
        images=run.images,
        state="scored" if run.upper is None else "discarded",
        value=run.total,
        upper=run.upper,
        by_task=run.values,
        answers=pack_answers(run.answers) if _is_better(run, rival) else {},
    )


def _rival(bench: Bench, finished: Sequence[Trial]) -> Run | None:
    """Return the run of the best trial so far, which brought its answers."""
    best = best_of([trial for trial in finished if trial.answers])
    if best is None:
        return None
    answers = unpack_answers(best.answers)
    values = bench.objective.by_task(answers)
    return Run(answers, values, bench.objective.total(values))


def _is_better(run: Run, rival: Run | None) -> bool:
    return run.upper is None and (rival is None or run.total > rival.total)
