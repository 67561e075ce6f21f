"""Gives memory that was freed back to the system, where the allocator would keep it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_AT_ONCE = 32 * 2**20  # bytes freed before it is worth the walk through the heap


def _trim_of_glibc() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim  # type: ignore[no-any-return]


class FreedMemory:
    """Counts what a caller frees in pieces between which it allocates what stays.

    glibc fills the holes of freed blocks only with what fits, and gives back no hole below a block in use: a model cut
    into shards one parameter at a time could so take as much memory as the whole. Other C libraries are left alone.
    """

    def __init__(self) -> None:
        self._trim = _trim_of_glibc()
        self._freed = 0

    def add(self, nbytes: int) -> None:
        """``nbytes`` of host memory were freed; now and then all holes go back to the system."""
        self._freed += nbytes
        if self._freed >= _AT_ONCE:
            self.give_back()

    def give_back(self) -> None:
        self._freed = 0
        if self._trim is not None:
            self._trim(0)
