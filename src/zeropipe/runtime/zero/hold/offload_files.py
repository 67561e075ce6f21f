"""Tensors that live in files: mapped into memory, read when they are used, and let go when they are not.

The file is removed from its folder as soon as it is open, so that whatever ends the process frees the disk. All of
its blocks are taken at once, so that a full disk is an error here and not a signal later. A page that was let go
stays in the file; the system may keep it in memory as long as it has nothing better to do with it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from zeropipe.errors import OffloadError

PREFIX = "zeropipe-offload-"  # of the files' names


@dataclass(frozen=True, slots=True)
class _Mapping:
    memory: mmap.mmap
    fd: int
    start: int  # address of the first byte


class Files:
    """Makes tensors in files of one folder. Raises OffloadError where that cannot be."""

    def __init__(self, folder: str) -> None:
        check_folder(folder, 0)
        self.folder = folder
        self._mappings: dict[int, _Mapping] = {}  # by the address of their first byte
        self._reader: ThreadPoolExecutor | None = None  # one thread that asks the system to read ahead
        self._closed = False

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A new 1-D tensor of zeros; its file goes when the last view of it goes."""
        if numel == 0:
            return torch.zeros(0, dtype=dtype)
        nbytes = numel * dtype.itemsize
        fd = -1
        try:
            fd, path = tempfile.mkstemp(prefix=PREFIX, dir=self.folder)
            os.unlink(path)
            os.posix_fallocate(fd, 0, nbytes)
            memory = mmap.mmap(fd, nbytes)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise OffloadError(
                f"no file of {nbytes:,} bytes for offloaded state can be made in {self.folder!r}: {error.strerror}",
                found=f"{_free(self.folder):,} bytes free",
                fix="free space there, or set nvme_path to a folder on a larger disk",
            ) from error
        tensor = torch.frombuffer(memory, dtype=dtype)
        start = tensor.data_ptr()
        self._mappings[start] = _Mapping(memory, fd, start)
        weakref.finalize(tensor.untyped_storage(), _forget_mapping, self._mappings, start, fd)
        return tensor

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._mappings

    def let_go(self, tensor: torch.Tensor) -> None:
        """Take the pages of ``tensor`` (a view of one from here) out of this process's memory, if they are there."""
        found = self._range(tensor)
        if found is not None:
            mapping, start, length = found
            mapping.memory.madvise(mmap.MADV_DONTNEED, start, length)

    def read_ahead(self, tensor: torch.Tensor) -> None:
        """Let the system begin to read ``tensor`` from its disk; returns at once."""
        found = self._range(tensor)
        if found is not None and not self._closed:
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, "zeropipe-read-ahead")
            mapping, start, length = found
            # The thread holds the tensor, so that the file stays open.
            self._reader.submit(_advise, tensor, mapping.fd, start, length)

    def close(self) -> None:
        """End the thread. Tensors that somebody still holds stay valid."""
        self._closed = True
        if self._reader is not None:
            self._reader.shutdown(wait=True)
            self._reader = None

    def _range(self, tensor: torch.Tensor) -> tuple[_Mapping, int, int] | None:
        """(mapping, first byte, bytes) of the pages that ``tensor`` lies in; None if it is not from here."""
        mapping = self._mappings.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if mapping is None:
            return None
        first = tensor.data_ptr() - mapping.start
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        return mapping, start, first + tensor.numel() * tensor.element_size() - start


class Arena:
    """Puts many small tensors into few files, one after the other."""

    def __init__(self, folder: str, chunk_bytes: int = 2**26) -> None:
        self.files = Files(folder)
        self._chunk_bytes = chunk_bytes
        self._rest: dict[torch.dtype, torch.Tensor] = {}  # what is left of the last chunk

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of ``tensor`` (1-D, on any device) in a file."""
        dtype, numel = tensor.dtype, tensor.numel()
        rest = self._rest.get(dtype)
        if rest is None or rest.numel() < numel:
            rest = self.files.zeros(max(self._chunk_bytes // dtype.itemsize, numel), dtype)
        kept, self._rest[dtype] = rest[:numel].copy_(tensor), rest[numel:]
        self.files.let_go(kept)
        return kept


def check_folder(folder: str, nbytes: int) -> None:
    """Raise OffloadError unless ``folder`` is there, takes files, and has ``nbytes`` free."""
    problem = None
    if not os.path.isdir(folder):
        problem, fix = "is not a folder", "make it, or set nvme_path to another one"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem, fix = "does not let this process write", "change its permissions"
    elif _free(folder) < nbytes:
        problem = f"has {_free(folder):,} bytes free, and this rank and those beside it need {nbytes:,}"
        fix = "free space there, or use another disk"
    if problem is not None:
        raise OffloadError(f"the folder {folder!r} for offloaded state {problem}. Fix: {fix}")


def _free(folder: str) -> int:
    figures = os.statvfs(folder)
    return figures.f_bavail * figures.f_frsize


def _advise(_: torch.Tensor, fd: int, start: int, length: int) -> None:
    os.posix_fadvise(fd, start, length, os.POSIX_FADV_WILLNEED)


def _forget_mapping(mappings: dict[int, _Mapping], start: int, fd: int) -> None:
    mappings.pop(start, None)
    os.close(fd)
