"""Damaged and hostile npz files: the arrays as they were, or one clear line; nothing else."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mergekit_lit.data.archives import npz_keys, npz_member
from mergekit_lit.data.npz_tasks import read_npz

DRAW = np.random.default_rng(0)


def members():
    return {
        "x": DRAW.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8),
        "y": (np.arange(12) % 3).astype(np.uint8),
        "split": np.repeat([0, 1], [8, 4]).astype(np.int8),
        "classes": np.array(["a", "b", "c"]),
    }


def shown(pool):
    """Return all that a pool holds, comparable."""
    parts = [
        array.tobytes() for images in (pool.train, pool.test) for array in vars(images).values()
    ]
    return parts, pool.classes


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_changes_nothing_or_is_told_in_one_line(tmp_path, save):
    """All bits of every byte were tried once, by hand, with the same outcome."""
    path = tmp_path / "own.npz"
    save(path, **members())
    whole, expected = path.read_bytes(), shown(read_npz(path))
    told = []
    # The first bytes, and the directory at the end, are where a reader goes astray.
    positions = {*range(0, len(whole), 23), *range(32), *range(len(whole) - 300, len(whole), 4)}
    for position in sorted(positions):
        content = bytearray(whole)
        content[position] ^= 1 << int(DRAW.integers(8))
        path.write_bytes(content)
        try:
            assert shown(read_npz(path)) == expected
        except ValueError as error:
            told.append(str(error))
    assert len(told) > len(positions) / 2
    assert all("own.npz' must" in line and "\n" not in line for line in told)
    assert not any("pickle" in line for line in told)


def test_streamed_blocks_are_the_array_and_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_lit.data.archives._BLOCK", 100)
    path = tmp_path / "own.npz"
    held = members()
    np.savez_compressed(path, **held, f=np.asfortranarray(held["x"]))
    for key in ("x", "f"):
        blocks = list(npz_member(path, key).blocks())
        assert len(blocks) == (6 if key == "x" else 1)
        np.testing.assert_array_equal(np.concatenate(blocks), held["x"])
        np.testing.assert_array_equal(npz_member(path, key).read(), held["x"])
    assert npz_keys(path) == ("x", "y", "split", "classes", "f")


class _Armed:
    """Unpickling this writes a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_objects_are_refused_without_being_unpickled(tmp_path):
    trace = tmp_path / "ran"
    path = tmp_path / "own.npz"
    armed = np.array([_Armed(trace)] * 12, dtype=object)
    for key in members():
        np.savez(path, **(members() | {key: armed}))
        with pytest.raises(ValueError, match=f"'{key}' holds objects, which only pickle reads"):
            read_npz(path)
    path.write_bytes(pickle.dumps(_Armed(trace)))
    with pytest.raises(ValueError, match="must be a whole npz file"):
        read_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        for key in members():
            archive.writestr(f"{key}.npy", pickle.dumps(_Armed(trace)))
    with pytest.raises(ValueError, match="magic string is not correct"):
        read_npz(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "{'descr': '|u1', 'fortran_order': False, 'shape': (9223372036854775807, 9, 9)}",
            "must take",
        ),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -3)}", "must take"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (1e3,)}", "shape is not valid"),
        ("{'descr': '|z9', 'fortran_order': False, 'shape': (6,)}", "descr is not a valid dtype"),
        ("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (6,)}", "holds objects"),
        ("{'descr': ", "damaged"),
        ("__import__('os').abort()", "malformed node"),
        ("(" * 9000, "damaged"),
    ],
)
def test_lying_headers_are_refused_before_memory_is_taken(tmp_path, header, message):
    file = io.BytesIO()
    text = header.encode() + b"\n"
    file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"123456")
    path = tmp_path / "own.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", file.getvalue())
    with pytest.raises(ValueError, match=message) as caught:
        npz_member(path, "x")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_array_are_named(tmp_path):
    path = tmp_path / "own.npz"
    with pytest.raises(FileNotFoundError, match=r"No file .*own\.npz"):
        npz_keys(path)
    np.savez(path, **members())
    with pytest.raises(ValueError, match=r"no item named 'z\.npy'"):
        npz_member(path, "z")
