"""What a rank waits for: left where others can read it, and said shortly before a backend's watchdog ends the process.

NCCL's watchdog ends a process from a thread of its own, by an abort in which no Python runs, and names a number and a
size. By then it must have been said which call that was, by the label that ranks know it by::

    call                                     0.8 of the timeout        timeout
    |------------- not completed ------------| said here: its name,    | the watchdog
                                               the last calls          v
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from zeropipe.comm.group import world
from zeropipe.comm.record import SEAM, Call

_log = logging.getLogger("zeropipe")
_SHARE = 0.8  # of a group's timeout
_LOOKS = 20  # at what is under way, in one timeout
_RARELY = 10.0  # s between looks at most, as a group with a shorter timeout may come


@dataclass(slots=True)
class _Started:
    """The last call of one channel of one group."""

    what: Call
    handles: Sequence[Any]
    since: float  # s, of the monotonic clock


class Witness:
    """Looks now and then at what the backend has not completed. One per process: process groups belong to it."""

    def __init__(self) -> None:
        self._start_anew()
        os.register_at_fork(after_in_child=self._start_anew)  # no thread there, and no process group

    def _start_anew(self) -> None:
        self._last: dict[tuple[tuple[int, ...], int], _Started] = {}
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def note(self, call: Call, handles: Sequence[Any]) -> None:
        """``call`` is under way, and over when all ``handles`` say so."""
        # The last one of a channel tells: the backend completes them in the order in which they were started.
        self._last[call.group.ranks, call.channel] = _Started(call, handles, time.monotonic())
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="zeropipe witness", daemon=True)
            self._thread.start()
            atexit.register(self.close)

    def awaited(self) -> Call | str | None:
        """What this process waits for: what it says itself, or what is not completed on a device whose host goes on."""
        if SEAM.awaited is not None:
            return SEAM.awaited
        for started in list(self._last.values()):
            if not all(handle.is_completed() for handle in started.handles):
                return started.what
        return None

    def close(self) -> None:
        """End the thread: it must not let go of what is the backend's while the interpreter ends."""
        self._over.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        self._start_anew()
        atexit.unregister(self.close)

    def _run(self) -> None:
        over, pause = self._over, 0.0
        while not over.wait(pause):
            pause = pause or _RARELY
            for key, started in list(self._last.items()):
                limit = started.what.group.timeout
                pause = pause if limit is None else min(pause, limit.total_seconds() / _LOOKS)
                if limit is None or all(handle.is_completed() for handle in started.handles):
                    self._forget(key, started)
                    continue
                waited = time.monotonic() - started.since
                if waited > _SHARE * limit.total_seconds():
                    _log.error(
                        "%s has not completed for %.0f s, and its group gives up after %.0f s. The last calls of this "
                        "rank: %s. Lay those of all ranks side by side: who does not have this call is who the others "
                        "wait for",
                        started.what,
                        waited,
                        limit.total_seconds(),
                        SEAM.lately(),
                    )
                    self._forget(key, started)

    def _forget(self, key: tuple[tuple[int, ...], int], started: _Started) -> None:
        """Let the backend's memory go, unless there is a later call by now."""
        if self._last.get(key) is started:
            self._last.pop(key, None)


WITNESS = Witness()


class Board:
    """What ranks leave for each other in the store by which they met, when no collective would come through: a place
    for each rank of the world, which it alone writes, and one for all.

    The store has a server of its own, in torchrun's agent or in the process of rank 0, so that it answers while every
    main thread is stuck. It is asked by a connection of its own: on the other one somebody may be waiting. Calls block
    for as long as it does not answer, and raise RuntimeError where it is gone.
    """

    def __init__(self, name: str) -> None:
        """``name``: the same on all ranks, and of no other board of this world."""
        group = world()
        self.me = group.ranks[group.rank]
        self.size = group.size
        self._name = name
        self._store: Any = None
        # Of one rank there is nobody to tell; a store that a user brought may be of a kind that cannot be opened twice.
        if self.size > 1 and not group.imagined:
            with suppress(AttributeError, RuntimeError, NotImplementedError):
                store: Any = dist.distributed_c10d._get_default_store()
                self._store = store.clone()

    @property
    def shared(self) -> bool:
        """Whether others can read it."""
        return self._store is not None

    def post(self, text: str) -> None:
        """In this rank's place."""
        self._store.set(self._of(self.me), text)

    def read(self, rank: int) -> str:
        """What ``rank`` has posted last, "" before it has."""
        return self._value(self._of(rank))

    def read_all(self) -> dict[int, str]:
        return {rank: text for rank in range(self.size) if (text := self.read(rank))}

    def after(self, over: Collection[int]) -> int:
        """The next rank that is none of ``over``: everybody has one to look after, and one that looks after it."""
        ring = ((self.me + step) % self.size for step in range(1, self.size))
        return next((rank for rank in ring if rank not in over), self.me)

    def common(self) -> str:
        """What stands in the place of all, "" at first."""
        return self._value(self._of("all"))

    def replace(self, before: str, after: str) -> bool:
        """Write into the place of all, unless somebody else has since it was ``before``."""
        # A store compares with the empty text where the key is not there yet, and then writes.
        return bytes(self._store.compare_set(self._of("all"), before, after)).decode() == after

    def _of(self, place: int | str) -> str:
        return f"zeropipe/{self._name}/{place}"

    def _value(self, key: str) -> str:
        return bytes(self._store.get(key)).decode() if self._store.check([key]) else ""
