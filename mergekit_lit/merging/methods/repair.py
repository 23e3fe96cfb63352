"""This file is REPAIR: layers of a merged model scaled back to the experts' activations."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Calibration, Network
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.params import Params
from mergekit_lit.core.registry import MERGE_METHODS, VENEERS
from mergekit_lit.merging.methods.averaging import average
from mergekit_lit.merging.methods.moments import check_samples, looks, matrix_names
from mergekit_lit.merging.passes import reduced
from mergekit_lit.merging.steps import moved, weighted_sum

_SOURCE = "Jordan et al. 2022, arXiv:2211.08403, sec. 3 (REPAIR)"


def _check(_: Experts, *, samples: int) -> None:
    check_samples(samples, least=2)


@VENEERS.add(position="after", data="train", source=_SOURCE, check=_check)
@MERGE_METHODS.add(
    form="whole",
    family="alignment",
    data="train",
    source=_SOURCE,
    check=_check,
)
@torch.no_grad()
def repair(
    experts: Experts,
    calibration: Calibration,
    merged: Merged | None = None,
    *,
    samples: int = 64,
    seed: int = 0,
) -> Merged:
    """Give each layer's outputs the mean and the deviation that they have in the experts.

    y_c <- s_c (y_c - mean y_c) / std y_c + m_c,  m_c = (1/T) sum_t mean y_tc,
    s_c = (1/T) sum_t std y_tc, per channel c, layer by layer from the input

    Averages of networks shrink the deviation of their activations, the more the deeper. The
    correction is a scale and a shift per channel, which go into the layer's weight and bias.

    Args:
        experts: T experts, aligned where they are of different bases (`git_rebasin`).
        calibration: training images; every model sees those of all tasks together, under the
            BatchNorm policy of the merge.
        merged: what is repaired; the experts' average without it.
        samples: number of images of each task at most, at least 2; every layer takes one pass.
        seed: of the choice of images.

    Returns:
        The merged model with other weights and biases.

    Raises:
        ValueError: no layer has a bias, and BatchNorm's statistics are not to be recalibrated; or
            tasks have layers or masks of their own.

    Source: Jordan et al. 2022, arXiv:2211.08403, sec. 3 (REPAIR).
    Differs: a layer without a bias is left to the BatchNorm that follows it: there the policy
        `recalibrate` is the paper's reset; channels that do not vary in the merge are shifted only.
    """
    _check(experts, samples=samples)
    if merged is not None and (merged.own or merged.masks or merged.adapters):
        raise ValueError(
            "`repair` must be given one model for all tasks, but this merge leaves each task "
            "layers, masks or adapters of its own. Recalibrate BatchNorm instead: "
            "--batch_norm recalibrate-per-task."
        )
    pool = list(_mixed_batches(experts, calibration, samples=samples, seed=seed))
    result = merged or _average(experts)
    biased = [name for name in matrix_names(experts) if _bias(name) in result.shared]
    if not biased and calibration.statistics:
        raise ValueError(
            "`repair` must find layers with a bias, or BatchNorm that is reset, but finds neither. "
            "Merge with `--batch_norm recalibrate`, which resets it."
        )
    goals = [output_moments(calibration.merged, p, pool, biased) for p in experts.tuned]
    params = dict(result.shared)
    for name in goals[0]:
        seen = {**params, **calibration.statistics}
        found = output_moments(calibration.merged, seen, pool, [name])[name]
        params |= _corrected(params, name, found, _mean([goal[name] for goal in goals]))
    return replace(result, shared=params)


def output_moments(
    network: Network, params: Params, pool: Sequence[Tensor], names: Sequence[str]
) -> dict[str, Tensor]:
    """Return mean and standard deviation of each channel of each layer's output, (2, m).

    Args:
        network: the backbone.
        params: its parameters.
        pool: images, (b, *s) each.
        names: weights of layers; those that the forward pass does not use are left out.

    Returns:
        float64, by name, in the order of the forward pass.
    """
    sums: dict[str, Tensor] = {}
    for inputs in pool:
        _, layers = network.capture(params, inputs, names)
        for name, layer in layers.items():
            rows = layer.output_rows(layer.output).double()  # (g, r, m / g)
            count = torch.full_like(rows[:, 0], rows.shape[1])
            seen = torch.stack([count, rows.sum(dim=1), rows.square().sum(dim=1)]).flatten(1)
            sums[name] = sums[name] + seen if name in sums else seen
    return {name: _mean_and_deviation(*total) for name, total in sums.items()}


def _mean(values: Sequence[Tensor]) -> Tensor:
    """Return the mean, which of equal values is that value to the last bit."""
    return values[0] + torch.stack([value - values[0] for value in values]).mean(dim=0)


def _mean_and_deviation(count: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    mean = total / count
    return torch.stack([mean, (squares / count - mean.square()).clamp(min=0).sqrt()])


def _corrected(params: Params, name: str, found: Tensor, goal: Tensor) -> dict[str, Tensor]:
    """Return weight and bias of one layer that bring its outputs from `found` to `goal`."""
    weight, bias = params[name], params[_bias(name)]
    # Rounding leaves a constant channel a little deviation.
    varies = found[1] > 1e-6 * (found[0].abs() + found[1])
    gain = torch.where(varies, goal[1] / torch.where(varies, found[1], 1), 1)
    scaled = weight.double() * gain.reshape(-1, *[1] * (weight.ndim - 1))
    shifted = gain * bias.double() + (goal[0] - gain * found[0])
    return {name: scaled.to(weight.dtype), _bias(name): shifted.to(bias.dtype)}


def _bias(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _average(experts: Experts) -> Merged:
    shares = average(experts)
    steps = (
        (name, reduced(experts, name, lambda deltas: weighted_sum(shares, deltas)))
        for name in experts.merged_names()
    )
    return Merged(shared=moved(experts.base, steps), structure=experts.structure)


def _mixed_batches(
    experts: Experts, calibration: Calibration, *, samples: int, seed: int
) -> Iterator[Tensor]:
    """Yield images of all tasks, each batch a mixture of them."""
    tasks = [looks(calibration, t, task, samples, seed) for t, task in enumerate(experts.names)]
    for together in zip_longest(*tasks):
        yield torch.cat([batch.inputs for batch in together if batch is not None])
