import pytest
import timm
import torch
import torchvision
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from mergekit_lit.core.permutations import permutation_sizes, permute
from mergekit_lit.models.architectures import SmallResNet, small_vit
from mergekit_lit.models.structure import structure_of


def on_meta(build):
    with torch.device("meta"):
        return build()


def timm_named(name):
    return lambda: timm.create_model(name, num_classes=0)


def torchvision_named(name):
    return lambda: torchvision.models.get_model(name)


ENCODERS = {
    "timm/resnet18": timm_named("resnet18"),
    "timm/resnet50": timm_named("resnet50"),
    "timm/vit_tiny_patch16_224": timm_named("vit_tiny_patch16_224"),
    "timm/tf_efficientnet_lite0": timm_named("tf_efficientnet_lite0"),
    "timm/convnext_atto": timm_named("convnext_atto"),
    "torchvision/resnet18": torchvision_named("resnet18"),
    "torchvision/vit_b_16": torchvision_named("vit_b_16"),
    "torchvision/efficientnet_b0": torchvision_named("efficientnet_b0"),
    "torchvision/vgg11_bn": torchvision_named("vgg11_bn"),
    "resnet": SmallResNet,
    "vit": lambda: small_vit(32),
}
# Number of depths: stem, blocks, and what follows the last block.
DEPTHS = {
    "timm/resnet18": 1 + 8,
    "timm/resnet50": 1 + 16,
    "timm/vit_tiny_patch16_224": 1 + 12 + 1,
    "timm/tf_efficientnet_lite0": 1 + 16 + 1,
    "torchvision/resnet18": 1 + 8 + 1,
    "torchvision/vit_b_16": 1 + 12 + 1,
    "resnet": 1 + 4,
    "vit": 1 + 5 + 1,
}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_tensor_is_classified(name):
    model = on_meta(ENCODERS[name])
    structure = structure_of(model)
    tensors = model.state_dict()
    assert list(structure) == list(tensors)
    for key, info in structure.items():
        layer = model.get_submodule(key.rpartition(".")[0])
        if isinstance(layer, nn.Conv2d):
            assert info.kind == "convolution", key
        elif isinstance(layer, (nn.Linear, nn.MultiheadAttention)):
            assert info.kind == "linear", key
        elif key.endswith("num_batches_tracked"):
            assert info.kind == "counter", key
        elif key.endswith(("running_mean", "running_var")):
            assert info.kind == "statistic", key
        elif isinstance(layer, (nn.LayerNorm, nn.BatchNorm2d)):
            assert info.kind == "norm", key
        elif "pos_embed" in key:
            assert info.kind == "embedding", key
        else:
            assert key.rpartition(".")[2] in ("cls_token", "class_token", "gamma", "layer_scale")
            assert info.kind == "other", key


@pytest.mark.parametrize("name", DEPTHS)
def test_depth_counts_blocks_from_the_input(name):
    structure = structure_of(on_meta(ENCODERS[name]))
    depths = [info.depth for info in structure.values()]
    assert sorted(set(depths)) == list(range(DEPTHS[name]))
    assert next(iter(structure.values())).group == "stem"


def test_groups_are_the_outermost_numbered_parts():
    groups = {info.group for info in structure_of(on_meta(ENCODERS["timm/resnet18"])).values()}
    assert groups == {"stem", "layer1", "layer2", "layer3", "layer4"}
    vit = structure_of(on_meta(ENCODERS["vit"]))
    assert vit["blocks.3.attn.qkv.weight"].group == "blocks.3"
    assert vit["fc_norm.weight"].group == "final"
    assert vit["pos_embed"].group == "stem"


def tiny_timm_resnet(block, layers):
    return ResNet(block, layers, channels=(8, 16, 16, 24), num_classes=0, in_chans=3)


def tiny_torchvision_vit():
    model = torchvision.models.VisionTransformer(16, 8, 2, 3, 12, 20, num_classes=5)
    model.heads = nn.Identity()
    return model


def torchvision_resnet():
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    return model


SYMMETRIC = {
    "ours resnet": (SmallResNet, 32),
    "ours vit": (lambda: small_vit(16), 16),
    "basic blocks": (lambda: tiny_timm_resnet(BasicBlock, (2, 1, 1, 2)), 32),
    "bottlenecks": (lambda: tiny_timm_resnet(Bottleneck, (2, 1, 1, 1)), 32),
    "torchvision resnet": (torchvision_resnet, 32),
    "timm vit": (
        lambda: timm.create_model(
            "test_vit", img_size=32, num_classes=0, init_values=0.5, qk_norm=True
        ),
        32,
    ),
    "torchvision vit": (tiny_torchvision_vit, 16),
}


@pytest.mark.parametrize("name", SYMMETRIC)
def test_permuting_the_named_axes_permutes_the_features_alone(name):
    build, size = SYMMETRIC[name]
    torch.manual_seed(0)
    model = build().double().eval()
    draw = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=draw, dtype=tensor.dtype))
    params, structure = model.state_dict(), structure_of(model)
    sizes = permutation_sizes(params, structure)
    permutations = {k: torch.randperm(n, generator=draw) for k, n in sizes.items()}
    moved = permute(params, structure, permutations)
    x = torch.randn(2, 3, size, size, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        after = torch.func.functional_call(model, moved, (x,))
    assert any(not torch.equal(moved[n], params[n]) for n in params)
    assert torch.allclose(after, before[:, permutations["features"]], rtol=1e-9, atol=1e-9)


def test_resnet_has_inner_and_residual_permutations():
    sizes = permutation_sizes(*both(SmallResNet()))
    inner = {"layer1.0.1": 32, "layer2.0.1": 64, "layer3.0.1": 128, "layer4.0.1": 256}
    assert sizes == {"stem": 32, "layer2": 64, "layer3": 128, "features": 256, **inner}


def test_vit_has_head_hidden_and_residual_permutations():
    sizes = permutation_sizes(*both(small_vit(16)))
    heads = {f"blocks.{i}.heads": 4 for i in range(5)}
    hidden = {f"blocks.{i}.hidden": 512 for i in range(5)}
    assert sizes == {"features": 128, **heads, **hidden}


def both(model):
    return model.state_dict(), structure_of(model)


@pytest.mark.parametrize(
    "name", ["seresnet18", "resnext26ts", "resnet18d", "eva02_tiny_patch14_224"]
)
def test_symmetries_of_other_blocks_are_left_unnamed(name):
    model = on_meta(timm_named(name))
    assert all(info.axes == () for info in structure_of(model).values())
