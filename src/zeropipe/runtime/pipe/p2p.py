"""Moves values between pipeline ranks in the order that the schedule's queues fix.

Each pair of ranks has one queue in each direction. In the usual case (shapes never change) a message is one
transfer, whose receive is opened ahead of its use; the first message of an edge, or every one where shapes may
change, is preceded by its form. A rank that fails says so in place of every message that it still owes, and takes
every one that it is still owed: nobody waits for it, and nothing is left on its way.
"""

from __future__ import annotations

import contextlib
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from zeropipe.comm.collectives import Work, broadcast_object, recv, send
from zeropipe.comm.group import Group
from zeropipe.comm.record import SEAM
from zeropipe.errors import CommunicationError, UsageError
from zeropipe.runtime.pipe.instructions import Message, Op
from zeropipe.runtime.pipe.wire import FAILED, Form, Value
from zeropipe.tensor.host import HOST

_FORM_TAG, _VALUE_TAG = 0, 1  # added to the pipeline's own tag
_TAGS = range(1 << 16, 1 << 30, 2)  # above a user's own messages and the collectives' tags
_SIZES = 2  # int64: bytes of the form, bytes of the value; a negative form says the sender has failed

Ranks = tuple[int, int]  # who sends, who receives
Forms = Mapping[tuple[int, int, Op], Form]  # by edge: stages and direction
Transfer = tuple[Work, torch.Tensor]  # with the buffer that it must find unchanged until it is done


class _Farewell(Exception):
    """In the place of a message: its sender has failed."""


class Links:
    """The ways between the ranks of one pipeline.

    ``pipe``: all of them, the member's index being its pipeline rank. ``pairs``: a group of two for each direction,
    where the backend matches messages by order alone (NCCL); empty where tags do (gloo).
    """

    def __init__(self, pipe: Group, pairs: Mapping[Ranks, Group] | None = None) -> None:
        self.pipe = pipe
        self._pairs = dict(pairs or {})
        # Drawn anew for each pipeline, so that what a failed one left on its way never reaches the next.
        self._tag: int = broadcast_object(secrets.choice(_TAGS), 0, pipe, label="pipeline tag")

    def move(self, ranks: Ranks, tensor: torch.Tensor, tag: int, label: str) -> Transfer:
        """Start to send ``tensor`` on the first of ``ranks``, to receive it on the second."""
        source, target = ranks
        sends = source == self.pipe.rank
        group = self._pairs.get(ranks, self.pipe)
        other = group.ranks.index(self.pipe.ranks[target if sends else source])
        call = send if sends else recv
        return call(tensor, other, group, tag=self._tag + tag, label=label, async_op=True), tensor


@dataclass(slots=True)
class _Incoming:
    """The messages from one other rank in one step. Each goes from the first of these to the last, in this order::

        expected  --[size known: receive opened]-->  opened  --[bytes are there]-->  arrived  --> taken
            `--------[form and value received at once]--------------------------------^

    A step may want a later message first; what came before it then waits in ``arrived``.
    """

    expected: deque[Message]
    opened: deque[tuple[Message, Transfer]] = field(default_factory=deque)
    arrived: dict[Message, Value] = field(default_factory=dict)


@dataclass(slots=True)
class _Outgoing:
    """The messages to one other rank in one step: still owed, or sent and perhaps not there yet."""

    owed: deque[Message]
    # The transfers of each message. gloo tells only who waits for a transfer whether it is done, so waiting must be
    # safe: it is done once the other side's receipt is known.
    sent: deque[list[Transfer]] = field(default_factory=deque)
    forgotten: int = 0

    def forget(self, count: int) -> None:
        """The first ``count`` messages ever are known to have arrived: free their buffers."""
        while self.forgotten < count:
            for work, _ in self.sent.popleft():
                work.wait()
            self.forgotten += 1


class Mailbox:
    """This rank's end of all its queues. ``dynamic``: shapes may change from one message of an edge to the next."""

    def __init__(self, links: Links, device: torch.device, dynamic: bool) -> None:
        self._links, self.device, self._dynamic = links, device, dynamic
        self._rank = links.pipe.rank

        # From step to step: the form of the latest message of each edge (stages and direction), which its sender has
        # told once and its receiver knows, while it does not change.
        self._forms: dict[tuple[int, int, Op], Form] = {}

        # Of one step.
        self._incoming: dict[Ranks, _Incoming] = {}
        self._outgoing: dict[Ranks, _Outgoing] = {}
        self._taken: Mapping[Message, int] = {}
        self.heard_of_failure = False  # another rank failed first

    def begin(self, queues: Mapping[Ranks, Sequence[Message]], taken: Mapping[Message, int]) -> None:
        """Start a step in which the messages of ``queues`` travel; ``taken`` as `known_taken` gives it."""
        self._incoming = {r: _Incoming(deque(q)) for r, q in queues.items() if r[1] == self._rank}
        self._outgoing = {r: _Outgoing(deque(q)) for r, q in queues.items() if r[0] == self._rank}
        self._taken = taken
        self.heard_of_failure = False

    def finish(self) -> None:
        """Wait until everything that was sent has arrived."""
        for outgoing in self._outgoing.values():
            outgoing.forget(outgoing.forgotten + len(outgoing.sent))

    def know_forms(self, forms: Forms) -> None:
        """The forms of edges, which then nobody needs to tell; all ranks must know the same."""
        self._forms.update(forms)

    def forget_forms(self) -> None:
        """Tell and be told all forms anew: the batches of a new kind of step have other shapes."""
        self._forms.clear()

    def send(self, message: Message, value: Value) -> None:
        """Start sending; the tensors are copied, so they may be freed or changed."""
        form, told = Form.of(value), self._told(message)
        if told is not None and told != form:
            raise UsageError(
                f"stage {message.source} sends micro-batch {message.micro_batch} to stage {message.target} "
                "in another form than before",
                expected=told,
                found=form if str(form) != str(told) else f"{form} (other containers, values or gradients)",
                fix="build PipelineModule with dynamic_shape=True, or give equal micro-batches (drop_last=True)",
            )
        parts: list[Transfer] = []
        if told is None:
            data = torch.frombuffer(bytearray(form.to_bytes()), dtype=torch.uint8).to(self.device)
            sizes = torch.tensor([data.numel(), form.nbytes], dtype=torch.int64, device=self.device)
            for part in (sizes, data):
                parts.append(self._links.move(message.ranks, part, _FORM_TAG, f"form {message}"))
            self._forms[message.edge] = form
        buffer = form.pack(value.tensors, self.device)
        parts.append(self._links.move(message.ranks, buffer, _VALUE_TAG, str(message)))
        outgoing = self._outgoing[message.ranks]
        outgoing.sent.append(parts)
        expected = outgoing.owed.popleft()
        assert expected == message, f"sent {message}, the schedule has {expected}"

    def open(self, message: Message) -> None:
        """Let ``message`` come in behind what is computed now, if its size is known and its turn has come."""
        incoming = self._incoming[message.ranks]
        while incoming.expected and message in incoming.expected and self._open_next(incoming):
            pass

    def receive(self, message: Message) -> Value:
        """Wait for ``message``; its tensors are views of a buffer of their own."""
        incoming = self._incoming[message.ranks]
        while message not in incoming.arrived:
            try:
                self._receive_next(incoming)
            except _Farewell:
                self.heard_of_failure = True
                raise CommunicationError(
                    f"pipeline rank {message.ranks[0]} failed before it sent {message.send}",
                    rank=self._rank,
                    fix="read the traceback of the rank that failed first",
                ) from None
        # An acknowledgement that costs nothing: who sent this had taken so many of ours before.
        back = self._outgoing.get(message.ranks[::-1])
        if back is not None:
            back.forget(self._taken[message])
        return incoming.arrived.pop(message)

    def say_failed(self) -> None:
        """Answer every message that others still expect from here, so that they stop instead of waiting."""
        for ranks, outgoing in self._outgoing.items():
            while outgoing.owed:
                # In the form that the other side waits for: sizes first, or bytes of the size that it knows.
                told = self._told(outgoing.owed.popleft())
                if told is None:
                    part, tag = torch.tensor([-1, self._rank], device=self.device), _FORM_TAG
                else:
                    part, tag = told.farewell(self.device), _VALUE_TAG
                with contextlib.suppress(Exception):  # the peer may be gone already
                    outgoing.sent.append([self._links.move(ranks, part, tag, "failed")])

    def clear(self) -> None:
        """After a failure: take all that is still sent to this rank; the next batch finds nothing on its way."""
        for incoming in self._incoming.values():
            while incoming.opened or incoming.expected:
                with contextlib.suppress(_Farewell):
                    self._receive_next(incoming)
            incoming.arrived.clear()
        self.finish()

    def give_up(self) -> None:
        """What is still on its way will not be waited for, but the transport uses its buffers."""
        for outgoing in self._outgoing.values():
            SEAM.keep(*(work for parts in outgoing.sent for work, _ in parts))
        for incoming in self._incoming.values():
            SEAM.keep(*(work for _, (work, _) in incoming.opened))

    def _told(self, message: Message) -> Form | None:
        """The form that both sides know ``message`` to have; None where it has to come first."""
        return None if self._dynamic else self._forms.get(message.edge)

    def _receive_next(self, incoming: _Incoming) -> None:
        """Take the next message of a queue, whichever it is."""
        if incoming.opened or self._open_next(incoming):
            message, (work, buffer) = incoming.opened.popleft()
            work.wait()
        else:
            message = incoming.expected.popleft()
            form_bytes, value_bytes = self._now(message, _SIZES, torch.int64, _FORM_TAG).tolist()
            if form_bytes < 0:
                raise _Farewell
            data = self._now(message, form_bytes, torch.uint8, _FORM_TAG)
            self._forms[message.edge] = Form.from_bytes(bytes(data.tolist()))
            buffer = self._now(message, value_bytes, torch.uint8, _VALUE_TAG)
        # On a GPU reading the first byte would stop the stream; there a failed peer shows as a dead process.
        if HOST.sees(buffer) and int(buffer[0]) == FAILED:
            raise _Farewell
        incoming.arrived[message] = self._forms[message.edge].unpack(buffer)

    def _open_next(self, incoming: _Incoming) -> bool:
        """Open the receive of the next message; False where its form must come first."""
        told = self._told(incoming.expected[0])
        if told is None:
            return False
        message = incoming.expected.popleft()
        buffer = torch.empty(told.nbytes, dtype=torch.uint8, device=self.device)
        transfer = self._links.move(message.ranks, buffer, _VALUE_TAG, str(message))
        incoming.opened.append((message, transfer))
        return True

    def _now(self, message: Message, numel: int, dtype: torch.dtype, tag: int) -> torch.Tensor:
        buffer = torch.empty(numel, dtype=dtype, device=self.device)
        label = f"form {message}" if tag == _FORM_TAG else str(message)
        self._links.move(message.ranks, buffer, tag, label)[0].wait()
        return buffer
