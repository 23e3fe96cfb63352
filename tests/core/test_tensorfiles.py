"""Tensor files: exact round trips, reproducible bytes, and every kind of damage noticed."""

import contextlib
import errno
import os
import pickle
import resource
import zlib

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lit.core.specs import Spec
from mergekit_lit.core.tensorfiles import TensorFile, floats, write_tensors

TENSORS = {
    "b.scalar": torch.tensor(1.5),
    "b.count": torch.tensor(7),
    "a.half": torch.arange(5, dtype=torch.float16),
    "a.brain": torch.arange(3, dtype=torch.bfloat16),
    "a.empty": torch.zeros(0, 3),
    "a.double": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double(),
    "a.mask": torch.tensor([True, False, True]),
}
FACTS = {"kind": "test", "text": "ü", "list": [1, 2.5, None]}


def read_all(path):
    file = TensorFile(path)
    if "kind" not in file.facts:  # as every loader of ours does
        raise ValueError("not one of our files")
    return file.facts, {name: file[name] for name in file}


def test_round_trip(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, FACTS)
    facts, tensors = read_all(path)
    assert facts == FACTS
    assert list(tensors) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_lazy_view_and_shapes(tmp_path):
    write_tensors(tmp_path / "a", TENSORS, FACTS)
    file = TensorFile(tmp_path / "a")
    view = file.under("a.")
    assert sorted(view) == ["brain", "double", "empty", "half", "mask"]
    assert len(view) == 5
    assert torch.equal(view["double"], TENSORS["a.double"])
    assert file.spec("a.double") == Spec(torch.float64, (4, 3))
    assert "scalar" not in view
    with pytest.raises(KeyError, match="nothing"):
        view["nothing"]


def test_bytes_do_not_depend_on_the_order_of_tensors_or_facts(tmp_path):
    write_tensors(tmp_path / "a", TENSORS, FACTS)
    backwards = dict(reversed(TENSORS.items()))
    write_tensors(tmp_path / "b", backwards, dict(reversed(FACTS.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_views_and_transposes_are_stored_by_value(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "a", {"row": whole[1], "turned": whole.T, "same": whole}, {})
    file = TensorFile(tmp_path / "a")
    assert torch.equal(file["row"], whole[1])
    assert torch.equal(file["turned"], whole.T)


def test_one_tensor_under_two_names(tmp_path):
    tied = torch.arange(4.0)
    write_tensors(tmp_path / "a", {"one": tied, "two": tied}, {})
    file = TensorFile(tmp_path / "a")
    assert torch.equal(file["one"], file["two"])


def noticed_or_harmless(path, facts, tensors) -> bool:
    try:
        seen_facts, seen = read_all(path)
    except ValueError as error:
        return "\n" not in str(error)
    return seen_facts == facts and {n: t.tolist() for n, t in seen.items()} == tensors


def test_every_flipped_bit_is_noticed(tmp_path):
    """Flip one bit in each byte of a small file, header and data: none may change what is read."""
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"w": torch.arange(6.0), "n": torch.tensor(3)}, {"kind": "test"})
    facts, read = read_all(path)
    tensors = {name: tensor.tolist() for name, tensor in read.items()}
    whole = path.read_bytes()
    unnoticed = []
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        if not noticed_or_harmless(path, facts, tensors):
            unnoticed.append(place)
    assert unnoticed == []


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated(tmp_path, share):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, FACTS)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="is damaged or of another format"):
        read_all(path)


def test_bytes_appended(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, FACTS)
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    with pytest.raises(ValueError, match="is damaged or of another format"):
        read_all(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_from_torch_is_refused(tmp_path, zipped):
    path = tmp_path / "a.safetensors"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="is a pickle, which can run code"):
        TensorFile(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickle_never_runs(tmp_path, protocol):
    class Harm:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps(Harm(), protocol=protocol))
    with pytest.raises(ValueError, match="safetensors file, but"):
        TensorFile(path)
    assert not (tmp_path / "harm").exists()


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file"):
        TensorFile(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="No file"):
        TensorFile(tmp_path)


def test_foreign_files_are_read_without_checksums(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "a")
    assert file.facts == {}
    assert torch.equal(file["w"], torch.ones(2))


@contextlib.contextmanager
def small_files_only():
    """Let the operating system refuse files of more than 4 KiB, as a full disk would.

    The limit holds for pytest's own output too, so it may not outlive the statement under test.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"w": torch.zeros(4)}, FACTS)
    with (
        small_files_only(),
        pytest.raises(OSError, match=r"File too large\. Nothing was left half-written") as caught,
    ):
        write_tensors(path, {"w": torch.zeros(100_000)}, FACTS)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == [path]
    assert TensorFile(path).spec("w").shape == (4,)


def test_floats_widens_halves_alone():
    wide = floats(TENSORS)
    assert wide["a.half"].dtype == wide["a.brain"].dtype == torch.float32
    assert wide["a.double"].dtype == torch.float64
    assert wide["b.count"].dtype == torch.int64


def test_types_and_shapes_are_told_from_the_header(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, FACTS)
    file = TensorFile(path)
    part = file.under("a.")
    for name, tensor in TENSORS.items():
        spec = Spec(tensor.dtype, tuple(tensor.shape))
        assert file.spec(name) == spec
        assert spec.bytes == tensor.nbytes
        if name.startswith("a."):
            assert part.spec(name[2:]) == spec


def test_a_tensor_is_checked_when_it_is_first_read(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, FACTS)
    looked = []
    real = zlib.crc32
    file = TensorFile(path)
    monkeypatch.setattr(zlib, "crc32", lambda data: looked.append(1) or real(data))
    for _ in range(3):
        assert torch.equal(file["a.double"], TENSORS["a.double"])
    assert len(looked) == 1
