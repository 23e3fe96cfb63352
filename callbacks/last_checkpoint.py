"""This file keeps two checkpoints of a run, from which a killed run goes on to the same bytes."""

import logging
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mergekit_lit.core.files import atomic_path
from mergekit_lit.lit.preemption import exit_code_of, hold, leave, told_anywhere

_LOG = logging.getLogger(__name__)


class LastCheckpoint(Callback):
    """Writes the Trainer's checkpoint between two steps, every so many of them, atomically.

    The one before is kept beside it as `previous.ckpt`: a kill at any moment leaves a whole
    checkpoint, and so does a disk that damages one file. Where the process is told to end
    (`lit.preemption`), it does so between two steps, with a checkpoint of the last one.

    List this callback first: what it writes as a step begins is then all of the steps before, rows
    of the loggers included, and nothing of this one.
    """

    def __init__(
        self,
        path: Path,
        *,
        every: int = 200,
        at: Sequence[int] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Choose where and how often.

        Args:
            path: the checkpoint.
            every: steps between two checkpoints, at least 0; 0 for none.
            at: further steps after which one is written, unless none are: a run that goes on must
                not be past one that it was not asked for before.
            config: what decides the weights' path; a resumed run must have the same.
        """
        if every < 0:
            raise ValueError(f"`checkpoint_every` must be at least 0, but is {every!r}.")
        self.path = Path(path)
        self.previous = self.path.with_stem("previous")
        self.every, self.at = every, frozenset(at)
        self.config = dict(config or {})
        self._kept, self._writes = 0, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on there is something to lose: let signals wait for the end of a step."""
        self._kept = trainer.global_step
        if self.every:
            hold()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Write the checkpoint of the steps so far if it is due; leave if the process must end."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        told = told_anywhere(trainer)
        step = trainer.global_step
        due = self.every and (told or step % self.every == 0 or step in self.at)
        if due and step != self._kept:
            self._write(trainer)
        if told is not None:
            leave(told, self._outcome(trainer), code=exit_code_of(trainer))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave the step that has begun out of a checkpoint of this callback's."""
        if self._writes:
            _end_before(checkpoint["loops"]["fit_loop"])

    def state_dict(self) -> dict[str, Any]:
        """Return the configuration of the run, and the steps that were asked for."""
        return {"config": self.config, "at": sorted(self.at)}

    def find(self, *, tells: bool = True) -> Path | None:
        """Return the newest whole checkpoint, if there is any; damaged ones are put aside.

        Args:
            tells: whether to say in one line what was damaged, and what the run goes on with.

        Raises:
            ValueError: the checkpoint comes from a run with another configuration.
        """
        damages = []
        for path in (self.path, self.previous):
            if not path.is_file():
                continue
            try:
                saved = _read(path)
            except ValueError as error:
                damages.append(str(error))
                # A rename of it must not take the place of the whole one.
                with suppress(FileNotFoundError):
                    path.replace(_aside(path))
                continue
            before, step = saved["callbacks"][type(self).__qualname__], saved["global_step"]
            self._check(before["config"])
            passed = sorted(k for k in self.at - set(before["at"]) if k <= step)
            if passed:
                damages.append(f"{str(path)!r} is past step {passed[0]}, which is asked for now.")
                continue
            self._tell(damages if tells else [], f"goes on at step {step}")
            return path
        self._tell(damages if tells else [], "begins anew, since no checkpoint serves it")
        return None

    def remove(self) -> None:
        """Remove the checkpoints of a run that has ended."""
        for path in (self.path, self.previous):
            path.unlink(missing_ok=True)
            _aside(path).unlink(missing_ok=True)
        with suppress(OSError):
            self.path.parent.rmdir()
            self.path.parent.parent.rmdir()

    def _write(self, trainer: Trainer) -> None:
        # One process writes; the others take part in collecting what it writes.
        place = atomic_path(self.path) if trainer.is_global_zero else nullcontext(self.path)
        self._writes = True
        with place as temporary:
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero and self.path.is_file():
                self.path.replace(self.previous)
        self._kept, self._writes = trainer.global_step, False

    def _outcome(self, trainer: Trainer) -> str:
        """Return what is left of a training that ends before its last step."""
        step, steps = trainer.global_step, trainer.max_steps
        if step and step == self._kept:
            return f"Step {step} of {steps} is kept in {str(self.path.parent)!r}."
        return f"Nothing of its {step} steps of {steps} is kept."

    def _check(self, before: Mapping[str, Any]) -> None:
        changed = sorted(_differences(before, self.config))
        if changed:
            key, was, now = changed[0]
            raise ValueError(
                f"A resumed run must keep its configuration, but `{key}` was {was} and is {now} "
                "now. Set it back, or train without `resume`."
            )

    def _tell(self, damages: Sequence[str], outcome: str) -> None:
        if damages:
            _LOG.warning("%s The run %s.", " ".join(damages), outcome)


def _read(path: Path) -> Mapping[str, Any]:
    """Return a checkpoint of ours, once every byte of it has been compared with its checksum.

    torch.save keeps a CRC-32 with each part of its zip file, which torch.load never looks at.

    Raises:
        ValueError: it is damaged, or of another kind.
    """
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        if broken:
            raise ValueError(f"{broken} does not match its checksum")
        saved: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        own = saved["callbacks"][LastCheckpoint.__qualname__]
        _ = own["config"], own["at"], saved["global_step"]
    except MemoryError:
        raise
    # A damaged zip or pickle raises whatever its reader meets first.
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{str(path)!r} is damaged, or no checkpoint of this run: {reason}."
        ) from None
    return saved


def _end_before(loop: dict[str, Any]) -> None:
    """Let Lightning's counters say what they did when the step before ended.

    It goes on from no other moment: a batch that has begun would be counted as one more that it
    has stepped with, and shift the step of all rows that are logged later.
    """
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    progress = loop["epoch_loop.batch_progress"]
    progress["is_last_batch"] = False
    for counts in (progress["total"], progress["current"]):
        done = counts["completed"]
        counts.update(ready=done, started=done, processed=done, completed=done - 1)


def _aside(path: Path) -> Path:
    """Return where a damaged checkpoint is kept until the run has ended."""
    return path.with_name(f"{path.name}.damaged")


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Yield dotted key, old value and new value of each leaf that differs."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", repr(old), repr(new)
