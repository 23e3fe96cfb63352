"""Measure what stability twins cost: M of them may cost M + 0.15 trainings beside the plain one.

Runs without and with twins alternate, on a task of the shipped suite; distances are logged at
every step.

    python experiments/benchmarks/twins.py
"""

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from mergekit_lit.callbacks import StabilityTwins
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.quiet import quiet

WARM_UP = 2


class Clock(Callback):
    """Takes the processor time from the first step after the warm-up to the last."""

    started = seconds = 0.0

    def on_train_batch_start(
        self,
        trainer: Trainer,
        *_: Any,
    ) -> None:
        """Start after the warm-up."""
        if trainer.global_step == WARM_UP:
            self.started = time.process_time()

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Return the mean step."""
        self.seconds = (time.process_time() - self.started) / (trainer.max_steps - WARM_UP)


def main() -> None:
    """Print the cost of M twins."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbones", nargs="+", default=["resnet", "vit"])
    parser.add_argument("--twins", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--steps", type=int, default=12, help="steps of one run")
    parser.add_argument("--rounds", type=int, default=5, help="runs without and with, in turn")
    parser.add_argument("--batch", type=int, default=32, help="images in a batch")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(f"batch {given.batch}, 1 thread, {given.rounds} rounds, processor time")
    print("backbone  twins   plain step   with / without (quartiles)   at most")
    for backbone in given.backbones:
        for twins in given.twins:
            pairs = [
                (seconds(backbone, 0, given), seconds(backbone, twins, given))
                for _ in range(given.rounds)
            ]
            ratios = statistics.quantiles([b / a for a, b in pairs], n=4)
            plain = statistics.median(a for a, _ in pairs)
            print(
                f"{backbone:9} {twins:5} {1000 * plain:9.1f} ms   {ratios[1]:.2f} "
                f"({ratios[0]:.2f} to {ratios[2]:.2f})           {twins + 1.15:.2f}",
                flush=True,
            )


def seconds(backbone: str, twins: int, given: argparse.Namespace) -> float:
    """Return the mean step of a run with so many twins."""
    clock = Clock()
    carried = [StabilityTwins(twins=twins, null=False, rounding=False)] if twins else []
    with quiet():
        trainer = Trainer(
            callbacks=[clock, *carried],
            max_steps=given.steps,
            max_epochs=-1,
            accelerator="cpu",
            log_every_n_steps=10,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
        )
        trainer.fit(
            ExpertModule(backbone, warmup_steps=1),
            datamodule=TaskDataModule("embedded8", "mnist", batch=given.batch),
        )
    return clock.seconds


if __name__ == "__main__":
    main()
