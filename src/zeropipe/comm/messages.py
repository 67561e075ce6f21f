"""How one message reaches one peer on gloo: which tag it carries, and who hands it over.

Messages between two ranks match in order per tag, so each purpose has tags of its own:

    7919 + 4 * channel + 0      what a collective moves                (DATA)
                       + 1      the second hop of a gather             (SECOND_HOP)
                       + 2      words, + 65536 * partings              (WORDS)
                       + 3      nothing, ever                          (NEVER)
    7919 + 4 * 3 ..    many bytes beside a training that goes on       (``carry``)
    2**30 + a label's crc       what a guarded gather moves

A channel (0, 1, ...) is a stream of collectives that needs no order among those of other channels.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any
from zlib import crc32

import torch

from zeropipe.comm.group import Group
from zeropipe.comm.host.one_sided import ONE_SIDED, Peer
from zeropipe.comm.record import Call, did_not_complete

_FIRST = 7919  # keeps our exchanges apart from a user's own send and recv on the same group
# A second hop is sent when the first is waited for, so it must not queue behind later first hops.
DATA, SECOND_HOP, WORDS, NEVER = range(4)
_PURPOSES = 4
_EPOCH, _EPOCHS = 2**16, 2**13  # apart are the tags of words before and after a parting
_LABELS = 2**30  # tags from here on belong to labels

_PATIENCE = 5.0  # seconds at the end of the process for messages that are not handed over yet
Cut = tuple[int, torch.Tensor]  # (member, what it is sent, or where it goes)
Message = Callable[[], Any]  # hands one message over; returns gloo's handle of it, None for an empty one


class Posted:
    """The handle of messages that are handed over soon."""

    __slots__ = ("_error", "_gate", "_handles", "_messages")

    def __init__(self, messages: Sequence[Message]) -> None:
        self._messages = messages
        self._handles: deque[Any] = deque()
        self._error: BaseException | None = None
        self._gate = threading.Lock()  # closed until all are handed over
        self._gate.acquire()

    def hand_over(self) -> None:
        for message in self._messages:
            try:
                handle = message()
            except BaseException as error:  # the thread that waits raises the first one
                # A peer that is gone is no reason to keep the others waiting: a last word is for them.
                self._error = self._error or error
            else:
                if handle is not None:
                    self._handles.append(handle)
        # They hold the tensors that were sent, which may now be freed by whoever owns them.
        self._messages = ()
        self._gate.release()

    def wait(self, *limit: Any) -> None:
        """Until all have arrived. Raises what handing them over raised."""
        with self._gate:
            pass
        if self._error is not None:
            raise self._error
        while self._handles:
            self._handles[0].wait(*limit)
            self._handles.popleft()

    def is_completed(self) -> bool:
        return not self._gate.locked() and all(handle.is_completed() for handle in self._handles)


class Poster:
    """Hands messages to gloo in a thread of its own, in the order in which they are posted. One per process."""

    # Gloo's device thread holds the lock of a pair of ranks while it moves a large message in or out, and whoever
    # hands over the next message waits for that lock: at stage 3, a tenth of a training step. The poster waits
    # instead, and the thread that computes goes on. Its thread starts with the first message and ends before the
    # interpreter does: one that came back from the transport later would end the process with an abort.

    def __init__(self) -> None:
        self._start_anew()
        os.register_at_fork(
            after_in_child=self._start_anew
        )  # no thread there, and the messages are the parent's

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Posted | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def post(self, messages: Sequence[Message]) -> Posted:
        """Have ``messages`` handed over, after all that were posted before them."""
        posted = Posted(messages)
        with self._lock:
            if self._thread is None:
                # A daemon, so that one that the transport never lets go does not keep the process.
                self._thread = threading.Thread(target=self._run, name="zeropipe poster", daemon=True)
                self._thread.start()
                atexit.register(self.close)
            self._queue.put(posted)
        return posted

    def close(self) -> None:
        """Hand over what is posted and end the thread, which takes ``_PATIENCE`` at most; a later message starts it
        anew."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._queue.put(None)
        if thread is not None:
            thread.join(_PATIENCE)
        atexit.unregister(self.close)

    def _run(self) -> None:
        while (posted := self._queue.get()) is not None:
            posted.hand_over()
            del posted


POSTER = Poster()


def tag_of(channel: int, purpose: int = DATA, epoch: int = 0) -> int:
    return _FIRST + _PURPOSES * channel + purpose + _EPOCH * (epoch % _EPOCHS)


def tag_of_label(label: str, numel: int) -> int:
    """Only exchanges of one label and size meet under it: gloo ends the process where a message is larger than the
    buffer that waits for it, so exchanges of different things must not."""
    return _LABELS + crc32(f"{label} {numel}".encode()) % _LABELS


def peers(group: Group) -> list[int]:
    """The other members, starting after this one, so that no member is everybody's first."""
    return [(group.rank + step) % group.size for step in range(1, group.size)]


# The process group's own methods: dist.isend and irecv look up the rank that we come from, which costs as much as a
# small message does.


def send_to(tensor: torch.Tensor, dst: int, group: Group, tag: int = _FIRST) -> Any:
    """Start to send to member ``dst``; None where there is nothing to send."""
    peer = neighbour(tensor, dst, group)
    if peer is None:
        return _send(tensor, dst, group, tag)
    return ONE_SIDED.publish(tensor, peer, group, tag)


def receive_from(tensor: torch.Tensor, src: int, group: Group, tag: int = _FIRST) -> Any:
    """Start to receive from member ``src``; None where there is nothing to receive."""
    peer = neighbour(tensor, src, group)
    if peer is None:
        return _receive(tensor, src, group, tag)
    return ONE_SIDED.read(tensor, peer, group, tag)


def neighbour(tensor: torch.Tensor, member: int, group: Group) -> Peer | None:
    """The member, where ``tensor`` goes there through the memory of this host; the same on both sides."""
    if tensor.device.type != "cpu" or group.speaking is not group:
        return None
    return ONE_SIDED.peer(group, member, tensor.nbytes)


def _send(tensor: torch.Tensor, dst: int, group: Group, tag: int) -> Any:
    assert group.pg is not None
    return group.pg.send([_real(tensor)], dst, tag) if tensor.numel() else None


def _receive(tensor: torch.Tensor, src: int, group: Group, tag: int) -> Any:
    assert group.pg is not None
    return group.pg.recv([_real(tensor)], src, tag) if tensor.numel() else None


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def start(
    what: Call | str,
    sends: Iterable[Cut],
    receives: Iterable[Cut],
    group: Group,
    tag: int = _FIRST,
    *,
    soon: bool = False,
    words: bool = False,
) -> list[Any]:
    """Send and receive (member, tensor) by ``tag`` for ``what``; the handles of what is under way. What does not go by
    the memory of this host is handed to gloo here and now or, ``soon``, by the poster; ``words`` always are.

    Messages of one tag must all take the same way: either keeps their order. The poster is for streams that run beside
    others (channels from 1 on) and for words, which meet large messages on their way in.
    """
    handles: list[Any] = []
    messages: list[Message] = []
    for begin, by_gloo, cuts in ((send_to, _send, sends), (receive_from, _receive, receives)):
        for member, tensor in cuts:
            if not words and neighbour(tensor, member, group) is not None:
                handles.append(begin(tensor, member, group, tag))
            else:
                messages.append(partial(by_gloo, tensor, member, group, tag))
    if soon and messages:
        handles.append(POSTER.post(messages))
    elif messages:
        try:
            handles += [message() for message in messages]
        except RuntimeError as error:  # a connection that is known to be gone takes none
            raise did_not_complete(what, error) from error
    return [handle for handle in handles if handle is not None]


_BESIDE = 3  # the channel of what is carried
_AT_ONCE = 4 * 2**20  # bytes: between two of these the messages of the training pass


def carry(
    group: Group,
    sends: Sequence[tuple[torch.Tensor, int]] = (),
    receives: Sequence[tuple[torch.Tensor, int]] = (),
) -> None:
    """Move whole memories (uint8, 1D) to and from members while others compute and communicate; for a thread too.

    A pair of members meets in the order of its calls. Raises what the transport does when a peer is gone.
    """
    tag = tag_of(_BESIDE)
    longest = max((len(memory) for memory, _ in (*sends, *receives)), default=0)
    for start in range(0, longest, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        handles = [send_to(memory[part], peer, group, tag) for memory, peer in sends if start < len(memory)]
        handles += [
            receive_from(memory[part], peer, group, tag) for memory, peer in receives if start < len(memory)
        ]
        for handle in handles:
            handle.wait()
