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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from zeropipe.comm.collectives import Work, broadcast_object, recv, send
from zeropipe.comm.group import Group
from zeropipe.comm.record import SEAM
from zeropipe.errors import CommunicationError, UsageError
from zeropipe.runtime.pipe.instructions import Message, Op
from zeropipe.runtime.pipe.wire import FAILED, Form, Value, farewell, form_of, pack, views

_FORM_TAG, _VALUE_TAG = 0, 1  # added to the pipeline's own tag
_TAGS = range(1 << 16, 1 << 30, 2)  # above a user's own messages and the collectives' tags
_SIZES = 2  # int64: bytes of the form, bytes of the value; a negative form says the sender has failed

Edge = tuple[int, int, Op]  # source stage, target stage, forward or backward


class _Farewell(Exception):
    """In the place of a message: its sender has failed."""


class Links:
    """The ways between the ranks of one pipeline.

    ``pipe``: all of them, the member's index being its pipeline rank. ``pairs``: a group of two for each direction,
    by (source, target) rank, where the backend matches messages by order alone (NCCL); empty where tags do (gloo).
    """

    def __init__(self, pipe: Group, pairs: Mapping[tuple[int, int], Group] | None = None) -> None:
        self.pipe = pipe
        self._pairs = dict(pairs or {})
        # Drawn anew for each pipeline, so that what a failed one left on its way never reaches the next.
        self._tag: int = broadcast_object(secrets.choice(_TAGS), 0, pipe, label="pipeline tag")

    def send(self, tensor: torch.Tensor, target: int, tag: int, label: str) -> Work:
        return self._start(send, (self.pipe.rank, target), target, tensor, tag, label)

    def recv(self, tensor: torch.Tensor, source: int, tag: int, label: str) -> Work:
        return self._start(recv, (source, self.pipe.rank), source, tensor, tag, label)

    def _start(
        self,
        call: Callable[..., Work],
        pair: tuple[int, int],
        other: int,
        tensor: torch.Tensor,
        tag: int,
        label: str,
    ) -> Work:
        group = self._pairs.get(pair, self.pipe)
        place = group.ranks.index(self.pipe.ranks[other])
        return call(tensor, place, group, tag=self._tag + tag, label=label, async_op=True)


def edge_of(message: Message) -> Edge:
    return message.source, message.target, message.op


def label_of(message: Message) -> str:
    """``0>1 F3``: from stage 0 to stage 1, the activation of micro-batch 3."""
    return f"{message.source}>{message.target} {message.op.value}{message.micro_batch}"


@dataclass(slots=True)
class _Queue:
    """The messages from one other rank in one step. Each goes from the first of these to the last, in this order::

        expected  --[size known: receive opened]-->  opened  --[bytes are there]-->  arrived  --> taken
            `--------[form and value received at once]--------------------------------^

    A step may want a later message first; what came before it then waits in ``arrived``.
    """

    source: int
    expected: deque[Message]
    opened: deque[tuple[Message, Work, torch.Tensor]] = field(
        default_factory=deque
    )  # the bytes once work is done
    arrived: dict[Message, tuple[Form, torch.Tensor]] = field(default_factory=dict)


@dataclass(slots=True)
class _Outgoing:
    """The messages to one other rank in one step: still owed, or sent and perhaps not there yet."""

    owed: deque[Message]
    # Of each message its transfers, with the buffers that they must find unchanged. gloo tells only who waits for a
    # transfer whether it is done, so waiting must be safe: it is done once the other side's receipt is known.
    sent: deque[list[tuple[Work, torch.Tensor]]] = field(default_factory=deque)
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

        # From step to step: the form of the latest message of each edge, told once while it does not change.
        self._told: dict[Edge, Form] = {}
        self._known: dict[Edge, Form] = {}

        # Of one step.
        self._queues: dict[int, _Queue] = {}  # by source rank
        self._out: dict[int, _Outgoing] = {}  # by target rank
        self._taken: Mapping[Message, int] = {}
        self.heard_of_failure = False  # in this step: another rank failed first

    def begin(
        self, queues: Mapping[tuple[int, int], Sequence[Message]], taken: Mapping[Message, int]
    ) -> None:
        """Start a step in which the messages of ``queues`` travel; ``taken`` as `known_taken` gives it."""
        self._queues = {s: _Queue(s, deque(q)) for (s, t), q in queues.items() if t == self._rank}
        self._out = {t: _Outgoing(deque(q)) for (s, t), q in queues.items() if s == self._rank}
        self._taken = taken
        self.heard_of_failure = False

    def finish(self) -> None:
        """Wait until everything that was sent has arrived."""
        for outgoing in self._out.values():
            outgoing.forget(outgoing.forgotten + len(outgoing.sent))

    def forget_forms(self) -> None:
        """Tell and be told all forms anew: the batches of a new kind of step have other shapes."""
        self._told.clear()
        self._known.clear()

    def send(self, message: Message, target: int, value: Value) -> None:
        """Start sending; the tensors are copied, so they may be freed or changed."""
        form = form_of(value)
        edge = edge_of(message)
        told = self._told.get(edge)
        if told != form and told is not None and not self._dynamic:
            raise UsageError(
                f"stage {message.source} sends micro-batch {message.micro_batch} to stage {message.target} "
                "in another form than before",
                expected=told,
                found=form if str(form) != str(told) else f"{form} (other containers, values or gradients)",
                fix="build PipelineModule with dynamic_shape=True, or give equal micro-batches (drop_last=True)",
            )
        label = label_of(message)
        parts: list[tuple[Work, torch.Tensor]] = []
        if told is None or self._dynamic:
            data = torch.frombuffer(bytearray(form.to_bytes()), dtype=torch.uint8).to(self.device)
            sizes = torch.tensor([data.numel(), form.nbytes], dtype=torch.int64, device=self.device)
            for part in (sizes, data):
                parts.append((self._links.send(part, target, _FORM_TAG, f"form {label}"), part))
            self._told[edge] = form
        buffer = pack(form, value.tensors, self.device)
        parts.append((self._links.send(buffer, target, _VALUE_TAG, label), buffer))
        self._out[target].sent.append(parts)
        expected = self._out[target].owed.popleft()
        assert expected == message, f"sent {message}, the schedule has {expected}"

    def open(self, message: Message, source: int) -> None:
        """Let ``message`` come in behind what is computed now, if its size is known and its turn has come."""
        queue = self._queues[source]
        while queue.expected and message in queue.expected and self._open_next(queue):
            pass

    def receive(self, message: Message, source: int) -> Value:
        """Wait for ``message``; its tensors are views of a buffer of their own."""
        queue = self._queues[source]
        while message not in queue.arrived:
            try:
                self._receive_next(queue)
            except _Farewell:
                self.heard_of_failure = True
                raise CommunicationError(
                    f"pipeline rank {source} failed before it sent {message.send}",
                    rank=self._rank,
                    fix="read the traceback of the rank that failed first",
                ) from None
        # An acknowledgement that costs nothing: who sent this had taken so many of ours before.
        if source in self._out:
            self._out[source].forget(self._taken[message])
        form, buffer = queue.arrived.pop(message)
        return Value(form.tree, views(form, buffer), [t.needs_grad for t in form.tensors])

    def say_failed(self) -> None:
        """Answer every message that others still expect from here, so that they stop instead of waiting."""
        for target, outgoing in self._out.items():
            while outgoing.owed:
                # In the form that the other side waits for: sizes first, or bytes of the size that it knows.
                told = self._told.get(edge_of(outgoing.owed.popleft()))
                if told is None or self._dynamic:
                    part, tag = torch.tensor([-1, self._rank], device=self.device), _FORM_TAG
                else:
                    part, tag = farewell(told.nbytes, self.device), _VALUE_TAG
                with contextlib.suppress(Exception):  # the peer may be gone already
                    outgoing.sent.append([(self._links.send(part, target, tag, "failed"), part)])

    def clear(self) -> None:
        """After a failure: take all that is still sent to this rank; the next batch finds nothing on its way."""
        for queue in self._queues.values():
            while queue.opened or queue.expected:
                with contextlib.suppress(_Farewell):
                    self._receive_next(queue)
            queue.arrived.clear()
        self.finish()

    def give_up(self) -> None:
        """What is still on its way will not be waited for, but the transport uses its buffers."""
        for outgoing in self._out.values():
            SEAM.keep(*(work for parts in outgoing.sent for work, _ in parts))
        for queue in self._queues.values():
            SEAM.keep(*(work for _, work, _ in queue.opened))

    def _receive_next(self, queue: _Queue) -> None:
        """Take the next message of ``queue``, whichever it is."""
        if queue.opened or self._open_next(queue):
            message, work, buffer = queue.opened.popleft()
            work.wait()
            form = self._known[edge_of(message)]
        else:
            message = queue.expected.popleft()
            form, buffer = self._receive_with_form(queue.source, message)
        # On a GPU reading the first byte would stop the stream; there a failed peer shows as a dead process.
        if buffer.device.type == "cpu" and int(buffer[0]) == FAILED:
            raise _Farewell
        queue.arrived[message] = form, buffer

    def _open_next(self, queue: _Queue) -> bool:
        """Open the receive of the next message; False where its form must come first."""
        form = self._known.get(edge_of(queue.expected[0]))
        if form is None or self._dynamic:
            return False
        message = queue.expected.popleft()
        buffer = torch.empty(form.nbytes, dtype=torch.uint8, device=self.device)
        work = self._links.recv(buffer, queue.source, _VALUE_TAG, label_of(message))
        queue.opened.append((message, work, buffer))
        return True

    def _receive_with_form(self, source: int, message: Message) -> tuple[Form, torch.Tensor]:
        sizes = torch.empty(_SIZES, dtype=torch.int64, device=self.device)
        self._links.recv(sizes, source, _FORM_TAG, "form").wait()
        form_bytes, value_bytes = sizes.tolist()
        if form_bytes < 0:
            raise _Farewell
        data = torch.empty(form_bytes, dtype=torch.uint8, device=self.device)
        self._links.recv(data, source, _FORM_TAG, "form").wait()
        form = self._known[edge_of(message)] = Form.from_bytes(bytes(data.tolist()))
        buffer = torch.empty(value_bytes, dtype=torch.uint8, device=self.device)
        self._links.recv(buffer, source, _VALUE_TAG, label_of(message)).wait()
        return form, buffer
