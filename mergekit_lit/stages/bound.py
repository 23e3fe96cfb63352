"""This file is the bound stage: experts and a merge in, every term of the bound out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.experts import Base, Experts, Merged
from mergekit_lit.core.measurements import read_measurements
from mergekit_lit.core.records import Record, Stopwatch
from mergekit_lit.data.splits import TaskData
from mergekit_lit.lit.recalibration import images_by_split, splits_needed
from mergekit_lit.merging.gather import in_memory, load_experts
from mergekit_lit.merging.patterns import select
from mergekit_lit.stages.bound_facts import expert_facts, is_recalibrated, looks_at, merge_facts
from mergekit_lit.stages.constants import Measured, check_measurable, measure_merge, symptoms_of
from mergekit_lit.stages.folders import check_record, check_record_name
from mergekit_lit.stages.images import Calibration
from mergekit_lit.stages.opening import fingerprint, load_base_of
from mergekit_lit.stages.recipes import Recipe, check_recipe, merge_recipe
from mergekit_lit.stages.refits import delta2_by_refits, refits_of
from mergekit_lit.theory.blocks import blocks_of
from mergekit_lit.theory.bound import TOTAL, Bound, bound
from mergekit_lit.theory.coefficients import Block
from mergekit_lit.theory.effort import Effort
from mergekit_lit.theory.facts import effective_travel
from mergekit_lit.theory.signatures import signatures


def bound_files(
    experts: Sequence[Path],
    *,
    recipe: Recipe | None = None,
    base: str | None = None,
    calibration: Calibration | None = None,
    effort: Effort | None = None,
    refits: bool = False,
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
        refits: whether to merge the refits that twins left beside the experts, for the stability of
            any merge, linear or not; of one that looks at images, through the experts alone.
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
        check_record_name(Path(out))
        check_record(Path(out), "bound")
    check_bound(recipe, calibration)
    backbone, found = load_base_of(paths, base)
    _check_one_base(paths, found)
    gathered = in_memory(
        select(load_experts(paths, base=found), include=recipe.include, exclude=recipe.exclude)
    )
    tasks = list(calibration.tasks(gathered.names)) if calibration else []
    check_same_images(gathered, tasks)
    needed = splits_needed(recipe.method, recipe.batch_norm, gathered.structure, recipe.veneers)
    images = {}
    if calibration and needed:
        images = images_by_split(tasks, needed, count=calibration.images, seed=recipe.seed)
    merged = merge_recipe(gathered, recipe, backbone, images)
    coefficients = coefficients_of(gathered, merged)
    measured = None
    if tasks:
        blocks = [each for each in coefficients or () if isinstance(each, Block)]
        measured = measure_merge(gathered, merged, backbone, tasks, effort=effort, blocks=blocks)
    stability = [read_measurements(path).get("stability") for path in paths]
    delta2 = None
    if refits:
        found_refits = [
            refits_of(path, twins) for path, twins in zip(paths, stability, strict=True)
        ]
        if all(found_refits):
            delta2 = delta2_by_refits(gathered, merged, found_refits, recipe, backbone, images)
    result = bound_of(
        gathered,
        coefficients,
        measured,
        stability,
        beside=looks_at(recipe, merged),
        recalibrated=is_recalibrated(recipe, gathered),
        delta2=delta2,
    )
    record = Record(
        stage="bound",
        name=recipe.method,
        config={
            "experts": [str(path) for path in paths],
            "base": base,
            "recipe": asdict(recipe),
            "calibration": asdict(calibration) if calibration else None,
            "effort": asdict(effort),
            "refits": refits,
        },
        inputs={str(path): fingerprint(path, plain=False) for path in paths},
        seeds={"merge": recipe.seed, "effort": effort.seed},
        metrics={
            "bound": _told(result),
            "constants": asdict(measured) if measured else None,
            "experts": _rows(gathered, result, measured),
            "signatures": signatures(symptoms_of(gathered, measured)) if measured else [],
        },
        outputs=[] if out is None else [Path(out).name],
    )
    watch.finish(record)
    if out is not None:
        record.write(Path(out))
    return record


def check_bound(recipe: Recipe, calibration: Calibration | None) -> None:
    """Refuse, before anything is read, a recipe that `bound_files` would."""
    check_recipe(recipe, calibration)
    if calibration is not None:
        check_measurable(recipe)


def coefficients_of(experts: Experts, merged: Merged) -> Sequence[float] | Sequence[Block] | None:
    """Return lambda of a merge, or by block where it differs; None if it is no sum of deltas."""
    rows = merged.facts.get("coefficients_by_tensor")
    if rows is not None:
        return blocks_of(experts, rows)
    found: Sequence[float] | None = merged.facts.get("coefficients")
    return found


def bound_of(
    experts: Experts,
    coefficients: Sequence[float] | Sequence[Block] | None,
    measured: Measured | None,
    stability: Sequence[Mapping[str, Any] | None],
    *,
    beside: str = "",
    recalibrated: bool = False,
    delta2: float | None = None,
) -> Bound:
    """Return the bound of a merge from cards and measurements.

    A merge that is not a sum of scaled deltas has no coefficients, and no terms that need some; its
    own stability is asked for.

    Args:
        experts: T experts.
        coefficients: of their merge, as `coefficients_of` tells them.
        measured: what images tell; None for cards alone.
        stability: what `StabilityTwins` left for each expert, or None.
        beside: what the method takes beside the experts' tensors: `images`, `cards` or nothing.
        recalibrated: whether BatchNorm statistics were estimated on images.
        delta2: Delta_M^2 of the merge, from its refits; None where nobody merged them.
    """
    linear = coefficients is not None
    facts = [
        expert_facts(card, name, measured, twins)
        for card, name, twins in zip(experts.cards, experts.names, stability, strict=True)
    ]
    chosen = coefficients or [1 / len(experts)] * len(experts)
    merge = replace(
        merge_facts(measured),
        linear=linear,
        looks_at=beside,
        recalibrated=recalibrated,
        delta2_of_merge=delta2,
    )
    return bound(facts, merge, chosen)


def _check_one_base(paths: Sequence[Path], base: Base) -> None:
    """Refuse experts that did not start where the bound does."""
    for path in paths:
        card = load_expert(path).card
        if card.base_hash not in (None, base.content):
            raise ValueError(
                f"The bound is of experts of one base, here {base.name!r} ({base.content[:12]}), "
                f"but {str(path)!r} was tuned from {card.base!r} ({card.base_hash[:12]}). "
                "Leave it out."
            )


def check_same_images(experts: Experts, tasks: Sequence[TaskData]) -> None:
    """Refuse images that the experts were not trained on.

    Raises:
        ValueError: a card knows of another split than that of its task.
    """
    for card, task in zip(experts.cards, tasks, strict=bool(tasks)):
        if card.split_hash is not None and card.split_hash != task.split_hash:
            raise ValueError(
                f"The training images of task {task.name!r} must be those that its expert was "
                "trained on, but their hash differs. Give the `data.*` of the training."
            )


def _told(result: Bound) -> dict[str, Any]:
    return {
        "terms": {name: asdict(term) for name, term in result.terms.items()},
        "parts": list(TOTAL),
        "total": result.total,
        "total_by_step": result.total_by_step,
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
            **result.by_task[i],
        }
        if measured:
            train, test = measured.train[name], measured.test[name]
            row |= {
                "base_loss": measured.base_losses[name],
                "train_loss": train["loss"],
                "test_loss": test["loss"],
                "gap": test["loss"] - train["loss"],
                "zeta2": measured.base.zeta2[name].value,
                "zeta2_merged": measured.merged.zeta2[name].value,
            }
        rows.append(row)
    return rows
