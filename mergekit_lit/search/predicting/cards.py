"""This file is the features of cards: how experts were trained, and what the bound makes of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.search.predicting.columns import (
    SPREAD,
    UNKNOWN,
    Column,
    Row,
    log10,
    number,
    spread,
)
from mergekit_lit.stages.bound import bound_of, coefficients_of
from mergekit_lit.theory.bound import Bound
from mergekit_lit.theory.facts import effective_travel


def _epochs(card: Card) -> float | None:
    if card.steps is None or card.batch is None or not card.n:
        return None
    return card.steps * card.batch / card.n


def _root(value: float | None) -> float | None:
    return None if value is None or value < 0 else value**0.5


def _trained_head(card: Card) -> float | None:
    return None if card.head is None else float(card.head == "trained")


FACTS: Mapping[str, tuple[str, Callable[[Card], float]]] = {
    "log_lr": ("log10 of the peak learning rate", lambda c: log10(c.lr)),
    "log_batch": ("log10 of the samples in one step", lambda c: log10(c.batch)),
    "log_steps": ("log10 of the steps K", lambda c: log10(c.steps)),
    "log_n": ("log10 of the training images n", lambda c: log10(c.n)),
    "log_epochs": ("log10 of steps x batch / n", lambda c: log10(_epochs(c))),
    "log_travel": ("log10 of eta ||a||_1", lambda c: log10(effective_travel(c))),
    "log_displacement": ("log10 of ||tau||", lambda c: log10(c.displacement)),
    "log_path": ("log10 of the length of the path", lambda c: log10(c.path_length)),
    "log_d": (
        "log10 of the root mean squared displacement along the path",
        lambda c: log10(_root(c.mean_squared_displacement)),
    ),
    "log_noise": (
        "log10 of the gradient noise sigma^2 along the path",
        lambda c: log10(c.gradient_noise),
    ),
    "log_eps": ("log10 of eps_path, the path estimate of stability", lambda c: log10(c.eps_path)),
    "card_train_loss": ("train loss on the card", lambda c: number(c.train_loss)),
    "card_val_loss": ("val loss on the card", lambda c: number(c.val_loss)),
    "card_val_accuracy": ("val accuracy on the card", lambda c: number(c.val_accuracy)),
    "card_base_loss": ("the base's val loss on the card", lambda c: number(c.base_val_loss)),
    "card_base_accuracy": (
        "the base's val accuracy on the card",
        lambda c: number(c.base_val_accuracy),
    ),
    "log_classes": ("log10 of the classes", lambda c: log10(c.classes)),
    "trained_head": ("1 if the head was trained, 0 if frozen", lambda c: number(_trained_head(c))),
}
"""What is taken of each card."""

_OF_BOUND = {
    "a_eff": "A_eff, the merge's own travel",
    "chi2_lambda": "chi2_lambda",
    "chi2_w": "chi2_w",
    "tv_w": "total variation of p and w",
    "log_delta_path": "log10 of Delta by the path estimates",
}

COLUMNS: tuple[Column, ...] = (
    *(Column(f"own_{name}", f"the expert's {text}") for name, (text, _) in FACTS.items()),
    *(
        Column(f"{name}_{word}", f"{text}: {word} over the group")
        for name, (text, _) in FACTS.items()
        for word in SPREAD
    ),
    *(
        Column(f"{name}_beside", f"{text}: the expert's minus the group's mean")
        for name, (text, _) in FACTS.items()
    ),
    Column("experts", "T, experts of the group"),
    Column("norm_ratio", "largest over least ||tau|| of the group"),
    Column("travel_ratio", "largest over least travel of the group"),
    Column("scale", "`scale` of the method; NaN where it has none"),
    Column("density", "share of entries that the method keeps; NaN where it has no such parameter"),
    Column("linear", "1 if the merge is a sum of scaled deltas, else 0"),
    Column("coefficient", "the expert's lambda; NaN where the merge is no sum of scaled deltas"),
    Column("coefficient_sum", "sum of lambda; NaN as above"),
    Column("own_w", "the expert's share w in what the merge descends; NaN as above"),
    *(Column(f"bound_{n}", f"bound: {t}; NaN as above") for n, t in _OF_BOUND.items()),
    *(Column(f"average_{n}", f"bound, of the plain average: {t}") for n, t in _OF_BOUND.items()),
)


def of_cards(experts: Experts, merged: Merged) -> list[Row]:
    """Return what cards and coefficients tell of a merge, a row a task."""
    facts = [{name: of(card) for name, (_, of) in FACTS.items()} for card in experts.cards]
    group = _group(experts, facts) | _of_merge(experts, merged)
    coefficients = coefficients_of(experts, merged)
    found = _bound(experts, coefficients) if coefficients is not None else None
    weighing = found.weighing if found else None
    return [
        {
            **{f"own_{name}": value for name, value in own.items()},
            **{f"{name}_beside": value - group[f"{name}_mean"] for name, value in own.items()},
            **group,
            "coefficient": weighing.coefficients[i] if weighing else UNKNOWN,
            "own_w": weighing.w[i] if weighing and weighing.w else UNKNOWN,
        }
        for i, own in enumerate(facts)
    ]


def _group(experts: Experts, facts: Sequence[Mapping[str, float]]) -> Row:
    """Return what all rows of a group share, whatever the merge."""
    spreads: Row = {}
    for name in FACTS:
        spreads |= spread(name, [own[name] for own in facts])
    average = _bound(experts, [1 / len(experts)] * len(experts))
    return {
        **spreads,
        "experts": float(len(experts)),
        "norm_ratio": 10 ** (spreads["log_displacement_max"] - spreads["log_displacement_min"]),
        "travel_ratio": 10 ** (spreads["log_travel_max"] - spreads["log_travel_min"]),
        **{f"average_{name}": value for name, value in _told(average).items()},
    }


def _of_merge(experts: Experts, merged: Merged) -> Row:
    """Return what all rows of a merge share."""
    config = merged.facts["config"]
    drop = config.get("drop")
    coefficients = coefficients_of(experts, merged)
    linear = coefficients is not None
    found = _bound(experts, coefficients) if coefficients is not None else None
    told = _told(found) if found else dict.fromkeys(_OF_BOUND, UNKNOWN)
    return {
        "scale": _numeric(config.get("scale")),
        "density": _numeric(config.get("density") if drop is None else 1 - drop),
        "linear": float(linear),
        "coefficient_sum": sum(found.weighing.coefficients) if found else UNKNOWN,
        **{f"bound_{name}": value for name, value in told.items()},
    }


def _bound(experts: Experts, coefficients: Any) -> Bound:
    return bound_of(experts, coefficients, None, [None] * len(experts))


def _told(found: Bound) -> Row:
    delta2 = found.terms["delta2_by_path"].value
    return {
        "a_eff": number(found.weighing.a_eff),
        "chi2_lambda": number(found.weighing.chi2_lambda),
        "chi2_w": number(found.weighing.chi2_w),
        "tv_w": number(found.weighing.tv_w),
        "log_delta_path": log10(_root(delta2)),
    }


def _numeric(value: Any) -> float:
    """Return a number; NaN for none, and for values that differ from tensor to tensor."""
    return number(value) if isinstance(value, int | float) else UNKNOWN
