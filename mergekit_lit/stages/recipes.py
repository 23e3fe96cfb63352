"""This file is the recipe of a merge: method, veneers, policies, seed; checked, and followed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from mergekit_lit.core.calibration import DataSplit
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.merging import BatchNormPolicy, MergeObserver
from mergekit_lit.core.registry import MERGE_METHODS, VENEERS, unknown_name
from mergekit_lit.lit.recalibration import (
    ONE_SET,
    ImagesBySplit,
    Veneers,
    images_by_split,
    merge_calibrated,
    splits_needed,
)
from mergekit_lit.merging.configuration import resolve
from mergekit_lit.merging.forms import is_per_task, is_whole, setting
from mergekit_lit.merging.images import check_shown
from mergekit_lit.merging.precision import ComputeDtype, OutputDtype
from mergekit_lit.merging.raw import refuse_own_parts
from mergekit_lit.merging.requests import check_request, layers_of
from mergekit_lit.stages.images import Calibration

if TYPE_CHECKING:
    from mergekit_lit.models.backbones import Backbone


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is merged how.

    Attributes:
        method: name of a registered merge method.
        config: values for the method's parameters; the others keep their defaults.
        batch_norm: the merged model's BatchNorm statistics: the `base`'s, the `average` of the
            experts', or estimated again on training images of all tasks together (`recalibrate`)
            or of each task for itself (`recalibrate-per-task`).
        veneers: names and configs of veneers: what acts on the experts before the method, or on its
            result after it.
        include: patterns of the tensors to merge; none means all.
        exclude: patterns of those that stay the base's, even if they are included.
        dtype: number type of the computation, `float32` or `float64`; None is float32, or the
            base's where that is better.
        out_dtype: number type of the result; `base` is each tensor's own in the base.
        seed: of methods that draw at random, and of the images that statistics are estimated on.
    """

    method: str = "average"
    config: Mapping[str, Any] = field(default_factory=dict)
    veneers: Veneers = ()
    batch_norm: BatchNormPolicy = "base"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    dtype: ComputeDtype | None = None
    out_dtype: OutputDtype = "base"
    seed: int = 0


def merge_recipe(
    experts: Experts,
    recipe: Recipe,
    backbone: "Backbone | None",
    images: ImagesBySplit,
    *,
    observers: Sequence[MergeObserver] = (),
    streamed: bool = False,
) -> Merged:
    """Merge in memory by a recipe; nothing is read from or written to disk.

    Args:
        experts: T experts of one base.
        recipe: method, its configuration, BatchNorm policy and seed.
        backbone: a module of the experts' architecture; never changed. None where no images are
            looked at.
        images: images of each task by split, as `merge_calibrated` takes them.
        observers: see every tensor's deltas.
        streamed: make each tensor when it is asked for, as `merging.engine.merge` does.

    Raises:
        KeyError: unknown method, parameter or policy, or a task without images.
        TypeError: a parameter of the wrong type.
        ValueError: a value out of range.
    """
    return merge_calibrated(
        experts,
        recipe.method,
        images,
        backbone=backbone,
        config=recipe.config,
        veneers=recipe.veneers,
        batch_norm=recipe.batch_norm,
        observers=observers,
        seed=recipe.seed,
        dtype=recipe.dtype,
        out_dtype=recipe.out_dtype,
        streamed=streamed,
    )


def check_recipe(recipe: Recipe, calibration: Calibration | None) -> None:
    """Refuse, before anything is read, unknown names and values, and what lacks its images."""
    method = MERGE_METHODS.get(recipe.method)
    values = resolve(method, recipe.config)
    veneers = [VENEERS.get(name) for name, _ in recipe.veneers]
    for veneer, (_, config) in zip(veneers, recipe.veneers, strict=True):
        resolve(veneer, config)
    known = get_args(BatchNormPolicy)
    if recipe.batch_norm not in known:
        raise KeyError(unknown_name("BatchNorm policy", recipe.batch_norm, known))
    if recipe.batch_norm.startswith("recalibrate") and calibration is None:
        raise ValueError(
            f"`batch_norm` {recipe.batch_norm!r} must be told a suite to take training images "
            "from, but got none. Name the suite, or use 'base' or 'average'."
        )
    if recipe.batch_norm == "recalibrate" and is_per_task(method, values):
        raise ValueError(ONE_SET)
    if calibration is None:
        for entry in (method, *veneers):
            check_shown(entry, None)
    elif calibration.images < 2:
        raise ValueError(
            f"`images` must be at least 2, to have a variance, but is {calibration.images}."
        )


def check_fit(
    recipe: Recipe, experts: Experts, calibration: Calibration | None, *, plain: bool
) -> None:
    """Refuse, by the experts' headers alone, what they cannot be merged by.

    Args:
        recipe: what is merged how, after `check_recipe`.
        experts: T experts, of which no tensor is read.
        calibration: where images come from.
        plain: whether they are weight files of others, which name no architecture.

    Raises:
        KeyError: an unknown suite, task, or part of the model that a parameter names.
        ValueError: they are too many or too few, or lack what the method needs to know of them; a
            pattern matches nothing; or plain files cannot hold the result.
    """
    method = MERGE_METHODS.get(recipe.method)
    values = resolve(method, recipe.config, seed=recipe.seed)
    check_request(method, [values], experts, layers_of(recipe.veneers, recipe.seed))
    if not is_whole(method):
        setting(method, values, experts)
    if plain and is_per_task(method, values):
        refuse_own_parts(method.name)
    if calibration is None or not _splits_of(recipe, experts):
        return
    if plain:
        raise ValueError(
            f"{recipe.method!r} with `batch_norm` {recipe.batch_norm!r} looks at images, for which "
            "it needs a network, but plain weight files name none. Merge experts of mergekit-lit."
        )
    calibration.found(experts.names)


def check_methods(recipes: Sequence[Recipe]) -> list[str]:
    """Return the method of each of several recipes that are compared by their methods' names.

    Raises:
        ValueError: there is none, or two are of one method.
    """
    names = [recipe.method for recipe in recipes]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`method` must name methods, each once, but is {','.join(names)!r}.")
    return names


def images_for(experts: Experts, recipe: Recipe, calibration: Calibration | None) -> ImagesBySplit:
    """Return the images that the recipe needs, by split and task; none where it needs none."""
    needed = _splits_of(recipe, experts)
    if calibration is None or not needed:
        return {}
    tasks = calibration.tasks(experts.names)
    return images_by_split(tasks, needed, count=calibration.images, seed=recipe.seed)


def _splits_of(recipe: Recipe, experts: Experts) -> tuple[DataSplit, ...]:
    """Return the splits of which the recipe needs images."""
    return splits_needed(recipe.method, recipe.batch_norm, experts.structure, recipe.veneers)
