"""How a collective is done point to point: on gloo this beats the native algorithms several times over.

Everybody sends the others what they own or need, and the owner of an element sums it in rank order, so that the
result has the same bits however the tensor was cut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Protocol
from zlib import crc32

import torch

from zeropipe.comm.group import Group
from zeropipe.comm.poster import Message
from zeropipe.comm.record import SEAM, Stream
from zeropipe.errors import CommunicationError, DesyncError

# Point-to-point messages match in order per tag, so each purpose has its own. A channel (0, 1, ...) is a stream of
# collectives that needs no order among those of other channels.
_TAG = 7919  # keeps our exchanges apart from a user's own send and recv on the same group
_TAGS_PER_CHANNEL = 4
SECOND_HOP = 1  # is sent when the first hop is waited for, so it must not queue behind later first hops
_GREETING = 2  # says which collective the sender is about to do
NEVER = 3  # nothing is ever sent
_EPOCH = 2**16  # apart are the tags of greetings before and after a parting
_EPOCHS = 2**13
_LABELS = 2**30  # tags from here on belong to labels
_GREETING_BYTES = 192
_NOTE_BYTES = 8  # of them: a number that need not be the same everywhere
_IN_CACHE = 2**16  # elements summed at a time on CPU: what the next operation needs is still in cache

Cut = tuple[int, torch.Tensor]  # (owner: index in the group, view of the elements that it owns)


class Work:
    """A collective in flight. ``wait`` returns when its result may be read; it may be called again."""

    def __init__(
        self, what: str, handles: Sequence[Any] = (), finish: Callable[[], None] | None = None
    ) -> None:
        self._what = what
        self._handles = list(handles)
        self._finish = finish
        self._hidden = False  # more is to be sent when it is waited for
        self.greeting: Callable[[], int] | None = None  # waits for the peers' words and compares them
        self.heard: int | None = None  # the lowest of all members' notes, once a greeting is over

    def wait(self) -> None:
        """Raises CommunicationError when a peer is gone or the group's timeout has passed, DesyncError when a
        peer is about to do another guarded collective than this one."""
        try:
            if self.greeting is not None:
                greeting, self.greeting = self.greeting, None
                self.heard = greeting()
            while self._handles:
                self._handles[-1].wait()
                self._handles.pop()
        except DesyncError:
            SEAM.abandoned.append(self)  # the transport still writes into our buffers
            raise
        except CommunicationError:
            raise  # of an earlier gather, which says so itself
        except RuntimeError as error:
            raise CommunicationError(
                f"{self._what} did not complete: {str(error).splitlines()[0]}. Fix: another rank has most likely "
                "failed first; read its traceback"
            ) from error
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()

    def done(self) -> bool:
        """Whether everything is known to have arrived, so that ``wait`` has only local work left.

        False may be too modest: gloo tells of a message's arrival only to who waits for it.
        """
        if self.peers_wait:
            return False
        return all(handle.is_completed() for handle in self._handles)

    @property
    def peers_wait(self) -> bool:
        """Whether peers may wait for something that this rank only sends when it waits itself."""
        return self._hidden and self._finish is not None

    def then(self, finish: Callable[[], None]) -> Work:
        """This work, followed by ``finish`` when it is waited for."""
        before = self._finish

        def both() -> None:
            if before is not None:
                before()
            finish()

        self._finish = both
        return self


def then(first: Work, start: Callable[[], Work], what: str) -> Work:
    """A work that, when waited for, waits for ``first``, starts the second and waits for that."""

    def finish() -> None:
        first.wait()
        start().wait()

    return waiting(what, finish)


def waiting(what: str, finish: Callable[[], None]) -> Work:
    """A work that sends something when it is waited for: ``finish`` does so."""
    work = Work(what, (), finish)
    work._hidden = True
    return work


def peers(group: Group) -> list[int]:
    """The other members, starting after this one, so that no member is everybody's first."""
    return [(group.rank + step) % group.size for step in range(1, group.size)]


def tag_of(channel: int, purpose: int = 0) -> int:
    return _TAG + _TAGS_PER_CHANNEL * channel + purpose


# The process group's own methods: dist.isend and irecv look up the rank that we come from, which costs as much as a
# small message does.


def send_to(tensor: torch.Tensor, dst: int, group: Group, tag: int = _TAG) -> Any:
    """Start to send to member ``dst``; None where there is nothing to send."""
    assert group.pg is not None
    return group.pg.send([_real(tensor)], dst, tag) if tensor.numel() else None


def receive_from(tensor: torch.Tensor, src: int, group: Group, tag: int = _TAG) -> Any:
    """Start to receive from member ``src``; None where there is nothing to receive."""
    assert group.pg is not None
    return group.pg.recv([_real(tensor)], src, tag) if tensor.numel() else None


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _start(messages: Sequence[Message], soon: bool) -> list[Any]:
    """Hand the messages over here and now or, ``soon``, by the poster.

    Messages of one tag must all take the same way: either keeps their order. The poster is for streams that run beside
    others (channels from 1 on) and for greetings, which meet large messages on their way in.
    """
    if soon:
        return [SEAM.poster.post(messages)]
    return [handle for message in messages if (handle := message()) is not None]


class Relay(Protocol):
    """What a member owes its peers once all have said the same word (see ``relay.py``)."""

    def hand_on(self) -> None: ...
    def give_up(self) -> None:
        """Let the peers know that nothing will come."""


def greet(
    label: str,
    group: Group,
    channel: int,
    note: int = 0,
    patience: timedelta | None = None,
    relay: Relay | None = None,
) -> Callable[[], int]:
    """Tell every member what is about to be done; the result waits for their words and compares.

    ``note``: a number of this member's; the result returns the lowest of all members' notes. Words are compared in
    the order in which they were said, earlier ones too: a peer stops at the first difference and says no more.
    ``relay`` hands on when the words are found equal, which any later comparison on this channel sees to.
    """
    queue = SEAM.greetings.setdefault(_stream(group, channel), deque())
    greeting = _Greeting(label, group, channel, note, patience, relay)
    queue.append(greeting)
    return lambda: _compare(greeting, queue)


def _stream(group: Group, channel: int) -> Stream:
    return group.ranks, channel, group.started


def since_parting(label: str, group: Group, channel: int) -> str:
    """``label``, such that nothing under it meets what was sent before the members last went different ways.

    Of a guarded gather that some members did not take part in, messages stay on their way for ever. Whoever compares
    words in order finds the first difference at the same word as all others, so the members count alike.
    """
    partings = SEAM.partings[_stream(group, channel)]
    return f"{label} after {partings} partings" if partings else label


def _compare(greeting: _Greeting, queue: deque[_Greeting]) -> int:
    try:
        while greeting.lowest is None:
            if not queue:
                raise DesyncError(f"'{greeting.label}' was given up: ranks had gone different ways before it")
            try:
                queue[0].compare()
            except DesyncError:
                SEAM.partings[_stream(queue[0].group, queue[0].channel)] += 1
                raise
            queue.popleft()
    except BaseException as error:
        SEAM.abandoned.extend(queue)  # the transport still writes into their buffers
        if not isinstance(error, DesyncError):  # that one every member raises, so that none waits for a relay
            for one in queue:
                if one.relay is not None:
                    one.relay.give_up()
        queue.clear()
        raise
    return greeting.lowest


def hand_on(group: Group, channel: int, patience: timedelta) -> None:
    """Before this rank goes away with an error: the second hops of gathers that it has started. Never raises.

    Waits, ``patience`` for each word, until every member has started them too.
    """
    queue = SEAM.greetings.get(_stream(group, channel), deque())
    last = next((greeting for greeting in reversed(queue) if greeting.relay is not None), None)
    if last is None:
        return
    for greeting in queue:
        greeting.limit = (patience,)
    SEAM.abandoned.extend(queue)  # what is sent must outlive its sending, and the engine may not
    with suppress(Exception):
        _compare(last, queue)


class _Greeting:
    """One member's word, on its way to the others, and theirs, on their way here."""

    def __init__(
        self,
        label: str,
        group: Group,
        channel: int,
        note: int,
        patience: timedelta | None,
        relay: Relay | None = None,
    ) -> None:
        self.limit = () if patience is None else (patience,)
        self.relay = relay
        size = _GREETING_BYTES - _NOTE_BYTES
        self.label = label
        self.group = group
        self.channel = channel
        self.words = label.encode()[-size:].ljust(size)
        self.lowest: int | None = None  # of all notes, once compared
        self._note = note
        self._mine = torch.frombuffer(bytearray(self.words + note.to_bytes(_NOTE_BYTES)), dtype=torch.uint8)
        tag = tag_of(channel, _GREETING) + _EPOCH * (SEAM.partings[_stream(group, channel)] % _EPOCHS)
        self._heard = {peer: torch.empty_like(self._mine) for peer in peers(group)}
        messages = [partial(send_to, self._mine, peer, group, tag) for peer in peers(group)]
        messages += [partial(receive_from, buffer, peer, group, tag) for peer, buffer in self._heard.items()]
        self._handles = _start(messages, soon=True)

    def compare(self) -> None:
        for handle in self._handles:
            handle.wait(*self.limit)
        notes = [self._note]
        for peer, buffer in self._heard.items():
            said = bytes(buffer.tolist())
            if said[: len(self.words)] != self.words:
                theirs = said[: len(self.words)].decode(errors="replace").strip()
                raise self._difference(self.group.ranks[peer], theirs)
            notes.append(int.from_bytes(said[len(self.words) :]))
        if self.relay is not None:
            self.relay.hand_on()
        self.lowest = min(notes)

    def _difference(self, other: int, theirs: str) -> DesyncError:
        return DesyncError(
            f"ranks went different ways: this one is at '{self.label}', rank {other} is at '{theirs}'",
            rank=self.group.ranks[self.group.rank],
            expected="the same modules in the same order on every rank",
            found=f"'{self.label}' here and '{theirs}' there",
            fix="make control flow equal on all ranks, or mark the module around both with "
            "set_z3_leaf_modules so that it is gathered whole",
        )


def gather_exchange(
    cuts: Sequence[Cut], group: Group, what: str, channel: int = 0, hop: int = 0, label: str = ""
) -> Work:
    """Send the own cuts to all, receive every other cut into its place.

    ``label``: only exchanges with the same label meet. Gloo ends the process where a message is larger than the
    buffer that waits for it, so exchanges of different things must not.
    """
    size = sum(view.numel() for _, view in cuts)
    tag = _LABELS + crc32(f"{label} {size}".encode()) % _LABELS if label else tag_of(channel, hop)
    own = [view for owner, view in cuts if owner == group.rank]
    messages = [partial(send_to, view, peer, group, tag) for peer in peers(group) for view in own]
    messages += [
        partial(receive_from, view, owner, group, tag) for owner, view in cuts if owner != group.rank
    ]
    return Work(what, _start(messages, soon=bool(channel)))


def reduce_exchange(
    cuts: Sequence[Cut], outputs: Sequence[torch.Tensor], group: Group, op: str, what: str, channel: int = 0
) -> Work:
    """Send each cut to its owner; the owner reduces what it received in rank order into ``outputs``."""
    tag = tag_of(channel)
    messages = [partial(send_to, view, owner, group, tag) for owner, view in cuts if owner != group.rank]
    sums: list[tuple[list[torch.Tensor], torch.Tensor]] = []
    own = [view for owner, view in cuts if owner == group.rank]
    for view, output in zip(own, outputs, strict=True):
        # Of two members the other's values may arrive where the sum goes.
        straight = group.size == 2 and output.data_ptr() != view.data_ptr() and output.dtype == view.dtype
        received = {peer: output if straight else torch.empty_like(view) for peer in peers(group)}
        messages += [partial(receive_from, buffer, peer, group, tag) for peer, buffer in received.items()]
        received[group.rank] = view
        sums.append(([received[member] for member in range(group.size)], output))

    def reduce() -> None:
        for parts, output in sums:
            reduce_in_order(parts, output, op)

    return Work(what, _start(messages, soon=bool(channel)), reduce)


def one_hop(flat: torch.Tensor, group: Group, op: str, what: str) -> Work:
    mine = flat.clone()
    received = {peer: torch.empty_like(flat) for peer in peers(group)}
    messages = [partial(send_to, mine, peer, group) for peer in peers(group)]
    messages += [partial(receive_from, buffer, peer, group) for peer, buffer in received.items()]
    received[group.rank] = mine
    parts = [received[member] for member in range(group.size)]
    return Work(what, _start(messages, soon=False), lambda: reduce_in_order(parts, flat, op))


def reduce_in_order(parts: Sequence[torch.Tensor], output: torch.Tensor, op: str) -> None:
    """Reduce ``parts`` (1-D) in member order into ``output``, which may be one of them.

    16-bit sums run in fp32 and round once, so that neither the number of ranks nor the range of fp16 shows.
    """
    numel = output.numel()
    if output.device.type != "cpu" or numel <= _IN_CACHE:
        _reduce_run(parts, output, op)
        return
    for start in range(0, numel, _IN_CACHE):
        run = slice(start, start + _IN_CACHE)
        _reduce_run([part[run] for part in parts], output[run], op)


def _reduce_run(parts: Sequence[torch.Tensor], output: torch.Tensor, op: str) -> None:
    if op in ("max", "min"):
        reduce = torch.maximum if op == "max" else torch.minimum
        total = reduce(parts[0], parts[1])
        for part in parts[2:]:
            reduce(total, part, out=total)
        output.copy_(total)
        return
    wide = torch.float32 if output.dtype in (torch.float16, torch.bfloat16) else output.dtype
    if wide != output.dtype:
        total = parts[0].to(wide)
        for part in parts[1:]:
            total += part
    elif len(parts) == 2:
        total = torch.add(parts[0], parts[1], out=output)
    else:
        scratch = parts[0] if parts[0].data_ptr() != output.data_ptr() else None
        if all(part.data_ptr() != output.data_ptr() for part in parts[1:]):
            total = output if scratch is None else output.copy_(scratch)
        else:
            total = parts[0]  # a received buffer: ours to overwrite
        for part in parts[1:]:
            total += part
    if op == "avg":
        total /= len(parts)
    if total.data_ptr() != output.data_ptr():
        output.copy_(total)
