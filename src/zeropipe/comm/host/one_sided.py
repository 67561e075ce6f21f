"""The transport inside a host: ranks read each other's memory where it lies, and small words say when they may.

::

    rank 0 (has the values)                            rank 1 (wants them)
    publish   "tag, 4 MiB at 0x7f..."  ----------->    read   once it was asked for: from there to where it is wanted,
              the values stay as they are                     or added to a sum
    wait      (drain)                  <-----------    "have read your number 12"
              they may be written again

Nothing is copied in order to be sent: ``process_vm_readv`` reads any memory of a process of the same user. Words are
stored on the board (``board.py``). Beside it each pair has a socket that no file system knows: by it a rank is called,
and the kernel closes it with its process, so that a rank which is killed is noticed at once.

It keeps the contract of gloo's messages, so whoever sends and receives need not know of it: by pair, group and tag they
match in order; a wait that takes too long raises, and ends what the group has under way, on all its members.

[1] A rank may write what it has published once the peer has said that it has read it, and ``wait`` waits for that. So
    no step and no schedule has an order of its own to keep because of this transport.
[2] What was asked for and is there is read by whoever waits for anything (``progress``), and by a thread where a peer
    that is about to sleep calls (``call``), whatever the rank itself does meanwhile. So a ``wait`` for a peer ends soon
    after that has asked for its part: what does not deadlock by messages does not deadlock here.
[3] A word never waits for room, and who reads never waits for a word: no rank waits but in ``wait``.
"""

from __future__ import annotations

import atexit
import os
import select
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
import torch.distributed as dist

from zeropipe.comm.group import Group
from zeropipe.comm.host.board import LINE, Page, orders_stores, own_page
from zeropipe.comm.host.reading import (
    CUT,
    GONE,
    PUBLISHED,
    READ,
    Key,
    Memory,
    Peer,
    Published,
    Reading,
    Source,
    Transfer,
    Word,
    crc_of,
)
from zeropipe.comm.host.thread import Waiting

LEAST = 1  # bytes that do not go by messages
_SOON = 5  # ms


class OneSided:
    """The ranks that read this one's memory, as this one theirs, and the thread that they call. Process groups belong
    to the process, and so does this."""

    def __init__(self) -> None:
        self.least = LEAST
        # Whether who reads finds out that it was written to meanwhile; costs as much as reading.
        self.checks = False
        self.borrowed = 0  # bytes of others' memory that are mapped here, which their owners count
        self._peers: dict[int, Peer] = {}  # by rank of the world
        self._thread: Waiting | None = None
        self._begin_anew()
        os.register_at_fork(after_in_child=self._leave)  # no thread there, and the lines are the parent's

    def _begin_anew(self) -> None:
        self._lock = threading.Lock()
        self._hears = threading.RLock()  # so that words are taken in in their order
        self._world: Callable[[], object] = lambda: None  # the one that this is about
        # Of ranks who know each other: with whom each shares its memory, itself among them.
        self._met: list[Mapping[int, frozenset[int]]] = []
        self._within: dict[tuple[int, ...], bool] = {}  # what that says of groups that were asked for
        self._page: tuple[Page, int] | None = None  # where this rank says its words, and the descriptor
        self._broken: dict[int, str] = {}  # groups that were cut, and why
        self._ready: deque[Reading] = deque()
        self._memory: Memory | None = None
        self._peers = {}

    def _leave(self) -> None:
        if self._thread is not None:
            self._thread.forget()
        for peer in self._peers.values():
            peer.line.close()
        if self._page is not None:
            os.close(self._page[1])
        self._thread = None
        self._begin_anew()

    # ---- who is here ----

    @property
    def _here(self) -> bool:
        return self._world() is not None and self._world() is dist.group.WORLD

    def met(self, group: Group) -> bool:
        """Whether all members have told each other what they can do; the same on all of them."""
        return self._here and any(met.keys() >= set(group.ranks) for met in self._met)

    def within(self, group: Group) -> bool:
        """Whether all members read each other's memory; the same on all of them."""
        if not self._here:
            return False
        found = self._within.get(group.ranks)
        if found is None:
            ranks, nobody = group.ranks, frozenset[int]()
            found = any(all(met.get(rank, nobody).issuperset(ranks) for rank in ranks) for met in self._met)
            self._within[ranks] = found
        return found

    def own_page(self) -> tuple[Page, int] | None:
        """Where this rank says its words, and the descriptor by which others map it; None where that cannot be. With it
        comes all else that a rank needs of its system: what it lacks it must lack before the others count on it."""
        self._be_here()
        if not orders_stores():
            return None
        # No descriptor is left, no such call, no thread.
        with suppress(OSError, AttributeError, RuntimeError):
            if self._thread is None:
                self._thread = Waiting(self._run)
                atexit.register(self.close)
            self._page = self._page or own_page()
            return self._page
        return None

    def peers_of(self, group: Group) -> dict[int, Peer]:
        """By member, of a group whose members have mapped each other's pages."""
        return {m: self._peers[rank] for m, rank in enumerate(group.ranks) if m != group.rank}

    def borrow(self, memory: torch.Tensor) -> None:
        """``memory`` is another rank's, mapped here."""
        self.borrowed += memory.nbytes
        weakref.finalize(memory.untyped_storage(), self._give_back, memory.nbytes)

    def _give_back(self, nbytes: int) -> None:
        self.borrowed -= nbytes

    def meet(
        self,
        group: Group,
        memory: Memory | None,
        lines: Mapping[int, tuple[int, socket.socket, Page]],
        near: Mapping[int, frozenset[int]],
    ) -> None:
        """The members have told each other: ``lines`` has the process, the line and the page of each, by rank, with
        whom this one shares its memory; ``near`` says of every member whose it shares, and is the same on all."""
        self._be_here()
        self._memory = memory or self._memory
        self._met.append(near)
        self._within.clear()
        for _, line, _ in lines.values():
            line.setblocking(False)
        # Another object: the thread may be going through this one. Who is known already keeps the line that he has.
        if lines:
            me, page = group.ranks[group.rank], self._page
            assert page is not None
            made = {
                rank: Peer(rank, *line, page[0].take(rank, LINE), me)
                for rank, line in lines.items()
                if rank not in self._peers
            }
            self._peers = self._peers | made
        if not self._peers:
            self._end_thread()
        elif self._thread is not None:
            self._thread.wake()

    def _be_here(self) -> None:
        """Forget another world than this."""
        if not self._here:
            self.close()
            assert dist.group.WORLD is not None
            self._world = weakref.ref(dist.group.WORLD)

    def _end_thread(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.end()
            atexit.unregister(self.close)

    def close(self) -> None:
        """End the thread and the lines: what is under way fails, here and there."""
        self._end_thread()
        for peer in self._peers.values():
            self._lose(peer)
        self._leave()

    # ---- the words of the seam ----

    def peer(self, group: Group, member: int, nbytes: int) -> Peer | None:
        """With whom ``nbytes`` are exchanged so; None where they go another way. The same on both sides."""
        if nbytes < self.least or not self._peers or not self._here:
            return None
        return self._peers.get(group.ranks[member])

    def publish(self, tensor: torch.Tensor, peer: Peer, group: Group, tag: int) -> Published:
        """Let ``peer`` read ``tensor`` (contiguous), which stays as it is until the result was waited for."""
        published = Published(self, group, tensor)
        key = published.circle, tag
        checked = crc_of(tensor) if self.checks else 0
        with self._lock:
            error = self._error(peer, key)
            if not error:
                # Inside the lock: in one order on both sides, whichever thread publishes.
                number = peer.enter(published)
                peer.tell(Word(PUBLISHED, checked, *key, tensor.data_ptr(), tensor.nbytes, number))
        if error:
            published.end(error)
        self._push(peer)
        return published

    def read(self, tensor: torch.Tensor, peer: Peer, group: Group, tag: int) -> Reading:
        """Fill ``tensor`` (contiguous) with what ``peer`` publishes next to this rank in this group by this tag."""
        return self.read_all([peer], tensor.nbytes, group, tag, lambda sources: self.take(sources[0], tensor))

    def read_all(
        self,
        peers: Sequence[Peer],
        nbytes: int,
        group: Group,
        tag: int,
        use: Callable[[Sequence[Source]], None],
    ) -> Reading:
        """Call ``use``, in the thread that makes progress, with what each of ``peers`` publishes next (``nbytes``
        each)."""
        reading, last = Reading(self, group, peers, nbytes, use), False
        key = reading.circle, tag
        with self._lock:
            error = next((text for peer in peers if (text := self._error(peer, key))), "")
            for peer in () if error else peers:
                if arrived := peer.arrived.get(key):
                    last = reading.arrive(arrived.popleft())
                else:
                    peer.wanted.setdefault(key, deque()).append(reading)
        if error:
            reading.end(error)
        elif last:
            self._ready.append(reading)
            self.progress()
        return reading

    def take(self, source: Source, to: torch.Tensor, first: int = 0) -> None:
        """For ``use``: the bytes of ``source`` from ``first`` on, as many as ``to`` (contiguous) has; each once, and in
        their order."""
        assert self._memory is not None
        source.read(self._memory, to, first)

    def cut(self, circle: int, ranks: Sequence[int], why: str) -> None:
        """End what the group ``circle`` of ``ranks`` has under way with ``why``, here and on all its members, for good:
        it is not used again."""
        if circle not in self._broken:
            for rank in ranks:
                if rank in self._peers:
                    self._peers[rank].tell(Word(CUT, circle=circle))
                    self._peers[rank].call()
                    self._push(self._peers[rank])
            self._break(circle, why)

    def why_cut(self, circle: int) -> str:
        return self._broken.get(circle, "")

    # ---- who reads ----

    def progress(self) -> None:
        """Take in what was said by now, and read what is there to be read. Any thread may; the one that waits does."""
        for peer in self._peers.values():
            if peer.has_news:
                self.listen(peer)
            if peer.is_full:
                peer.flush()
        while self._ready:
            try:
                reading = self._ready.popleft()
            except IndexError:  # another thread has it
                break
            reading.run()

    def call(self, ranks: Sequence[int]) -> None:
        """Have those of ``ranks`` that share this memory look, by their threads: this rank is about to sleep."""
        for rank in ranks:
            if rank in self._peers:
                self._peers[rank].call()

    def _run(self, thread: Waiting) -> None:
        while not thread.ending:
            here = {peer.line.fileno(): peer for peer in list(self._peers.values()) if not peer.has_left}
            poll = select.poll()
            for number in (thread.woken, *here):
                poll.register(number, select.POLLIN)
            # Who has words that a line had no room for looks whether it has.
            full = any(peer.is_full for peer in here.values())
            for number, _ in poll.poll(_SOON if full else None):
                if number == thread.woken:
                    os.read(number, 2**12)
                elif here[number].has_ended():
                    self.listen(here[number])  # its last words
                    self._lose(here[number])
            self.progress()

    def listen(self, peer: Peer) -> None:
        """Take in what ``peer`` has said by now."""
        with self._hears:
            for word in peer.hear():
                self._take_in(peer, word)

    def _take_in(self, peer: Peer, word: Word) -> None:
        key = word.circle, word.tag
        if word.said == PUBLISHED:
            source = Source(peer, word)
            with self._lock:
                if wanted := peer.wanted.get(key):
                    reading = wanted.popleft()
                    if reading.arrive(source):
                        self._ready.append(reading)
                else:
                    peer.arrived.setdefault(key, deque()).append(source)
        elif word.said == READ:
            with self._lock:
                published = peer.published.pop(word.number, None)
            if published is not None:
                published.end()
        else:
            self._break(word.circle, GONE)

    def _lose(self, peer: Peer) -> None:
        """Its process has ended, or this one goes."""
        with self._lock:
            ended = peer.leave()
        for transfer in ended:
            # Of the others some wait for this rank, which goes on with none of it: what it wanted of all has failed.
            # They hear it before whoever waits here may write to what they read.
            self.cut(transfer.circle, transfer.group.ranks, GONE)
            transfer.end(GONE)

    def _break(self, circle: int, why: str) -> None:
        with self._lock:
            self._broken.setdefault(circle, why)
            ended: list[Transfer] = []
            for peer in self._peers.values():
                numbers = [n for n, one in peer.published.items() if one.circle == circle]
                if numbers:  # who still reads hears it from this rank, before that may be written to
                    peer.tell(Word(CUT, circle=circle))
                ended += [peer.published.pop(number) for number in numbers]
                for key in [key for key in peer.wanted if key[0] == circle]:
                    ended += peer.wanted.pop(key)
        ended += [reading for reading in list(self._ready) if reading.circle == circle]
        for transfer in ended:
            transfer.end(why)

    def _error(self, peer: Peer, key: Key) -> str:
        return GONE if peer.gone else self._broken.get(key[0], "")

    def _push(self, peer: Peer) -> None:
        """Let the thread see to words that the line to ``peer`` has no room for."""
        thread = self._thread
        if peer.is_full and thread is not None:
            thread.wake()


ONE_SIDED = OneSided()
