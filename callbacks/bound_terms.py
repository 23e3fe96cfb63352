"""This file follows the terms of the bound that one expert's training decides, along the way."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import SGD

from mergekit_lit.callbacks.gradient_noise import GradientNoise
from mergekit_lit.callbacks.gradient_norm import GradientNorm
from mergekit_lit.callbacks.path_length import PathLength
from mergekit_lit.callbacks.view import is_logging_step, log_metrics, step_ended, training_samples
from mergekit_lit.theory.bound import bound
from mergekit_lit.theory.facts import ExpertFacts, MergeFacts


class BoundTerms(Callback):
    """Logs what an expert would add to the bound of a merge if it stopped now.

    `bound/a_eff` is lambda s, the travel that it brings in; `bound/drift` and `bound/merged_noise`
    are those terms for it alone, and `bound/delta2_by_path` is lambda^2 eps_path^2
    (`theory.terms`). Terms that need the smoothness L are left out where none is given. What needs
    the other experts (the closed form of the drift, by their heterogeneity) or the merged model,
    only `mergekit-lit bound` can tell. The noise is the mean over the steps so far, as a card has.

    It reads the path from the `PathLength` of the same Trainer, which every training has, and
    measures nothing itself. An adaptive optimizer has no travel: there the length of the path over
    the mean norm of the gradients stands in for it (`theory.facts.effective_travel`), if a
    `GradientNorm` is there, and names begin with `bound/effective_`. So they do where gradients are
    clipped.
    """

    def __init__(self, *, coefficient: float = 1.0, smoothness: float | None = None) -> None:
        """Choose the merge.

        Args:
            coefficient: lambda, positive: 1/T for the plain average of T experts.
            smoothness: L, such as `mergekit-lit bound` measures on experts like these; None leaves
                the terms that need it out.

        Raises:
            ValueError: a number that is not positive.
        """
        if not 0 < coefficient < float("inf"):
            raise ValueError(f"`coefficient` must be positive, but is {coefficient!r}.")
        if smoothness is not None and not 0 < smoothness < float("inf"):
            raise ValueError(f"`smoothness` must be positive, but is {smoothness!r}.")
        self.coefficient, self.smoothness = coefficient, smoothness
        self._path: PathLength | None = None
        self._norm: GradientNorm | None = None
        self._noise: GradientNoise | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the follower of the path.

        Raises:
            ValueError: the Trainer has none.
        """
        callbacks = trainer.callbacks  # type: ignore[attr-defined] # Lightning sets it untyped
        self._path = next((c for c in callbacks if isinstance(c, PathLength)), None)
        self._norm = next((c for c in callbacks if isinstance(c, GradientNorm)), None)
        self._noise = next((c for c in callbacks if isinstance(c, GradientNoise)), None)
        if self._path is None:
            raise ValueError(
                "BoundTerms needs a PathLength among the Trainer's callbacks, but there is none. "
                "Add mergekit_lit.callbacks.PathLength before it."
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the terms of the step that just ended, if the Trainer logs it."""
        if step_ended(trainer, batch_idx) and is_logging_step(trainer):
            log_metrics(trainer, self.terms(trainer))

    def terms(self, trainer: Trainer) -> dict[str, float]:
        """Return the terms that are known now, by the names of metrics."""
        if self._path is None:
            return {}
        path = self._path.facts()
        samples = training_samples(trainer)
        noise = self._noise.card_facts()["gradient_noise"] if self._noise else None
        eps = path.get("eps_path")
        adaptive = not isinstance(trainer.optimizers[0], SGD)
        expert = ExpertFacts(
            travel=self._effective_travel(path) if adaptive else path.get("travel"),
            travel_squared=path.get("travel_squared"),
            d2=path.get("mean_squared_displacement"),
            batch=samples.batch if samples else None,
            noise=noise,
            eps2_path=None if eps is None else eps**2,
            adaptive=adaptive,
            clipped=trainer.gradient_clip_val is not None,
        )
        found = bound([expert], MergeFacts(smoothness=self.smoothness), [self.coefficient])
        known = {
            name: term.value
            for name, term in found.terms.items()
            if term.value is not None and name not in _OF_MERGES
        }
        a_eff = found.weighing.a_eff
        known |= {} if a_eff is None else {"a_eff": a_eff}
        prefix = "bound/effective_" if found.effective else "bound/"
        return {f"{prefix}{name}": value for name, value in known.items()}

    def _effective_travel(self, path: Mapping[str, float]) -> float | None:
        """Return the length of the path over the mean norm of the gradients."""
        norm = self._norm.card_facts()["gradient_norm"] if self._norm else None
        return path["path_length"] / norm if norm and path["path_length"] else None


# What one expert alone says nothing of.
_OF_MERGES = ("divergence", "mismatch", "overshoot")
