"""What lies in another process's memory, and what is done with it: the parts of ``one_sided.py``."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol
from zlib import crc32

import torch

from zeropipe.comm.group import Group
from zeropipe.comm.host.board import LINE, Line, Page, Place

PUBLISHED, READ, CUT = range(3)
GONE, LATE = "Connection closed by peer", "Timed out waiting"  # gloo's words
_WORD = struct.Struct("<IIQqQQQ")
_NO_LIMIT = 1e9  # s
_GLANCES = 20  # before a wait sleeps
_NAP, _LONGEST_NAP = 2e-5, 1e-3  # s
Key = tuple[int, int]  # circle, tag


@dataclass(frozen=True, slots=True)
class Word:
    """What one rank says to another, in 48 bytes: ``said`` is PUBLISHED, READ or CUT."""

    said: int
    checked: int = 0  # crc of what is published; 0: none
    circle: int = 0  # the group
    tag: int = 0
    at: int = 0  # address
    nbytes: int = 0
    number: int = 0  # counts what this rank has published to that one


def circle_of(group: Group) -> int:
    """A number of ``group``, the same on all members and no other's; what is kept of it outlives its process group."""
    return _number_of("" if group.pg is None else str(group.pg.group_name))


@lru_cache(maxsize=2**12)
def _number_of(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest())


class _Span(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("at", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


class Memory:
    """Reads other processes' memory. Raises OSError where this system has no such call."""

    def __init__(self) -> None:
        try:
            self._call = ctypes.CDLL(None, use_errno=True).process_vm_readv
        except AttributeError as error:
            raise OSError("this system has no process_vm_readv") from error
        span, one = ctypes.POINTER(_Span), ctypes.c_ulong
        self._call.argtypes = (ctypes.c_int, span, one, span, one, one)
        self._call.restype = ctypes.c_ssize_t

    def read(self, pid: int, at: int, to: int, nbytes: int) -> None:
        """Copy ``nbytes`` at the address ``at`` of process ``pid`` to the address ``to`` of this one."""
        while nbytes:  # at most 2 GiB come at once
            found = self._call(pid, _Span(to, nbytes), 1, _Span(at, nbytes), 1, 0)
            if found <= 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            at, to, nbytes = at + found, to + found, nbytes - found


class Host(Protocol):
    """What a transfer needs of those who share a memory (``OneSided``)."""

    def cut(self, circle: int, ranks: Sequence[int], why: str) -> None: ...
    def why_cut(self, circle: int) -> str: ...
    def listen(self, peer: Peer) -> None: ...
    def progress(self) -> None: ...
    def call(self, ranks: Sequence[int]) -> None: ...


class Transfer:
    """The handle of what is under way, as gloo's."""

    def __init__(self, host: Host, group: Group, kind: str) -> None:
        self.host, self.group, self.circle = host, group, circle_of(group)
        self.error = ""
        self._over = False
        self._kind = kind

    def end(self, error: str = "") -> None:
        """It is done, or has failed; for good. Called by whoever has taken it off the lists of what is under way."""
        if not self._over:
            self.error = error
            self.let_go()
            self._over = True

    def let_go(self) -> None:
        """Keep no memory."""

    def wait(self, limit: timedelta | None = None) -> None:
        """Raises RuntimeError, as gloo's, where it failed or took longer than ``limit``, None: the group's."""
        if not self._over:
            self.host.progress()
        if not self._over:
            seconds = seconds_of(limit, self.group)
            for _ in naps(seconds, lambda: self.host.call(self.group.ranks)):
                self.host.progress()
                if self._over:
                    break
            else:
                text = f"{LATE} {seconds * 1000:.0f}ms for {self._kind} operation to complete"
                self.host.cut(self.circle, self.group.ranks, text)  # which ends this one too
        if self.error:
            raise RuntimeError(self.error)

    def is_completed(self) -> bool:
        return self._over


def seconds_of(limit: timedelta | None, group: Group) -> float:
    """Seconds that a member of ``group`` waits: ``limit``, None: the group's."""
    limit = limit or group.timeout
    return _NO_LIMIT if limit is None else limit.total_seconds()


def naps(seconds: float, before: Callable[[], None]) -> Iterator[None]:
    """The moments at which to look again, for so long; ``before`` the first nap."""
    for _ in range(_GLANCES):
        yield
        time.sleep(0)  # which lets another thread of this process run
    before()
    end, nap = time.monotonic() + seconds, _NAP
    while time.monotonic() < end:
        time.sleep(nap)
        yield
        nap = min(1.2 * nap, _LONGEST_NAP)


class Published(Transfer):
    """Memory that a peer reads, and which must stay as it is until then."""

    def __init__(self, host: Host, group: Group, tensor: torch.Tensor) -> None:
        super().__init__(host, group, "send")
        self._tensor: torch.Tensor | None = tensor

    def let_go(self) -> None:
        self._tensor = None


@dataclass(slots=True)
class Source:
    """What a peer has published."""

    peer: Peer
    word: Word
    _found: int = 0  # crc of what was read

    def read(self, memory: Memory, to: torch.Tensor, first: int) -> None:
        """The bytes from ``first`` on, as many as ``to`` (contiguous) has; each once, and in their order."""
        memory.read(self.peer.pid, self.word.at + first, to.data_ptr(), to.nbytes)
        if self.word.checked:
            self._found = crc_of(to, self._found)

    @property
    def changed(self) -> bool:
        return bool(self.word.checked) and self._found != self.word.checked


class Reading(Transfer):
    """What is done once all of the peers' values are there to be read: ``use`` gets a source for each peer."""

    def __init__(
        self,
        host: Host,
        group: Group,
        peers: Sequence[Peer],
        nbytes: int,
        use: Callable[[Sequence[Source]], None],
    ) -> None:
        super().__init__(host, group, "recv")
        self._peers, self._nbytes = peers, nbytes
        self._sources: dict[int, Source] = {}  # by rank
        self._use: Callable[[Sequence[Source]], None] | None = use
        self._running = threading.Lock()

    def arrive(self, source: Source) -> bool:
        """One of the sources is there; returns whether that was the last."""
        self._sources[source.peer.of_world] = source
        return len(self._sources) == len(self._peers)

    def end(self, error: str = "") -> None:
        with self._running:  # whoever gives it up may free what it writes to
            super().end(error)

    def run(self) -> None:
        """Read, and say so."""
        error, sources = "", [self._sources[peer.of_world] for peer in self._peers]
        interrupt: BaseException | None = None
        with self._running:
            if self._use is None:
                return
            try:
                self._read(self._use, sources)
            except BaseException as reason:
                error = str(reason) or type(reason).__name__
                interrupt = None if isinstance(reason, Exception) else reason
        # The number of a process that has ended may be another's by now. Looked at before what was said: who calls has
        # said before what he calls for, and this may take the call in place of the thread.
        ended = [peer for peer in self._peers if peer.has_ended()]
        # A peer that gives up on this says so before it touches what it has published: then this hears it here.
        for peer in self._peers:
            self.host.listen(peer)
        error = error or self.host.why_cut(self.circle) or (GONE if ended else "")
        if error:
            self.host.cut(self.circle, self.group.ranks, error)
        else:
            for source in sources:
                source.peer.tell(Word(READ, number=source.word.number))
        self.end(error)
        if interrupt is not None:
            raise interrupt  # Ctrl-C is this thread's; the members have been told, who would wait

    def _read(self, use: Callable[[Sequence[Source]], None], sources: Sequence[Source]) -> None:
        odd = next((source for source in sources if source.word.nbytes != self._nbytes), None)
        if odd is not None:
            raise RuntimeError(
                f"rank {odd.peer.of_world} has sent {odd.word.nbytes} bytes, not {self._nbytes}"
            )
        try:
            # Writes to what a block of torch.inference_mode() has made too, whose mode is not this thread's.
            with torch.inference_mode():
                use(sources)
        except OSError as reason:
            raise RuntimeError(f"{GONE}: its memory cannot be read ({reason})") from reason
        odd = next((source for source in sources if source.changed), None)
        if odd is not None:
            raise RuntimeError(f"rank {odd.peer.of_world} has changed what it sent before it was read")

    def let_go(self) -> None:
        self._use = None


@dataclass(eq=False)
class Peer:
    """Another rank of this host, and what is between it and this one."""

    of_world: int  # its rank
    pid: int
    line: socket.socket  # by which it is called, and whose end is its own
    page: Page  # where it says its words
    mine: Place  # where this rank says its words to it
    me: int  # this rank
    gone: bool = False
    published: dict[int, Published] = field(default_factory=dict)  # by number
    wanted: dict[Key, deque[Reading]] = field(default_factory=dict)
    arrived: dict[Key, deque[Source]] = field(default_factory=dict)
    _count: int = 0
    _place: Place | None = None  # where it says its words to this rank, once it is there
    _unsaid: deque[bytes] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._says = Line(self.mine, _WORD.size)

    def enter(self, published: Published) -> int:
        """The number of what is published to it now."""
        self._count += 1
        self.published[self._count] = published
        return self._count

    def leave(self) -> list[Transfer]:
        """Its process has ended, or this one goes: what was under way."""
        self.gone = True
        self.line.close()
        ended = [*self.published.values(), *(reading for line in self.wanted.values() for reading in line)]
        for known in (self.published, self.wanted, self.arrived):
            known.clear()
        return ended

    @property
    def has_left(self) -> bool:
        """Whether what was under way with it is over."""
        return self.line.fileno() < 0

    @property
    def is_full(self) -> bool:
        """Whether words wait for room on the line."""
        return bool(self._unsaid)

    def tell(self, word: Word) -> None:
        """Never waits: what the line has no room for leaves when it has."""
        self._unsaid.append(
            _WORD.pack(word.said, word.checked, word.circle, word.tag, word.at, word.nbytes, word.number)
        )
        self.flush()

    def flush(self) -> None:
        with self._lock:
            theirs = self._theirs()
            while self._unsaid and self._says.room(theirs) > 0:
                self._says.say(self._unsaid.popleft())

    @property
    def has_news(self) -> bool:
        theirs = self._theirs()
        return theirs is not None and self._says.has_news(theirs)

    def hear(self) -> list[Word]:
        """The words that have come."""
        theirs = self._theirs()
        found = b"" if theirs is None else self._says.hear(theirs)
        return [Word(*fields) for fields in _WORD.iter_unpack(found)]

    def call(self) -> None:
        """Let its thread look at what was said."""
        with suppress(OSError):  # it looks already, or is gone, which the end of its line tells
            self.line.send(b"x", socket.MSG_DONTWAIT)

    def has_ended(self) -> bool:
        """Whether its process has; and it is no longer calling."""
        try:
            self.gone = self.gone or not self.line.recv(2**12, socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass
        except OSError:
            self.gone = True
        return self.gone

    def _theirs(self) -> Place | None:
        if self._place is None:
            self._place = self.page.find(self.me, LINE)
        return self._place


def crc_of(tensor: torch.Tensor, before: int = 0) -> int:
    """Of the bytes of ``tensor`` (contiguous), after those of which it was ``before``; never 0."""
    return crc32((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()), before) or 1
