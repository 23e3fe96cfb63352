"""This file is the bound stage: experts and a merge in, every term of the bound out."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergekit_lit.core.cards import Card
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.measurements import read_measurements
from mergekit_lit.core.params import Params
from mergekit_lit.core.records import Record, Stopwatch
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.calibration import calibration_on
from mergekit_lit.lit.recalibration import images_by_split, splits_needed, task_statistics
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.merging.patterns import select
from mergekit_lit.models.backbones import Backbone
from mergekit_lit.stages.evaluate import evaluate_models
from mergekit_lit.stages.folders import check_record
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.opening import fingerprint, load_base_of
from mergekit_lit.stages.recipes import Recipe, check_recipe, merge_recipe
from mergekit_lit.theory.bound import Bound, bound
from mergekit_lit.theory.coefficients import weigh
from mergekit_lit.theory.constants import (
    AtPoint,
    Effort,
    Smoothness,
    measure_point,
    measure_sample_gradients,
    measure_smoothness,
)
from mergekit_lit.theory.facts import ExpertFacts, MergeFacts
from mergekit_lit.theory.heterogeneity import Estimate
from mergekit_lit.theory.objective import Objective


@dataclass(frozen=True)
class Measured:
    """What images tell of a merge.

    Attributes:
        base: at x0, under the statistics that each head was fitted under.
        merged: at x_avg, under the merge's own.
        smoothness: around them.
        sample_gradient2: G^2 at x_avg.
        test: losses and accuracies on test images, by task.
        train: the same on training images.
    """

    base: AtPoint
    merged: AtPoint
    smoothness: Smoothness
    sample_gradient2: Estimate
    test: Mapping[str, Mapping[str, float]]
    train: Mapping[str, Mapping[str, float]]


def bound_files(
    experts: Sequence[Path],
    *,
    recipe: Recipe | None = None,
    base: str | None = None,
    calibration: Calibration | None = None,
    effort: Effort | None = None,
    out: Path | None = None,
) -> Record:
    """Tell every term of the bound for a merge of expert files, with its provenance.

    From cards alone come the closed forms; with the images that the experts were trained on all
    terms, but stability, which `StabilityTwins` measures while an expert is trained and leaves in
    `<expert>.measured.json`.

    Args:
        experts: one file per expert, each of another task, all of one base.
        recipe: what is merged how; the plain average by default.
        base: spec of the base, if not the one that the first card names.
        calibration: where the training and test images come from; None for cards alone.
        effort: how much is looked at.
        out: the record's file, ending in `.json`; None writes nothing.

    Raises:
        FileNotFoundError: an expert is missing.
        KeyError: unknown method, parameter, suite or task.
        ValueError: experts that cannot be merged, other images than those trained on, or a value
            out of range.
    """
    watch = Stopwatch()
    recipe, effort = recipe or Recipe(), effort or Effort()
    paths = [Path(path) for path in experts]
    if out is not None:
        check_record(Path(out), "bound")
    check_recipe(recipe, calibration)
    backbone, found = load_base_of(paths, base)
    gathered = in_memory(
        select(load_experts(paths, base=found), include=recipe.include, exclude=recipe.exclude)
    )
    tasks = list(calibration.tasks(gathered.names)) if calibration else []
    _check_same_images(gathered, tasks)
    needed = splits_needed(recipe.method, recipe.batch_norm, gathered.structure, recipe.veneers)
    images = images_by_split(tasks, needed, seed=recipe.seed) if needed else {}
    merged = merge_recipe(gathered, recipe, backbone, images)
    measured = None
    if tasks:
        measured = measure_merge(gathered, merged, backbone, tasks, effort=effort)
    stability = [read_measurements(path).get("stability") for path in paths]
    result = bound_of(gathered, merged, measured, stability)
    record = Record(
        stage="bound",
        name=recipe.method,
        config={
            "experts": [str(path) for path in paths],
            "recipe": asdict(recipe),
            "calibration": asdict(calibration) if calibration else None,
            "effort": asdict(effort),
        },
        inputs={str(path): fingerprint(path, plain=False) for path in paths},
        seeds={"merge": recipe.seed, "effort": effort.seed},
        metrics={
            "bound": _told(result),
            "constants": asdict(measured) if measured else None,
            "experts": _rows(gathered, result, measured),
        },
        outputs=[] if out is None else [Path(out).name],
    )
    watch.finish(record)
    if out is not None:
        record.write(Path(out))
    return record


def measure_merge(
    experts: Experts,
    merged: Merged,
    backbone: Backbone,
    tasks: Sequence[TaskData],
    *,
    effort: Effort,
) -> Measured:
    """Measure losses, gradients and curvature at the base and at the merge.

    Args:
        experts: T experts, in memory.
        merged: their merge, one model for all tasks but for statistics.
        backbone: a module of the architecture; never changed.
        tasks: the images of each, as the experts saw them.
        effort: how much is looked at.

    Raises:
        ValueError: the merge makes each task a model of its own.
    """
    if merged.masks or merged.own or merged.adapters:
        raise ValueError(
            f"The bound is of one merged model, but {merged.facts['method']!r} makes each task a "
            "model of its own by masks, layers or adapters. Choose another method, or leave "
            "`data.suite` out."
        )
    images = {task.name: task.train for task in tasks}
    calibration = calibration_on(images, experts, backbone=backbone, split="train")
    moving = experts.merged_names()
    p = [1 / len(experts)] * len(experts)
    coefficients = merged.facts.get("coefficients")
    w = None
    if coefficients is not None:
        w = weigh(coefficients, [effective_travel(card) for card in experts.cards]).w
    at_base = [
        _objective(
            task.name, {**experts.base, **_statistics(experts, backbone, task)}, moving, calibration
        )
        for task in tasks
    ]
    at_merge = [
        _objective(task.name, merged.for_task(task.name), moving, calibration) for task in tasks
    ]
    base = {name: experts.base[name].float() for name in moving}
    weights = {name: merged.shared[name].float() for name in moving}
    scores = {
        split: evaluate_models(backbone, {"merged": merged}, tasks, split=split)["merged"]["tasks"]
        for split in ("train", "test")
    }
    return Measured(
        base=measure_point(at_base, base, calibration, p=p, w=w, effort=effort),
        merged=measure_point(at_merge, weights, calibration, p=p, w=w, effort=effort),
        smoothness=measure_smoothness(at_merge, base, weights, experts, calibration, effort=effort),
        sample_gradient2=measure_sample_gradients(
            at_merge, weights, calibration, p=p, effort=effort
        ),
        test=_losses(scores["test"]),
        train=_losses(scores["train"]),
    )


def bound_of(
    experts: Experts,
    merged: Merged,
    measured: Measured | None,
    stability: Sequence[Mapping[str, Any] | None],
) -> Bound:
    """Return the bound of a merge from cards and measurements.

    A merge that is not a sum of scaled deltas has no coefficients: it is weighed as the plain
    average, and its own stability is asked for.

    Args:
        experts: T experts.
        merged: their merge.
        measured: what images tell; None for cards alone.
        stability: what `StabilityTwins` left for each expert, or None.
    """
    coefficients = merged.facts.get("coefficients")
    linear = coefficients is not None
    facts = [
        expert_facts(card, name, measured, twins)
        for card, name, twins in zip(experts.cards, experts.names, stability, strict=True)
    ]
    chosen = coefficients if coefficients is not None else [1 / len(experts)] * len(experts)
    return bound(facts, _merge_facts(facts, chosen, measured, linear=linear), chosen)


def expert_facts(
    card: Card, name: str, measured: Measured | None, twins: Mapping[str, Any] | None
) -> ExpertFacts:
    """Return what the bound takes of one expert, from its card, images and twins."""
    plain = (
        card.optimizer == "sgd"
        and not card.momentum
        and card.schedule == "constant"
        and not card.warmup_steps
    )
    known = plain and card.lr is not None and card.steps is not None
    eps2, eps2_head = _stability(card, twins)
    return ExpertFacts(
        travel=effective_travel(card),
        travel_squared=card.travel_squared,
        plain_sgd=(card.lr, card.steps) if known else None,  # type: ignore[arg-type] # known
        d2=card.mean_squared_displacement,
        batch=card.batch,
        noise=card.gradient_noise,
        zeta2=measured.base.zeta2[name].value if measured else None,
        eps2=eps2,
        eps2_path=None if card.eps_path is None else card.eps_path**2,
        eps2_head=eps2_head,
        train_loss=measured.train[name]["loss"] if measured else None,
        lr=card.lr,
        adaptive=card.optimizer not in (None, "sgd"),
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


def _stability(card: Card, twins: Mapping[str, Any] | None) -> tuple[float | None, float | None]:
    """Return eps^2 of backbone and head where twins measured them above the rounding."""
    head = None if card.head in (None, "trained") else 0.0
    for _, found in sorted(
        (twins or {}).get("replaced", {}).items(), key=lambda pair: int(pair[0])
    ):
        if found["above_rounding"] is not False:
            return found["backbone"]["mean"], found["head"]["mean"]
    return None, head


def _merge_facts(
    facts: Sequence[ExpertFacts],
    coefficients: Sequence[float],
    measured: Measured | None,
    *,
    linear: bool,
) -> MergeFacts:
    if measured is None:
        return MergeFacts(linear=linear)
    w = weigh(coefficients, [one.travel for one in facts]).w
    surrogate = measured.base.surrogate2
    losses = list(measured.base.losses.values())
    return MergeFacts(
        smoothness=measured.smoothness.secant,
        surrogate_at_base=sum(a * b for a, b in zip(w, losses, strict=True)) if w else None,
        surrogate_gradient2=surrogate.value if surrogate else None,
        merged_gradient2=measured.merged.gradient2.value,
        sample_gradient2=measured.sample_gradient2.value,
        linear=linear,
    )


def _objective(task: str, params: Params, moving: Sequence[str], calibration: Any) -> Objective:
    """Return a task's loss under what of `params` does not move."""
    fixed = {name: tensor for name, tensor in params.items() if name not in set(moving)}
    return Objective(task, calibration, fixed)


def _statistics(experts: Experts, backbone: Backbone, task: TaskData) -> dict[str, Any]:
    """Return the statistics of the base on a task, as its head was fitted under them."""
    module = copy.deepcopy(backbone).eval()
    module.load_state_dict(dict(experts.base))
    return task_statistics(module, task)


def _check_same_images(experts: Experts, tasks: Sequence[TaskData]) -> None:
    """Refuse images that the experts were not trained on."""
    for card, task in zip(experts.cards, tasks, strict=bool(tasks)):
        if card.split_hash is not None and card.split_hash != task.split_hash:
            raise ValueError(
                f"The training images of task {task.name!r} must be those that its expert was "
                "trained on, but their hash differs. Give the `data.*` of the training."
            )


def _losses(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    return {task: {"loss": row["loss"], "accuracy": row["accuracy"]} for task, row in rows.items()}


def _told(result: Bound) -> dict[str, Any]:
    return {
        "terms": {name: asdict(term) for name, term in result.terms.items()},
        "total": result.total,
        "weighing": asdict(result.weighing),
        "violated": list(result.violated),
        "effective": result.effective,
    }


def _rows(experts: Experts, result: Bound, measured: Measured | None) -> list[dict[str, Any]]:
    """Return one row an expert: how it is weighed, how far it went, what it is worth."""
    rows = []
    for i, (name, card) in enumerate(zip(experts.names, experts.cards, strict=True)):
        row: dict[str, Any] = {
            "task": name,
            "coefficient": result.weighing.coefficients[i],
            "w": result.weighing.w[i] if result.weighing.w else None,
            "travel": effective_travel(card),
            "d2": card.mean_squared_displacement,
            "noise": card.gradient_noise,
            "eps_path": card.eps_path,
            "expert_train_loss": card.train_loss,
        }
        if measured:
            train, test = measured.train[name], measured.test[name]
            row |= {
                "base_loss": measured.base.losses[name],
                "train_loss": train["loss"],
                "test_loss": test["loss"],
                "gap": test["loss"] - train["loss"],
                "zeta2": measured.base.zeta2[name].value,
                "zeta2_merged": measured.merged.zeta2[name].value,
            }
        rows.append(row)
    return rows
