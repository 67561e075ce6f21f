"""Values on their way into one new buffer, of which no more than one is in memory twice.

::

    host      pages of a new buffer come as they are written, those of a value go as it is freed:
                  |aaaa|bbbb|cccc|  + |....|....|....|     |    |    |cccc|  + |aaaa|bbbb|....|
    device    an allocation is whole at once, so all values wait on the host until it is there
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

_FREED_AT_ONCE = 8 * 2**20  # bytes freed before it is worth the walk through the heap


class FreedMemory:
    """Counts what a caller frees in pieces between which it allocates what stays, and gives it back to the system."""

    def __init__(self) -> None:
        # glibc fills the holes of freed blocks only with what fits, and gives back no hole below a block in use: a
        # model cut into shards one parameter at a time could so take as much memory as the whole. Other C libraries
        # are left alone.
        self._trim: Callable[[ctypes.c_size_t], int] | None = None
        with suppress(OSError, TypeError, AttributeError):
            self._trim = ctypes.CDLL(None).malloc_trim
        self._freed = 0

    def add(self, nbytes: int) -> None:
        """``nbytes`` of host memory were freed; now and then all holes go back."""
        self._freed += nbytes
        if self._freed >= _FREED_AT_ONCE:
            self.give_back()

    def give_back(self) -> None:
        self._freed = 0
        if self._trim is not None:
            self._trim(ctypes.c_size_t(0))


@contextmanager
def moving(tensors: Sequence[torch.Tensor]) -> Iterator[Iterator[torch.Tensor]]:
    """The values of ``tensors``, in their order, for a block that gives each a new place before it takes the next.

    The block makes the places: of values on a device their memory is free by then. Where it raises, those that have no
    new place yet are where they were.
    """
    left: dict[int, torch.Tensor] = {}
    freed = FreedMemory()

    def values() -> Iterator[torch.Tensor]:
        for index in range(len(tensors)):
            yield left[index]
            freed.add(left.pop(index).nbytes)

    try:
        for index, tensor in enumerate(tensors):
            left[index] = tensor.detach().to("cpu")
            # Emptied, and not moved: a parameter's node in autograd, and hooks on it, do not outlive its device.
            tensor.data = tensor.detach().new_empty(0)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # blocks of many small values are no room for a large one
        yield values()
    except BaseException:
        for index, value in left.items():
            if not tensors[index].numel():
                tensors[index].data = value.to(tensors[index].device)
        raise
    finally:
        freed.give_back()
