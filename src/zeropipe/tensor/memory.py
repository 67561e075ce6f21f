"""Host memory that goes back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress

_FREED_AT_ONCE = 32 * 2**20  # bytes freed before it is worth the walk through the heap


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
