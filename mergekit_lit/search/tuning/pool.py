"""This file is what a search under a budget chooses among: method, parameters, BatchNorm policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_lit.core.merging import BatchNormPolicy
from mergekit_lit.merging.configuration import SCALE
from mergekit_lit.search.tuning.space import Config, Space, grid_of, key_of


@dataclass(frozen=True)
class Candidate:
    """One merge that can be tried.

    Attributes:
        method: name of the merge method.
        config: values of the searched parameters.
        batch_norm: where its BatchNorm statistics come from.
    """

    method: str
    config: Config
    batch_norm: BatchNormPolicy

    @property
    def key(self) -> str:
        """The text that two candidates share if they are the same."""
        return key_of({"method": self.method, "of": self.config, "batch_norm": self.batch_norm})


REFERENCE = "task_arithmetic"
_SCALE = 0.3


def pool_of(spaces: Mapping[str, Space], policies: Sequence[BatchNormPolicy]) -> list[Candidate]:
    """Return all candidates, each once: the reference, then the grid of each method.

    The reference is task arithmetic at 0.3, the scale that its authors found to do for most suites,
    under the first of the policies.

    Args:
        spaces: what is searched of each method, by name.
        policies: BatchNorm policies, each of which every merge is tried with; at least one.
    """
    first = Candidate(REFERENCE, {SCALE: _SCALE}, policies[0])
    others = [
        Candidate(method, config, policy)
        for method, space in spaces.items()
        for policy in policies
        for config in grid_of(space)
    ]
    return list({candidate.key: candidate for candidate in (first, *others)}.values())
