"""This file is models in several files: shards, and the index that says where each tensor lies."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_lit.core.files import atomic_paths
from mergekit_lit.core.params import Params
from mergekit_lit.core.specs import Computed, LazyParams, Spec, spec_of
from mergekit_lit.core.tensorfiles import (
    HEADER_KEY,
    Checksums,
    TensorFile,
    TensorView,
    damaged,
    header_of,
    read_header,
    write_at,
    write_tensors,
)

INDEX = "model.safetensors.index.json"
"""Name of the index in a folder that Hugging Face wrote."""

_INDEX_SUFFIX = ".index.json"


class Shards(LazyParams):
    """The tensors of several safetensors files, each file opened when it is first asked for.

    Attributes:
        path: the index, or the folder that it lies in.
        facts: JSON facts of the index; empty for files that others wrote.
    """

    def __init__(self, path: Path) -> None:
        """Read the index alone.

        Raises:
            FileNotFoundError: no index, or one of its shards is missing.
            ValueError: the index is damaged, or names a file outside its folder.
        """
        self.path = Path(path)
        index = self.path / INDEX if self.path.is_dir() else self.path
        self._folder = index.parent
        self._place, metadata = _read_index(index)
        super().__init__(dict.fromkeys(sorted(self._place)))
        self.facts: dict[str, Any] = {}
        self._checksums: Checksums = {}
        if HEADER_KEY in metadata:
            self.facts, self._checksums = read_header(index, metadata[HEADER_KEY])
        self._open: dict[str, TensorFile] = {}
        for shard in sorted(set(self._place.values())):
            if not (self._folder / shard).is_file():
                raise FileNotFoundError(f"No file {shard!r}, which {str(index)!r} names.")

    def __getitem__(self, name: str) -> Tensor:
        """Map one tensor into memory.

        Raises:
            KeyError: there is no such tensor.
            ValueError: it is damaged, or of another model than the index.
        """
        file = self._file(name)
        if self._checksums and file.checksums.get(name) != self._checksums.get(name):
            raise damaged(file.path, f"tensor {name!r} is not the one that the index names")
        return file[name]

    def spec(self, name: str) -> Spec:
        """Return a tensor's number type and shape without reading its data."""
        return self._file(name).spec(name)

    def under(self, prefix: str) -> TensorView:
        """Return the tensors whose names start with `prefix`, by their short names, still lazy."""
        return TensorView(self, prefix)

    def _file(self, name: str) -> TensorFile:
        shard = self._place[name]
        if shard not in self._open:
            self._open[shard] = TensorFile(self._folder / shard)
        return self._open[shard]


def open_file(path: Path) -> TensorFile | Shards:
    """Open one safetensors file, or the shards that stand for it, by its name or their index.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or a pickle.
    """
    path = Path(path)
    index = index_of(path)
    if path.name.endswith(_INDEX_SUFFIX) or (index.is_file() and not path.exists()):
        return Shards(index)
    return TensorFile(path)


def index_of(path: Path) -> Path:
    """Return the index of the shards of `NAME.safetensors`; of an index itself."""
    if path.name.endswith(_INDEX_SUFFIX):
        return path
    return path.with_name(path.name + _INDEX_SUFFIX)


def model_files(path: Path) -> list[Path]:
    """Return the files of a model: the one of that name, or its shards and then their index."""
    index = index_of(path)
    if path != index and path.is_file():
        return [path]
    shards = {index.with_name(shard) for shard in _read_index(index)[0].values()}
    return [*sorted(shards), index]


def check_shard_size(max_shard_bytes: int) -> None:
    """Refuse shards of no size.

    Raises:
        ValueError: `max_shard_bytes` is not above 0.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"`max_shard_bytes` must be above 0, but is {max_shard_bytes!r}.")


def write_shards(
    path: Path, tensors: Params, facts: Mapping[str, Any], *, max_shard_bytes: int
) -> list[Path]:
    """Write tensors into files of at most so many bytes of tensors, named as Hugging Face does.

    `NAME-00001-of-00003.safetensors` ... and last `NAME.safetensors.index.json`, which names them
    and holds the facts. Until it stands there is no model: a crash leaves no half that can be read.
    Shards of an earlier model of this name are removed.

    Args:
        path: `NAME.safetensors`; written as one file if all tensors fit into one shard.
        tensors: by name; asked for one at a time, in order.
        facts: JSON facts.
        max_shard_bytes: above 0; a larger tensor has a shard of its own.

    Returns:
        The files written; the last is what to open.

    Raises:
        OSError: a file cannot be written (full disk, read-only folder).
        ValueError: `max_shard_bytes` is not above 0.
    """
    path = Path(path)
    check_shard_size(max_shard_bytes)
    specs = {name: spec_of(tensors, name) for name in sorted(tensors)}
    shards = _filled(specs, max_shard_bytes)
    if len(shards) < 2:
        write_tensors(path, tensors, facts)
        return [path]
    files = [
        path.with_name(f"{path.stem}-{i:05}-of-{len(shards):05}{path.suffix}")
        for i in range(1, len(shards) + 1)
    ]
    index = index_of(path)
    earlier = [other for other in _shards_of(path) if other not in files]
    with atomic_paths([*files, index], gone_first=[index, path], gone_last=earlier) as temporaries:
        checksums: Checksums = {}
        for names, temporary in zip(shards, temporaries[:-1], strict=True):
            part = Computed({name: specs[name] for name in names}, tensors.__getitem__)
            checksums |= write_at(temporary, part, {})
        place = {
            name: file.name for names, file in zip(shards, files, strict=True) for name in names
        }
        metadata = {
            "total_size": sum(spec.bytes for spec in specs.values()),
            HEADER_KEY: header_of(facts, checksums),
        }
        text = json.dumps({"metadata": metadata, "weight_map": place}, indent=2, sort_keys=True)
        temporaries[-1].write_text(text + "\n", encoding="utf-8")
    return [*files, index]


def _filled(specs: Mapping[str, Spec], most: int) -> list[list[str]]:
    """Return names in their order, cut where a shard would be too large."""
    shards: list[list[str]] = []
    size = 0
    for name, spec in specs.items():
        if not shards or size + spec.bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.bytes
    return shards


def _shards_of(path: Path) -> list[Path]:
    """Return the shards of a model of this name that are there."""
    shard = re.compile(rf"{re.escape(path.stem)}-\d{{5}}-of-\d{{5}}{re.escape(path.suffix)}")
    # Of a folder that is not there yet, this finds nothing.
    return [other for other in path.parent.glob("*") if shard.fullmatch(other.name)]


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the file name of each tensor, and the metadata."""
    if not path.is_file():
        raise FileNotFoundError(f"No file {str(path)!r}.")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        place = dict(index["weight_map"])
        metadata = dict(index.get("metadata") or {})
        plain = all(Path(shard).name == shard for shard in place.values())
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} must be an index of shards with a 'weight_map', but is not: {error!r}."
        ) from None
    if not plain or not place:
        raise ValueError(
            f"{str(path)!r} must map tensors to files beside it, but names other places or none."
        )
    return place, metadata
