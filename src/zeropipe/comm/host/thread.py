"""The thread of a rank that answers whom another rank calls: it waits for descriptors, and can be woken meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

_PATIENCE = 5.0  # seconds for the thread to end


class Waiting:
    """A thread that runs ``run(self)`` until it is to ``end``. Raises OSError (no descriptor is left) or RuntimeError
    (no thread), and then nothing has begun."""

    def __init__(self, run: Callable[[Waiting], None]) -> None:
        self.ending = False
        self.woken, self._wakes = os.pipe()  # the first can be read once someone has woken it
        os.set_blocking(self._wakes, False)
        # A daemon, so that one that the kernel never lets go does not keep the process.
        self._thread = threading.Thread(target=run, args=(self,), name="zeropipe reader", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self.forget()
            raise

    def wake(self) -> None:
        if self._wakes >= 0:
            with suppress(OSError):
                os.write(self._wakes, b"x")

    def end(self) -> None:
        self.ending = True
        self.wake()
        self._thread.join(_PATIENCE)
        self.forget()

    def forget(self) -> None:
        """Close the pipe: the thread is not there (in the child of a fork) or has ended."""
        ends, self.woken, self._wakes = (self.woken, self._wakes), -1, -1
        for end in ends:
            if end >= 0:
                os.close(end)
