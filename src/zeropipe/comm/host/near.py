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
    Whoever waits has read what he may: others wait for that, to write as well or without him.
[4] So nobody waits for a rank that waits for it: by [2] the writer has said its words and has nothing more to give, by
    [1] and [3] the reader waits for a word, which the owner says at the latest when it has written.
[5] Words are compared once all have said theirs. So where they differ all come to that word, and are never further than
    one such parting apart. Who has parted waits for no reader of before: that one sees it, and uses nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

from zeropipe.comm.group import Group
from zeropipe.comm.host.board import BEFORE, COUNT, EPOCH, HEARD, READ, RING, STABLE, START, Place
from zeropipe.comm.host.giving_up import give_up
from zeropipe.comm.host.one_sided import ONE_SIDED
from zeropipe.comm.host.reading import GONE, LATE, circle_of, naps, seconds_of
from zeropipe.comm.host.words import NOTE_BYTES, TEXT_BYTES, Relay, last_owed, packed, parted
from zeropipe.comm.record import SEAM, did_not_complete
from zeropipe.errors import CommunicationError, DesyncError

_AHEAD = 2  # reductions that a rank may have started before the slowest, when it reads without waiting


class NearWord:
    """One word of this rank, and those of the others to compare it with."""

    __slots__ = ("epoch", "index", "is_read", "limit", "lowest_note", "note", "relay", "said", "talk", "text")

    def __init__(
        self,
        talk: NearTalk,
        text: str,
        note: int,
        patience: timedelta | None,
        relay: Relay | None,
        place: tuple[int, int],
    ) -> None:
        self.talk, self.text, self.note, self.limit, self.relay = talk, text, note, patience, relay
        self.epoch, self.index = place
        self.said = packed(text)
        self.lowest_note: int | None = None  # once compared
        self.is_read = False  # what goes by it

    def meet(self) -> int:
        return self.talk.meet(self)

    def be_met(self, limit: timedelta) -> None:
        self.limit = limit


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
        self._reads: dict[NearWord, Callable[[], None]] = {}  # those that are not over, oldest first
        self._untold: DesyncError | None = None  # found where it could not be raised

    # ---- words ----

    def say(
        self,
        text: str,
        note: int = 0,
        patience: timedelta | None = None,
        relay: Relay | None = None,
        copy: Callable[[], None] | None = None,
    ) -> NearWord:
        """Tell every member what is about to be done; ``relay`` begins when the words are found equal. Waits only for
        one who is ``RING`` words behind.

        ``copy``, out of what the others expose, is what ``read`` will do: before that none of them writes to it.
        """
        if self._untold is not None:
            raise self._given_up(text)
        if not self._has_room():
            with self._waiting(f"room to say '{text}'"):
                self._wait(self._makes_room, patience)
        word = NearWord(self, text, note, patience, relay, (self.partings, self._said))
        if copy is not None:
            self._reads[word] = copy  # before it is said: nobody may take it for read in between
        self._mine.say(word.said + note.to_bytes(NOTE_BYTES), 0 if copy is None else note)
        self._said += 1
        self._unmet.append(word)
        self._tell_read()
        return word

    def leave(self, text: str, patience: timedelta | None) -> NearWord:
        """Say the last word of a rank that goes away with an error. Waits, for so long, as ``say`` does."""
        self._untold = None  # its own error says more
        word = self.say(text, patience=patience)
        word.limit = None
        return word

    def meet(self, word: NearWord) -> int:
        """The lowest of the members' notes on ``word``, once it and all words before it are found equal."""
        while word.lowest_note is None:
            if word.epoch != self.partings or not self._unmet:
                raise self._given_up(word.text)
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
                raise
            self._met = max(self._met, first.index + 1)
        return word.lowest_note

    def hand_on(self, patience: timedelta) -> None:
        """What this rank owes in gathers that it has started, once every member has started them. Never raises."""
        last = last_owed(self._unmet, patience)
        if last is not None:
            with suppress(Exception):
                self.meet(last)

    def since_parting(self, label: str) -> str:
        """``label``, such that nothing under it meets what was sent before the members last went different ways."""
        return f"{label} after {self.partings} partings" if self.partings else label

    def _is_compared(self, word: NearWord) -> bool:
        return word.lowest_note is not None or self._compare(word)

    def _compare(self, word: NearWord) -> bool:
        """Compare the oldest word with everybody's; False where somebody has not said it yet. Raises DesyncError."""
        every: dict[int, bytes] = {}
        for member in self._peers:
            place = self._place(member)
            theirs = None if place is None else place.word(self.partings, word.index)
            if theirs is None:
                return False
            every[member] = theirs
        for member, theirs in every.items():
            if theirs[:TEXT_BYTES] != word.said:
                self._part()
                raise parted(self.group, word.text, member, theirs[:TEXT_BYTES])
        self._unmet.popleft()
        self._mine.head[HEARD] = word.index + 1
        if word.relay is not None:
            word.relay.begin()
        word.lowest_note = min(
            [word.note, *(int.from_bytes(theirs[TEXT_BYTES:]) for theirs in every.values())]
        )
        return True

    def _part(self) -> None:
        """All words before this one were equal on every member, so everybody comes to the same place, and goes on in
        an epoch of its own."""
        self.partings += 1
        self._said = self._met = 0
        self._unmet.clear()
        self._reads.clear()
        self._untold = None
        self._mine.part()

    def _given_up(self, text: str) -> DesyncError:
        error, self._untold = self._untold, None
        return error or DesyncError(f"'{text}' was given up: ranks had gone different ways before it")

    def _makes_room(self) -> bool:
        # Who is behind may wait for room, too: it has it once this rank has compared.
        self._compare_said()
        return self._has_room()

    def _compare_said(self) -> None:
        while self._unmet and self._compare(self._unmet[0]):
            pass

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
            place = self._peers[member].page.find(self._circle, self.channel)
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
        """Withdraw, and return when all others have read what goes by the words that this rank has said.

        Where those differ this rank is told by its next word: here it may be on its way to repair what went wrong.
        """
        self.withdraw()
        if not self._said:
            return
        with self._waiting("others to read what is about to be written"):
            try:
                if self._unmet:
                    self.meet(self._unmet[-1])
                self._take_compared()
            except DesyncError as error:
                self._untold = error
                return
            if not self._is_read():
                self._wait(self._is_read, None)

    def _is_read(self) -> bool:
        places = map(self._place, self._peers)
        return all(place is not None and place.has_read(self.partings, self._said) for place in places)

    def read(self, word: NearWord, early: bool) -> int:
        """Do what was to be done by ``word``; ``early``: whoever of the others has promised need not have come to it.
        Returns the lowest note known."""
        if word.is_read:  # in ``drain``
            return self.meet(word)
        if word not in self._reads:
            raise self._given_up(word.text)
        try:
            if not early:
                self.withdraw()
            promise = self._mine.head[STABLE]
            if promise and self._have_promised(promise):
                self._reads[word]()
                note = self._glance()
                if note + _AHEAD < word.note:
                    note = self.meet(word)  # else gradients pile up which the others have not come to
                if self._have_promised(promise):
                    word.is_read = True
                    return note
            note = self.meet(word)
            self._take(word)
            return note
        finally:
            self._reads.pop(word, None)
            self._tell_read()

    def _take(self, word: NearWord) -> None:
        """Read what goes by a word that all have said."""
        self._reads[word]()
        if any(self._places[member].head[EPOCH] != word.epoch for member in self._peers):
            self.meet(self._unmet[-1])  # raises, by [5]
        word.is_read = True
        del self._reads[word]
        self._tell_read()

    def _take_compared(self) -> None:
        for word in [word for word in self._reads if word.lowest_note is not None]:
            self._take(word)

    def _have_promised(self, promise: int) -> bool:
        places = map(self._place, self._peers)
        return all(place is not None and place.head[STABLE] == promise for place in places)

    def _tell_read(self) -> None:
        self._mine.head[READ] = next(iter(self._reads)).index if self._reads else self._said

    def _glance(self) -> int:
        """Compare what has been said by now; the lowest of the others' last notes on reads, 0 where they meet."""
        self._compare_said()
        # Notes of meetings mean other things. And who has met says none before it reads again, so that none is of a
        # word before the last that was met, after which counts may have begun anew.
        places = map(self._place, self._peers)
        return min([0 if place is None else place.last_note(self.partings) for place in places])

    # ---- waiting ----

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        """Raises CommunicationError where what is waited for in here cannot come."""
        group = self.group
        said = f"[rank {group.ranks[group.rank]}] {what} (with ranks {list(group.ranks)})"
        before = SEAM.wait_for(said)
        try:
            yield
        except (DesyncError, CommunicationError):
            raise
        except RuntimeError as error:
            raise did_not_complete(said, error) from error
        finally:
            SEAM.wait_for(before)

    def _wait(self, ready: Callable[[], bool], limit: timedelta | None) -> None:
        """Return when ``ready``. Raises RuntimeError, with gloo's words, where a member has gone before, the group was
        cut, or ``limit`` (None: the group's) has passed."""
        seconds = seconds_of(limit, self.group)
        for _ in naps(seconds, lambda: ONE_SIDED.call(self.group.ranks)):
            if ready():
                return
            ONE_SIDED.progress()  # others wait for what this rank has asked for
            self._take_compared()
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


def near(group: Group) -> bool:
    """Whether the members talk on a board; the same on all of them."""
    return ONE_SIDED.within(group)
