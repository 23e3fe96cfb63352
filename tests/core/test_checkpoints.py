"""Tensors that others wrote: shards, torch checkpoints, names behind prefixes."""

import json
import pickle
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lit.core.checkpoints import match_names, open_tensors
from mergekit_lit.core.shards import INDEX, Shards
from mergekit_lit.core.specs import Spec

STATE = {
    "conv.weight": torch.arange(6.0).reshape(2, 3),
    "fc.bias": torch.ones(2, dtype=torch.bfloat16),
    "count": torch.tensor(3),
}


def write_shards(folder):
    parts = {"model-1.safetensors": ["conv.weight"], "model-2.safetensors": ["fc.bias", "count"]}
    place = {}
    for shard, names in parts.items():
        save_file({name: STATE[name] for name in names}, folder / shard)
        place |= dict.fromkeys(names, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))


def assert_state(params):
    assert sorted(params) == sorted(STATE)
    for name, tensor in STATE.items():
        assert params[name].dtype == tensor.dtype
        assert torch.equal(params[name], tensor)


def test_shards_are_one_mapping(tmp_path):
    write_shards(tmp_path)
    assert_state(open_tensors(tmp_path))
    shards = open_tensors(tmp_path / INDEX)
    assert isinstance(shards, Shards)
    assert len(shards) == 3
    assert shards.spec("conv.weight") == Spec(torch.float32, (2, 3))
    assert shards.spec("fc.bias") == Spec(torch.bfloat16, (2,))


def test_a_folder_with_one_file_is_that_file(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    assert_state(open_tensors(tmp_path))
    assert_state(open_tensors(tmp_path / "model.safetensors"))
    save_file(STATE, tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="holds 2 such files"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
def test_torch_checkpoints(tmp_path, suffix, key):
    path = tmp_path / f"a{suffix}"
    for writer in ("zip", "older"):
        WRITERS[writer](STATE if key is None else {key: STATE, "epoch": 3, "lr": [0.1]}, path)
        assert_state(open_tensors(path))


class Dangerous:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


WRITERS = {
    "zip": torch.save,
    "older": partial(torch.save, _use_new_zipfile_serialization=False),
    "pickle": lambda thing, path: path.write_bytes(pickle.dumps(thing)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_in_a_checkpoint_is_run(tmp_path, writer):
    path = tmp_path / "a.pt"
    WRITERS[writer]({"state_dict": STATE, "more": Dangerous()}, path)
    with pytest.raises(ValueError, match=r"must hold tensors .*more: Unsupported") as caught:
        open_tensors(path)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "weight_map"),
        (b'{"weight_map": {}}', "or none"),
        (b'{"weight_map": {"a": "../x.safetensors"}}', "other places"),
        (b'{"weight_map": [1]}', "weight_map"),
        (b"nothing", "weight_map"),
    ],
)
def test_damaged_indexes_are_one_line(tmp_path, content, message):
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_tensors(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds 0 such files"):
        open_tensors(tmp_path)
    for name in ("a.pt", "a.safetensors", "a.index.json"):
        with pytest.raises(FileNotFoundError, match="No file"):
            open_tensors(tmp_path / name)
    write_shards(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-2"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("thing", [[1, 2], {"epoch": 1}, {}, torch.ones(2), {"state_dict": {}}])
def test_checkpoints_without_weights_are_refused(tmp_path, thing):
    torch.save(thing, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must be a state dict"):
        open_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("writer", ["zip", "older"])
def test_truncated_checkpoints_are_one_line(tmp_path, writer):
    path = tmp_path / "a.pt"
    WRITERS[writer](STATE, path)
    whole = path.read_bytes()
    for size in (0, 1, 3, 10, *range(12, len(whole), 13), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="must be a whole file") as caught:
            open_tensors(path)
        assert "\n" not in str(caught.value)


def test_damaged_checkpoints_of_the_older_format_are_one_line(tmp_path):
    path = tmp_path / "a.pt"
    WRITERS["older"](STATE, path)
    whole = path.read_bytes()
    told = []
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            open_tensors(path)
        except ValueError as error:
            told.append(str(error))
    # A flipped bit of a tensor's own bytes cannot be told.
    assert len(told) > 20
    assert not any("\n" in text for text in told)


def test_names_are_found_behind_a_prefix():
    wanted = {"conv.weight": STATE["conv.weight"], "count": STATE["count"]}
    given = {f"model.encoder.{name}": tensor for name, tensor in STATE.items()}
    names, left = match_names(given, wanted, source="'a'")
    assert names == {n: f"model.encoder.{n}" for n in wanted}
    assert left == ["model.encoder.fc.bias"]
    names, left = match_names(given | STATE, wanted, source="'a'")
    assert names == {n: n for n in wanted}
    del given["model.encoder.count"]
    with pytest.raises(ValueError, match=r"lacks 1, first 'model.encoder.count'"):
        match_names(given, wanted, source="'a'")


def test_an_adapter_alone_is_told_as_such():
    adapter = {
        "model.conv.lora_A.weight": torch.ones(1, 3),
        "model.conv.lora_B.weight": torch.ones(2, 1),
    }
    with pytest.raises(ValueError, match="It must hold whole weights, but holds a LoRA adapter"):
        match_names(adapter, STATE, source="It")
