"""This file is what the bound takes: facts of each expert, of the merge and of the loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mergekit_lit.core.cards import Card

Gram: TypeAlias = Sequence[Sequence[float]]
"""Inner products of T vectors, (T, T)."""

ALL = "all"
"""The block of all parameters."""


@dataclass(frozen=True, kw_only=True)
class ExpertFacts:
    """What the bound takes of one expert; None where unknown.

    Attributes:
        travel: s = eta ||a||_1; None for adaptive optimizers.
        travel_squared: sum_k (eta_k a_k)^2.
        plain_sgd: lr and steps (eta, K) of plain SGD at a constant rate; else None.
        d2: (1/||a||_1) sum_k a_k ||x_k - x0||^2.
        batch: b.
        noise: sigma^2, variance of one sample's gradient, summed over coordinates.
        zeta2: ||grad F_Si - grad F_S||^2.
        eps2: squared stability of the backbone, per replaced sample.
        eps2_path: its estimate along the path, uncalibrated; enters no total.
        eps2_head: of the head; 0 if frozen.
        chaotic: whether twins were measured, but went hardly further than one whose base is rounded
            otherwise: what they tell is not the samples' doing.
        unchecked: whether no such twin was carried beside those that `eps2` is of.
        base_loss: F_Si(x0), under what does not move of the merge (such as BatchNorm's statistics),
            so that it and `train_loss` are values of one function.
        train_loss: F_Si(x_avg), the merged model's on the task's training images.
        slope: <grad F_Si(x0), x_avg - x0>.
        merged_gradient2: ||grad F_Si(x_avg)||^2.
        lr: peak learning rate, to judge eta L by.
        adaptive: whether the optimizer's steps depend on the data.
        clipped: whether gradients were clipped, so that step weights depend on the data.
        trained_head: whether the head moved while the expert was trained.
        own_objective: what its training loss had beside the cross-entropy that is measured here,
            such as `weight decay 0.1`; empty for nothing.
    """

    travel: float | None = None
    travel_squared: float | None = None
    plain_sgd: tuple[float, int] | None = None
    d2: float | None = None
    batch: int | None = None
    noise: float | None = None
    zeta2: float | None = None
    eps2: float | None = None
    eps2_path: float | None = None
    eps2_head: float | None = 0.0
    chaotic: bool = False
    unchecked: bool = False
    base_loss: float | None = None
    train_loss: float | None = None
    slope: float | None = None
    merged_gradient2: float | None = None
    lr: float | None = None
    adaptive: bool = False
    clipped: bool = False
    trained_head: bool = False
    own_objective: str = ""


@dataclass(frozen=True, kw_only=True)
class MergeFacts:
    """What the bound takes of the merge and of the loss; None where unknown.

    Attributes:
        smoothness: L in the weights that merging moves, the heads held.
        gram: <grad^l F_Si(x0), grad^l F_Sj(x0)> by block l of the parameters; `ALL` is the one
            block of a merge whose coefficients do not differ.
        gradient_drift: avg over the path of ||grad F_Si(x_k) - grad F_Si(x0)||^2 by expert: the
            drift without L.
        merged_gradient2: ||grad F_S(x_avg)||^2.
        sample_gradient2: G^2 at x_avg.
        delta2_of_merge: Delta_M^2, from the merge of the refits themselves.
        step2: ||x_avg^l - x0^l||^2 by block l of the parameters, as `gram`.
        linear: whether x_avg is x0 + sum_i lambda_i tau_i.
        looks_at: what the method takes beside the experts' tensors, `images` or `cards`, and the
            merges of refits take unchanged; empty for nothing.
        recalibrated: whether BatchNorm statistics were estimated on training images.
    """

    smoothness: float | None = None
    gram: Mapping[str, Gram] | None = None
    gradient_drift: Sequence[float] | None = None
    merged_gradient2: float | None = None
    sample_gradient2: float | None = None
    delta2_of_merge: float | None = None
    step2: Mapping[str, float] | None = None
    linear: bool = True
    looks_at: str = ""
    recalibrated: bool = False

    @property
    def fixed(self) -> bool:
        """Whether lambda_i was found without images."""
        return self.looks_at != "images"


def check_facts(experts: Sequence[ExpertFacts], merge: MergeFacts) -> None:
    """Refuse facts that cannot be.

    Raises:
        ValueError: one is negative or not finite.
    """
    # A U-statistic of a squared norm may come out negative, and enters as it is; a slope may fall.
    signed = {"zeta2", "merged_gradient2", "noise", "slope"}
    for facts in (*experts, merge):
        for name, value in vars(facts).items():
            if isinstance(value, bool) or not isinstance(value, float | int):
                continue
            least = -math.inf if name in signed else 1 if name == "batch" else 0
            if not (least <= value < math.inf and math.isfinite(value)):
                said = "" if name in signed else f"at least {least} and "
                raise ValueError(f"`{name}` must be {said}finite, but is {value!r}.")
    drifts = merge.gradient_drift or ()
    if not all(0 <= drift < math.inf for drift in drifts):
        raise ValueError(
            f"`gradient_drift` must be at least 0 and finite, but is {list(drifts)!r}."
        )
    entries = [entry for rows in (merge.gram or {}).values() for row in rows for entry in row]
    lengths = list((merge.step2 or {}).values())
    if not all(map(math.isfinite, [*entries, *lengths])) or min(lengths, default=0.0) < 0:
        raise ValueError(
            "Products of gradients must be finite and squared lengths of steps at least 0, but one "
            "is not. Leave out the expert that diverged."
        )


def effective_travel(card: Card) -> float | None:
    """Return eta ||a||_1, or for an adaptive optimizer what stands in for it.

    Steps that the data change have no weights of their own: there it is the length of the path over
    the mean norm of the gradients, which is the same for plain SGD. Whatever is derived from it is
    called effective.
    """
    if card.travel is not None or card.path_length is None or not card.gradient_norm:
        return card.travel
    return card.path_length / card.gradient_norm
