"""Many short rows of whole numbers in two files, mapped into memory: Megatron's format for token ids and for indices.

``PATH.bin`` has the rows end to end, ``PATH.idx`` says where each lies, all in little-endian::

    MMIDIDX\\0\\0 | version: u64 = 1 | dtype: u8 | rows: u64 | bounds: u64 | lengths: i32[rows]
    | offsets in bytes: i64[rows] | document bounds, in rows: i64[bounds]
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from zeropipe.errors import UsageError

_MAGIC: Final = b"MMIDIDX\x00\x00"
_HEAD: Final = struct.Struct("<QBQQ")
_DTYPES: Final = MappingProxyType(
    dict(enumerate(map(np.dtype, ("u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8")), start=1))
)

Row = NDArray[Any]


def data_file_path(prefix_path: str) -> str:
    return f"{prefix_path}.bin"


def index_file_path(prefix_path: str) -> str:
    return f"{prefix_path}.idx"


class MMapIndexedDataset(torch.utils.data.Dataset[Row]):
    """The rows of ``path``, read when they are asked for. ``path``: without ``.bin`` and ``.idx``.

    Raises UsageError where the files are missing, of another format, or cut off.
    """

    def __init__(self, path: str, skip_warmup: bool = True) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        index, data = Path(index_file_path(self._path)), Path(data_file_path(self._path))
        for file in (index, data):
            if not file.exists():
                raise UsageError(f"{file} is missing", expected="both files of an indexed dataset")
        raw = index.read_bytes()
        begin = len(_MAGIC) + _HEAD.size
        if raw[: len(_MAGIC)] != _MAGIC or len(raw) < begin:
            raise UsageError(
                f"{index} is no index of rows", expected=f"{_MAGIC!r} at its begin", found=raw[:9]
            )
        version, code, rows, bounds = _HEAD.unpack_from(raw, len(_MAGIC))
        size = begin + rows * 12 + bounds * 8
        if version != 1 or code not in _DTYPES or len(raw) < size:
            found = f"version {version}, dtype {code}, {len(raw)} of {size} bytes"
            raise UsageError(f"{index} cannot be read", expected="version 1, a whole file", found=found)
        self.sizes = np.frombuffer(raw, np.int32, rows, begin)
        self._offsets = np.frombuffer(raw, np.int64, rows, begin + rows * 4)
        self.doc_idx = np.frombuffer(raw, np.int64, bounds, begin + rows * 12)
        self.dtype = _DTYPES[code]
        end = int(self._offsets[-1]) + int(self.sizes[-1]) * self.dtype.itemsize if rows else 0
        if data.stat().st_size < end:
            raise UsageError(f"{data} was cut off", expected=f"{end} bytes", found=data.stat().st_size)
        self._data = np.memmap(data, np.uint8, "r") if end else np.empty(0, np.uint8)

    # Workers of a data loader open the files again rather than being sent what is in them.
    def __getstate__(self) -> str:
        return self._path

    def __setstate__(self, path: str) -> None:
        self._path = path
        self._open()

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, idx: int | slice) -> Any:
        """A row, 1D; of a slice a list of them."""
        if isinstance(idx, slice):
            return [self.get(at) for at in range(*idx.indices(len(self)))]
        return self.get(range(len(self))[idx])

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> Row:
        """``length`` elements (default: all that follow) of a row from its ``offset``-th on."""
        count = int(self.sizes[idx]) - offset if length is None else length
        at = int(self._offsets[idx]) + offset * self.dtype.itemsize
        return np.frombuffer(self._data, self.dtype, count, at)

    def size(self, index: int) -> int:
        return int(self.sizes[index])

    @staticmethod
    def exists(path: str) -> bool:
        return os.path.exists(index_file_path(path)) and os.path.exists(data_file_path(path))


class MMapIndexedDatasetBuilder:
    """Writes such files: ``add_item`` for each row, ``end_document`` where a document ends, ``finalize``.

    ``out_file``: the path that ends in ``.bin``. Raises UsageError for a dtype that the format has no code for.
    """

    def __init__(self, out_file: str, dtype: DTypeLike = np.int64) -> None:
        self._dtype = np.dtype(dtype)
        self._code = next((code for code, known in _DTYPES.items() if known == self._dtype), 0)
        if not self._code:
            raise UsageError(
                "dtype of an indexed dataset", expected="whole numbers of 1 to 8 bytes", found=self._dtype
            )
        self._file = open(out_file, "wb")  # noqa: SIM115 - open from the first row to finalize
        self._sizes: list[int] = []
        self._bounds = [0]

    def add_item(self, tensor: torch.Tensor) -> None:
        self.add_item_numpy(tensor.cpu().numpy())

    def add_item_numpy(self, np_array: Row) -> None:
        row = np.asarray(np_array).reshape(-1)
        self._file.write(row.astype(self._dtype, copy=False).tobytes())
        self._sizes.append(row.size)

    def add_items(self, arr_list: Sequence[Row]) -> None:
        for row in arr_list:
            self.add_item_numpy(row)

    def end_document(self) -> None:
        self._bounds.append(len(self._sizes))

    def merge_file_(self, another_file: str) -> None:
        """Append the rows of another dataset of this dtype; ``another_file``: without ``.bin`` and ``.idx``."""
        other, start = MMapIndexedDataset(another_file), len(self._sizes)
        if other.dtype != self._dtype:
            raise UsageError(f"merge of {another_file}", expected=self._dtype, found=other.dtype)
        self.add_items(other[:])
        self._bounds += [start + int(at) for at in other.doc_idx[1:]]

    def finalize(self, index_file: str) -> None:
        self._file.close()
        sizes, bounds = np.array(self._sizes, np.int32), np.array(self._bounds, np.int64)
        lengths = sizes.astype(np.int64) * self._dtype.itemsize
        head = _HEAD.pack(1, self._code, len(sizes), len(bounds))
        offsets = np.concatenate(([0], np.cumsum(lengths)[:-1])) if len(sizes) else lengths
        parts = (_MAGIC, head, sizes.tobytes(), offsets.astype(np.int64).tobytes(), bounds.tobytes())
        Path(index_file).write_bytes(b"".join(parts))


def write_rows(path: str, rows: Sequence[Row]) -> None:
    """Write ``rows`` as ``path.bin`` and ``path.idx``, in the smallest dtype that holds them."""
    low = min((int(row.min()) for row in rows if row.size), default=0)
    high = max((int(row.max()) for row in rows if row.size), default=0)
    dtype = np.promote_types(np.min_scalar_type(high), np.min_scalar_type(low))
    builder = MMapIndexedDatasetBuilder(data_file_path(path), dtype)
    builder.add_items(rows)
    builder.end_document()
    builder.finalize(index_file_path(path))
