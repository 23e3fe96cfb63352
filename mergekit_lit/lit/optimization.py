"""This file is the optimizers and learning-rate schedules of fine-tuning."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mergekit_lit.core.registry import unknown_name

OptimizerName = Literal["sgd", "adam", "adamw"]
ScheduleName = Literal["constant", "cosine", "linear"]
_WARMUP_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How the weights are moved.

    Attributes:
        optimizer: `sgd`, `adam` or `adamw`.
        lr: peak learning rate eta, positive.
        momentum: momentum rho of `sgd`, in [0, 1).
        betas: decay rates of `adam` and `adamw`, each in [0, 1).
        weight_decay: coefficient, at least 0; coupled for `sgd` and `adam`, decoupled for `adamw`.
        schedule: `constant`, `cosine` or `linear`, after the warm-up.
        warmup_steps: steps of linear warm-up, at least 0; None is 20, or half of the steps if that
            is fewer.
    """

    optimizer: OptimizerName
    lr: float
    momentum: float
    betas: tuple[float, float]
    weight_decay: float
    schedule: ScheduleName
    warmup_steps: int | None

    def __post_init__(self) -> None:
        """Refuse values out of range, one line each."""
        for noun, value, known in (
            ("optimizer", self.optimizer, get_args(OptimizerName)),
            ("schedule", self.schedule, get_args(ScheduleName)),
        ):
            if value not in known:
                raise ValueError(unknown_name(noun, value, known))
        if not 0 < self.lr < math.inf:
            raise ValueError(f"`lr` must be positive and finite, but is {self.lr!r}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` must lie in [0, 1), but is {self.momentum!r}.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"`betas` must be two numbers in [0, 1), but are {self.betas!r}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"`weight_decay` must be at least 0, but is {self.weight_decay!r}.")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"`warmup_steps` must be at least 0, but is {self.warmup_steps!r}.")

    @property
    def horizon_matters(self) -> bool:
        """Whether the number of steps K is part of the trajectory."""
        return self.schedule != "constant"

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer over `parameters`, weight decay on all of them."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
            )
        adaptive = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return adaptive(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)

    def warmup(self, steps: int) -> int:
        """Return the steps of warm-up w of a run of `steps` steps."""
        return min(_WARMUP_STEPS, steps // 2) if self.warmup_steps is None else self.warmup_steps

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
        """Return the schedule over `steps` steps, to be advanced after each.

        Raises:
            ValueError: the warm-up does not leave a step.
        """
        if self.warmup(steps) >= steps > 0:
            raise ValueError(
                f"`warmup_steps` must be less than the number of steps {steps}, but is "
                f"{self.warmup_steps}. Train longer or warm up for less."
            )
        return LambdaLR(optimizer, lambda step: self.factor(step, steps))

    def check_finite(self, loss: float, *, step: int, task: str) -> None:
        """Refuse a loss that is no number.

        Raises:
            ValueError: it is NaN or infinite.
        """
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss must be finite, but is {loss} at step {step} of task {task!r}. Train "
                f"with a lower `lr` (now {self.lr:g}), more `warmup_steps` or "
                "`trainer.gradient_clip_val`."
            )

    def configured(
        self, parameters: Iterable[nn.Parameter], steps: int
    ) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and its schedule over `steps` steps as Lightning takes them."""
        optimizer = self.build(parameters)
        scheduler = self.scheduler(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def factor(self, step: int, steps: int) -> float:
        """Return eta_k / eta of step k = 0, 1, ..., in (0, 1] for k < K.

        (k + 1) / w while k < w, the steps of warm-up. Then, with s = (k - w) / (K - w):
        1 for `constant`, (1 + cos(pi s)) / 2 for `cosine`, 1 - s for `linear`.

        Args:
            step: k.
            steps: K.
        """
        warmup = self.warmup(steps)
        if step < warmup:
            return (step + 1) / warmup
        if not self.horizon_matters:
            return 1.0
        share = min(1.0, (step - warmup) / (steps - warmup))
        return (1 + math.cos(math.pi * share)) / 2 if self.schedule == "cosine" else 1 - share
