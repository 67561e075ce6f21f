"""The communication seam: a call as it is handed down, its work in flight, and who listens, counts or breaks it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from zeropipe.comm.group import Group
from zeropipe.comm.host.giving_up import give_up
from zeropipe.comm.summary import CommsLog
from zeropipe.errors import CommunicationError, DesyncError, UsageError

_REMEMBERED = 8  # calls
REDUCTIONS = ("sum", "avg", "max", "min")
Cut = tuple[int, torch.Tensor]  # (owner: index in the group, view of the elements that it owns)
Cuts = tuple[int, Sequence[torch.Tensor]]  # several of one place: (its owner, views of one size)


@dataclass(frozen=True, slots=True)
class Run:
    """A run of a flat that is cut in equal shards, one for each member of a group::

        flat     |--- shard 0 ---|--- shard 1 ---|--- shard 2 ---|
        whole            |############################|
                       start            owners: 0, 1, 2

    The general form of what a reduce_scatter gives away.
    """

    whole: torch.Tensor  # 1-D
    start: int  # of its first element in the flat
    shard_numel: int

    @property
    def owners(self) -> range:
        """The members that own a part of it."""
        if not self.whole.numel():
            return range(0)
        return range(
            self.start // self.shard_numel, (self.start + self.whole.numel() - 1) // self.shard_numel + 1
        )

    def part(self, owner: int) -> torch.Tensor:
        """What ``owner`` has of it: a view."""
        first = owner * self.shard_numel - self.start
        return self.whole[max(first, 0) : max(first + self.shard_numel, 0)]


@dataclass(frozen=True, slots=True)
class Event:
    """One collective, as this rank issued it. ``bytes`` is the size of the full (gathered or unreduced) tensor."""

    op: str
    group_size: int
    bytes: int
    label: str
    async_op: bool
    ranks: tuple[int, ...] = ()  # of the group, in its order, where the call moves tensors


@dataclass(frozen=True, slots=True)
class Call:
    """One collective as its caller asked for it: made at the seam, handed down to whatever carries it."""

    op: str
    group: Group
    label: str = ""
    async_op: bool = False
    reduction: str = "sum"

    # What runs beside other collectives (stage 3) says in which order it must stay, and whether ranks compare labels.
    channel: int = 0
    guarded: bool = False
    note: int = 0

    def __str__(self) -> str:
        ranks = self.group.ranks
        return f"[rank {ranks[self.group.rank]}] {self.op} {self.label!r} among ranks {list(ranks)}"

    @property
    def pg(self) -> dist.ProcessGroup | None:
        """The process group that carries it, where channels have one each."""
        return self.group.on(self.channel)

    def check(self, tensor: torch.Tensor) -> Call:
        """The call by the group that carries ``tensor``. Raises UsageError where that cannot travel or be reduced so,
        before anything is sent."""
        if self.reduction not in REDUCTIONS:
            raise UsageError(f"{self.op}: op is one of {', '.join(REDUCTIONS)}; found {self.reduction!r}")
        if self.reduction == "avg" and not tensor.dtype.is_floating_point:
            raise UsageError(
                f"{self.op}: an average of {tensor.dtype} tensors is not exact", fix="use op='sum' and divide"
            )
        if not tensor.is_contiguous():
            raise UsageError(f"{self.op}: the tensor must be contiguous; found strides {tensor.stride()}")
        group = self.group.carrying(tensor)
        return self if group is self.group else replace(self, group=group)

    def enter(self, nbytes: int | None = None) -> Call:
        """Pass through the seam; ``nbytes`` None: no tensor moves."""
        SEAM.remember(self)
        if SEAM.log.on and nbytes is not None:
            SEAM.log.began(self, self.op, nbytes, self.group.size)
        if SEAM.listeners:
            ranks = () if nbytes is None else self.group.ranks
            event = Event(self.op, self.group.size, nbytes or 0, self.label, self.async_op, ranks)
            for listener in tuple(SEAM.listeners):
                listener(event)
        return self


def did_not_complete(what: Call | str, error: RuntimeError) -> CommunicationError:
    """The error of a collective that its backend has given up."""
    return CommunicationError(
        f"{what} did not complete: {str(error).splitlines()[0]}",
        found=f"as the last calls here: {SEAM.lately()}",
        fix="another rank has most likely failed first; read its traceback",
    )


class Words(Protocol):
    """What the members tell each other before a collective (``agreement.py``)."""

    def meet(self) -> int: ...


class Work:
    """A collective in flight. ``wait`` returns when its result may be read; it may be called again."""

    def __init__(
        self,
        what: Call | str,
        handles: Sequence[Any] = (),
        finish: Callable[[], None] | None = None,
        sends_late: bool = False,
    ) -> None:
        self._what = what

        # In the order in which they are waited for: the peers' words, what is under way, what is left to do then.
        self._words: Words | None = None
        self._handles = list(handles)
        self._steps = [] if finish is None else [finish]

        self._sends_late = sends_late  # a step sends something
        self._group: Group | None = None
        self.lowest_note: int | None = None  # of all members, once they have met

    def wait(self) -> None:
        """Raises CommunicationError when a peer is gone or the group's timeout has passed, DesyncError when a
        peer is about to do another guarded collective than this one."""
        before = SEAM.wait_for(self._what)
        try:
            if self._words is not None:
                # Given up before they are met: after an error there is nothing to meet a second time.
                words, self._words = self._words, None
                self.lowest_note = words.meet()
            while self._handles:
                self._handles[-1].wait()
                self._handles.pop()
        except DesyncError:
            SEAM.keep(self)
            raise
        except CommunicationError:
            raise  # of an earlier gather, which says so itself
        except RuntimeError as error:
            if self._group is not None:
                give_up(self._group, str(error))
            raise did_not_complete(self._what, error) from error
        finally:
            SEAM.wait_for(before)
        # Taken first: a step that raises is not done a second time by who waits again.
        steps, self._steps = self._steps, []
        for step in steps:
            step()
        if SEAM.log.on:
            SEAM.log.ended(self._what)

    def done(self) -> bool:
        """Whether everything is known to have arrived, so that ``wait`` has only local work left.

        False may be too modest: gloo tells of a message's arrival only to who waits for it.
        """
        # On NCCL an event of the device answers, and the host goes on: what has arrived may be waited for at any place,
        # whatever the other ranks are doing.
        return not self.peers_wait and all(handle.is_completed() for handle in self._handles)

    def is_completed(self) -> bool:
        """As the handle of another work."""
        return self.done()

    @property
    def peers_wait(self) -> bool:
        """Whether peers may wait for something that this rank only sends when it waits itself."""
        return self._sends_late and bool(self._steps)

    def after(self, words: Words) -> Work:
        """This work, which ranks wait for only where ``words`` are the same on all."""
        self._words = words
        return self

    def then(self, step: Callable[[], None]) -> Work:
        """This work, followed by ``step`` when it is waited for."""
        self._steps.append(step)
        return self

    def under(self, call: Call) -> Work:
        """As its caller wants it: over, unless ``call`` is asynchronous."""
        self._group = call.group
        if not call.async_op:
            self.wait()
        return self


class Later:
    """The handle of what is asked for one by one and begins together, for works that each wait for all of it."""

    def __init__(self) -> None:
        self._work: Work | None = None

    def begin(self, work: Work) -> None:
        self._work = work

    def wait(self) -> None:
        if self._work is None:
            raise RuntimeError("it was given up before it began")
        self._work.wait()

    def is_completed(self) -> bool:
        return self._work is not None and self._work.done()


class Seam:
    """Who listens to this process's collectives. Process groups belong to the process, and so does this."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[Event], None]] = []
        self.log = CommsLog()
        # What this rank did last. A collective that hangs names itself; which one a peer did not come to is found by
        # laying the ranks' last calls side by side.
        self._lately: deque[Call] = deque(maxlen=_REMEMBERED)
        # Buffers that somebody gave up on and the transport still writes into or sends from: freed, they would be
        # other tensors' memory by then.
        self._kept: list[object] = []
        # For who asks whether this process still moves: how many calls there were, and what is waited for right now.
        self.calls = 0
        self.awaited: Call | str | None = None
        self._of_parent: object | None = None  # in the child of a fork: the world that is its parent's
        os.register_at_fork(after_in_child=self._disown)

    def _disown(self) -> None:
        self._of_parent = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None

    def keep(self, *works: object) -> None:
        """Let ``works``, which nobody will wait for, keep their buffers while the process lasts."""
        self._kept += works

    def remember(self, call: Call) -> None:
        """Raises UsageError in the child of a fork: what it says on its parent's connections breaks them."""
        if self._of_parent is not None and call.group.size > 1 and self._of_parent is dist.group.WORLD:
            raise UsageError(
                f"{call} in a process that was forked from that rank",
                expected="collectives in the process that started its process group",
                found=f"process {os.getpid()}, a child of it",
                fix="call it before the fork and hand the result on, or start processes by multiprocessing's 'spawn'",
            )
        self.calls += 1
        self._lately.append(call)

    def wait_for(self, what: Call | str | None) -> Call | str | None:
        """From now on this process waits for ``what``; what it waited for before."""
        before, self.awaited = self.awaited, what
        return before

    @contextmanager
    def waiting(self, what: Call) -> Iterator[None]:
        before = self.wait_for(what)
        try:
            yield
        finally:
            self.wait_for(before)

    def lately(self) -> str:
        """The last calls of this rank, oldest first."""
        return ", ".join(f"{call.op} {call.label!r}" for call in self._lately) or "none"

    @contextmanager
    def listening(self, listener: Callable[[Event], None]) -> Iterator[None]:
        self.listeners.append(listener)
        try:
            yield
        finally:
            self.listeners.remove(listener)


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
