"""This file is the space of a recommendation: ways to train an expert, and for how many steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, get_args

from mergekit_lit.core.registry import unknown_name
from mergekit_lit.lit.optimization import Optimization, OptimizerName

_BETAS = (0.9, 0.999)
_POSITIVE = ("be positive and finite", lambda rate: 0 < rate < math.inf)
_COUNT = ("be at least 1", lambda count: count >= 1)
_RANGES: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "lr": _POSITIVE,
    "adam_lr": _POSITIVE,
    "batch": _COUNT,
    "steps": _COUNT,
    "share": ("lie in (0, 1]", lambda share: 0 < share <= 1),
}


@dataclass(frozen=True, order=True)
class Way:
    """How an expert is trained, but for how long.

    Attributes:
        optimizer: `sgd`, `adam` or `adamw`.
        lr: learning rate after the warm-up.
        batch: samples in one step.
        share: share of the training images, in (0, 1].
    """

    optimizer: str
    lr: float
    batch: int
    share: float

    @property
    def name(self) -> str:
        """What files of its trainings are called by."""
        return f"{self.optimizer}-lr{self.lr:g}-b{self.batch}-share{self.share:g}"


@dataclass(frozen=True, order=True)
class Candidate:
    """A way to train, and the number of steps K."""

    way: Way
    steps: int


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is recommended from: every combination of these values.

    The rate is constant after the warm-up, so that one training serves every number of steps.

    Attributes:
        optimizer: optimizers, of `sgd`, `adam` and `adamw`.
        lr: learning rates of `sgd`, positive.
        adam_lr: those of `adam` and `adamw`.
        batch: samples in one step, each at least 1.
        steps: numbers of steps, each at least 1.
        share: shares of the training images, in (0, 1].
        warmup_steps: steps of linear warm-up, fewer than the largest of `steps`.
        momentum: of `sgd`, in [0, 1).
    """

    optimizer: Sequence[str] = ("sgd", "adamw")
    lr: Sequence[float] = (0.001, 0.003, 0.01, 0.03)
    adam_lr: Sequence[float] = (0.0003, 0.001)
    batch: Sequence[int] = (8, 32, 128)
    steps: Sequence[int] = (25, 50, 100, 200, 400, 800)
    share: Sequence[float] = (0.5, 1.0)
    warmup_steps: int = 10
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Refuse what is empty or out of range, one line each."""
        for field in fields(self):
            values = getattr(self, field.name)
            if isinstance(values, list | tuple) and not values:
                raise ValueError(f"`space.{field.name}` must hold a value, but is empty.")
        for name in self.optimizer:
            if name not in get_args(OptimizerName):
                raise ValueError(unknown_name("optimizer", name, get_args(OptimizerName)))
        self._check_ranges()
        if not 0 <= self.warmup_steps < max(self.steps):
            raise ValueError(
                f"`space.warmup_steps` must be at least 0 and less than the largest of "
                f"`space.steps`, {max(self.steps)}, but is {self.warmup_steps}."
            )

    def _check_ranges(self) -> None:
        for name, (told, holds) in _RANGES.items():
            for value in getattr(self, name):
                if not holds(value):
                    raise ValueError(f"`space.{name}` must {told}, but is {value!r}.")

    @property
    def rates(self) -> list[tuple[str, float]]:
        """Every optimizer with each of its rates."""
        return [
            (name, rate)
            for name in dict.fromkeys(self.optimizer)
            for rate in sorted(set(self.lr if name == "sgd" else self.adam_lr))
        ]

    @property
    def ways(self) -> list[Way]:
        """Every way to train."""
        sizes, shares = sorted(set(self.batch)), sorted(set(self.share))
        return [Way(*rate, b, share) for rate, b, share in product(self.rates, sizes, shares)]

    @property
    def probes(self) -> list[Way]:
        """One way of each rate, of the middle batch and the largest share: what is probed."""
        sizes = sorted(set(self.batch))
        return [Way(*rate, sizes[(len(sizes) - 1) // 2], max(self.share)) for rate in self.rates]

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of steps, ascending."""
        return tuple(sorted(set(self.steps)))

    @property
    def candidates(self) -> list[Candidate]:
        """Every combination."""
        return [Candidate(way, steps) for way in self.ways for steps in self.lengths]

    def training_of(self, optimizer: str, lr: float) -> dict[str, Any]:
        """Return the arguments of `ExpertModule` that an optimizer and a rate decide."""
        return {
            "optimizer": optimizer,
            "lr": lr,
            "momentum": self.momentum,
            "schedule": "constant",
            "warmup_steps": self.warmup_steps,
        }

    def factors(self, steps: int) -> list[float]:
        """Return eta_k / eta of each of K steps."""
        chosen = Optimization(weight_decay=0.0, betas=_BETAS, **self.training_of("sgd", 1.0))
        # Of a constant rate: what comes after a step does not change it.
        return [chosen.factor(step, max(steps, self.warmup_steps + 1)) for step in range(steps)]
