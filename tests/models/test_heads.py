import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergekit_lit.models.heads import (
    apply_head,
    fit_ncm,
    fit_probe,
    load_embeddings,
    trained_init,
)


def blobs(n=120, d=5, classes=4, spread=1.5, seed=0):
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centres = draw.normal(size=(classes, d))
    features = centres[labels] + spread * draw.normal(size=(n, d)) + 3.0
    return torch.tensor(features), torch.tensor(labels)


def cross_entropy_numpy(logits, labels):
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(labels)), labels].mean()


def test_ncm_chooses_the_nearest_class_mean():
    features, labels = blobs()
    head = fit_ncm(features, labels, 4)
    f, y = features.numpy(), labels.numpy()
    means = np.stack([f[y == c].mean(axis=0) for c in range(4)])
    nearest = ((f[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (apply_head(head, features.float()).argmax(dim=1).numpy() == nearest).all()


def test_ncm_scale_is_the_best_on_a_fine_grid():
    features, labels = blobs()
    head = fit_ncm(features, labels, 4)
    logits = apply_head(head, features.float()).double().numpy()
    grid = np.linspace(0.5, 2.0, 301)
    losses = [cross_entropy_numpy(g * logits, labels.numpy()) for g in grid]
    assert grid[int(np.argmin(losses))] == pytest.approx(1.0, abs=0.006)


@pytest.mark.parametrize("spread", [1e-6, 0.05, 100.0])
def test_ncm_stays_finite_when_classes_are_separable_or_hopeless(spread):
    features, labels = blobs(spread=spread)
    head = fit_ncm(features, labels, 4)
    assert all(bool(torch.isfinite(t).all()) for t in head.values())


def test_probe_reaches_a_zero_gradient():
    features, labels = blobs()
    l2 = 0.01
    head = fit_probe(features, labels, 4, l2=l2)
    f = features.numpy()
    standard = (f - f.mean(axis=0)) / f.std(axis=0)
    weight = head["weight"].double().numpy() * f.std(axis=0)
    logits = apply_head(head, features.float()).double().numpy()
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = p / p.sum(axis=1, keepdims=True)
    residual = (p - np.eye(4)[labels.numpy()]) / len(f)
    assert np.abs(residual.T @ standard + l2 * weight).max() < 1e-5
    assert np.abs(residual.sum(axis=0)).max() < 1e-5


def test_probe_ignores_constant_features_and_is_deterministic():
    features, labels = blobs()
    features[:, 2] = 7.0
    first, second = (fit_probe(features, labels, 4) for _ in range(2))
    assert float(first["weight"][:, 2].abs().max()) == 0.0
    assert torch.equal(first["weight"], second["weight"])


def test_trained_head_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = trained_init(8, 3, seed=5)["weight"]
    torch.manual_seed(2)
    assert torch.equal(first, trained_init(8, 3, seed=5)["weight"])
    assert not torch.equal(first, trained_init(8, 3, seed=6)["weight"])


def test_embeddings_give_scaled_cosines(tmp_path):
    rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    save_file({"embeddings": rows, "other": torch.zeros(1)}, tmp_path / "text.safetensors")
    head = load_embeddings(tmp_path / "text.safetensors", 3, features=6, scale=10.0)
    f = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    expected = 10 * torch.nn.functional.cosine_similarity(f[:, None], rows[None], dim=2)
    assert torch.allclose(apply_head(head, f), expected, atol=1e-5)


def test_embeddings_of_another_shape_are_refused(tmp_path):
    save_file({"a": torch.zeros(3, 6)}, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match=r"must have shape \(4, 6\).*have \(3, 6\)"):
        load_embeddings(tmp_path / "text.safetensors", 4)
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="must hold one tensor"):
        load_embeddings(tmp_path / "two.safetensors", 4)


@pytest.mark.parametrize("fit", [fit_ncm, fit_probe])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0, 1, 1], "1 of 3 have none, first class 2"),
        ([0, 1, 2, 3], "must lie in 0 to 2, but are 0 to 3"),
        ([-1, 1, 2, 0], "must lie in 0 to 2, but are -1 to 2"),
        ([], "must lie in 0 to 2, but are none"),
    ],
)
def test_labels_that_no_head_fits_are_refused(fit, labels, message):
    with pytest.raises(ValueError, match=message):
        fit(torch.randn(len(labels), 2), torch.tensor(labels, dtype=torch.long), 3)


@pytest.mark.parametrize("fit", [fit_ncm, fit_probe])
def test_features_that_are_not_finite_are_refused(fit):
    with pytest.raises(ValueError, match="must be finite"):
        fit(torch.tensor([[1.0], [torch.nan]]), torch.tensor([0, 1]), 2)


def test_penalty_must_be_positive():
    with pytest.raises(ValueError, match="`l2` must be above 0, but is 0"):
        fit_probe(*blobs(), 4, l2=0)
