"""What a module shows of its layers, and that looking changes nothing."""

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from mergekit_lit.models.backbones import build_backbone
from mergekit_lit.models.capture import network
from mergekit_lit.models.structure import structure_of


def weights_of(module):
    structure, params = structure_of(module), dict(module.state_dict())
    names = [n for n, i in structure.items() if i.kind in ("linear", "convolution")]
    return params, [name for name in names if params[name].ndim >= 2]


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_rows_times_weights_are_the_outputs_of_every_layer(name):
    backbone = build_backbone(name).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        check_every_layer(backbone, x, expected=backbone(x))


def check_every_layer(module, x, *, expected):
    """Rows times weights are the outputs of every layer, and the features are the module's."""
    params, names = weights_of(module)
    with torch.no_grad():
        features, layers = network(module).capture(params, x, names)
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert set(layers) == set(names)
    for key, layer in layers.items():
        bias = params.get(key.removesuffix("weight") + "bias", torch.zeros(()))
        outputs = layer.input_rows() @ params[key].flatten(1).T + bias
        torch.testing.assert_close(layer.output_rows(layer.output), outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_of_torch_is_seen_as_two_linear_maps(batch_first, bias):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    module, x = Encoder().eval(), torch.randn(3, 5, 8)
    with torch.no_grad():
        check_every_layer(module, x, expected=module(x))


def test_the_encoder_of_torchvision_is_seen_whole():
    module = VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=24).eval()
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        check_every_layer(module, x, expected=module(x))


@pytest.mark.parametrize("options", [{"add_zero_attn": True}, {"add_bias_kv": True}, {"kdim": 6}])
def test_other_attention_is_computed_as_torch_does(options):
    class Crossing(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

        def forward(self, x):
            key = x[..., :6] if "kdim" in options else x
            return self.attention(x, key, x, need_weights=False)[0]

    module, x = Crossing().eval(), torch.randn(3, 5, 8)
    with torch.no_grad():
        seen = network(module).features(dict(module.state_dict()), x)
        torch.testing.assert_close(seen, module(x))


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2, "padding": 1},
        {"groups": 4, "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "stride": (2, 1)},
        {"padding": (0, 2)},
    ],
)
def test_every_kind_of_convolution_is_rows_times_weights(options):
    layer = nn.Conv2d(4, 8, (3, 2), bias=False, **options).double()
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    _, layers = network(layer).capture(dict(layer.state_dict()), x, ["weight"])
    rows = layers["weight"].input_rows()
    groups = options.get("groups", 1)
    matrices = layer.weight.flatten(1).unflatten(0, (groups, -1))
    outputs = layers["weight"].output_rows(layers["weight"].output)
    torch.testing.assert_close(rows @ matrices.mT, outputs)
    # Rows are images first, then places: the first of the second image is half-way down.
    places = outputs.shape[1] // 2
    first = layer(x)[1, : 8 // groups, 0, 0]
    torch.testing.assert_close(outputs[0, places], first)


def test_gradients_at_outputs_are_those_before_what_follows_in_place():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True)).double()
    params = {n: p.detach().requires_grad_() for n, p in module.named_parameters()}
    x = torch.randn(5, 3, dtype=torch.float64)
    features, layers = network(module).capture(params, x, ["0.weight"])
    (gradient,) = torch.autograd.grad(features.sum(), layers["0.weight"].output)
    torch.testing.assert_close(gradient, (layers["0.weight"].output > 0).double())
    assert module[1].inplace


def test_the_batch_normalises_without_a_trace():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    params = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in params.items()}
    x = torch.randn(8, 3, 5, 5) * 3 + 1
    seen = network(module, batch_statistics=True).features(params, x)
    torch.testing.assert_close(seen, module.train()(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in params.items())
    stored = network(module).features(params, x)
    assert not torch.allclose(stored, seen)


def test_half_precision_is_computed_with_in_float32():
    module = nn.Linear(3, 2)
    half = {name: tensor.bfloat16() for name, tensor in module.state_dict().items()}
    features, layers = network(module).capture(half, torch.randn(4, 3), ["weight"])
    assert features.dtype == torch.float32
    assert set(layers) == {"weight"}
