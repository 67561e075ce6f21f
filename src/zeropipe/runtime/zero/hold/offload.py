"""Decides where one engine's masters, moments, gradients and parameter shards live, and makes them there.

                   DEVICE            HOST (on a GPU run)                FILE
masters, moments   with parameters   pinned; steps on the CPU           mapped; stepped piece by piece
gradient shards    with parameters   pinned, copied while backward runs mapped
what gathers read  the masters       a pinned copy in the parameters' dtype, or the masters where they are fp32

A tensor in a file is mapped into memory, read when it is used, and let go when it is not.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from zeropipe.comm.group import node_size
from zeropipe.config.schema_zero import ZeroOptimization
from zeropipe.errors import ConfigError, OffloadError
from zeropipe.runtime.zero.hold.policy import Place, Policy
from zeropipe.streams import STREAMS

Move = Callable[[torch.Tensor], torch.Tensor]  # how a tensor changes its place

PREFIX = "zeropipe-offload-"  # of the files' names


class Files:
    """Makes tensors in files of one folder. Raises OffloadError where that cannot be."""

    def __init__(self, folder: str) -> None:
        check_folder(folder, 0)
        self.folder = folder
        self._mappings: dict[
            int, tuple[mmap.mmap, int]
        ] = {}  # (memory, fd), by the address of the first byte
        self._reader: ThreadPoolExecutor | None = None  # one thread that asks the system to read ahead
        self._closed = False

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A new 1-D tensor of zeros; its file goes when the last view of it goes."""
        if numel == 0:
            return torch.zeros(0, dtype=dtype)
        nbytes = numel * dtype.itemsize
        try:
            memory, fd = self.new(nbytes)
        except OSError as error:
            raise OffloadError(
                f"no file of {nbytes:,} bytes for offloaded state can be made in {self.folder!r}: {error.strerror}",
                found=f"{_free(self.folder):,} bytes free",
                fix="free space there, or set nvme_path to a folder on a larger disk",
            ) from error
        tensor = torch.frombuffer(memory, dtype=dtype)
        start = tensor.data_ptr()
        self._mappings[start] = memory, fd
        weakref.finalize(tensor.untyped_storage(), _forget_mapping, self._mappings, start, fd)
        return tensor

    def new(self, nbytes: int) -> tuple[mmap.mmap, int]:
        """A file of ``nbytes``: mapped, and open. Raises OSError where there is no room for it."""
        fd, path = tempfile.mkstemp(prefix=PREFIX, dir=self.folder)
        try:
            # Removed as soon as it is open, so that whatever ends the process frees the disk. All blocks are taken at
            # once, so that a full disk is an error here and not a signal later.
            os.unlink(path)
            os.posix_fallocate(fd, 0, nbytes)
            return mmap.mmap(fd, nbytes), fd
        except OSError:
            os.close(fd)
            raise

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._mappings

    def let_go(self, tensor: torch.Tensor) -> None:
        """Take the pages of ``tensor`` (a view of one from here) out of this process's memory, if they are there."""
        found = self._range(tensor)
        if found is not None:
            memory, _, start, length = found
            # The page stays in the file; the system may keep it as long as it has nothing better to do with memory.
            memory.madvise(mmap.MADV_DONTNEED, start, length)

    def read_ahead(self, tensor: torch.Tensor) -> None:
        """Let the system begin to read ``tensor`` from its disk; returns at once."""
        found = self._range(tensor)
        if found is None or self._closed:
            return
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "zeropipe-read-ahead")
        _, fd, start, length = found
        # The thread holds the tensor, so that the file stays open.
        self._reader.submit(lambda _: os.posix_fadvise(fd, start, length, os.POSIX_FADV_WILLNEED), tensor)

    def close(self) -> None:
        """End the thread. Tensors that somebody still holds stay valid."""
        self._closed = True
        if self._reader is not None:
            self._reader.shutdown(wait=True)
            self._reader = None

    def _range(self, tensor: torch.Tensor) -> tuple[mmap.mmap, int, int, int] | None:
        """(memory, fd, first byte, bytes) of the pages that ``tensor`` lies in; None if it is not from here."""
        home = tensor.untyped_storage().data_ptr()
        if not tensor.numel() or home not in self._mappings:
            return None
        first = tensor.data_ptr() - home
        start = first // mmap.PAGESIZE * mmap.PAGESIZE  # advice is taken for whole pages
        return *self._mappings[home], start, first + tensor.numel() * tensor.element_size() - start


class Arena:
    """Puts many small tensors into few files, one after the other."""

    def __init__(self, folder: str, chunk_bytes: int = 2**26) -> None:
        # A file for each shard of a large model would be more descriptors than a process may have.
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
        raise OffloadError(f"the folder {folder!r} for offloaded state {problem}", fix=fix)


def _free(folder: str) -> int:
    figures = os.statvfs(folder)
    return figures.f_bavail * figures.f_frsize


def _forget_mapping(mappings: dict[int, tuple[mmap.mmap, int]], start: int, fd: int) -> None:
    mappings.pop(start, None)
    os.close(fd)


_COPY_NUMEL = 2**22  # elements that a copy from or to a file holds in memory at a time
_STATE_BYTES = 16  # per element in files: master, gradient and the two moments of an Adam, fp32


class Offload:
    """Makes the tensors of one engine where its policy wants them."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._files: dict[str, Files] = {}  # by folder, which masters and parameters may share
        self._state_files = self._open(policy.optimizer_place, policy.optimizer_folder)
        self._param_files = self._open(policy.param_place, policy.param_folder)

    def _open(self, place: Place, folder: str) -> Files | None:
        if place is Place.FILE and folder not in self._files:
            self._files[folder] = Files(folder)
        return self._files[folder] if place is Place.FILE else None

    @property
    def pages_state(self) -> bool:
        """Whether the optimizer steps piece by piece on files."""
        return self._state_files is not None

    def state(self, numel: int, dtype: torch.dtype, device: torch.device, written: int = 0) -> torch.Tensor:
        """A 1-D tensor of zeros for a master, a moment or a gradient shard of parameters on ``device``; the first
        ``written`` elements are about to be written and may be anything."""
        return self._zeros(numel, dtype, device, self.policy.optimizer_place, self._state_files, written)

    def source(self, numel: int, dtype: torch.dtype, device: torch.device, written: int = 0) -> torch.Tensor:
        """A 1-D tensor of zeros for what gathers read of parameters on ``device``; ``written`` as in ``state``."""
        return self._zeros(numel, dtype, device, self.policy.param_place, self._param_files, written)

    def gathers_read_masters(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether parameters of ``dtype`` on ``device`` need no copy of their shards beside the masters."""
        places = [self.policy.optimizer_place, self.policy.param_place]
        if not STREAMS.of(device).apart:
            places = [Place.DEVICE if place is Place.HOST else place for place in places]
        if places[0] is not places[1]:
            return False
        # From afar, moving 16 bits of each element instead of 32 is worth the copy.
        same_folder = places[0] is not Place.FILE or self._param_files is self._state_files
        return same_folder and (places[0] is Place.DEVICE or dtype == torch.float32)

    @property
    def has_files(self) -> bool:
        """Whether anything lives in files."""
        return bool(self._files)

    def in_files(self, tensor: torch.Tensor) -> bool:
        return self._state_files is not None and self._state_files.owns(tensor)

    def is_remote(self, device: torch.device) -> bool:
        """Whether the shards of parameters on ``device`` live elsewhere."""
        place = self.policy.param_place
        return place is Place.FILE or (place is Place.HOST and STREAMS.of(device).apart)

    def let_go(self, tensor: torch.Tensor) -> None:
        """The elements of ``tensor`` will not be used for a while."""
        for files in self._files.values():
            files.let_go(tensor)

    def read_ahead(self, tensor: torch.Tensor) -> None:
        """The elements of ``tensor`` will be used soon."""
        for files in self._files.values():
            files.read_ahead(tensor)

    def copy(self, target: torch.Tensor, source: torch.Tensor, device: torch.device) -> None:
        """``target.copy_(source)``, 1-D, of parameters on ``device``, with little of either in memory at a time where
        they are in files. The host does not wait: see ``streams/``."""
        # What went through is let go part by part; in memory there is nothing to let go, and one copy is enough.
        numel = _COPY_NUMEL if self._files else max(target.numel(), 1)
        for into, part in zip(target.split(numel), source.split(numel), strict=True):
            STREAMS.of(device).bring(into, part, self.let_go)

    def close(self) -> None:
        for files in self._files.values():
            files.close()

    def _zeros(
        self,
        numel: int,
        dtype: torch.dtype,
        device: torch.device,
        place: Place,
        files: Files | None,
        written: int,
    ) -> torch.Tensor:
        if files is not None:
            return files.zeros(numel, dtype)
        if place is Place.HOST and STREAMS.of(device).apart:
            return STREAMS.of(device).zeros(numel, dtype, self.policy.pin_memory)
        made = torch.empty(numel, dtype=dtype, device=device)
        # Of the rest no page is there before somebody writes it (``tensor/memory.py``).
        made[written:].zero_()
        return made


def check_folders(policy: Policy, numels: Mapping[torch.dtype, int], ranks: int) -> None:
    """Raise OffloadError unless the folders of ``policy`` are there and have room for this machine's shards of so
    many trained elements of each dtype among ``ranks`` ranks."""
    # Before anything is allocated: a folder that fills up in the middle of building leaves ranks that wait.
    here = min(ranks, node_size())
    needs: dict[str, int] = {}
    if policy.optimizer_place is Place.FILE:
        needs[policy.optimizer_folder] = sum(numels.values()) * here // ranks * _STATE_BYTES
    if policy.param_place is Place.FILE:
        # In fp32 gathers read the masters, where those are in files.
        read = {dtype: n for dtype, n in numels.items() if not (needs and dtype == torch.float32)}
        values = sum(n * here // ranks * dtype.itemsize for dtype, n in read.items())
        needs[policy.param_folder] = needs.get(policy.param_folder, 0) + values
    for folder, nbytes in needs.items():
        check_folder(folder, nbytes)


def arena_of(zero: ZeroOptimization | None) -> Arena:
    """Where zero.Init puts shards that live in files. Raises ConfigError where the config names no folder."""
    folder = None if zero is None else zero.offload_param.nvme_path
    if not folder:
        raise ConfigError(
            "zero.Init: remote_device 'nvme' without a folder",
            fix="pass config_dict_or_path= a config with zero_optimization.offload_param.nvme_path",
        )
    return Arena(folder)
