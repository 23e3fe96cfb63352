"""This file measures the pace of a budget in seconds: once, by a few short trainings."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mergekit_lit.search.recommending.budget import Pace
from mergekit_lit.search.recommending.site import Setting, Site
from mergekit_lit.search.recommending.space import Way

# Between the two no noise of gradients is measured, which would pass for the cost of steps.
_SHORT, _LONG = 10, 20
# Nothing is learned from these experts; another rate for each keeps their files apart.
_RATE = 1e-6


def clock() -> Callable[[], float]:
    """Return what tells seconds: of this process's processor, or of the wall where a GPU works."""
    return time.perf_counter if torch.cuda.is_available() else time.process_time


def measured_pace(setting: Setting) -> Pace:
    """Return what trainings and scores cost in seconds, by five short trainings of one task.

    Args:
        setting: of the recommendation.
    """
    now, task = clock(), setting.tasks[0]
    quick = replace(setting, space=replace(setting.space, warmup_steps=0))
    small, large = min(setting.space.batch), max(setting.space.batch)
    with tempfile.TemporaryDirectory() as folder:
        site = Site(quick, Path(folder))

        def seconds(place: int, batch: int, *steps: int) -> float:
            begun = now()
            site.train(Way("sgd", _RATE * place, batch, 1.0), task, steps, steps[-1])
            return now() - begun

        # The first loads images and network, and fits the head.
        loaded = seconds(1, small, _SHORT)
        few, many = seconds(2, small, _SHORT), seconds(3, small, _LONG)
        both = seconds(4, small, _SHORT, _LONG)
        wide = seconds(5, large, _SHORT) if large > small else few
        files = site.train(Way("sgd", _RATE, small, 1.0), task, [_SHORT], _SHORT)
        begun = now()
        site.scores(site.merged(list(files.values()))[1])
        score = now() - begun
    step = max(0.0, many - few) / (_LONG - _SHORT)
    sample = max(0.0, wide - few) / _SHORT / max(1, large - small)
    return Pace(
        unit="seconds",
        # Every training of a command by itself loads its images.
        start=max(0.0, loaded - _SHORT * step),
        export=max(0.0, both - many),
        step=max(0.0, step - sample * small),
        sample=sample,
        score=score,
    )
