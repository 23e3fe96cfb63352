"""This file runs a search as its plan says: method by method, or all at once to a budget."""

from collections.abc import Sequence

from rich.console import Console

from mergekit_lit.models.statistics import has_statistics
from mergekit_lit.search.display import Display
from mergekit_lit.search.tuning.bench import Bench
from mergekit_lit.search.tuning.group import facts_of_group
from mergekit_lit.search.tuning.joint import expected_best, search_jointly
from mergekit_lit.search.tuning.loop import score_again, search_method
from mergekit_lit.search.tuning.plan import TuningPlan
from mergekit_lit.search.tuning.prior import Measured, prior_of
from mergekit_lit.search.tuning.trials import Trial, TrialLog, best_of


def run_search(
    bench: Bench, log: TrialLog, plan: TuningPlan, measured: Measured | None, *, quiet: bool
) -> None:
    """Make every trial of a plan that is not in the log.

    Args:
        bench: makes and scores candidates.
        log: hears of each trial at once.
        plan: what is searched, and how.
        measured: merges of other experts, for the prior of a search to a budget.
        quiet: whether to draw no progress.

    Raises:
        ValueError: the candidate that a search starts from cannot be merged.
    """
    with Display(Console(quiet=quiet)) as display:
        if plan.joint:
            _at_once(bench, log, plan, measured, display)
        else:
            for method in plan.methods:
                _one_method(bench, log, method, plan, display)


def _at_once(
    bench: Bench, log: TrialLog, plan: TuningPlan, measured: Measured | None, display: Display
) -> None:
    """Search all methods to the budget, and score again what was discarded if that is asked for."""
    statistics = has_statistics(bench.experts.structure)
    pool = plan.pool(statistics=statistics)
    # Only other groups tell what follows from what is known of this one.
    facts = facts_of_group(bench.experts) if measured else {}
    prior = prior_of(pool, facts, measured, statistics=statistics)
    propose = expected_best(pool, prior, bench.objective, confidence=plan.confidence)
    count = plan.budget or len(pool)
    display.show("search", 0, count, "merging")

    def heard(_: Trial) -> None:
        own = log.own
        done = sum(each.images for each in own) // bench.count if plan.budget else len(own)
        display.show("search", done, count, _note(own, len(log.trials) - len(own)))

    search_jointly(bench, log, propose, plan.spending, heard=heard)
    if plan.regret:
        for method in dict.fromkeys(trial.method for trial in log.own):
            score_again(bench, log, method, heard=heard)


def _one_method(
    bench: Bench, log: TrialLog, method: str, plan: TuningPlan, display: Display
) -> None:
    """Search one method, and score again what was discarded if the regret is asked for."""
    propose, count = plan.proposals(method)
    display.show(method, 0, count, "merging")

    def heard(_: Trial) -> None:
        own = log.of(method)
        display.show(method, len(own), count, _note(own, len(log.again(method))))

    search_method(bench, log, method, propose, heard=heard)
    if plan.regret:
        score_again(bench, log, method, heard=heard)


def _note(trials: Sequence[Trial], again: int) -> str:
    best = best_of(trials)
    note = f"best {best.value:.4f}" if best and best.value is not None else ""
    return f"{note}; {again} of the discarded scored again" if again else note
