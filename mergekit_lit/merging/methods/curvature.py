"""This file is matching models in the subspace that each task depends on: MaTS."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mergekit_lit.core.calibration import Batch, Calibration
from mergekit_lit.core.experts import Experts, Merged
from mergekit_lit.core.params import Params
from mergekit_lit.core.registry import MERGE_METHODS
from mergekit_lit.core.seeds import generator
from mergekit_lit.core.tensorfiles import floats
from mergekit_lit.merging.methods.moments import as_matrices, check_samples, looks, matrix_names
from mergekit_lit.merging.passes import mean_delta
from mergekit_lit.merging.steps import moved

# Bytes that the blocks of all experts of one round of layers may take.
_BLOCK_BYTES = 2**30

# Conjugate gradients stop when the residual has fallen by this factor.
_SOLVED = 1e-10


def _check(_: Experts, *, iterations: int, samples: int) -> None:
    check_samples(samples)
    if iterations < 1:
        raise ValueError(f"`iterations` must be at least 1, but is {iterations!r}.")


@MERGE_METHODS.add(
    form="whole",
    family="moments",
    data="train",
    source="Tam et al. 2024, arXiv:2312.04339, sec. 4 (MaTS)",
    search={"iterations": (1, 100)},
    order="the labels of the t-th expert are drawn from the t-th stream",
    check=_check,
)
def mats(
    experts: Experts,
    calibration: Calibration,
    *,
    iterations: int = 30,
    samples: int = 256,
    seed: int = 0,
) -> Merged:
    """Find the layers closest to each expert's, as far as that expert's answers depend on them.

    sum_t A_t W B_t = sum_t A_t W_t B_t by conjugate gradients from the average,
    A_t = E[g g^T],  B_t = E[x x^T]

    x are the inputs of the layer, as in `regmean`, and g the gradients of log p_t(y|x), y drawn
    from p_t, at its outputs: A_t (x) B_t is the layer's block of K-FAC. An expert is looked at
    under its own BatchNorm statistics. Tensors of other layers are averaged.

    Args:
        experts: T experts of one base, with their heads.
        calibration: training images of each task; labels are not looked at.
        iterations: most steps of conjugate gradients, >= 1; few stay close to the average.
        samples: largest number of images of each task, >= 1.
        seed: of the choice of images, and of the labels.

    Source: Tam et al. 2024, arXiv:2312.04339, sec. 4 (MaTS).
    Differs: convolutions too, their places counted as rows; from the average, not from another
        merge.
    """
    _check(experts, iterations=iterations, samples=samples)
    steps: dict[str, Tensor] = {}
    for names in _rounds(experts):
        blocks = []
        for t, task in enumerate(experts.names):
            params = floats(dict(experts.tuned[t]))
            batches = looks(calibration, t, task, samples, seed)
            draw = generator(seed, "labels", t)
            blocks.append(kronecker_blocks(calibration, task, params, batches, names, draw=draw))
        for name in blocks[0]:
            steps[name] = _matched(experts, name, [of[name] for of in blocks], iterations)
    every = (
        (name, steps[name] if name in steps else mean_delta(experts, name))
        for name in experts.merged_names()
    )
    shared = moved(experts.base, every)
    facts = {"solved_layers": len(steps)}
    return Merged(shared=shared, structure=experts.structure, facts=facts)


def kronecker_blocks(
    calibration: Calibration,
    task: str,
    params: Params,
    batches: Iterable[Batch],
    names: Sequence[str],
    *,
    draw: torch.Generator,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A = E[g g^T], (g, m/g, m/g), and B = E[x x^T], (g, n, n), by layer, in float64.

    Args:
        calibration: the expert's network and heads.
        task: whose head answers.
        params: the expert's parameters.
        batches: images.
        names: weights of layers; those that cannot be captured are left out.
        draw: the stream of the labels.
    """
    traced = {
        name: tensor.detach().requires_grad_() if name in names else tensor
        for name, tensor in params.items()
    }
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    rows_seen: Counter[str] = Counter()
    for batch in batches:
        features, layers = calibration.expert.capture(traced, batch.inputs, names)
        likelihoods = calibration.logits(task, features).log_softmax(dim=1)
        chances = likelihoods.detach().exp().cpu()
        y = torch.multinomial(chances, 1, generator=draw).to(likelihoods.device)
        total = likelihoods.gather(1, y).sum()
        outputs = [layer.output for layer in layers.values()]
        gradients = torch.autograd.grad(total, outputs)
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
            x, g = layer.input_rows().detach(), layer.output_rows(gradient)
            pair = ((g.mT @ g).double(), (x.mT @ x).double())
            before = sums.get(name)
            sums[name] = pair if before is None else (before[0] + pair[0], before[1] + pair[1])
            rows_seen[name] += x.shape[1]
    return {name: (a / rows_seen[name], b / rows_seen[name]) for name, (a, b) in sums.items()}


def conjugate_gradients(
    blocks: Sequence[tuple[Tensor, Tensor]], targets: Tensor, *, iterations: int
) -> Tensor:
    """Return X with sum_t A_t X B_t = Y, from X = 0; (g, m, n).

    Args:
        blocks: A_t (g, m, m) and B_t (g, n, n), symmetric and positive semidefinite.
        targets: Y, (g, m, n), in the range of the map.
        iterations: most steps; fewer where the residual has fallen by 1e-10.
    """
    solution, residual = torch.zeros_like(targets), targets.clone()
    direction = residual
    size = residual.square().sum()
    enough = _SOLVED**2 * size
    for _ in range(iterations):
        if size <= enough:
            break
        image = _applied(blocks, direction)
        length = size / (direction * image).sum()
        solution = solution + length * direction
        residual = residual - length * image
        new_size = residual.square().sum()
        direction = residual + (new_size / size) * direction
        size = new_size
    return solution


def _applied(blocks: Sequence[tuple[Tensor, Tensor]], matrices: Tensor) -> Tensor:
    """Return sum_t A_t X B_t, (g, m, n)."""
    total = torch.zeros_like(matrices)
    for a, b in blocks:
        total += a @ matrices @ b
    return total


def _matched(
    experts: Experts, name: str, blocks: Sequence[tuple[Tensor, Tensor]], iterations: int
) -> Tensor:
    """Return the step of one layer, in its own shape."""
    groups = len(blocks[0][0])
    average = mean_delta(experts, name)
    dtype, mean = average.dtype, as_matrices(average, groups).to(average.dtype)
    # Only the ratios of the A_t matter; the gradients of a sure expert are tiny.
    largest = max(float(a.abs().max()) for a, _ in blocks) or 1.0
    scaled = [((a / largest).to(dtype), b.to(dtype)) for a, b in blocks]
    deltas = (as_matrices(experts.delta(name, t), groups).to(dtype) for t in range(len(experts)))
    targets = sum(
        (a @ (delta - mean) @ b for (a, b), delta in zip(scaled, deltas, strict=True)),
        start=torch.zeros_like(mean),
    )
    matched = mean + conjugate_gradients(scaled, targets, iterations=iterations)
    return matched.flatten(0, 1).reshape(experts.base[name].shape)


def _rounds(experts: Experts) -> Iterator[list[str]]:
    """Yield the layers' weights in rounds, whose blocks fit into memory together."""
    here: list[str] = []
    held = 0
    for name in matrix_names(experts):
        m, n = experts.base[name].flatten(1).shape
        needed = 8 * len(experts) * (m * m + n * n)
        if here and held + needed > _BLOCK_BYTES:
            yield here
            here, held = [], 0
        here, held = [*here, name], held + needed
    if here:
        yield here
