"""The talk of ranks that share a host: words on a board, and memory of others that is read without waiting for them.

A word costs a store, and is compared with those of the others when somebody needs it compared, or in passing: by who
goes on without them (``glance``). What differs is found where it was said, if later than by messages.

Memory that is *exposed* (``exposed.py``) is read by ``read``, in the order of the talk, as if its owner had sent it
there: the values are those that it has when it comes to the same word. To wait for that is not needed where all ranks
have promised not to write to what they expose (``promise``, right after they have met)::

    rank 0   "forward"  promise  |read a|read b|read c|   ...backward...   |withdraw, drain| writes
    rank 1   "forward"  promise       |read a|    |read b|      |read c|        ...
                                   b of rank 0 is read before rank 0 has come to "b", or long after: it is the same

[1] A promise is the number of the word at which it was made. Who reads by one looks at the owners' afterwards: if one
    has withdrawn it by then, what was read may be of two kinds, and is read again once that owner has come to the word.
[2] Who wants to write withdraws, and waits until all have read whatever goes by the words that it has said itself
    (``drain``). Who is further waits for this rank by [1], so everybody has read all that is before the write.
[3] Without a promise a read waits until all have come to its word: the order of messages.
[4] So nobody waits for a rank that waits for it: by [2] the writer has said its words and has nothing more to give, by
    [1] and [3] the reader waits for a word, which the owner says at the latest when it has written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Protocol

from zeropipe.comm.group import Group
from zeropipe.comm.host.board import BEFORE, COUNT, EPOCH, HEARD, READ, RING, STABLE, START, WORD_BYTES, Place
from zeropipe.comm.host.giving_up import give_up
from zeropipe.comm.host.one_sided import ONE_SIDED
from zeropipe.comm.host.reading import GONE, LATE, circle_of, naps
from zeropipe.comm.record import Work
from zeropipe.errors import DesyncError

NOTE_BYTES = 8
TEXT_BYTES = WORD_BYTES - NOTE_BYTES  # of a label its end, which tells layers apart
_AHEAD = 2  # reductions that a rank may have started before the slowest, when it reads without waiting
_NO_LIMIT = 1e9  # s


def packed(text: str) -> bytes:
    return text.encode()[-TEXT_BYTES:].ljust(TEXT_BYTES)


def parted(group: Group, mine: str, peer: int, theirs: bytes) -> DesyncError:
    """The error where member ``peer`` says ``theirs`` and this rank ``mine``."""
    other = theirs.decode(errors="replace").strip()
    return DesyncError(
        f"ranks went different ways: this one is at '{mine}', rank {group.ranks[peer]} is at '{other}'",
        rank=group.ranks[group.rank],
        expected="the same modules in the same order on every rank",
        found=f"'{mine}' here and '{other}' there",
        fix="make control flow equal on all ranks, or mark the module around both with "
        "set_z3_leaf_modules so that it is gathered whole",
    )


class Relay(Protocol):
    """What a member owes its peers once all have said the same word: the second hop of a gather."""

    def begin(self) -> None: ...
    def abort(self) -> None:
        """Let the peers know that nothing will come."""


class NearWord:
    """One word of this rank, and those of the others to compare it with."""

    __slots__ = ("index", "limit", "lowest_note", "note", "relay", "said", "talk", "text")

    def __init__(
        self,
        talk: NearTalk,
        text: str,
        note: int,
        patience: timedelta | None,
        relay: Relay | None,
        index: int,
    ) -> None:
        self.talk, self.text, self.note = talk, text, note
        self.limit, self.relay, self.index, self.said = patience, relay, index, packed(text)
        self.lowest_note: int | None = None  # once compared

    def meet(self) -> int:
        return self.talk.meet(self)


class NearTalk:
    """The words that the members of one group say on one channel, in one order."""

    def __init__(self, group: Group, channel: int) -> None:
        self.group, self.channel = group, channel
        self._circle = circle_of(group)
        self._peers = ONE_SIDED.peers_of(group)
        page = ONE_SIDED.own_page()
        assert page is not None
        self._mine: Place = page[0].take(self._circle, channel)
        self._places: dict[int, Place] = {}  # of the others, by member, once they are there

        # Of this epoch.
        self.partings = 0  # how often words were found to differ
        self._said = 0
        self._met = 0  # words up to the last that was waited for
        self._unmet: deque[NearWord] = deque()  # said here and not compared yet, oldest first
        self._reads: deque[NearWord] = deque()  # reads that are not over, oldest first

    # ---- words ----

    def say(
        self, text: str, note: int = 0, patience: timedelta | None = None, relay: Relay | None = None
    ) -> NearWord:
        """Tell every member what is about to be done; ``relay`` begins when the words are found equal. Waits only for
        one who is ``RING`` words behind; raises CommunicationError where that takes too long."""
        word = NearWord(self, text, note, patience, relay, self._said)
        if not self._has_room():
            self._wait_by_name(text, self._has_room, patience)
        self._mine.say(word.said + note.to_bytes(NOTE_BYTES))
        self._said += 1
        self._unmet.append(word)
        self._tell_read()
        return word

    def meet(self, word: NearWord) -> int:
        """The lowest of the members' notes on ``word``, once it and all words before it are found equal."""
        while word.lowest_note is None:
            if not self._unmet:
                raise DesyncError(f"'{word.text}' was given up: ranks had gone different ways before it")
            first = self._unmet[0]
            try:
                if not self._compare(first):
                    self._wait(partial(self._is_compared, first), first.limit)
            except DesyncError:
                raise
            except BaseException:
                for one in self._unmet:
                    if one.relay is not None:
                        one.relay.abort()
                self._unmet.clear()
                raise
            self._met = max(self._met, first.index + 1)
        return word.lowest_note

    def hand_on(self, patience: timedelta) -> None:
        """What this rank owes in gathers that it has started, once every member has started them. Never raises."""
        last = next((word for word in reversed(self._unmet) if word.relay is not None), None)
        if last is None:
            return
        for word in self._unmet:
            word.limit = patience
        with suppress(Exception):
            self.meet(last)

    def since_parting(self, label: str) -> str:
        """``label``, such that nothing under it meets what was sent before the members last went different ways."""
        return f"{label} after {self.partings} partings" if self.partings else label

    def _is_compared(self, word: NearWord) -> bool:
        return word.lowest_note is not None or self._compare(word)

    def _compare(self, word: NearWord) -> bool:
        """Compare the oldest word with everybody's; False where somebody has not said it yet. Raises DesyncError."""
        lowest = word.note
        for member in self._peers:
            place = self._place(member)
            theirs = None if place is None else place.word(self.partings, word.index)
            if theirs is None:
                return False
            if theirs[:TEXT_BYTES] != word.said:
                self._part()
                raise parted(self.group, word.text, member, theirs[:TEXT_BYTES])
            lowest = min(lowest, int.from_bytes(theirs[TEXT_BYTES:]))
        self._unmet.popleft()
        self._mine.head[HEARD] = word.index + 1
        if word.relay is not None:
            word.relay.begin()
        word.lowest_note = lowest
        return True

    def _part(self) -> None:
        """All words before this one were equal on every member, so everybody comes to the same place, and goes on in
        an epoch of its own."""
        self.partings += 1
        self._said = self._met = 0
        self._unmet.clear()
        self._reads.clear()
        self._mine.part()

    def _has_room(self) -> bool:
        """Whether the oldest word in the ring has been heard by all."""
        mine = self._mine.head
        for member in self._peers:
            place = self._place(member)
            if place is None:
                needed = 0
            else:
                epoch, heard = place.head[EPOCH], place.head[HEARD]
                if epoch > mine[EPOCH]:
                    continue
                needed = heard + (mine[START] if epoch == mine[EPOCH] else mine[BEFORE])
            if mine[COUNT] - needed >= RING:
                return False
        return True

    def _place(self, member: int) -> Place | None:
        place = self._places.get(member)
        if place is None:
            page = self._peers[member].page
            assert page is not None
            place = page.find(self._circle, self.channel)
            if place is not None:
                self._places[member] = place
        return place

    # ---- memory that is read where it lies ----

    def promise(self) -> None:
        """Right after a meeting: this rank writes to nothing that it exposes before it has withdrawn."""
        self._mine.head[STABLE] = self._met

    def withdraw(self) -> None:
        self._mine.head[STABLE] = 0

    def drain(self) -> None:
        """Withdraw, and return when all others have read what goes by the words that this rank has said."""
        self.withdraw()
        epoch, said = self.partings, self._said

        def read() -> bool:
            return all(
                place is not None and place.has_read(epoch, said) for place in map(self._place, self._peers)
            )

        if said and not read():
            self._wait_by_name("a write to what others read", read, None)

    def will_read(self, word: NearWord) -> None:
        """Others do not write to what is read by ``word`` before ``read`` is over."""
        self._reads.append(word)
        self._tell_read()

    def read(self, word: NearWord, early: bool, copy: Callable[[], None]) -> int:
        """``copy`` out of what the others expose; ``early``: whoever of them has promised need not have come to
        ``word``. Returns the lowest note known."""
        try:
            if not early:
                self.withdraw()
            promise = self._mine.head[STABLE]
            if promise and self._have_promised(promise):
                copy()
                note = self._glance()
                if note + _AHEAD < word.note:
                    note = self.meet(
                        word
                    )  # so that gradients do not pile up which the others have not come to
                if self._have_promised(promise):
                    return note
            note = self.meet(word)
            copy()
            return note
        finally:
            with suppress(ValueError):
                self._reads.remove(word)
            self._tell_read()

    def _have_promised(self, promise: int) -> bool:
        places = map(self._place, self._peers)
        return all(place is not None and place.head[STABLE] == promise for place in places)

    def _tell_read(self) -> None:
        self._mine.head[READ] = self._reads[0].index if self._reads else self._said

    def _glance(self) -> int:
        """Compare what has been said by now; the lowest of the others' last notes, 0 where they are behind."""
        while self._unmet and self._compare(self._unmet[0]):
            pass
        return min(map(self._last_note, self._peers))

    def _last_note(self, member: int) -> int:
        place = self._place(member)
        last = 0 if place is None else place.said(self.partings)
        if place is None or last <= self._met:
            return 0
        word = place.word(self.partings, last - 1)
        return 0 if word is None else int.from_bytes(word[TEXT_BYTES:])

    # ---- waiting ----

    def _wait_by_name(self, what: str, ready: Callable[[], bool], limit: timedelta | None) -> None:
        """``_wait`` where no work is waited for. Raises CommunicationError that names ``what``."""
        group = self.group
        named = f"[rank {group.ranks[group.rank]}] {what} (with ranks {list(group.ranks)})"
        Work(named).after(_Until(partial(self._wait, ready, limit))).wait()

    def _wait(self, ready: Callable[[], bool], limit: timedelta | None) -> None:
        """Return when ``ready``. Raises RuntimeError, with gloo's words, where a member has gone before, the group was
        cut, or ``limit`` (None: the group's) has passed."""
        limit = limit or self.group.timeout
        seconds = _NO_LIMIT if limit is None else limit.total_seconds()
        for _ in naps(seconds, lambda: ONE_SIDED.call(self.group.ranks)):
            if ready():
                return
            ONE_SIDED.progress()  # others wait for what this rank has asked for
            error = ONE_SIDED.why_cut(self._circle)
            if not error and any(peer.gone for peer in self._peers.values()):
                error = GONE
            if error:
                break
        else:
            error = f"{LATE} {seconds * 1000:.0f}ms for a word"
        if not ready():  # what was said last counts
            give_up(self.group, error)
            raise RuntimeError(error)


@dataclass(frozen=True, slots=True)
class _Until:
    """What a work waits for in place of words."""

    wait: Callable[[], None]

    def meet(self) -> int:
        self.wait()
        return 0


def near(group: Group) -> bool:
    """Whether the members talk on a board; the same on all of them."""
    return ONE_SIDED.within(group)
