"""One rank's state of one step as bytes in a mapped file: a piece.

::

    |  head, one page  |  words  |  tensor 0  |  tensor 1  | ...
       written last       what is no tensor, as the files of a checkpoint have it (``contents.py``)

A process may be killed at any instant. The head is erased before the first byte changes and written after the last, so
what has a head was whole when it was written; the digest in it says whether it still is. A file is as large as it will
be before it is mapped, with every page of it taken: a page that the system lacks would end the process.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zeropipe.checkpoint.save.contents import Outgoing
from zeropipe.checkpoint.save.records import Manifest
from zeropipe.errors import CheckpointError
from zeropipe.frozen import from_json, to_json
from zeropipe.layout.flat import in_lines

_PAGE = 4096
_MAGIC = b"zeropipe piece 1"
_LINE = 64  # bytes; where a tensor begins
_COLUMNS = 1024  # words of a row of the digest
_WINDOW = 128 * 8 * _COLUMNS  # bytes that are copied and summed twice while they are in the cache


@dataclass(frozen=True, slots=True)
class Seal:
    """The head: of which moment of which run the piece is, and what it must be."""

    attempt: int  # how often the run was started before, as far as anybody knows
    token: str  # of all pieces of one engine's life, and of no others
    copy: int  # pieces of one number belong together
    step: int  # optimizer steps that are done
    rank: int  # in the group that saves together, of ``world``
    world: int
    agent: str  # who started the processes (``shelf.py``)
    nbytes: int  # behind the head
    digest: str


class Digest:
    """Sums that any one changed word changes, and any two words that changed places.

    The bytes are a table of 64-bit words, 1024 to a row. A changed word changes the sum of its row and that of its
    column; two that changed places change those of their columns, or, in one column, of their rows.
    """

    # Several times as fast as CRC-32, and about as fast as a copy.
    def __init__(self) -> None:
        self._columns = np.zeros(_COLUMNS, dtype=np.uint64)
        self._sums = hashlib.sha256()

    def add(self, memory: torch.Tensor) -> None:
        """The next bytes (uint8, 1D, on the host): whole rows, but for the last ones."""
        data = memory.numpy()
        rows = data[: data.size - data.size % (8 * _COLUMNS)].view(np.uint64).reshape(-1, _COLUMNS)
        self._columns += np.add.reduce(rows, axis=0)
        self._sums.update(np.add.reduce(rows, axis=1).data)
        self._sums.update(data[rows.nbytes :].data)  # what is left of a row

    def text(self) -> str:
        self._sums.update(self._columns.data)
        return self._sums.hexdigest()

    @classmethod
    def of(cls, memory: torch.Tensor) -> str:
        digest = cls()
        for part in memory.split(_WINDOW):
            digest.add(part)
        return digest.text()


# Packed: what a rank would write to files, as words and a list of tensors.


@dataclass(frozen=True, slots=True)
class Packed:
    """``tensors`` are the state's own, in the order in which the words name them."""

    words: bytes
    tensors: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        return _places(len(self.words), self.tensors)[-1]

    def begin(self, memory: torch.Tensor, wanted: Callable[[torch.Tensor], bool]) -> None:
        """The words, and those tensors that are ``wanted``, to where they belong behind the head."""
        memory[:8].copy_(torch.frombuffer(bytearray(len(self.words).to_bytes(8)), dtype=torch.uint8))
        memory[8 : 8 + len(self.words)].copy_(torch.frombuffer(bytearray(self.words), dtype=torch.uint8))
        for tensor, at in self._placed():
            if wanted(tensor):
                _seen(memory, at, tensor.dtype, tensor.shape).copy_(tensor)

    def finish(self, memory: torch.Tensor, wanted: Callable[[torch.Tensor], bool]) -> str:
        """Those tensors too that are ``wanted``; the digest of it all."""
        flat: list[tuple[int, torch.Tensor]] = []
        for tensor, at in self._placed():
            if wanted(tensor) and tensor.is_contiguous() and tensor.device.type == "cpu":
                flat.append((at, tensor.view(-1).view(torch.uint8)))
            elif wanted(tensor):
                _seen(memory, at, tensor.dtype, tensor.shape).copy_(tensor)
        digest, first = Digest(), 0
        # Window by window, so that what is summed is in the cache.
        for start in range(0, len(memory), _WINDOW):
            stop = min(start + _WINDOW, len(memory))
            for at, source in flat[first:]:
                if at >= stop:
                    break
                low, high = max(at, start), min(at + len(source), stop)
                memory[low:high].copy_(source[low - at : high - at])
                first += at + len(source) <= stop
            digest.add(memory[start:stop])
        return digest.text()

    def _placed(self) -> Iterator[tuple[torch.Tensor, int]]:
        """Tensors that have elements, in the order in which they lie, and where."""
        places = _places(len(self.words), self.tensors)
        return ((tensor, at) for tensor, at in zip(self.tensors, places, strict=False) if tensor.numel())


def pack(outgoing: Outgoing) -> Packed:
    """Words without the tensors in them; nothing is copied but small values."""
    file, tensors = io.BytesIO(), list[torch.Tensor]()
    _Pickler(file, tensors).dump(outgoing.trees)
    table = [(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in tensors]
    words = pickle.dumps((table, json.dumps(to_json(outgoing.part)), file.getvalue()), protocol=5)
    return Packed(words, tuple(tensors))


def unpack(memory: torch.Tensor) -> tuple[Manifest, dict[str, Any]]:
    """What was packed; tensors are views of ``memory``. It runs code, so only of a piece that is this run's own."""
    length = int.from_bytes(memory[:8].numpy().tobytes())
    table, part, trees = pickle.loads(memory[8 : 8 + length].numpy().tobytes())
    dtypes = [(getattr(torch, name), torch.Size(shape)) for name, shape in table]
    places = _ends(length, [shape.numel() * dtype.itemsize for dtype, shape in dtypes])
    tensors = [_seen(memory, at, *what) for at, what in zip(places, dtypes, strict=False)]
    manifest: Manifest = from_json(Manifest, json.loads(part))
    return manifest, _Unpickler(io.BytesIO(trees), tensors).load()


def _places(words: int, tensors: Sequence[torch.Tensor]) -> list[int]:
    return _ends(words, [t.nbytes for t in tensors])


def _ends(words: int, sizes: Sequence[int]) -> list[int]:
    """Where each tensor begins behind the head, and where the last one ends."""
    places = [in_lines(8 + words, _LINE)]
    for size in sizes:
        places.append(places[-1] + in_lines(size, _LINE))
    return places


def _seen(memory: torch.Tensor, at: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return memory[at : at + shape.numel() * dtype.itemsize].view(dtype).view(shape)


class _Pickler(pickle.Pickler):
    """Plain tensors go to a list; rarer ones (sparse, subclasses) are pickled as they are."""

    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file, protocol=5)
        self._tensors = tensors
        self._known: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if type(value) is not torch.Tensor or value.layout != torch.strided or value.is_quantized:
            return None
        if id(value) not in self._known:
            self._known[id(value)] = len(self._tensors)
            self._tensors.append(value.detach())
        return self._known[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> torch.Tensor:
        return self._tensors[number]


# In files.


class Slot:
    """A file that holds one piece after the other, mapped for as long as it is large enough."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._memory: torch.Tensor | None = None  # head and all

    def begin(self, nbytes: int) -> torch.Tensor:
        """Room for ``nbytes`` behind the head (uint8); the piece that was there is gone. Raises OSError."""
        if self._memory is None or len(self._memory) < _PAGE + nbytes:
            self.remove()
            self._memory = _made(self.path, _PAGE + nbytes)
        self._memory[:_PAGE].zero_()
        return self._memory[_PAGE : _PAGE + nbytes]

    def end(self, seal: Seal) -> None:
        """The piece is there."""
        assert self._memory is not None
        text = json.dumps(to_json(seal)).encode()
        head = _MAGIC + len(text).to_bytes(4) + zlib.crc32(text).to_bytes(4) + text
        self._memory[: len(head)].copy_(torch.frombuffer(bytearray(head), dtype=torch.uint8))

    def remove(self) -> None:
        """May be called again."""
        self._memory = None
        with suppress(OSError):
            self.path.unlink()


def _made(path: Path, nbytes: int) -> torch.Tensor:
    """A new file of that size, nobody else's, and the memory that it is."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        os.posix_fallocate(handle, 0, nbytes)
        return torch.frombuffer(mmap.mmap(handle, nbytes), dtype=torch.uint8)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(handle)


def seal_of(path: Path) -> Seal | None:
    """The head of the piece in ``path``; None where there is no whole one."""
    with suppress(OSError, ValueError, KeyError, TypeError), open(path, "rb") as file:
        head = file.read(_PAGE)
        start = len(_MAGIC) + 8
        length, check = (int.from_bytes(head[at : at + 4]) for at in (start - 8, start - 4))
        text = head[start : start + length]
        if head.startswith(_MAGIC) and zlib.crc32(text) == check:
            seal: Seal = from_json(Seal, json.loads(text))
            return seal
    return None


def opened(path: Path, nbytes: int) -> torch.Tensor:
    """The bytes behind the head, mapped. Raises CheckpointError where there are fewer."""
    try:
        if path.stat().st_size < _PAGE + nbytes:
            raise CheckpointError(f"{path} is truncated")
        # Of this process alone: what a reader writes to it, and nobody should, stays here.
        return torch.from_file(str(path), shared=False, size=_PAGE + nbytes, dtype=torch.uint8)[_PAGE:]
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is gone or cannot be read: {error}") from error


def fault_of(path: Path, seal: Seal) -> str:
    """What is wrong with the piece in ``path``, whose head was ``seal``; "" where it is as it was written."""
    if seal_of(path) != seal:
        return "its head has changed"
    try:
        return "" if Digest.of(opened(path, seal.nbytes)) == seal.digest else "its checksum does not match"
    except CheckpointError as error:
        return str(error)
