"""This file is Fisher merging: each parameter from the experts whose answers depend on it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergekit_lit.core.calibration import Batch, Calibration
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.params import Params, norm
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.seeds import generator
from mergekit_lit.core.tensorfiles import floats
from mergekit_lit.merging.methods.moments import check_samples, looks
from mergekit_lit.merging.steps import moved

Labels = Literal["sampled", "enumerated", "true"]
"""How the expectation over the labels is taken."""

# Bytes that the gradients of the images of one chunk may take.
_GRADIENT_BYTES = 2**28


def _check(_: Experts, *, samples: int, floor: float) -> None:
    check_samples(samples)
    if floor <= 0:
        raise ValueError(f"`floor` must be above 0, but is {floor!r}.")


@MERGE_METHODS.add(
    form="whole",
    family="moments",
    data="train",
    source="Matena & Raffel 2022, arXiv:2111.09832, sec. 3",
    order="the labels of the t-th expert are drawn from the t-th stream",
    check=_check,
)
def fisher(
    experts: Experts,
    calibration: Calibration,
    *,
    samples: int = 256,
    labels: Labels = "sampled",
    equal_norms: bool = False,
    floor: float = 1e-6,
    seed: int = 0,
) -> Merged:
    """Average each parameter with the weight that it has for each expert's answers.

    theta = sum_t a_t F_t theta_t / sum_t a_t F_t, entry by entry;
    F_t = E_x E_{y ~ p_t(.|x)} (grad log p_t(y|x))^2

    An expert is looked at under its own BatchNorm statistics, which are held fixed.

    Args:
        experts: T experts of one base, with their heads.
        calibration: training images of each task.
        samples: largest number of images of each task, >= 1.
        labels: y is `sampled` once for each image from the expert's own answer; or `enumerated`
            over all C classes, exact at C times the cost; or the `true` label, which gives the
            empirical Fisher.
        equal_norms: whether a_t = 1 / ||F_t||, so that confident experts, whose gradients are
            small, count for no less; else a_t = 1.
        floor: added to each entry of F_t, > 0: what no expert's answers depend on is averaged.
        seed: of the choice of images, and of the labels.

    Source: Matena & Raffel 2022, arXiv:2111.09832, sec. 3.
    Differs: heads are not merged.
    """
    _check(experts, samples=samples, floor=floor)
    weighted: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}
    for t, task in enumerate(experts.names):
        params = floats(dict(experts.tuned[t]))

        def logits(params: Params, inputs: Tensor, task: str = task) -> Tensor:
            return calibration.logits(task, calibration.expert.features(params, inputs))

        diagonal = fisher_diagonal(
            logits,
            params,
            looks(calibration, t, task, samples, seed),
            names=experts.merged_names(),
            labels=labels,
            draw=generator(seed, "labels", t),
        )
        share = 1 / max(norm(diagonal), floor) if equal_norms else 1.0
        for name, entries in diagonal.items():
            weight = share * (entries + floor)
            base = experts.base[name].to(weight.dtype)
            pull = weight * (params[name].to(weight.dtype) - base)
            weighted[name] = weighted[name] + pull if t else pull
            totals[name] = totals[name] + weight if t else weight
    steps = ((name, weighted[name] / total) for name, total in totals.items())
    return Merged(shared=moved(experts.base, steps), structure=experts.structure)


def fisher_diagonal(
    logits: Callable[[Params, Tensor], Tensor],
    params: Params,
    batches: Iterable[Batch],
    *,
    names: Sequence[str],
    labels: Labels,
    draw: torch.Generator,
) -> dict[str, Tensor]:
    """Return F = E_x E_y (grad log p(y|x))^2, of the shapes of the parameters.

    Args:
        logits: (params, inputs (b, *s)) -> (b, C).
        params: theta.
        batches: images x, each of which counts alike.
        names: the parameters with respect to which the gradients are taken.
        labels: how y is taken, as in `fisher`.
        draw: the stream of `sampled` labels.
    """
    moving = {name: params[name] for name in names}

    def log_likelihood(moving: Params, x: Tensor, y: Tensor) -> Tensor:
        answers = logits({**params, **moving}, x[None])[0]
        return answers.log_softmax(dim=0).gather(0, y[None])[0]

    gradients = vmap(grad(log_likelihood), in_dims=(None, 0, 0))
    each = sum(tensor.numel() * tensor.element_size() for tensor in moving.values())
    chunk = max(1, _GRADIENT_BYTES // max(1, each))
    sums = {name: torch.zeros_like(tensor) for name, tensor in moving.items()}
    seen = 0
    for batch in batches:
        seen += len(batch.inputs)
        with torch.no_grad():
            answers = logits(params, batch.inputs).softmax(dim=1)
        for y, weight in _answers(answers, batch, labels, draw):
            parts = [torch.split(part, chunk) for part in (batch.inputs, y, weight)]
            for inputs, targets, weights in zip(*parts, strict=True):
                # Only the plain attention has a rule for the gradients of each image.
                with sdpa_kernel(SDPBackend.MATH):
                    of_each = gradients(moving, inputs, targets)
                for name, gradient in of_each.items():
                    sums[name] += torch.tensordot(weights, gradient.square(), dims=1)
    return {name: total / seen for name, total in sums.items()}


def _answers(
    probabilities: Tensor, batch: Batch, labels: Labels, draw: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield labels (b,) with their weights (b,), so that weighted sums are expectations."""
    ones = torch.ones_like(probabilities[:, 0])
    if labels == "sampled":
        yield torch.multinomial(probabilities.cpu(), 1, generator=draw)[:, 0].to(ones.device), ones
    elif labels == "enumerated":
        for y, weight in enumerate(probabilities.T):
            yield torch.full_like(ones, y, dtype=torch.int64), weight
    elif batch.labels is None:
        raise ValueError("`labels` 'true' needs labels, but the images come without them.")
    else:
        yield batch.labels, ones
