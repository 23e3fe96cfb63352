"""Pickles are told from safetensors files whose length happens to begin like a pickle."""

import json
import struct

import pytest
import torch
from safetensors.torch import save

from mergekit_lit.core.tensorfiles import TensorFile


@pytest.mark.parametrize("low_byte", [0x80, 0x50])
def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path, low_byte):
    data = save({"x": torch.ones(3)})
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length]
    wanted = 0x4B50 if low_byte == 0x50 else 0x180
    padded = header + b" " * (wanted - length)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", wanted) + padded + data[8 + length :])
    assert json.loads(padded)["x"]["shape"] == [3]
    assert torch.equal(TensorFile(path)["x"], torch.ones(3))


def test_a_pickle_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="but is a pickle"):
        TensorFile(path)
