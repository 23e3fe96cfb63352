"""This file says which configurations to try next: those of a grid, or what Optuna asks for."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from mergekit_lit.core.seeds import derive_seed
from mergekit_lit.search.tuning.space import Axis, Config, Space, grid_of, key_of, start_of
from mergekit_lit.search.tuning.trials import Trial

Propose: TypeAlias = Callable[[Sequence[Trial]], list[Config]]
"""Takes every finished trial of a method, in order, and returns what to try next; none at the end.

What is returned depends on the trials and the seed alone, so a resumed search goes on alike.
"""


def grid_proposals(space: Space, *, trials: int | None, seed: int) -> Propose:
    """Propose the points of a grid, all at once.

    Args:
        space: what is searched.
        trials: at most so many; None for the whole grid.
        seed: of the draw, where there are more.
    """
    grid = grid_of(space, trials=trials, seed=seed)

    def propose(finished: Sequence[Trial]) -> list[Config]:
        done = {key_of(trial.config) for trial in finished}
        return [config for config in grid if key_of(config) not in done]

    return propose


def optuna_proposals(space: Space, *, trials: int, seed: int) -> Propose:
    """Propose what Optuna's TPE sampler asks for, one by one, the start first.

    Trials that were discarded tell their estimate: it is unbiased, unlike a lower end.

    Args:
        space: what is searched, not empty.
        trials: how many to make.
        seed: of the sampler, which is seeded anew for each trial.

    Raises:
        ModuleNotFoundError: Optuna is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "The search 'optuna' needs it installed: pip install 'mergekit-lit[tune]'. "
            "The search 'grid' needs nothing."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: _distribution(optuna, axis) for name, axis in space.items()}

    def propose(finished: Sequence[Trial]) -> list[Config]:
        if len(finished) >= trials:
            return []
        if not finished:
            return [start_of(space)]
        sampler = optuna.samplers.TPESampler(seed=derive_seed(seed, len(finished)) % 2**32)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(
            optuna.trial.create_trial(
                params=dict(trial.config), distributions=distributions, value=trial.value
            )
            for trial in finished
            if trial.value is not None
        )
        return [study.ask(distributions).params]

    return propose


def _distribution(optuna: Any, axis: Axis) -> Any:
    kinds = optuna.distributions
    if axis.ends is None:
        return kinds.CategoricalDistribution(axis.values)
    low, high = axis.ends
    if axis.whole:
        return kinds.IntDistribution(round(low), round(high))
    return kinds.FloatDistribution(low, high)
