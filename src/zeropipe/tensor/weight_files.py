"""Weights in files, as a table: which bytes of which file are which tensor. Only what is asked for is read.

    .safetensors   | size | header (JSON) | bytes of a | bytes of b | ...
    .bin, .pt      | zip: pickle, bytes of each storage, ...              torch's own loader says where, without reading

    *.index.json   which of several files holds which tensor

Bytes are read with ``pread`` into the memory where they stay: a mapped file would count as this process's memory.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch

from zeropipe.errors import CheckpointError, UsageError
from zeropipe.layout.mosaic import Mosaic

Weights = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

# What safetensors calls the dtypes that torch has.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType({
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
})  # fmt: skip
_SIZE = 8  # bytes of the header's length
_LARGEST_HEADER = 100 * 2**20  # safetensors' own limit: a length beyond it is that of another kind of file
_AT_ONCE = 8 * 2**20  # bytes in the buffer between file and memory where the dtype is another
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FILES = ("model.safetensors", "pytorch_model.bin")
_REPAIR = "copy or download the file again, and compare its size with the original's"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file."""

    path: str
    key: str
    dtype: torch.dtype  # in the file
    shape: tuple[int, ...]
    offset: int  # bytes from the file's start
    strides: tuple[int, ...] | None = None  # None: contiguous
    casts: tuple[torch.dtype, ...] = ()  # what it is read as, one after the other

    @property
    def mosaic(self) -> Mosaic:
        return Mosaic.of(self, self.shape, self.strides)

    @property
    def read_as(self) -> torch.dtype:
        return (self.dtype, *self.casts)[-1]

    def cast(self, dtype: torch.dtype) -> Stored:
        return self if dtype == self.read_as else replace(self, casts=(*self.casts, dtype))


# ---- which files, and what is in them ----


def open_weights(weights: Weights) -> dict[str, Stored]:
    """Every tensor by its key; no tensor is read.

    ``weights``: a folder as ``save_pretrained`` leaves it, a file, an index file, or files.
    Raises UsageError for what is no such place, CheckpointError for a file that is missing, cut or of another kind, and
    for a key that two files have.
    """
    found: dict[str, Stored] = {}
    for path in _files(weights):
        for key, stored in _opened(path).items():
            if key in found:
                raise CheckpointError(
                    f"weights: key '{key}' is in two files",
                    found=f"{found[key].path} and {path}",
                    fix="name the files of one model",
                )
            found[key] = stored
    return found


def _files(weights: Weights) -> list[Path]:
    if not isinstance(weights, str | os.PathLike):
        return list(dict.fromkeys(path for one in weights for path in _files(one)))
    path = Path(weights)
    if path.is_dir():
        named = [path / name for name in (_INDEXES[0], _FILES[0], _INDEXES[1], _FILES[1])]
        chosen = next((one for one in named if one.exists()), None)
        found = sorted(path.glob("*.safetensors")) if chosen is None else _files(chosen)
        if not found:
            raise UsageError(
                f"weights: no weights in the folder {path}",
                expected=f"{_FILES[0]}, {_INDEXES[0]}, other *.safetensors, or {_FILES[1]}",
                found=", ".join(sorted(os.listdir(path))[:8]) or "nothing",
                fix="name the folder that save_pretrained wrote, or the files",
            )
        return found
    if path.name.endswith(".index.json"):
        return _indexed(path)
    if not path.exists():
        raise UsageError(f"weights: {path}", expected="a file or a folder", found="nothing there")
    return [path]


def _indexed(path: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"weights: {path} is no index ({type(error).__name__}: {error})",
            expected="JSON with a 'weight_map' of keys and files",
            fix=_REPAIR,
        ) from error
    for name in names:
        if not (path.parent / name).exists():
            raise CheckpointError(
                f"weights: {path} names a file that is not there",
                expected=f"{len(names)} files",
                found=f"no {name}",
                fix="copy or download it into the folder",
            )
    return [path.parent / name for name in names]


def _opened(path: Path) -> dict[str, Stored]:
    try:
        return _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    except OSError as error:
        raise CheckpointError(f"weights: {path} cannot be read: {error.strerror}", fix=_REPAIR) from error


def _safetensors(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_SIZE), "little")
        if size < _SIZE or length > min(_LARGEST_HEADER, size - _SIZE):
            raise CheckpointError(
                f"weights: {path} is cut, or no safetensors file",
                expected=f"a header of {length} bytes",
                found=f"{size} bytes in all",
                fix=_REPAIR,
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {key: _entry(path, key, said, _SIZE + length) for key, said in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"weights: the header of {path} cannot be read ({type(error).__name__}: {error})", fix=_REPAIR
        ) from error
    for key, stored in entries.items():
        end = stored.offset + Mosaic.of(None, stored.shape).numel * stored.dtype.itemsize
        if end > size:
            raise CheckpointError(
                f"weights: {path} is cut before the end of '{key}'",
                expected=f"{end} bytes",
                found=size,
                fix=_REPAIR,
            )
    return entries


def _entry(path: Path, key: str, said: Any, data: int) -> Stored:
    dtype = DTYPES.get(said["dtype"])
    if dtype is None:
        raise CheckpointError(
            f"weights: key '{key}' of {path}",
            expected=f"a dtype that torch has: {', '.join(DTYPES)}",
            found=said["dtype"],
            fix="save it in another dtype",
        )
    start, stop = said["data_offsets"]
    shape = tuple(map(int, said["shape"]))
    if stop - start != torch.Size(shape).numel() * dtype.itemsize:
        raise CheckpointError(
            f"weights: key '{key}' of {path}",
            expected=f"{torch.Size(shape).numel() * dtype.itemsize} bytes for {said['dtype']} {list(shape)}",
            found=stop - start,
            fix=_REPAIR,
        )
    return Stored(str(path), key, dtype, shape, data + start)


def _torch_file(path: Path) -> dict[str, Stored]:
    # On meta torch unpickles the tensors, notes where their storages lie, and leaves the bytes alone.
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"weights: {path} cannot be read by torch.load(weights_only=True) ({type(error).__name__}: {error})",
            fix="save the model's state dict, best as safetensors (save_pretrained does)",
        ) from error
    entries = {}
    for key, tensor in state.items() if isinstance(state, Mapping) else ():
        if not isinstance(tensor, torch.Tensor):
            continue
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if start is None:
            raise CheckpointError(
                f"weights: {path} is of the format that torch had before 1.6, which can only be read whole",
                fix="save it once more, best as safetensors (save_pretrained does)",
            )
        offset = start + tensor.storage_offset() * tensor.itemsize
        strides = None if tensor.is_contiguous() else tensor.stride()
        entries[key] = Stored(str(path), key, tensor.dtype, tuple(tensor.shape), offset, strides)
    if not entries:
        raise CheckpointError(
            f"weights: {path}", expected="a state dict: tensors by name", found=type(state).__name__
        )
    return entries


# ---- reading ----


@dataclass
class Reader:
    """Opens each file once, until it is closed."""

    nbytes: int = 0  # read so far
    _open: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def fill(self, mosaic: Mosaic, start: int, out: torch.Tensor) -> None:
        """Elements [start, start + out.numel()) of ``mosaic``, whose sources are ``Stored``, into ``out`` (1D,
        contiguous, of any dtype and device).

        Raises CheckpointError where the file is shorter than it was.
        """
        for run in mosaic.runs(start, start + out.numel()):
            stored = run.source
            assert isinstance(stored, Stored)
            place = out[run.at - start : run.at - start + run.numel]
            if out.device.type == "cpu" and {stored.dtype, *stored.casts} == {out.dtype}:
                self._read(stored, run.start, place)
            else:
                self._read_through(stored, run.start, place)

    def _read_through(self, stored: Stored, start: int, place: torch.Tensor) -> None:
        """Piece by piece through a buffer: another dtype takes no more memory than that."""
        most = max(1, _AT_ONCE // stored.dtype.itemsize)
        buffer = torch.empty(min(most, place.numel()), dtype=stored.dtype)
        for at, part in zip(count(start, most), place.split(most), strict=False):
            value = buffer[: part.numel()]
            self._read(stored, at, value)
            for dtype in stored.casts:
                value = value.to(dtype)
            part.copy_(value)

    def _read(self, stored: Stored, start: int, place: torch.Tensor) -> None:
        if stored.path not in self._open:
            self._open[stored.path] = os.open(stored.path, os.O_RDONLY)
        memory = memoryview((ctypes.c_char * place.nbytes).from_address(place.data_ptr())).cast("B")
        offset, done = stored.offset + start * place.itemsize, 0
        while done < place.nbytes:
            got = os.preadv(self._open[stored.path], [memory[done:]], offset + done)
            if not got:
                raise CheckpointError(
                    f"weights: {stored.path} has become shorter while it was read, at '{stored.key}'",
                    expected=f"{offset + place.nbytes} bytes",
                    found=offset + done,
                    fix=_REPAIR,
                )
            done += got
        self.nbytes += done
