"""This file is the features of images: losses and gradients at the base, and one probe merge."""

import math
from collections.abc import Sequence
from dataclasses import replace

from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.params import flat
from mergekit_lit.search.predicting.columns import Column, Row, number, spread, spread_columns
from mergekit_lit.search.predicting.deltas import step_of
from mergekit_lit.search.predicting.probing import Probe
from mergekit_lit.search.predicting.sights import Seen
from mergekit_lit.stages.bound import coefficients_of
from mergekit_lit.stages.bound_facts import expert_facts
from mergekit_lit.theory.bound import Bound, bound
from mergekit_lit.theory.coefficients import Block
from mergekit_lit.theory.facts import ALL, ExpertFacts, MergeFacts
from mergekit_lit.theory.term import sum_of

_TERMS = ("progress", "drift", "drift_closed_form", "merged_noise")
# What the shipped table's `probe_total` sums.
_SUMMED = ("progress", "drift", "mismatch", "merged_noise", "divergence", "generalization")
_OTHERS, _TASKS = "the other experts", "the tasks"

DATA_COLUMNS: tuple[Column, ...] = (
    Column("base_val_accuracy", "accuracy of the base on val images"),
    Column("base_val_loss", "cross-entropy of the base on val images"),
    Column("expert_val_accuracy", "accuracy of the expert on val images"),
    Column("expert_val_loss", "cross-entropy of the expert on val images"),
    *spread_columns("base_val_accuracies", "accuracy of the base on val images", _TASKS),
    *spread_columns("expert_val_accuracies", "accuracy of the experts on val images", _TASKS),
    Column("gradient2", "||grad F_t||^2 at the base, a U-statistic (may be negative)"),
    Column("gradient_noise", "tr Sigma of one sample's gradient at the base"),
    Column("zeta2", "||grad F_t - grad F_S||^2 at the base, a U-statistic"),
    Column("zeta2_mean", "zeta2, mean over the tasks"),
    Column("gradient_product", "<grad F_t, grad F_s>, mean over the other tasks"),
    Column("group_gradient2", "||grad F_S||^2 at the base, a U-statistic"),
    Column("gradient_step", "<grad F_t, step>: first order of the merge's loss"),
    Column("gradient_own", "<grad F_t, tau_t>: first order of the expert's loss"),
    *spread_columns("gradient_other", "<grad F_t, tau_s> for another expert s", _OTHERS),
    Column("curvature_own", "tau^T H tau along the expert's delta, by the secant of grad F_t"),
    Column("curvature_average", "the same along the step of the plain average"),
    Column("smoothness", "L of F_S, by the secant between base and plain average"),
    *(Column(f"bound_{name}", f"bound: {name.replace('_', ' ')}") for name in _TERMS),
)

PROBE_COLUMNS: tuple[Column, ...] = (
    Column("probe_val_accuracy", "accuracy of the plain average on val images"),
    Column("probe_val_loss", "cross-entropy of the plain average on val images"),
    Column("probe_train_loss", "the same on training images"),
    *spread_columns("probe_val_accuracies", "probe_val_accuracy", _TASKS),
    *spread_columns("probe_val_losses", "probe_val_loss", _TASKS),
    Column("probe_divergence", "bound of the plain average: divergence"),
    Column("probe_generalization", "bound of the plain average: generalization, Delta by path"),
    Column("probe_total", "bound of the plain average: total, Delta by path"),
)


def of_data(experts: Experts, merged: Merged, seen: Seen) -> list[Row]:
    """Return what images tell of a merge before it is scored, a row a task."""
    terms = _bound(experts, coefficients_of(experts, merged), seen)
    step = flat(step_of(experts, merged))
    count = len(experts)
    group = {
        **spread("base_val_accuracies", [sight.base.accuracy for sight in seen.sights]),
        **spread("expert_val_accuracies", [expert.score.accuracy for expert in seen.experts]),
        "zeta2_mean": number(sum(seen.zeta2) / count),
        "group_gradient2": number(float(seen.gram.mean())),
        "smoothness": number(seen.smoothness),
        **{f"bound_{name}": number(terms.terms[name].value if terms else None) for name in _TERMS},
    }
    return [
        {
            **group,
            **_alone(seen, t),
            "gradient_step": number(float(sight.mean @ step)),
        }
        for t, sight in enumerate(seen.sights)
    ]


def _alone(seen: Seen, t: int) -> Row:
    """Return what images tell of one task in its group, whatever the merge."""
    sight, expert = seen.sights[t], seen.experts[t]
    others = [s for s in range(len(seen.sights)) if s != t]
    products = [float(seen.gram[t, s]) for s in others]
    return {
        "base_val_accuracy": number(sight.base.accuracy),
        "base_val_loss": number(sight.base.loss),
        "expert_val_accuracy": number(expert.score.accuracy),
        "expert_val_loss": number(expert.score.loss),
        "gradient2": number(float(seen.gram[t, t])),
        "gradient_noise": number(seen.noise[t]),
        "zeta2": number(seen.zeta2[t]),
        "gradient_product": number(sum(products) / len(products) if products else None),
        "gradient_own": number(float(seen.along[t, t])),
        **spread("gradient_other", [float(seen.along[t, s]) for s in others]),
        "curvature_own": number(expert.curvature),
        "curvature_average": number(seen.curvatures[t]),
    }


def of_probe(experts: Experts, seen: Seen, probe: Probe) -> list[Row]:
    """Return what the plain average's scores tell, a row a task, the same for every merge."""
    found = _bound(experts, [1 / len(experts)] * len(experts), seen, probe)
    val = [probe.val[task] for task in experts.names]
    told = {name: term.value for name, term in found.terms.items()} if found else {}
    group = {
        **spread("probe_val_accuracies", [score.accuracy for score in val]),
        **spread("probe_val_losses", [score.loss for score in val]),
        "probe_divergence": number(told.get("divergence")),
        "probe_generalization": number(told.get("generalization")),
        "probe_total": number(sum_of([told[name] for name in _SUMMED]) if told else None),
    }
    return [
        {
            **group,
            "probe_val_accuracy": number(score.accuracy),
            "probe_val_loss": number(score.loss),
            "probe_train_loss": number(probe.train_loss[task]),
        }
        for task, score in zip(experts.names, val, strict=True)
    ]


def _bound(
    experts: Experts,
    coefficients: Sequence[float] | Sequence[Block] | None,
    seen: Seen,
    probe: Probe | None = None,
) -> Bound | None:
    """Return the bound of a sum of scaled deltas; None of any other merge."""
    if coefficients is None:
        return None
    blocks = [each for each in coefficients if isinstance(each, Block)]
    facts = [_facts(experts, seen, probe, t) for t in range(len(experts))]
    # By block the slopes would be needed block by block: progress is then unknown.
    gram = None if blocks else {ALL: seen.gram.tolist()}
    return bound(facts, MergeFacts(smoothness=seen.smoothness, gram=gram), coefficients)


def _facts(experts: Experts, seen: Seen, probe: Probe | None, t: int) -> ExpertFacts:
    card, task = experts.cards[t], experts.names[t]
    found = expert_facts(card, task, None, None)
    loss = probe.train_loss[task] if probe else None
    return replace(
        found,
        # No twins have calibrated the path estimate: what rests on it is called so.
        eps2=found.eps2_path,
        zeta2=seen.zeta2[t],
        base_loss=_finite(seen.sights[t].base.loss),
        train_loss=_finite(loss),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
