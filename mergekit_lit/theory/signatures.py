"""This file names which of the source's three signatures of failure a merge shows."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Symptoms:
    """What is looked at.

    Attributes:
        lr: largest peak learning rate of the experts.
        eigenvalue: dominant eigenvalue of the Hessian at the merge.
        base_loss: F_Si(x0) by task, training images.
        merged_loss: F_Si(x_avg) by task, training images.
        expert_loss: F_Si(x_i) of each task's own expert; None where its card does not tell.
        gap: F_i - F_Si at x_avg by task: test above training loss.
        gradient2: ||grad F_S||^2 at the merge.
        zeta2: ||grad F_Si - grad F_S||^2 there, by task.
    """

    lr: float | None
    eigenvalue: float
    base_loss: Mapping[str, float]
    merged_loss: Mapping[str, float]
    expert_loss: Mapping[str, float | None]
    gap: Mapping[str, float]
    gradient2: float
    zeta2: Mapping[str, float]


def signatures(symptoms: Symptoms) -> list[str]:
    """Return the signatures that the symptoms show, one sentence each; none where all is well.

    The source (arXiv 2601.21690) names the three and gives no numbers; each threshold is ours:

    - Large learning rate: eta times the dominant eigenvalue exceeds 2, where a step of gradient
      descent on a quadratic goes further up than it came down, whatever the batch.
    - Over-specialisation: the merge's training loss is no lower than the base's although its
      experts' are: what they gained is lost on the way between them. It is told which is larger,
      training loss above the experts' (drift) or test above training loss (stability).
    - Diverse tasks: the mean zeta_i^2 exceeds N ||grad F_S||^2. Unrelated gradients of one length
      give N - 1 times; beyond, tasks work against each other, and each further one adds more
      heterogeneity than progress.
    """
    found = []
    if symptoms.lr is not None and symptoms.lr * symptoms.eigenvalue > 2:
        found.append(
            f"Large learning rate: eta times the Hessian's eigenvalue is "
            f"{symptoms.lr * symptoms.eigenvalue:.3g}, above 2: no batch size mends that."
        )
    base, merged = (
        statistics.fmean(symptoms.base_loss.values()),
        statistics.fmean(symptoms.merged_loss.values()),
    )
    known = [loss for loss in symptoms.expert_loss.values() if loss is not None]
    if known and statistics.fmean(known) < base <= merged:
        own, gap = statistics.fmean(known), statistics.fmean(symptoms.gap.values())
        cause = (
            "its training loss (drift)"
            if merged - own >= gap
            else "its test loss alone (stability)"
        )
        found.append(
            f"Over-specialised experts: the merge's training loss {merged:.3g} is not below the "
            f"base's {base:.3g}, its experts' {own:.3g} is; most of it is {cause}."
        )
    apart = statistics.fmean(symptoms.zeta2.values())
    if apart > len(symptoms.zeta2) * max(symptoms.gradient2, 0.0):
        found.append(
            f"Diverse tasks: their gradients differ by {apart:.3g} and share "
            f"{symptoms.gradient2:.3g} (squared norms): each further task costs more than it helps."
        )
    return found
