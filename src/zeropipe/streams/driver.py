"""What a device with streams can do: CUDA's, or one that only writes down what it is given (tests without a GPU)."""

from __future__ import annotations

import mmap
import weakref
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from zeropipe.errors import OffloadError
from zeropipe.given import Anything

_EXACT_BYTES = 2**20  # from here on pinned memory is registered as it is
Moment = Anything  # a place in a stream's work: what was given to it before is done when it has passed


class Driver(Protocol):
    """What a device and its streams can do: CUDA's in training, one that only writes down in tests."""

    def new_stream(self) -> Anything: ...
    def current(self) -> Anything:
        """The stream that works are given to now; equal to itself alone."""

    def on(self, stream: Anything) -> AbstractContextManager[object]: ...
    def mark(self) -> Moment:
        """Now, on the current stream."""

    def wait(self, moment: Moment) -> None:
        """The current stream goes on when ``moment`` has passed."""

    def finish(self, moment: Moment) -> None:
        """The host does."""

    def passed(self, moment: Moment) -> bool: ...
    def on_host(self, tensor: torch.Tensor) -> bool: ...
    def is_pinned(self, tensor: torch.Tensor) -> bool: ...
    def pinned(self, nbytes: int) -> torch.Tensor:
        """1-D uint8 zeros in host memory that the device can reach by itself."""


class Cuda:
    """Streams, events and pinned memory of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        return torch.cuda.stream(stream)

    def mark(self) -> torch.cuda.Event:
        return self.current().record_event()

    def wait(self, moment: torch.cuda.Event) -> None:
        self.current().wait_event(moment)

    def finish(self, moment: torch.cuda.Event) -> None:
        moment.synchronize()

    def passed(self, moment: torch.cuda.Event) -> bool:
        return moment.query()

    def on_host(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu"

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()

    def pinned(self, nbytes: int) -> torch.Tensor:
        # torch's allocator of pinned memory gives a power of two: 64 GiB for masters of 33. What is large is a mapping
        # of its own, whole pages, that CUDA is told of.
        if nbytes < _EXACT_BYTES:
            return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
        return register(nbytes)


def register(nbytes: int) -> torch.Tensor:
    """1-D uint8 zeros in pinned host memory of exactly so many bytes, in whole pages.

    Raises OffloadError where the system gives no such memory.
    """
    runtime = torch.cuda.cudart()
    problem = ""
    try:
        tensor = torch.frombuffer(
            mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8
        )
        code = int(runtime.cudaHostRegister(tensor.data_ptr(), nbytes, 1))  # 1: for all devices
        problem = f"CUDA's code {code}" if code else ""
    except OSError as error:
        problem = str(error)
    if problem:
        raise OffloadError(
            f"{nbytes:,} bytes of host memory cannot be pinned",
            found=problem,
            fix="allow this process more locked memory (ulimit -l), or set pin_memory to false",
        )
    # The storage holds the mapping and goes first: CUDA lets go of pages that are still there.
    end = weakref.finalize(tensor.untyped_storage(), runtime.cudaHostUnregister, tensor.data_ptr())
    end.atexit = False  # then the system does it, and CUDA may be gone
    return tensor
