"""This file is the design of the benchmark of merges: which experts are grouped, and merged how.

It is a module, not a command. Everything is a function of the settings and the seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import Any, TypeVar

from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.seeds import derive_seed
from mergekit_lit.merging.configuration import SCALE
from mergekit_lit.search.tuning.space import space_of

Item = TypeVar("Item")

_POINTS = 25
"""Values of each declared range that are drawn from; those of `scale` lie as squares do."""


@dataclass(frozen=True)
class Cell:
    """How one expert is trained.

    Attributes:
        lr: peak learning rate.
        batch: samples in one step.
        n: training images.
        steps: K.
    """

    lr: float
    batch: int
    n: int
    steps: int

    @property
    def training(self) -> str:
        """Name of the trajectory that it lies on."""
        return f"lr{self.lr:g}-b{self.batch}-n{self.n}"

    @property
    def name(self) -> str:
        """Name of the configuration."""
        return f"{self.training}-k{self.steps}"


@dataclass(frozen=True)
class Group:
    """Some experts, and their merges.

    Attributes:
        name: unique in its pool.
        place: among the groups of its pool.
        uniform: whether all experts were trained alike.
        members: task and training of each expert.
        merges: method and configuration of each merge.
    """

    name: str
    place: int
    uniform: bool
    members: tuple[tuple[str, Cell], ...]
    merges: tuple[tuple[str, Mapping[str, Any]], ...]


@dataclass(frozen=True)
class MergePlan:
    """What groups and merges are drawn from.

    Attributes:
        seed: of every draw.
        sizes: numbers of experts in a group.
        each: uniform groups of each size, and mixed ones.
        trainings: rate, batch, images and step counts of each trajectory.
        always: merges of every group.
        drawn: number of further ones.
        methods: what these are drawn from, with what is given of their configuration.
    """

    seed: int
    sizes: tuple[int, ...]
    each: int
    trainings: tuple[tuple[float, int, int, tuple[int, ...]], ...]
    always: tuple[tuple[str, Mapping[str, Any]], ...]
    drawn: int
    methods: tuple[tuple[str, Mapping[str, Any]], ...]

    @classmethod
    def of(cls, settings: Mapping[str, Any], pool: Mapping[str, Any]) -> "MergePlan":
        """Return the plan of one pool of a file."""
        return cls(
            seed=settings["seed"],
            sizes=tuple(pool["sizes"]),
            each=pool["each"],
            trainings=tuple(
                (float(c["lr"]), c["batch"], c["n"], tuple(c["steps"]))
                for c in pool["configurations"]
            ),
            always=_methods(settings["always"]),
            drawn=settings["drawn"],
            methods=_methods(settings["methods"]),
        )

    @property
    def cells(self) -> list[Cell]:
        """Every way of training an expert."""
        return [Cell(lr, b, n, k) for lr, b, n, steps in self.trainings for k in steps]


def groups_of_pool(tasks: Sequence[str], plan: MergePlan) -> list[Group]:
    """Return the groups of a pool: of each size equally many, half of them trained alike.

    Tasks, trainings and methods are dealt from shuffled decks, so that each comes about equally
    often; the same for every backbone, so that these can be compared. Sizes and kinds alternate:
    the first few groups are a sample of all.

    Args:
        tasks: of the pool.
        plan: what is drawn.

    Raises:
        ValueError: fewer tasks than the largest group takes.
    """
    if len(tasks) < max(plan.sizes):
        raise ValueError(
            f"A pool must hold {max(plan.sizes)} tasks for the largest group, but holds "
            f"{len(tasks)}. Leave out the larger `sizes`."
        )
    decks = {name: Random(derive_seed(plan.seed, "merges", name)) for name in _DECKS}
    dealt_tasks, methods = _deal(tasks, decks["tasks"]), _deal(plan.methods, decks["methods"])
    alike, mixed = _deal(plan.cells, decks["alike"]), _deal(plan.cells, decks["mixed"])
    kinds = [(size, uniform) for size in plan.sizes for uniform in (True, False)]
    groups = []
    for place, (size, uniform) in enumerate(islice(cycle(kinds), len(kinds) * plan.each)):
        chosen = _distinct(dealt_tasks, size)
        cells = [next(alike)] * size if uniform else list(islice(mixed, size))
        drawn = _distinct(methods, min(plan.drawn, len(plan.methods)))
        merges = [(m, _config(m, given, decks["configs"])) for m, given in drawn]
        groups.append(
            Group(
                name=f"{place:03d}-{size}-{'uniform' if uniform else 'mixed'}",
                place=place,
                uniform=uniform,
                members=tuple(zip(chosen, cells, strict=True)),
                merges=(*plan.always, *merges),
            )
        )
    return groups


_DECKS = ("tasks", "methods", "alike", "mixed", "configs")


def _deal(items: Sequence[Item], draw: Random) -> Iterator[Item]:
    """Yield items for ever, each once in every round, in a new order each round."""
    while True:
        yield from draw.sample(list(items), len(items))


def _distinct(dealt: Iterator[Item], count: int) -> list[Item]:
    """Return the next items that differ, passing over what a new round brings again."""
    found: list[Item] = []
    while len(found) < count:
        item = next(dealt)
        if item not in found:
            found.append(item)
    return found


def _config(method: str, given: Mapping[str, Any], draw: Random) -> dict[str, Any]:
    """Return what is given of a configuration, and a value of each parameter to be searched."""
    space = space_of(MERGE_METHODS.get(method), points=_POINTS)
    chosen = dict(given)
    for name, axis in space.items():
        # A step of no length is the base.
        values = [value for value in axis.values if not (name == SCALE and value == 0)]
        value = draw.choice(values)
        if name not in chosen:
            chosen[name] = value
    return chosen


def _methods(
    entries: Sequence[Mapping[str, Any]],
) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return tuple((entry["method"], entry.get("config", {})) for entry in entries)
