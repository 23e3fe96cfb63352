"""Plain weight files: guessed structure, heads by name, merges that others can read."""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file

from mergekit_lit.core.shards import write_shards
from mergekit_lit.core.specs import Spec
from mergekit_lit.merging import load_raw, merge, save_raw
from mergekit_lit.merging.guessing import guessed_structure
from mergekit_lit.merging.patterns import is_match
from mergekit_lit.merging.raw import HEADS
from mergekit_lit.models.architectures import SmallResNet, small_vit
from mergekit_lit.models.structure import structure_of


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm.create_model("resnet50", num_classes=0),
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0),
        lambda: timm.create_model("convnext_atto", num_classes=0),
        lambda: torchvision.models.get_model("resnet18"),
        lambda: torchvision.models.get_model("vit_b_16"),
        SmallResNet,
        lambda: small_vit(32),
    ],
    ids=["resnet50", "vit_tiny", "convnext", "resnet18", "vit_b_16", "resnet", "vit"],
)
def test_the_guess_is_what_the_module_tells(build):
    with torch.device("meta"):
        model = build()
    tensors = model.state_dict()
    specs = {
        name: Spec(tensors[name].dtype, tuple(tensors[name].shape)) for name in sorted(tensors)
    }
    guess = guessed_structure(specs)
    for name, info in structure_of(model).items():
        assert (guess[name].kind, guess[name].depth, guess[name].group) == (
            info.kind,
            info.depth,
            info.group,
        ), name
        assert guess[name].axes == ()


def test_what_is_called_a_head():
    heads = ["head.weight", "head.fc.bias", "fc.weight", "heads.head.weight", "classifier.1.bias"]
    others = ["head.norm.weight", "fc_norm.weight", "blocks.0.mlp.fc1.weight", "layer1.0.fc.bias"]
    assert [name for name in [*heads, *others] if is_match(HEADS, name)] == heads


def weights(seed, head=None):
    """Return a small model with BatchNorm; with a head of its own size for an expert."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=draw)

    return {
        "conv1.weight": randn(4, 3, 3, 3),
        "bn1.weight": randn(4),
        "bn1.running_mean": randn(4),
        "bn1.num_batches_tracked": torch.tensor(seed),
        "blocks.0.fc1.weight": randn(6, 4),
        "blocks.0.fc1.bias": randn(6),
    } | ({} if head is None else {"head.weight": randn(head, 6), "head.bias": randn(head)})


@pytest.fixture
def files(tmp_path):
    """Return a base with an ImageNet head, and experts with heads of 2 and 3 classes."""
    save_file(weights(0, 10), tmp_path / "base.safetensors")
    for seed, name in ((1, "a"), (2, "b")):
        save_file(weights(seed, seed + 1), tmp_path / f"{name}.safetensors")
    return tmp_path


def load(files, **options):
    paths = [files / "a.safetensors", files / "b.safetensors"]
    return load_raw(paths, base=files / "base.safetensors", **options)


def test_a_merge_of_plain_files_is_a_plain_file(files):
    experts = load(files)
    assert experts.names == ["a", "b"]
    merged = merge(experts, "average", streamed=True)
    out = files / "m.safetensors"
    assert save_raw(out, merged) == [out, files / "m.heads.safetensors"]
    found, base = load_file(out), weights(0)
    assert found.keys() == base.keys()
    mean = (weights(1)["conv1.weight"] + weights(2)["conv1.weight"]) / 2
    torch.testing.assert_close(found["conv1.weight"], mean)
    assert torch.equal(found["bn1.running_mean"], base["bn1.running_mean"])
    assert int(found["bn1.num_batches_tracked"]) == 0
    heads = load_file(files / "m.heads.safetensors")
    assert heads["a/head.weight"].shape == (2, 6)
    assert torch.equal(heads["b/head.bias"], weights(2, 3)["head.bias"])


def test_what_was_merged_can_be_merged_again(files):
    save_raw(files / "m.safetensors", merge(load(files), "average"))
    paths = [files / "m.safetensors", files / "a.safetensors"]
    again = merge(load_raw(paths, base=files / "base.safetensors"), "average")
    assert again.tasks == ("m", "a")


@pytest.mark.parametrize("suffix", ["safetensors.index.json", "pt", "folder"])
def test_files_of_every_format(files, suffix):
    reference = merge(load(files), "average")
    if suffix == "pt":
        prefixed = {f"module.{name}": tensor for name, tensor in weights(1, 2).items()}
        torch.save({"state_dict": prefixed}, files / "a.pt")
        path = files / "a.pt"
    elif suffix == "folder":
        path = files / "a"
        path.mkdir()
        save_file(weights(1, 2), path / "model.safetensors")
    else:
        write_shards(files / "a.safetensors", weights(1, 2), {}, max_shard_bytes=200)
        path = files / "a.safetensors.index.json"
    paths = [path, files / "b.safetensors"]
    experts = load_raw(paths, base=files / "base.safetensors")
    assert experts.names == ["a", "b"]
    assert list(experts.heads[0]) == ["head.bias", "head.weight"]
    merged = merge(experts, "average")
    assert all(torch.equal(merged.shared[name], t) for name, t in reference.shared.items())


def test_files_called_alike_go_by_their_folders(files):
    for name in "ab":
        (files / name).mkdir()
        (files / f"{name}.safetensors").rename(files / name / "model.safetensors")
    paths = [files / name / "model.safetensors" for name in "ab"]
    assert load_raw(paths, base=files / "base.safetensors").names == ["a", "b"]
    with pytest.raises(ValueError, match="is given 2 times"):
        load_raw([paths[0], paths[0]], base=files / "base.safetensors")


def test_heads_may_be_merged_too(files):
    save_file(weights(0, 2), files / "base.safetensors")
    save_file(weights(2, 2), files / "b.safetensors")
    merged = merge(load(files, heads=""), "average")
    assert "head.weight" in merged.shared
    assert save_raw(files / "m.safetensors", merged) == [files / "m.safetensors"]


def test_sharded_output(files):
    merged = merge(load(files), "average", streamed=True)
    written = save_raw(files / "m.safetensors", merged, max_shard_bytes=300)
    assert [file.name for file in written if "heads" not in file.name] == [
        "m-00001-of-00002.safetensors",
        "m-00002-of-00002.safetensors",
        "m.safetensors.index.json",
    ]
    again = load_raw([files / "m.safetensors.index.json"], base=files / "base.safetensors")
    assert all(torch.equal(again.tuned[0][name], merged.shared[name]) for name in merged.shared)


BAD = {
    "extra": ({"neck.weight": torch.ones(2)}, "nothing beyond .* but holds 'neck.weight'"),
    "shape": ({"bn1.weight": torch.ones(5)}, r"first 'bn1.weight': \(5,\) and \(4,\)"),
    "integers": ({"bn1.weight": torch.ones(4, dtype=torch.int32)}, "kinds of numbers, but 'bn1"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_do_not_fit_are_refused_by_their_headers(files, name):
    changes, message = BAD[name]
    save_file(weights(2, 3) | changes, files / "b.safetensors")
    with pytest.raises(ValueError, match=message):
        load(files)


def test_missing_tensors_and_files_are_refused(files):
    few = weights(2)
    del few["blocks.0.fc1.bias"]
    save_file(few, files / "b.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1, first 'blocks\.0\.fc1\.bias'"):
        load(files)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load_raw([files / "nothing.safetensors"], base=files / "base.safetensors")
    with pytest.raises(ValueError, match="at least one expert file"):
        load_raw([], base=files / "base.safetensors")


@pytest.mark.parametrize("name", ["base", "b"])
def test_numbers_that_are_none_are_refused_when_they_are_read(files, name):
    spoilt = weights(2, 3)
    spoilt["blocks.0.fc1.bias"][3] = torch.nan
    save_file(spoilt, files / f"{name}.safetensors")
    experts = load(files)
    with pytest.raises(
        ValueError, match=f"{name}.safetensors.* finite numbers, but 'blocks.0.fc1.b"
    ):
        merge(experts, "task_arithmetic")


def test_what_tasks_keep_of_their_own_has_no_place_in_plain_files(files):
    with pytest.raises(ValueError, match="'emr' gives each task a part of its own"):
        save_raw(files / "m.safetensors", merge(load(files), "emr"))
