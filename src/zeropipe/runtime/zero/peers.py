"""What ranks that run one model tell each other: where they are, that they write to no shard, that one has raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from zeropipe.comm.agreement import TALKS, leave_all, meet
from zeropipe.comm.group import Group
from zeropipe.errors import CommunicationError, DesyncError
from zeropipe.runtime.zero.param import GATHER

# For peers to come to where this rank raised an error, so that it can hand on what they will then wait for.
PATIENCE = timedelta(seconds=30)


class Peers:
    """The ranks that run the same model, and what this one has told them."""

    def __init__(self, group: Group, everyone: Group) -> None:
        self.group = group
        self.circles = [group] if everyone == group else [group, everyone]
        self.silent = 0  # contexts in which they need not agree on what they run
        self._told: list[Callable[[], int]] = []  # an error told to the peers: whether they have the same
        self._parted = False  # the last meeting ended in an error, of which everyone knows

    @contextmanager
    def silence(self) -> Iterator[None]:
        """While every parameter is held whole, ranks need not agree on what they run."""
        self.silent += 1
        try:
            yield
        finally:
            self.silent -= 1

    def meet(self, what: str, note: int) -> int:
        """Go on when every rank is about to do ``what``; returns the lowest note. DesyncError when one is not."""
        told, self._told, self._parted = self._told, [], False
        for same in told:
            same()
        for circle in self.circles:
            try:
                note = min(note, meet(what, circle, channel=GATHER, note=note))
            except DesyncError:
                self._parted = circle is self.circles[-1]
                raise
        return note

    def promise(self) -> None:
        """All have met: until ``withdraw`` this rank writes to no shard, so that the others may read them at any
        time."""
        talk = None if self.silent else TALKS.on_board(self.group, GATHER)
        if talk is not None:
            talk.promise()

    def withdraw(self) -> None:
        talk = TALKS.on_board(self.group, GATHER)
        if talk is not None:
            talk.withdraw()

    def drain(self) -> None:
        """Return when nobody reads any more what this rank is about to write to shards."""
        talk = TALKS.on_board(self.group, GATHER)
        if talk is not None:
            talk.drain()

    def tell(self, error: BaseException, where: str) -> None:
        """Tell the peers, who would wait for this rank, that it has raised; they may have, too."""
        if self._told or self.silent:
            return
        # A DesyncError heard in a gather is known among those who share the shards, a broken gather as well (in two
        # hops, only on one node); one heard in the last circle that met, in all.
        met = self.circles if self._parted and isinstance(error, DesyncError) else self.circles[:1]
        if isinstance(error, CommunicationError) and self.group.hops is not None:
            met = []
        said = f"{type(error).__name__} raised in {where}"
        self._told = leave_all(said, error, self.circles, met, channel=GATHER, patience=PATIENCE)
