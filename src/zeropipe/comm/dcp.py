"""The files of ``torch.distributed.checkpoint`` (DCP): their index and their chunks, without its collectives.

    FOLDER/.metadata      pickled ``Metadata``: for each key its shape, dtype and chunks, and where each chunk lies
    FOLDER/*.distcp       chunks end to end, each what ``torch.save`` writes

It stands here because only ``comm`` imports ``torch.distributed``. torch reads ``.metadata`` with plain ``pickle``,
which runs whatever code is in it; here only the classes that DCP itself writes are let through. One chunk is in
memory at a time, both ways. (torch's own writer keeps all tensors of a file until the file is done.)
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zeropipe.errors import CheckpointError
from zeropipe.given import Tree
from zeropipe.paths import inside

INDEX_NAME = ".metadata"
_PACKAGE = "torch.distributed.checkpoint."
# What torch's own writer puts into an index. To let any other name through would be to run what the file says.
_ALLOWED = {
    _PACKAGE + "metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    _PACKAGE + "filesystem": {"_StorageInfo"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
}  # fmt: skip

Key = tuple[str | int, ...]  # where a value stands in the nested state dict


@dataclass(frozen=True, slots=True)
class Chunk:
    """One block of a tensor, or one pickled value, and the bytes of a file that hold it."""

    start: tuple[int, ...]  # first index of the block in each dim
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Stored:
    """One key. ``dtype`` is torch's name without the prefix, "" for a value that is no tensor."""

    key: Key
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Lazy:
    """A tensor that is made when its turn to be written comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        # torch names values of its own by their attribute: torch.float32, torch.strided.
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
            return found
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_index(folder: Path) -> dict[str, Stored]:
    """Every key of a DCP folder, by its flat name. Raises CheckpointError for what is missing, damaged or unsafe."""
    path = folder / INDEX_NAME
    try:
        with open(path, "rb") as file:
            index = _Unpickler(file).load()
        return {name: _stored(name, found, index) for name, found in index.state_dict_metadata.items()}
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}", fix="give the folder that dcp.save wrote"
        ) from error
    except CheckpointError:
        raise
    # A damaged pickle fails in many ways.
    except Exception as error:
        raise CheckpointError(
            f"{path} was not opened: {type(error).__name__}: {error}",
            expected="the index that torch.distributed.checkpoint writes, which names only its own classes",
            fix="save it again with torch's FileSystemWriter",
        ) from error


def _stored(name: str, found: Any, index: Any) -> Stored:
    key = tuple((index.planner_data or {}).get(name) or (name,))
    chunks = getattr(found, "chunks", None)
    if chunks is None:
        return Stored(key, (), "", (_chunk(name, None, (), index),))
    blocks = tuple(_chunk(name, tuple(c.offsets), tuple(c.sizes), index) for c in chunks)
    dtype = str(found.properties.dtype).removeprefix("torch.")
    return Stored(key, tuple(found.size), dtype, blocks)


def _chunk(name: str, start: tuple[int, ...] | None, shape: tuple[int, ...], index: Any) -> Chunk:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    # By name and offset; what was written as one block may have no offset.
    place = index.storage_data.get(MetadataIndex(name, start)) or index.storage_data.get(MetadataIndex(name))
    if place is None:
        raise CheckpointError(f"the index names no place for {name} at {start}")
    if getattr(place, "transform_descriptors", None):
        raise CheckpointError(
            f"{name} was written through an extension",
            expected="plain files",
            found=place.transform_descriptors,
            fix="save it again without extensions of the FileSystemWriter",
        )
    return Chunk(start or (), shape, str(place.relative_path), place.offset, place.length)


def read_chunk(folder: Path, chunk: Chunk, *, trust: bool = False) -> Any:
    """A chunk's tensor or value. ``trust``: unpickle any object, which runs code of whoever wrote it."""
    path = inside(folder, chunk.file, "a file of the index")
    try:
        with open(path, "rb") as file:
            # Apart from the rest of the file: torch.load looks for a directory at the end of what it is given.
            file.seek(chunk.offset)
            data = file.read(chunk.length)
        if len(data) != chunk.length:
            raise CheckpointError(
                f"{path} is truncated",
                expected=f"{chunk.offset + chunk.length} bytes",
                found=path.stat().st_size,
                fix="copy the folder again from where it is whole",
            )
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=not trust)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}", fix="copy all ranks' files into one folder"
        ) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds something other than tensors and plain values, which could run code",
            fix="if you trust whoever wrote it, say so with trust=True (`--trust` on the command line)",
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged at byte {chunk.offset}: {str(error).splitlines()[0]}"
        ) from error


def read_tensor(folder: Path, stored: Stored) -> torch.Tensor:
    """A tensor put together from its chunks; new memory."""
    # One chunk that is the whole is the tensor already: no second one of its size.
    if len(stored.chunks) == 1 and stored.chunks[0].shape == stored.shape:
        return torch.as_tensor(read_chunk(folder, stored.chunks[0]))
    whole = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    for chunk in stored.chunks:
        region = tuple(slice(a, a + n) for a, n in zip(chunk.start, chunk.shape, strict=True))
        whole[region] = read_chunk(folder, chunk).view(chunk.shape)
    return whole


def flatten(tree: Tree, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """The leaves of a nested state dict, cut where DCP's planner cuts: lists of plain values stay whole."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from flatten(value, (*key, name))
    # A list with a tensor in it is cut, so that the tensor can be sharded; numbers alone stay one value.
    elif isinstance(tree, list) and not all(map(_whole, tree)):
        for number, value in enumerate(tree):
            yield from flatten(value, (*key, number))
    else:
        yield key, tree


def _whole(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_whole, value))
    return not isinstance(value, (Mapping, torch.Tensor, Lazy))


def write(
    folder: Path, items: Iterable[tuple[Key, Any]], create: Callable[[Path], AbstractContextManager[Any]]
) -> None:
    """Write an index and one data file into ``folder``; the index last. Raises OSError as it comes.

    ``items``: what ``flatten`` gives; leaves are tensors, ``Lazy`` ones, or values that ``torch.save`` takes.
    ``create``: opens a new file for writing, which is on the disk when its block ends.
    """
    from torch.distributed.checkpoint import metadata as meta
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

    name = "__0_0.distcp"
    described: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    keys: dict[str, Key] = {}
    # The data before the index: what an index names is on the disk.
    with create(folder / name) as file:
        for key, value in items:
            flat = ".".join(map(str, key))
            keys[flat] = key
            start = file.tell()
            if isinstance(value, (torch.Tensor, Lazy)):
                size = torch.Size(value.shape)
                origin = torch.Size([0] * len(size))
                described[flat] = meta.TensorStorageMetadata(
                    meta.TensorProperties(dtype=value.dtype), size, [meta.ChunkStorageMetadata(origin, size)]
                )
                index = meta.MetadataIndex(flat, origin, 0)
                tensor = (value.read() if isinstance(value, Lazy) else value).detach().contiguous()
                # In a storage of exactly its size: torch.save writes whole storages.
                alone = tensor.untyped_storage().nbytes() == tensor.nbytes
                torch.save(tensor if alone else tensor.clone(), file)
            else:
                described[flat] = meta.BytesStorageMetadata()
                index = meta.MetadataIndex(flat)
                torch.save(value, file)
            places[index] = _StorageInfo(name, start, file.tell() - start)
    with create(folder / INDEX_NAME) as file:
        pickle.dump(
            meta.Metadata(described, keys, places, meta.StorageMeta(), version=CURRENT_DCP_VERSION), file
        )
