"""This file is what a search may spend: evaluations, seconds, or both.

One evaluation is one look at all validation images; a candidate that is discarded after an eighth
of them costs an eighth. Merging and statistics cost seconds, not evaluations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_lit.search.tuning.trials import Trial


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be spent.

    Attributes:
        evaluations: at least 1; None for any number.
        seconds: wall time of the trials, above 0; None for any.
    """

    evaluations: int | None = None
    seconds: float | None = None

    def check(self) -> None:
        """Refuse a budget out of range.

        Raises:
            ValueError: a number out of range.
        """
        if self.evaluations is not None and self.evaluations < 1:
            raise ValueError(f"`budget` must be at least 1, but is {self.evaluations}.")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"`budget_seconds` must be above 0, but is {self.seconds}.")

    def allows(self, trials: Sequence[Trial], images: int) -> bool:
        """Return whether another candidate may be scored on all images without overspending.

        The first always may: of the seconds only those are known that were spent.

        Args:
            trials: those made so far.
            images: validation images of all tasks.
        """
        enough = True
        if self.evaluations is not None:
            seen = sum(trial.images for trial in trials)
            enough = seen + images <= self.evaluations * images
        if self.seconds is not None:
            enough = enough and sum(trial.seconds for trial in trials) < self.seconds
        return enough
