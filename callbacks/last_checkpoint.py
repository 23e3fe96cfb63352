"""This file keeps one checkpoint of a run, from which a killed run goes on to the same bytes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mergekit_lit.callbacks.view import step_ended
from mergekit_lit.core.files import atomic_path


class LastCheckpoint(Callback):
    """Writes the Trainer's checkpoint every so many steps over the one before, atomically.

    A kill at any moment leaves a whole checkpoint. List this callback last, so that what the others
    did in the same step is inside.
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
            at: further steps after which one is written, unless none are.
            config: what decides the weights' path; a resumed run must have the same.
        """
        if every < 0:
            raise ValueError(f"`checkpoint_every` must be at least 0, but is {every!r}.")
        self.path = Path(path)
        self.every, self.at = every, frozenset(at)
        self.config = dict(config or {})

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write the checkpoint after a step for which it is due; the last step needs none."""
        step = trainer.global_step
        due = self.every > 0 and (step % self.every == 0 or step in self.at)
        if not (due and step != trainer.max_steps and step_ended(trainer, batch_idx)):
            return
        # One process writes; the others take part in collecting what it writes.
        place = atomic_path(self.path) if trainer.is_global_zero else nullcontext(self.path)
        with place as temporary:
            trainer.save_checkpoint(temporary)

    def state_dict(self) -> dict[str, Any]:
        """Return the configuration of the run."""
        return {"config": self.config}

    def remove(self) -> None:
        """Remove the checkpoint of a run that has ended."""
        with suppress(FileNotFoundError):
            self.path.unlink()
        with suppress(OSError):
            self.path.parent.rmdir()
            self.path.parent.parent.rmdir()


def check_resumable(path: Path, config: Mapping[str, Any]) -> bool:
    """Return whether there is a checkpoint to go on from.

    Raises:
        ValueError: the checkpoint is damaged, or comes from a run with another configuration.
    """
    if not path.is_file():
        return False
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        before = saved["callbacks"][LastCheckpoint.__qualname__]["config"]
    # A damaged zip or pickle raises whatever its reader meets first.
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} must be a checkpoint of this run, but is damaged or of another kind: "
            f"{str(error).splitlines()[0]}. Delete it, or train without `resume`."
        ) from None
    changed = sorted(_differences(before, config))
    if changed:
        key, was, now = changed[0]
        raise ValueError(
            f"A resumed run must keep its configuration, but `{key}` was {was} and is {now} now. "
            "Set it back, or train without `resume`."
        )
    return True


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
