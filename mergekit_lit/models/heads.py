"""This file is the heads: linear classifiers on a backbone's features, fitted, drawn, or given."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from mergekit_lit.core.params import Params
from mergekit_lit.core.seeds import generator
from mergekit_lit.core.tensorfiles import TensorFile


def apply_head(head: Params, features: Tensor) -> Tensor:
    """Return logits (B, C) of features (B, d).

    W f + b; with a tensor `scale`, as class embeddings have, W f scale / ||f|| + b.
    """
    if "scale" in head:
        features = normalize(features, dim=-1) * head["scale"]
    return torch.nn.functional.linear(features, head["weight"], head["bias"])


def fit_ncm(features: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    """Fit a scaled nearest-class-mean head: weak, frozen, and as independent of n as zero-shot.

    logits_c = -(s/2) ||f - mu_c||^2 + const:  W_c = s mu_c,  b_c = -(s/2) ||mu_c||^2, means after
    centring; s minimises the training cross-entropy (convex in s; Newton).

    Args:
        features: at the base, (n, d).
        labels: in [0, classes), (n,).
        classes: C.

    Returns:
        `weight` (C, d) and `bias` (C,), float32.

    Raises:
        ValueError: a class has no sample.
    """
    _check(features, labels, classes)
    f = features.double()
    centre = f.mean(dim=0)
    means = torch.zeros(classes, f.shape[1], dtype=f.dtype).index_add_(0, labels, f - centre)
    means = means / torch.bincount(labels, minlength=classes).unsqueeze(1)
    bias = -0.5 * means.square().sum(dim=1)
    scale = _fit_scale((f - centre) @ means.T + bias, labels)
    return _float({"weight": scale * means, "bias": scale * (bias - means @ centre)})


def fit_probe(
    features: Tensor, labels: Tensor, classes: int, *, l2: float = 1e-3, iterations: int = 200
) -> dict[str, Tensor]:
    """Fit a multinomial logistic regression on standardised features.

    min_W,b  mean cross-entropy + (l2 / 2) ||W||^2, by L-BFGS in float64; the standardisation is
    folded into W and b.

    Args:
        features: at the base, (n, d).
        labels: in [0, classes), (n,).
        classes: C.
        l2: weight of the penalty, above 0.
        iterations: at most so many steps of L-BFGS.

    Returns:
        `weight` (C, d) and `bias` (C,), float32.

    Raises:
        ValueError: a class has no sample, or `l2` is not above 0.
    """
    _check(features, labels, classes)
    if l2 <= 0:
        raise ValueError(f"`l2` must be above 0, but is {l2}.")
    f = features.double()
    centre, spread = f.mean(dim=0), f.std(dim=0, correction=0)
    spread = torch.where(spread > 1e-8 * (1 + centre.abs()), spread, torch.inf)
    standard = (f - centre) / spread
    weight = torch.zeros(classes, f.shape[1], dtype=f.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=f.dtype, requires_grad=True)
    optimizer: torch.optim.Optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def objective() -> float:
        loss = cross_entropy(standard @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
        return float(loss.detach())

    with torch.enable_grad():
        optimizer.step(objective)
    folded = weight.detach() / spread
    return _float({"weight": folded, "bias": bias.detach() - folded @ centre})


def trained_init(features: int, classes: int, seed: int) -> dict[str, Tensor]:
    """Draw a head to be trained: normal weights of deviation 0.01 and no bias.

    Args:
        features: d.
        classes: C.
        seed: the head is a function of it and the two sizes alone.
    """
    draw = generator(seed, "head", features, classes)
    weight = 0.01 * torch.randn(classes, features, generator=draw)
    return {"weight": weight, "bias": torch.zeros(classes)}


def load_embeddings(
    path: Path, classes: int, *, features: int | None = None, scale: float = 100.0
) -> dict[str, Tensor]:
    """Read class embeddings, such as CLIP's text features, as a frozen head of cosines.

    logits_c = scale <f, e_c> / (||f|| ||e_c||)

    Args:
        path: safetensors file with one tensor (C, d), or with one named `embeddings`.
        classes: C.
        features: d that the backbone makes; None to leave it unchecked.
        scale: inverse temperature; CLIP's trained value by default.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no such tensor, or one of another shape.
    """
    file = TensorFile(path)
    name = "embeddings" if "embeddings" in file else next(iter(file), "")
    if name != "embeddings" and len(file) != 1:
        raise ValueError(
            f"{str(path)!r} must hold one tensor, or one named 'embeddings', but holds {len(file)}."
        )
    rows = file[name].float()
    wanted = (classes, rows.shape[-1] if features is None else features)
    if tuple(rows.shape) != wanted:
        raise ValueError(
            f"Class embeddings in {str(path)!r} must have shape {wanted} (classes, features), but "
            f"have {tuple(rows.shape)}."
        )
    weight = normalize(rows, dim=-1)
    return {"weight": weight, "bias": torch.zeros(classes), "scale": torch.tensor(scale)}


def _fit_scale(logits: Tensor, labels: Tensor, *, iterations: int = 100) -> float:
    """Return s > 0 that minimises the mean cross-entropy of s * logits (n, C).

    Newton in log s, with steps of at most 1: where classes are separable, s would grow without
    bound, and stops when the slope is spent.
    """
    right = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    log_scale = -torch.log(logits.std().clamp_min(1e-12))
    for _ in range(iterations):
        scale = log_scale.exp()
        p = (scale * logits).softmax(dim=1)
        mean = (p * logits).sum(dim=1)
        slope = (mean - right).mean() * scale
        variance = (p * (logits - mean.unsqueeze(1)).square()).sum(dim=1).mean()
        curvature = variance * scale.square() + slope
        step = slope / curvature if curvature > 0 else slope.sign()
        log_scale = log_scale - step.clamp(-1, 1)
        if abs(float(slope)) < 1e-6:
            break
    return float(log_scale.exp())


def _check(features: Tensor, labels: Tensor, classes: int) -> None:
    """Refuse samples that a head cannot be fitted to."""
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= classes:
        found = f"{int(labels.min())} to {int(labels.max())}" if len(labels) else "none"
        raise ValueError(f"Labels must lie in 0 to {classes - 1}, but are {found}.")
    empty = (torch.bincount(labels, minlength=classes) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"A fitted head needs a sample of every class, but {len(empty)} of {classes} have "
            f"none, first class {empty[0]}. Take more samples (n), or the head 'trained'."
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("Features must be finite, but hold NaN or infinite entries.")


def _float(head: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in head.items()}
