"""The communication seam: every collective passes here, so that tests can count, delay or break it."""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zeropipe.comm.poster import Poster

# Words in one order: ranks, channel, which process group of these ranks.
Stream = tuple[tuple[int, ...], int, weakref.ref[Any] | None]


@dataclass(frozen=True, slots=True)
class Event:
    """One collective, as this rank issued it. ``bytes`` is the size of the full (gathered or unreduced) tensor."""

    op: str
    group_size: int
    bytes: int
    label: str
    async_op: bool
    ranks: tuple[int, ...] = ()  # of the group, in its order, where the call moves tensors


class Seam:
    """Who listens to this process's collectives. Process groups belong to the process, and so does this."""

    def __init__(self) -> None:
        self.greetings: dict[Stream, deque[Any]] = {}  # what was said and not compared yet
        self.partings: Counter[Stream] = Counter()  # how often words were found to differ
        self.poster = Poster()
        self._listeners: list[Callable[[Event], None]] = []
        self.abandoned: list[
            object
        ] = []  # works given up on; they keep their buffers while the process lasts

    def pass_through(
        self,
        op: str,
        group_size: int,
        nbytes: int,
        label: str,
        async_op: bool,
        ranks: tuple[int, ...] = (),
    ) -> None:
        if self._listeners:
            event = Event(op, group_size, nbytes, label, async_op, ranks)
            for listener in tuple(self._listeners):
                listener(event)

    @contextmanager
    def listening(self, listener: Callable[[Event], None]) -> Iterator[None]:
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)


SEAM = Seam()


@contextmanager
def record() -> Iterator[list[Event]]:
    """Collect the events of every collective that this process issues inside the ``with`` block.

    Nested recordings each see all events.
    """
    events: list[Event] = []
    with SEAM.listening(events.append):
        yield events


@contextmanager
def inject(fault: Callable[[Event], None]) -> Iterator[None]:
    """Call ``fault`` before every collective; it may sleep, raise or end the process."""
    with SEAM.listening(fault):
        yield
