"""This file is ZipIt: units that act alike become one, be they of two experts or of the same."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Calibration
from mergekit_lit.core.experts import Experts
from mergekit_lit.core.params import Params
from mergekit_lit.core.permutations import axis_layout, split_axis
from mergekit_lit.core.registry import MERGE_METHODS, unknown_name
from mergekit_lit.core.specs import LazyParams
from mergekit_lit.core.structure import Structure, TensorInfo
from mergekit_lit.merging.configuration import check_interval
from mergekit_lit.merging.methods.alignment import FEATURES, check_axes
from mergekit_lit.merging.methods.matching import correlations, group_units
from mergekit_lit.merging.methods.moments import check_samples, looks


def _check(experts: Experts, *, alpha: float, beta: float, until: str | None, samples: int) -> None:
    check_interval("alpha", alpha, "[0, 1]")
    check_interval("beta", beta, "[0, 1]")
    check_samples(samples)
    check_axes(experts)
    _tail(experts.structure, until)


@MERGE_METHODS.add(
    form="experts",
    family="alignment",
    data="train",
    source="Stoica et al. 2023, arXiv:2305.03053, alg. 1",
    search={"alpha": (0.0, 1.0), "beta": (0.0, 1.0)},
    order="of pairs that correlate alike the first experts' is merged first",
    per_task=lambda config: config["until"] is not None,
    check=_check,
)
def zipit(
    experts: Experts,
    calibration: Calibration,
    *,
    alpha: float = 0.3,
    beta: float = 0.0,
    until: str | None = None,
    samples: int = 128,
    seed: int = 0,
) -> Experts:
    """Merge the units whose activations correlate most, within experts too, and average the rest.

    Per layer the T n units of all experts fall into n groups (`matching.group_units`). A unit of
    the merged layer is the mean of its group, M (n x T n), and the next layer reads it in place of
    each member, U = M^+:  W = sum_t M_t W_t U_t

    Merged channels have other statistics than any expert's: recalibrate BatchNorm after it.

    Args:
        experts: T experts, of one base or of several of one architecture.
        calibration: training images, of which every expert sees those of all tasks.
        alpha: factor on the correlation of a group with more units of experts that it has units
            of, in [0, 1]; 0 takes them only where all else correlates below 0.
        beta: share of an expert's units that may be merged among themselves, in [0, 1].
        until: name of the last stage that is zipped, such as `layer2`; each task keeps the stages
            after it from its expert, BatchNorm statistics included, where these are not
            recalibrated. Null zips all: for tasks that have little in common that is too much.
        samples: number of images of each task at most, at least 1.
        seed: of the choice of images.

    Returns:
        Experts whose average is the merge. Heads read the merged features; each task keeps its own.

    Raises:
        ValueError: the structure names no permutations; or units go on from the stage `until` to
            the next, so that no layer in between can read them.

    Source: Stoica et al. 2023, arXiv:2305.03053, alg. 1 and sec. 4 (partial zip: sec. 4.3).
    Differs: activations are taken where the next layer reads them, and all layers of one residual
        stream share their groups; ViTs too, though only whole; with more than two experts, alpha
        damps only merges with further units of the same experts.
    """
    _check(experts, alpha=alpha, beta=beta, until=until, samples=samples)
    tail = _tail(experts.structure, until)
    keys = _written(experts.structure, set(experts.structure) - tail)
    similarities = unit_similarities(experts, calibration, keys, samples=samples, seed=seed)
    groups = {
        key: group_units(similarity, len(experts), alpha=alpha, beta=beta)
        for key, similarity in similarities.items()
    }
    statistics = (n for n, info in experts.structure.items() if info.kind == "statistic")
    apart = frozenset(tail.intersection([*experts.merged_names(), *statistics]))
    return replace(zipped(experts, groups), apart=apart)


@torch.no_grad()
def unit_similarities(
    experts: Experts,
    calibration: Calibration,
    keys: Collection[str],
    *,
    samples: int,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return how the activations of all experts' units correlate, (T n, T n) per permutation.

    Each expert sees the same images of all tasks. Units that never vary are like those of their
    own number in other experts.

    Args:
        experts: T experts.
        calibration: the images.
        keys: the permutations.
        samples: number of images of each task at most, at least 1.
        seed: of the choice of images.
    """
    readers = {name: layout for name, layout in _readers(experts).items() if layout[1] in keys}
    totals: dict[str, list[Tensor]] = {}
    for t, task in enumerate(experts.names):
        for batch in looks(calibration, t, task, samples, seed):
            seen = [_activations(p, calibration, batch.inputs, readers) for p in experts.tuned]
            for key, rows in _side_by_side(seen):
                if key not in keys:
                    continue
                moments = [
                    torch.tensor(float(len(rows)), dtype=torch.float64),
                    rows.sum(dim=0, dtype=torch.float64),
                    (rows.T @ rows).double(),
                ]
                before = totals.get(key, [torch.zeros((), dtype=torch.float64)] * 3)
                totals[key] = [a + b for a, b in zip(before, moments, strict=True)]
    return {key: _or_own_number(correlations(*totals[key]), len(experts)) for key in sorted(totals)}


def zipped(experts: Experts, groups: Mapping[str, Tensor]) -> Experts:
    """Return experts whose average is the model with merged units.

    Args:
        experts: T experts.
        groups: for each permutation the group of each unit, (T, n); others stay as they are.
    """
    maps = {key: _maps(group) for key, group in groups.items()}
    tuned = [
        _Zipped(params, experts.structure, {key: (m[t], u[t]) for key, (m, u) in maps.items()})
        for t, params in enumerate(experts.tuned)
    ]
    heads = list(experts.heads)
    if FEATURES in maps:
        read = maps[FEATURES][1]
        heads = [_reading(head, read[t]) for t, head in enumerate(heads)]
    return replace(experts, tuned=tuned, heads=heads)


def _tail(structure: Structure, until: str | None) -> set[str]:
    """Return the names of the tensors after a stage.

    Raises:
        KeyError: no such stage.
        ValueError: units are written on both sides of its end.
    """
    ends = {}
    for info in sorted(structure.values(), key=lambda info: info.depth):
        ends[info.group] = info.depth
    if until is None:
        return set()
    if until not in ends:
        raise KeyError(unknown_name("stage to zip `until`", until, ends))
    tails = {
        stage: {name for name, info in structure.items() if info.depth > end}
        for stage, end in ends.items()
    }
    ways = [
        stage
        for stage, tail in tails.items()
        if not _written(structure, tail) & _written(structure, set(structure) - tail)
    ]
    if until not in ways:
        raise ValueError(
            f"`until` must be a stage whose units end with it ({', '.join(ways)}), but those of "
            f"{until!r} go on. Choose one of these."
        )
    return tails[until]


def _written(structure: Structure, names: Iterable[str]) -> set[str]:
    """Return the permutations of the units that some tensors make, and not only read."""
    return {
        axis_layout(axis)[1]
        for name in names
        for dim, axis in enumerate(structure[name].axes)
        if axis is not None and not _is_input(structure[name], dim)
    }


class _Zipped(LazyParams):
    """T M_t W_t U_t of one expert's tensors, each computed when it is asked for."""

    def __init__(
        self, params: Params, structure: Structure, maps: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__(params)
        self._params, self._structure, self._maps = params, structure, maps

    def __getitem__(self, name: str) -> Tensor:
        tensor, info = self._params[name], self._structure[name]
        if not tensor.is_floating_point():
            return tensor
        wide = tensor.double()
        for dim, axis in enumerate(info.axes):
            if axis is not None and (key := axis_layout(axis)[1]) in self._maps:
                write, read = self._maps[key]
                wide = _mapped(wide, dim, axis, read.T if _is_input(info, dim) else write)
        return wide.to(tensor.dtype)


def _maps(group: Tensor) -> tuple[Tensor, Tensor]:
    """Return T M_t (T, n, n) and U_t (T, n, n) of groups (T, n), in float64."""
    models, units = group.shape
    read = torch.zeros(models, units, units, dtype=torch.float64)
    read.scatter_(2, group[:, :, None], 1.0)  # U[t, unit, group]
    write = read.mT * (models / read.sum(dim=(0, 1)))[:, None]
    return write, read


def _is_input(info: TensorInfo, dim: int) -> bool:
    return dim == 1 and info.kind in ("linear", "convolution")


def _mapped(tensor: Tensor, dim: int, axis: str, matrix: Tensor) -> Tensor:
    """Return the tensor with a matrix (n, n) applied to the units of one axis."""
    units = split_axis(tensor, dim, axis)
    mapped: Tensor = torch.tensordot(matrix, units, ([1], [dim + 1]))
    return mapped.movedim(0, dim + 1).reshape(tensor.shape)


def _reading(head: Params, read: Tensor) -> Params:
    """Return a head that reads the merged features."""
    if "weight" not in head:
        return head
    weight = head["weight"]
    return {**head, "weight": (weight.double() @ read).to(weight.dtype)}


def _readers(experts: Experts) -> dict[str, tuple[int, str, int]]:
    """Return the layout of the axis that reads units, of each weight that has one, by its name."""
    return {
        name: axis_layout(str(info.axes[1]))
        for name, info in experts.structure.items()
        if len(info.axes) > 1 and info.axes[1] is not None and _is_input(info, 1)
    }


def _activations(
    params: Params,
    calibration: Calibration,
    inputs: Tensor,
    readers: Mapping[str, tuple[int, str, int]],
) -> list[tuple[str, Tensor]]:
    """Return what each layer reads of one expert, as permutation and rows (r, n)."""
    features, layers = calibration.expert.capture(params, inputs, list(readers))
    found = [(FEATURES, features)]
    for name in sorted(layers):
        before, key, after = readers[name]
        rows = layers[name].input_rows().flatten(0, 1)  # (r, before * n * after * taps)
        width = params[name].shape[1]
        taps, units = rows.shape[1] // width, width // (before * after)
        # The kernel's middle alone: its other taps read the same map a pixel further on.
        middle = rows.reshape(-1, before, units, after, taps)[..., taps // 2]
        found.append((key, middle.movedim(2, -1).flatten(0, -2)))
    return found


def _side_by_side(seen: Sequence[Sequence[tuple[str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the rows of all experts beside one another, (r, T n), layer by layer."""
    for of_all in zip(*seen, strict=True):
        yield of_all[0][0], torch.cat([rows for _, rows in of_all], dim=1)


def _or_own_number(similarity: Tensor, models: int) -> Tensor:
    """Return the similarities, 1 between units of one number of which neither varies."""
    dead = similarity.diagonal() == 0
    same = torch.eye(len(similarity) // models, dtype=torch.bool).repeat(models, models)
    return torch.where(same & dead & dead[:, None], 1.0, similarity)
