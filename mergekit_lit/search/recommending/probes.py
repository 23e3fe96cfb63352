"""This file probes: short trainings at every rate, and the constants of the bound around them.

Every rate is tried on a few tasks for a few steps, and the merge of its experts is scored half-way
and at the end. What only images tell of the loss is measured once: noise, heterogeneity and slope
at the base; smoothness and gradients of single samples at the merge of the first probe.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mergekit_lit.core.cards import Card
from mergekit_lit.core.expert_files import load_expert
from mergekit_lit.core.experts import Experts
from mergekit_lit.lit.calibration import calibration_on
from mergekit_lit.search.recommending.points import Constants, OfExpert, Point, Probed
from mergekit_lit.search.recommending.site import Site
from mergekit_lit.search.recommending.space import Way
from mergekit_lit.stages.constants import objectives_at_base, objectives_at_merge
from mergekit_lit.theory.constants import measure_point
from mergekit_lit.theory.effort import Effort
from mergekit_lit.theory.facts import ALL, effective_travel
from mergekit_lit.theory.smoothness import measure_sample_gradients, measure_secant


def probe(
    site: Site,
    tasks: Sequence[str],
    steps: Mapping[Way, Sequence[int]],
    length: int,
    effort: Effort,
) -> Probed:
    """Probe every rate of the space.

    Args:
        site: where.
        tasks: on which.
        steps: of each probe's trajectory all step counts that it may be asked for.
        length: K of the probes; half of it is measured too.
        effort: how many images the constants take at most.

    Raises:
        ValueError: every rate diverged.
    """
    points, failed = [], {}
    for way in site.setting.space.probes:
        try:
            points += list(measured(site, way, tasks, steps[way], probe_points(length)))
        except ValueError as error:
            failed[way.name] = diverged(error)
    if not points:
        raise ValueError(
            f"At least one learning rate must train, but all of {len(failed)} diverged. Give "
            f"smaller ones: `space.lr`. {next(iter(failed.values()))}"
        )
    first = points[1]
    files = [site.train(first.way, task, steps[first.way], length)[length] for task in tasks]
    return Probed(_constants(site, files, effort), tuple(points), failed)


def probe_points(length: int) -> tuple[int, int]:
    """Return the step counts at which probes of some length are measured."""
    return length // 2, length


def diverged(error: ValueError) -> str:
    """Return why a training diverged.

    Raises:
        ValueError: `error` itself, if it tells of something else.
    """
    if "must be finite" not in str(error):
        raise error
    return str(error)


def measured(
    site: Site, way: Way, tasks: Sequence[str], steps: Sequence[int], wanted: Sequence[int]
) -> Iterator[Point]:
    """Train in one way until the last of some step counts, and yield the merge at each of these."""
    found = {task: site.train(way, task, steps, max(wanted)) for task in tasks}
    for k in wanted:
        files = [found[task][k] for task in tasks]
        _, merged = site.merged(files)
        rows = tuple(_of_card(load_expert(file).card, k) for file in files)
        yield Point(way=way, steps=k, experts=rows, scores=site.scores(merged))


def _of_card(card: Card, steps: int) -> OfExpert:
    facts = {
        "n": card.n,
        "travel": effective_travel(card),
        "noise": card.gradient_noise,
        "d2": card.mean_squared_displacement,
        "train_loss": card.train_loss,
        "val_loss": card.val_loss,
    }
    unknown = [name for name, value in facts.items() if value is None]
    if card.task is None or unknown:
        raise ValueError(
            f"The card of {card.task!r} after {steps} steps must tell {', '.join(unknown)}, but "
            "does not. Give at least one validation image of each task."
        )
    return OfExpert(task=card.task, **facts)  # type: ignore[arg-type] # none is unknown


def _constants(site: Site, files: Sequence[Path], effort: Effort) -> Constants:
    """Measure the loss at the base, and around one merge."""
    experts, merged = site.merged(files)
    tasks = [site.data(task) for task in experts.names]
    images = {task.name: task.train for task in tasks}
    fewest = min(len(each) for each in images.values())
    effort = effort.within(fewest)
    calibration = calibration_on(images, experts, backbone=site.backbone, split="train")
    at_base = objectives_at_base(experts, site.backbone, tasks, calibration)
    at_merge = objectives_at_merge(experts, merged, calibration)
    start, end = _moving(experts, experts.base), _moving(experts, merged.shared)
    p = [1 / len(experts)] * len(experts)
    point = measure_point(at_base, start, calibration, p=p, effort=effort)
    secant = measure_secant(at_merge, start, end, experts, calibration, effort=effort)
    each = measure_sample_gradients(at_merge, end, calibration, p=p, effort=effort)
    return Constants(
        base=site.scores(site.at_base(files)),
        base_loss=dict(point.losses),
        noise={task: found.value for task, found in point.noise.items()},
        zeta2={task: found.value for task, found in point.zeta2.items()},
        gradient2=point.gradient2.value,
        gram=point.gram[ALL],
        smoothness=secant or None,
        sample_gradient2=each.value,
    )


def _moving(experts: Experts, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: params[name].float() for name in experts.merged_names()}
