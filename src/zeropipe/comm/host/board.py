"""Words between ranks of one host, in memory that all of them have mapped: said by writing, heard by reading.

Each rank has one *page*, which it alone writes and the others read. A *place* in it is its part of one talk (a group
and a channel, ``near.py``), or what it says to one other rank about memory (``Line``)::

    place    | circle, channel | epoch, start, before, count | heard | read | stable | note | words: a ring |

A word is written first, and then how many there are: who sees the count sees the word. Counts begin anew when ranks
have parted (an *epoch*); ``start`` and ``before`` say where this epoch and the last one begin in the ring. That a store
is seen after those before it is what x86 promises, so elsewhere there is no page (``orders_stores``).
"""

from __future__ import annotations

import mmap
import os
import platform

from zeropipe.comm.host.words import WORD_BYTES

RING = 128  # words of one talk that a rank may be ahead of the slowest
_HEAD_BYTES = 128
_PLACE_BYTES = _HEAD_BYTES + RING * WORD_BYTES
_PLACES = 2**14  # no memory before they are taken
_PAGE_BYTES = _PLACES * _PLACE_BYTES
_CIRCLE, _TAKEN, EPOCH, START, BEFORE, COUNT, HEARD, READ, STABLE, NOTE = range(10)


def orders_stores() -> bool:
    """Whether every process sees the stores of another in the order in which they were made."""
    return platform.machine().lower() in ("x86_64", "amd64", "i686")


class Place:
    """What one rank tells the others in one talk; written by it alone."""

    def __init__(self, page: memoryview, index: int) -> None:
        at = index * _PLACE_BYTES
        self.head = page[at : at + _HEAD_BYTES].cast("Q")  # whole words: a store of one is seen whole
        self.words = page[at + _HEAD_BYTES : at + _PLACE_BYTES]

    def say(self, word: bytes, note: int = 0) -> None:
        """``note``: what holds of this rank until it says the next word."""
        at = self.head[COUNT] % RING * WORD_BYTES
        self.words[at : at + WORD_BYTES] = word
        self.head[NOTE] = note
        self.head[COUNT] += 1

    def part(self) -> None:
        """Begin an epoch."""
        head = self.head
        head[BEFORE], head[START] = head[START], head[COUNT]
        head[HEARD] = head[READ] = head[STABLE] = head[NOTE] = 0
        head[EPOCH] += 1

    def word(self, epoch: int, index: int) -> bytes | None:
        """The word ``index`` of ``epoch``, which is this one's or the last; None where it has not been said yet."""
        head = self.head
        while True:
            now = head[EPOCH]
            if now == epoch:
                at, end = head[START] + index, head[COUNT]
            elif now == epoch + 1:
                at, end = head[BEFORE] + index, head[START]
            else:
                return None
            place = at % RING * WORD_BYTES
            word = None if at >= end else bytes(self.words[place : place + WORD_BYTES])
            if head[EPOCH] == now:  # else it has parted meanwhile
                return word

    def last_note(self, epoch: int) -> int:
        """What it said with its last word; 0 where that is of another epoch."""
        note = self.head[NOTE]
        return note if self.head[EPOCH] == epoch else 0

    def has_read(self, epoch: int, count: int) -> bool:
        """Whether it has read all that goes by the first ``count`` words of ``epoch``."""
        now = self.head[EPOCH]
        return now > epoch or (now == epoch and self.head[READ] >= count)


LINE = 2**32  # in place of a channel: what is said to the rank that stands in place of a circle


class Line:
    """Words of ``size`` bytes from one rank to another, by the place of either."""

    def __init__(self, mine: Place, size: int) -> None:
        self._mine, self._size = mine, size
        self._room = RING * WORD_BYTES // size

    def room(self, theirs: Place | None) -> int:
        """How many words can be said before the other one has heard more."""
        return self._room - (self._mine.head[COUNT] - (0 if theirs is None else theirs.head[HEARD]))

    def say(self, word: bytes) -> None:
        at = self._mine.head[COUNT] % self._room * self._size
        self._mine.words[at : at + self._size] = word
        self._mine.head[COUNT] += 1

    def hear(self, theirs: Place) -> bytes:
        """What the other one has said since this was asked last."""
        heard, count = self._mine.head[HEARD], theirs.head[COUNT]
        words = b""
        while heard < count:
            at = heard % self._room * self._size
            words += theirs.words[at : at + self._size]
            heard += 1
        self._mine.head[HEARD] = heard
        return words

    def has_news(self, theirs: Place) -> bool:
        return theirs.head[COUNT] != self._mine.head[HEARD]


class Page:
    """The memory in which one rank says its words; ``places`` by circle and channel."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._view = memoryview(memory)
        self._places: dict[tuple[int, int], Place] = {}
        self._looked = 0  # places of others that were looked at

    def take(self, circle: int, channel: int) -> Place:
        """This rank's place of a talk; a new one where it has none."""
        place = self._places.get((circle, channel))
        if place is None:
            if self._looked == _PLACES:
                raise RuntimeError(f"more than {_PLACES} groups speak on one host")
            place = self._places[circle, channel] = Place(self._view, self._looked)
            self._looked += 1
            place.head[_CIRCLE] = circle
            place.head[_TAKEN] = channel + 1
        return place

    def find(self, circle: int, channel: int) -> Place | None:
        """Another rank's; None before it has taken one."""
        while (circle, channel) not in self._places and (at := self._looked) < _PLACES:
            place = Place(self._view, at)
            taken = place.head[_TAKEN]
            if not taken:
                return None
            self._places[place.head[_CIRCLE], taken - 1] = place
            self._looked = at + 1  # two threads may be here, and find the same
        return self._places.get((circle, channel))


def own_page() -> tuple[Page, int]:
    """A page of this process, and the descriptor by which others map it. Raises OSError."""
    number = os.memfd_create("zeropipe words")
    try:
        os.ftruncate(number, _PAGE_BYTES)
        return Page(mmap.mmap(number, _PAGE_BYTES)), number
    except OSError:  # mmap keeps a descriptor of its own, for which there may be no room
        os.close(number)
        raise


def page_of(pid: int, number: int) -> Page:
    """That of another process. Raises OSError."""
    with open(f"/proc/{pid}/fd/{number}", "rb") as file:
        return Page(mmap.mmap(file.fileno(), _PAGE_BYTES, prot=mmap.PROT_READ))
