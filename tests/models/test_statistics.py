import numpy as np
import pytest
import torch
from torch import nn

from mergekit_lit.models.backbones import load_base
from mergekit_lit.models.statistics import estimate_statistics, has_statistics


def images(count=2, batch=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, 16, 16, generator=draw) for _ in range(count)]


def test_statistics_are_the_mean_of_the_batches_moments():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    batches = images(3)
    found = estimate_statistics(model, batches)
    seen = [model[0](x).detach().double().numpy() for x in batches]
    mean = np.mean([x.mean(axis=(0, 2, 3)) for x in seen], axis=0)
    unbiased = [x.transpose(1, 0, 2, 3).reshape(4, -1).var(axis=1, ddof=1) for x in seen]
    assert np.allclose(found["1.running_mean"], mean, atol=1e-5)
    assert np.allclose(found["1.running_var"], np.mean(unbiased, axis=0), atol=1e-5)
    second = []
    for x in seen:
        centred = x - x.mean(axis=(0, 2, 3), keepdims=True)
        normal = centred / np.sqrt(x.var(axis=(0, 2, 3), keepdims=True) + 1e-5)
        second.append(np.maximum(normal, 0).mean(axis=(0, 2, 3)))
    assert np.allclose(found["3.running_mean"], np.mean(second, axis=0), atol=1e-5)


def test_module_and_mode_stay_as_they_were():
    backbone, base = load_base("resnet@random:0", image_size=16)
    backbone.train()
    found = estimate_statistics(backbone, images())
    assert all(m.training for m in backbone.modules())
    assert all(torch.equal(t, base.params[n]) for n, t in backbone.state_dict().items())
    assert {m.momentum for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    wanted = {n for n, info in base.structure.items() if info.kind == "statistic"}
    assert set(found) == wanted
    assert has_statistics(base.structure)


def test_an_encoder_without_batchnorm_has_no_statistics():
    backbone, base = load_base("vit@random:0")
    assert estimate_statistics(backbone, []) == {}
    assert not has_statistics(base.structure)


def test_no_batch_is_refused():
    layer = nn.BatchNorm2d(3)
    layer.running_mean.fill_(2)
    with pytest.raises(ValueError, match="need at least one batch"):
        estimate_statistics(layer, [])
    assert layer.running_mean.tolist() == [2, 2, 2]
