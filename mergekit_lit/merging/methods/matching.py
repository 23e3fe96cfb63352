"""This file is the grouping of units by how their activations correlate, as ZipIt does it."""

import torch
from torch import Tensor

_NEVER = -torch.inf


def correlations(count: Tensor, sums: Tensor, products: Tensor) -> Tensor:
    """Return the correlations of m features seen over `count` rows, (m, m), in float64.

    Args:
        count: number of rows, ().
        sums: sum of each feature over the rows, (m,).
        products: sums of the products of any two, (m, m).
    """
    mean = sums / count
    covariance = products / count - torch.outer(mean, mean)
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    # Rounding leaves a feature that never varies with a little variance.
    varies = deviation > 1e-6 * (products.diagonal() / count).clamp(min=0).sqrt()
    scale = torch.where(varies, 1 / torch.where(varies, deviation, 1), 0)
    return covariance * torch.outer(scale, scale)


def group_units(similarity: Tensor, models: int, *, alpha: float, beta: float) -> Tensor:
    """Merge the units of several models, greedily, until as many groups are left as one model has.

    The two most similar groups become one, whose similarity to a third is the lesser of theirs,
    times alpha where the third holds a unit of a model that it holds itself.

    Args:
        similarity: of any two of the T n units, the models' one after the other, (T n, T n).
        models: T.
        alpha: factor on the similarity of a group to more units of its own models, in [0, 1].
        beta: share of a model's units that may be merged with units of the same model alone.

    Returns:
        The group of each unit, (T, n), int64 in [0, n); groups are numbered by their first unit.
    """
    units = len(similarity) // models
    state = _Groups(similarity, models, budget=int(beta * units))
    for _ in range(len(similarity) - units):
        state.merge_closest(alpha)
    return state.numbered().reshape(models, units)


class _Groups:
    """Groups of units, their similarities, and the best partner of each."""

    def __init__(self, similarity: Tensor, models: int, *, budget: int) -> None:
        self._similarity = similarity.clone()
        self._similarity.fill_diagonal_(_NEVER)
        self._owner = torch.arange(len(similarity))
        units = len(similarity) // models
        # Whose units a group holds, (T n, T).
        self._models = torch.eye(models, dtype=torch.bool).repeat_interleave(units, dim=0)
        self._budget = torch.full((models,), budget)
        self._best, self._partner = self._allowed(self._owner).max(dim=1)

    def merge_closest(self, alpha: float) -> None:
        """Make one group of the two most similar ones."""
        row = int(self._best.argmax())
        kept, gone = sorted((row, int(self._partner[row])))
        models = self._models[kept] | self._models[gone]
        if models.sum() == 1:
            self._budget -= models.to(self._budget.dtype)
        self._owner[self._owner == gone] = kept
        self._models[kept], self._models[gone] = models, False
        self._join(kept, gone, alpha)
        self._find_partners(kept, gone)

    def numbered(self) -> Tensor:
        """Return the group of each unit, from 0."""
        groups: Tensor = torch.unique(self._owner, return_inverse=True)[1]
        return groups

    def _join(self, kept: int, gone: int, alpha: float) -> None:
        """Set the similarities of a joint group, and forget the one that went into it."""
        joint = torch.minimum(self._similarity[kept], self._similarity[gone])
        shares = (self._models & self._models[kept]).any(dim=1)
        # Below 0 a factor would bring groups closer.
        joint = torch.where(shares & (joint > 0), alpha * joint, joint)
        joint[kept] = joint[gone] = _NEVER
        self._similarity[kept], self._similarity[:, kept] = joint, joint
        self._similarity[gone], self._similarity[:, gone] = _NEVER, _NEVER

    def _find_partners(self, kept: int, gone: int) -> None:
        """Bring the best partners up to date after a merge."""
        stale = (self._partner == kept) | (self._partner == gone)
        if self._models[kept].sum() == 1:  # perhaps its model's last merge within itself
            stale |= (self._models == self._models[kept]).all(dim=1)
        stale[kept] = stale[gone] = True
        rows = stale.nonzero()[:, 0]
        self._best[rows], self._partner[rows] = self._allowed(rows).max(dim=1)
        # What was one model's alone may now be merged with units of that model.
        joint = self._similarity[kept]
        better = (joint > self._best) & ~stale
        self._best = torch.where(better, joint, self._best)
        self._partner = torch.where(better, kept, self._partner)

    def _allowed(self, rows: Tensor) -> Tensor:
        """Return the similarities of some groups to all, without merges beyond a model's budget."""
        own = (self._models.sum(dim=1) == 1) & (self._models & (self._budget <= 0)).any(dim=1)
        alike = (self._models[rows, None] == self._models).all(dim=2)
        return torch.where(alike & own[rows, None], _NEVER, self._similarity[rows])
