"""Models in several files: as Hugging Face names them, read back, and never half there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lit.core.checkpoints import open_tensors
from mergekit_lit.core.expert_files import file_kind, load_merged, save_merged
from mergekit_lit.core.experts import Merged
from mergekit_lit.core.shards import Shards, open_file, write_shards
from mergekit_lit.core.specs import Computed, Spec, renamed
from mergekit_lit.core.structure import TensorInfo
from mergekit_lit.core.tensorfiles import TensorFile, write_tensors

TENSORS = {f"w{i}": torch.full((100,), float(i)) for i in range(5)} | {"n": torch.tensor(7)}
FACTS = {"kind": "test"}


def written(folder, tensors=TENSORS, facts=FACTS, size=900):
    return write_shards(folder / "m.safetensors", tensors, facts, max_shard_bytes=size)


def test_files_are_named_and_filled_as_hugging_face_does(tmp_path):
    files = written(tmp_path)
    names = [f"m-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [file.name for file in files] == [*names, "m.safetensors.index.json"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == 5 * 400 + 8
    assert index["weight_map"] == {"n": names[0], "w0": names[0], "w1": names[0]} | {
        "w2": names[1],
        "w3": names[1],
        "w4": names[2],
    }
    # safetensors' own reader takes every one of them.
    found = {name: tensor for file in files[:-1] for name, tensor in load_file(file).items()}
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("name", ["m.safetensors", "m.safetensors.index.json"])
def test_what_was_written_is_read_back_by_either_name(tmp_path, name):
    written(tmp_path)
    for opened in (open_file(tmp_path / name), open_tensors(tmp_path / name)):
        assert isinstance(opened, Shards)
        assert opened.facts == FACTS
        assert list(opened) == sorted(TENSORS)
        assert all(torch.equal(opened[key], tensor) for key, tensor in TENSORS.items())


def test_what_fits_into_one_file_is_one(tmp_path):
    assert written(tmp_path, size=10_000) == [tmp_path / "m.safetensors"]
    assert open_file(tmp_path / "m.safetensors").facts == FACTS
    with pytest.raises(ValueError, match="`max_shard_bytes` must be above 0, but is 0"):
        written(tmp_path, size=0)


def test_same_tensors_same_bytes_and_other_tensors_another_index(tmp_path):
    first = written(tmp_path / "a")
    other = written(tmp_path / "b", dict(reversed(TENSORS.items())))
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in other]
    changed = written(tmp_path / "c", TENSORS | {"n": torch.tensor(8)})
    assert changed[-1].read_text() != first[-1].read_text()


def test_an_earlier_model_of_the_name_goes(tmp_path):
    written(tmp_path, size=400)
    write_tensors(tmp_path / "m.safetensors", {"old": torch.ones(2)}, FACTS)
    (tmp_path / "m-1-of-2.safetensors").touch()  # none of ours
    files = written(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*files, tmp_path / "m-1-of-2.safetensors"])
    assert "old" not in open_file(tmp_path / "m.safetensors")


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_a_crash_while_files_are_put_in_place_leaves_no_model(tmp_path, monkeypatch, renames):
    written(tmp_path)
    replace, left = Path.replace, [renames]

    def crash(self, target):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, {name: tensor + 1 for name, tensor in TENSORS.items()})
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "m.safetensors")
    assert not list(tmp_path.glob(".*"))


def test_a_failure_while_tensors_are_made_leaves_the_earlier_model(tmp_path):
    written(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(name):
        if name == "w4":
            raise ValueError("no w4")
        return TENSORS[name] + 1

    specs = {name: Spec(t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
    with pytest.raises(ValueError, match="no w4"):
        written(tmp_path, Computed(specs, fail))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shards_of_another_model_are_noticed(tmp_path):
    written(tmp_path)
    written(tmp_path / "other", {name: tensor + 1 for name, tensor in TENSORS.items()})
    (tmp_path / "other/m-00002-of-00003.safetensors").replace(
        tmp_path / "m-00002-of-00003.safetensors"
    )
    opened = open_file(tmp_path / "m.safetensors")
    assert torch.equal(opened["w0"], TENSORS["w0"])
    with pytest.raises(ValueError, match="tensor 'w2' is not the one that the index names"):
        opened["w2"]


def test_facts_of_an_index_are_checked(tmp_path):
    index = written(tmp_path)[-1]
    index.write_text(index.read_text().replace("test", "tast"))
    with pytest.raises(ValueError, match="header does not match its checksum"):
        open_file(index)


def test_whether_a_tensor_is_there_is_told_without_reading_it(tmp_path, monkeypatch):
    one, several = tmp_path / "one.safetensors", tmp_path / "several.safetensors"
    write_tensors(one, {"a.x": torch.ones(3)}, {})
    write_shards(several, {"a.x": torch.ones(300), "a.y": torch.ones(300)}, {}, max_shard_bytes=999)
    lazy = [TensorFile(one), open_file(several)]
    lazy += [file.under("a.") for file in lazy]
    lazy.append(renamed(lazy[0], {"x": "a.x"}))
    monkeypatch.setattr(TensorFile, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    for params in lazy:
        assert next(iter(params)) in params
        assert "a" not in params


def test_computed_tensors_are_made_one_at_a_time_and_must_be_what_was_announced(tmp_path):
    made = []
    specs = {name: Spec(t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
    lazy = Computed(specs, lambda name: made.append(name) or TENSORS[name])
    write_tensors(tmp_path / "a", lazy, FACTS)
    write_tensors(tmp_path / "b", TENSORS, FACTS)
    assert sorted(made) == sorted(TENSORS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "other" not in lazy
    wrong = Computed({"w0": Spec(torch.float32, (3,))}, TENSORS.__getitem__)
    with pytest.raises(ValueError, match=r"'w0' must be made of torch.float32 and shape \(3,\)"):
        write_tensors(tmp_path / "c", wrong, FACTS)
    assert not (tmp_path / "c").exists()


def test_a_merged_model_in_shards(tmp_path):
    structure = {name: TensorInfo("linear", 0, "stem") for name in TENSORS}
    heads = {"a": {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}}
    merged = Merged(TENSORS, structure, heads=heads, facts={"method": "average"})
    save_merged(tmp_path / "m.safetensors", merged, max_shard_bytes=900)
    assert file_kind(tmp_path / "m.safetensors") == "merged"
    for path in (tmp_path / "m.safetensors", tmp_path / "m.safetensors.index.json"):
        loaded = load_merged(path)
        assert loaded.facts == merged.facts
        assert all(torch.equal(loaded.shared[name], tensor) for name, tensor in TENSORS.items())
        assert torch.equal(loaded.heads["a"]["weight"], heads["a"]["weight"])
