"""This file is soups: averages of those experts that do each other good, by validation accuracy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Batch, Calibration
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.params import Params
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.merging.methods.moments import check_samples, looks, looks_together
from mergekit_lit.merging.passes import reduced
from mergekit_lit.merging.steps import moved


@MERGE_METHODS.add(
    form="linear",
    family="averaging",
    data="val",
    source="Wortsman et al. 2022, arXiv:2203.05482, recipe 1 (greedy soup)",
    order="of experts with equal scores the first is tried first",
    check=lambda _, samples: check_samples(samples),
)
def greedy_soup(
    experts: Experts, calibration: Calibration, *, samples: int = 512, seed: int = 0
) -> Tensor:
    """Average the experts that do not lower the validation accuracy of the average.

    From the best expert down: M <- M + {t} if score(M + {t}) >= score(M);
    score(M) = mean over tasks s of accuracy of mean_{t in M} theta_t on s, over expert s's on s

    The average is looked at under the BatchNorm statistics of the merge's policy, or of the batch
    where they are to be recalibrated; an expert on its own task under its own.

    Args:
        experts: T experts of one base, with their heads.
        calibration: validation images of each task, with labels.
        samples: largest number of images of each task, >= 1.
        seed: of the choice of images.

    Returns:
        Coefficients lambda, (T,): 1/|M| for the experts in M, else 0.

    Source: Wortsman et al. 2022, arXiv:2203.05482, recipe 1 (greedy soup).
    Differs: experts of different tasks, hence the normalised accuracy averaged over tasks; there
        all experts are of one task. Where an expert has no image right, plain accuracy counts.
    """
    check_samples(samples)
    judge = _Judge(experts, calibration, samples, seed)
    alone = [judge.score([t]) for t in range(len(experts))]
    order = sorted(range(len(experts)), key=lambda t: (-alone[t], t))
    members, best = order[:1], alone[order[0]]
    for t in order[1:]:
        score = judge.score([*members, t])
        if score >= best:
            members, best = [*members, t], score
    coefficients = torch.zeros(len(experts), dtype=torch.float64)
    coefficients[members] = 1 / len(members)
    return coefficients


class _Judge:
    """Scores averages of some of the experts on the validation images of all tasks."""

    def __init__(self, experts: Experts, calibration: Calibration, samples: int, seed: int) -> None:
        self._experts = experts
        self._calibration = calibration
        self._samples = samples
        self._seed = seed
        self._own = [self._accuracy_of_expert(t) for t in range(len(experts))]

    @torch.no_grad()
    def score(self, members: Sequence[int]) -> float:
        """Return the mean normalised accuracy of the average of some experts."""
        params = self._average(members)
        right, seen = dict.fromkeys(self._experts.names, 0), dict.fromkeys(self._experts.names, 0)
        rounds = looks_together(self._calibration, self._experts.names, self._samples, self._seed)
        for batches in rounds:
            features = self._calibration.merged_features(params, batches)
            for task, batch in batches.items():
                right[task] += _right(self._calibration.logits(task, features[task]), batch)
                seen[task] += len(batch.inputs)
        accuracies = [right[task] / seen[task] for task in self._experts.names]
        normalised = [a / own if own else a for a, own in zip(accuracies, self._own, strict=True)]
        return sum(normalised) / len(normalised)

    @torch.no_grad()
    def _accuracy_of_expert(self, t: int) -> float:
        """Return the accuracy of expert t on its own task."""
        task, params = self._experts.names[t], dict(self._experts.tuned[t])
        right = seen = 0
        for batch in looks(self._calibration, t, task, self._samples, self._seed):
            features = self._calibration.expert.features(params, batch.inputs)
            right += _right(self._calibration.logits(task, features), batch)
            seen += len(batch.inputs)
        return right / seen

    def _average(self, members: Sequence[int]) -> Params:
        steps = (
            (name, reduced(self._experts, name, lambda deltas: deltas[list(members)].mean(dim=0)))
            for name in self._experts.merged_names()
        )
        return moved(self._experts.base, steps)


def _right(logits: Tensor, batch: Batch) -> int:
    """Return how many images of a batch are answered right."""
    if batch.labels is None:
        raise ValueError("`greedy_soup` needs labels, but the images come without them.")
    return int((logits.argmax(dim=1) == batch.labels).sum())
