"""This file measures stability: twins of a training that differ from it in a few samples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mergekit_lit.callbacks.expert_export import ExpertExport
from mergekit_lit.callbacks.twin_distances import Place, squared_distances
from mergekit_lit.callbacks.view import log_metrics, step_ended
from mergekit_lit.core.measurements import add_measurements
from mergekit_lit.data.splits import TaskData, neighbour, replacement
from mergekit_lit.lit.data import TaskDataModule
from mergekit_lit.lit.expert import ExpertModule
from mergekit_lit.lit.twins import Twin, settings_of
from mergekit_lit.theory.stability import twin_spread

# A distance counts only where it is so many times what rounding alone makes of two equal runs.
_ABOVE_ROUNDING = 10.0


class StabilityTwins(Callback):
    """Carries twins of the run, and logs ||x_k - x'_k||^2 / m after each step.

    A twin is the same run on a neighbouring data set (`data.splits.neighbour`): m training samples
    are replaced from the reserve, all else is coupled (`lit.twins.Twin`). So its end is that of a
    run of its own with `data.neighbour` m and `data.neighbour_seed` 0, 1, ...: on the CPU to the
    same bits. For each m `stability/m<m>/mean` is eps^2 over the twins, beside `median`, the
    bootstrap interval of the median (`low`, `high`), the medians of the layer groups
    `stability/m<m>/group/<group>` and of the head, `stability/m<m>/head`, which is 0 if frozen.

    Two controls: `stability/null` is the distance of a twin with nothing replaced, exactly 0 on the
    CPU; `stability/rounding` that of a twin whose x0 is moved by one unit in the last place. Where
    eps is not 10 times the latter, the run is chaotic, and how much was replaced no longer matters.

    At the end the distances at each step count that `ExpertExport` writes go to
    `<expert>.measured.json`. M twins cost M trainings in time, and weights, gradients and the
    optimizer's state in memory; M counts every twin carried, `twins` for each m and the controls:
    by default 5 + 2. They step one after the other: stacked into one pass they would lose time with
    the shipped backbones (measured in experiments/benchmarks/README.md), so that is not offered.

    Several processes carry the twins that one does, but for rounding, where their plain run is that
    of one too: not under augmentation or dropout, of which each process draws its own, nor under
    BatchNorm without `sync_batchnorm`.

    Source: Lei & Ying 2020, arXiv:2006.08157, definition 4 (l2 on-average model stability).
    Differs: m samples at once, divided by m, which is the same where the change is small.
    """

    def __init__(
        self,
        *,
        twins: int | Sequence[int] = 5,
        replaced: Sequence[int] = (1,),
        null: bool = True,
        rounding: bool = True,
        every: int = 1,
        export: bool = False,
        seed: int = 0,
    ) -> None:
        """Choose the twins.

        Args:
            twins: neighbours for each m, at least 1, one number for all or one for each m; their
                seeds are 0, 1, ... The two controls are carried beside them.
            replaced: the numbers m of samples that are replaced, each at least 1.
            null: whether to carry a twin with nothing replaced.
            rounding: whether to carry a twin whose x0 is rounded otherwise.
            every: steps between two logged distances, at least 1.
            export: whether to write each neighbour as an expert file, in the folder
                `<expert>.twins`, wherever `ExpertExport` writes one.
            seed: of the rounding.

        Raises:
            ValueError: no m, a number out of range, or not one number of twins for each m.
        """
        _check(every=every)
        if not replaced:
            raise ValueError(
                "`replaced` must hold at least one number of samples, but is empty. Leave "
                "StabilityTwins out, or give one, such as [1]."
            )
        for m in replaced:
            _check(replaced=m)
        counts = _counts(twins, replaced)
        places = [Place(m, j) for m, n in zip(replaced, counts, strict=True) for j in range(n)]
        controls = [Place(0)] * null + [Place(0, rounded=True)] * rounding
        self.places = [*dict.fromkeys(places), *controls]
        self.every, self.export, self.seed = every, export, seed
        self._twins: list[Twin] = []
        self._saved: Sequence[Mapping[str, Any]] = ()
        self._met: list[int | None] = [None] * len(self.places)
        self._measured: dict[str, dict[str, Any]] = {}
        self._settings: list[dict[str, Any]] = []
        self._handle: RemovableHandle | None = None
        self._stepped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run whose samples cannot be replaced."""
        data = trainer.datamodule  # type: ignore[attr-defined] # Lightning sets it untyped
        if not isinstance(pl_module, ExpertModule) or not isinstance(data, TaskDataModule):
            raise TypeError(
                "StabilityTwins must watch an ExpertModule on a TaskDataModule, whose batches tell "
                f"which sample is which, but got {type(pl_module).__name__} on "
                f"{type(data).__name__}. Train by `train_expert`, or leave it out."
            )
        for place in self.places:
            replacement(data.task_data, place.m, place.seed, name="replaced")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # untyped
        export = _export_of(trainer)
        if self.export and export and callbacks.index(export) < callbacks.index(self):
            raise ValueError(
                "StabilityTwins must stand before ExpertExport among the callbacks, to step before "
                "it is written, but stands after it. Change their order."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch which steps the optimizer takes."""
        if trainer.global_step and not self._saved:
            raise ValueError(
                "StabilityTwins must be carried from the first step, but the run goes on at step "
                f"{trainer.global_step} of a checkpoint without them. Train without `resume`."
            )
        self._twins = []
        self._release()
        optimizer = trainer.optimizers[0]
        self._handle = optimizer.register_step_post_hook(self._note_step)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Add the gradient of the coming micro-batch to each twin's."""
        if not self._twins:
            self._twins = self._begun(trainer, _expert(pl_module))
        # The schedule moves on before the batch ends.
        self._settings = settings_of(trainer.optimizers[0])
        with isolate_rng(include_cuda=pl_module.device.type == "cuda"):
            meets = [twin.backward(batch, batch_idx) for twin in self._twins]
        self._note_met(trainer, meets)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Let the twins step with the run, and log how far they are from it."""
        if not step_ended(trainer, batch_idx):
            return
        for twin in self._twins:
            twin.step(self._settings) if self._stepped else twin.skip()
        self._stepped = False
        step = trainer.global_step
        export = _export_of(trainer)
        path = export.path_after(trainer, batch_idx) if export else None
        if step % self.every and path is None:
            return
        columns, table = squared_distances(_expert(pl_module), self._twins)
        if step % self.every == 0:
            log_metrics(trainer, self._metrics(columns, table))
        if path is not None:
            self._measured[str(path)] = self._summary(columns, table, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was measured beside the experts, and leave the optimizer as it was."""
        self._release()
        self._twins = []
        if trainer.is_global_zero:
            for path, summary in self._measured.items():
                if Path(path).is_file():
                    add_measurements(Path(path), {"stability": summary})

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the optimizer as it was."""
        self._release()

    def neighbours(self) -> Iterator[tuple[ExpertModule, TaskData]]:
        """Yield the module and the data of each neighbour that is to be kept as an expert."""
        if self.export:
            for place, twin in zip(self.places, self._twins, strict=True):
                if place.m:
                    data = neighbour(twin.module.data.task_data, place.m, place.seed)
                    yield twin.module, data

    def state_dict(self) -> dict[str, Any]:
        """Return every twin's weights and optimizer, and what was measured so far."""
        return {
            "places": [place.name for place in self.places],
            "twins": [twin.state_dict() for twin in self._twins],
            "met": list(self._met),
            "measured": self._measured,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the twins of a checkpoint."""
        names = [place.name for place in self.places]
        if state_dict["places"] != names:
            raise ValueError(
                "A resumed run must keep its twins, but had "
                f"{', '.join(state_dict['places'])} and has {', '.join(names)}. Set "
                "StabilityTwins back, or train without `resume`."
            )
        self._saved = state_dict["twins"]
        self._met = list(state_dict["met"])
        self._measured = dict(state_dict["measured"])

    def _begun(self, trainer: Trainer, module: ExpertModule) -> list[Twin]:
        """Return the twins at the start, or as a checkpoint left them."""
        twins = []
        data = module.data.task_data
        for place in self.places:
            positions, others = replacement(data, place.m, place.seed)
            twin = Twin(module, trainer, torch.from_numpy(positions), others)
            if place.rounded:
                twin.round_up(self.seed)
            twins.append(twin)
        for twin, saved in zip(twins, self._saved, strict=bool(self._saved)):
            twin.load_state_dict(saved)
        return twins

    def _note_met(self, trainer: Trainer, meets: Sequence[bool]) -> None:
        """Note the step at which each twin meets a replaced sample first, in any process."""
        if trainer.world_size > 1 and None in self._met:
            mine = torch.tensor(meets, dtype=torch.float32, device=trainer.strategy.root_device)
            meets = trainer.strategy.reduce(mine, reduce_op="max").bool().tolist()
        for i, met in enumerate(meets):
            if met and self._met[i] is None:
                self._met[i] = trainer.global_step + 1

    def _note_step(self, *_: Any) -> None:
        self._stepped = True

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _metrics(self, columns: Sequence[str], table: Tensor) -> dict[str, float]:
        """Return what is logged after a step."""
        metrics: dict[str, float] = {}
        for m, rows in self._by_m(table).items():
            spread = asdict(twin_spread((rows[:, 0] / m).tolist()))
            metrics |= {f"stability/m{m}/{k}": v for k, v in spread.items() if v is not None}
            middle = (rows / m).quantile(0.5, dim=0).tolist()
            metrics |= {
                f"stability/m{m}/{k}": v for k, v in zip(columns[1:], middle[1:], strict=True)
            }
        return metrics | {f"stability/{k}": v for k, v in self._controls(table).items()}

    def _summary(self, columns: Sequence[str], table: Tensor, step: int) -> dict[str, Any]:
        """Return what is kept of the twins at a step count, as plain values."""
        controls = self._controls(table)
        floor = controls.get("rounding")
        found: dict[str, Any] = {"step": step, **controls, "replaced": {}}
        for m, rows in self._by_m(table).items():
            each = (rows / m).tolist()
            spread = twin_spread([row[0] for row in each])
            head = twin_spread([row[columns.index("head")] for row in each])
            above = None if floor is None else spread.mean * m >= _ABOVE_ROUNDING**2 * floor
            found["replaced"][str(m)] = {
                "backbone": asdict(spread),
                "head": asdict(head),
                "each": [row[0] for row in each],
                "above_rounding": above,
            }
        found["first_met"] = {p.name: met for p, met in zip(self.places, self._met, strict=True)}
        return found

    def _by_m(self, table: Tensor) -> dict[int, Tensor]:
        numbers = [place.m for place in self.places]
        return {m: table[[i for i, n in enumerate(numbers) if n == m]] for m in numbers if m > 0}

    def _controls(self, table: Tensor) -> dict[str, float]:
        return {
            place.name: float(row[0])
            for place, row in zip(self.places, table, strict=True)
            if place.m == 0
        }


def _expert(module: LightningModule) -> ExpertModule:
    """Return the module as what `on_fit_start` has found it to be."""
    if not isinstance(module, ExpertModule):
        raise TypeError(f"StabilityTwins must watch an ExpertModule, not {type(module).__name__}.")
    return module


def _counts(twins: int | Sequence[int], replaced: Sequence[int]) -> list[int]:
    """Return the number of twins for each m."""
    counts = [twins] * len(replaced) if isinstance(twins, int) else list(twins)
    if len(counts) != len(replaced):
        raise ValueError(
            f"`twins` must be one number, or one for each of `replaced`, {list(replaced)}, but is "
            f"{counts}."
        )
    for count in counts:
        _check(twins=count)
    return counts


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {number!r}.")


def _export_of(trainer: Trainer) -> ExpertExport | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined] # Lightning sets it untyped
    return next((c for c in callbacks if isinstance(c, ExpertExport)), None)
