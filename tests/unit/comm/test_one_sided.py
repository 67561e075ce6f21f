"""One end of the memory of a host, with the other end in the test's hands: what is said before what, and to whom."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import pytest
import torch

from zeropipe.comm.group import SELF
from zeropipe.comm.host.board import LINE, RING, Page, Place, own_page
from zeropipe.comm.host.one_sided import OneSided
from zeropipe.comm.host.reading import CUT, GONE, PUBLISHED, Memory, Peer, Word, circle_of

TAG = 7


def page() -> tuple[Page, Page]:
    """As the rank has it that writes it, and as its peer has it."""
    made, number = own_page()
    try:
        return made, Page(mmap.mmap(number, 0, prot=mmap.PROT_READ))
    finally:
        os.close(number)


class Ends:
    """A rank and its peer, both of this process: no thread, so nothing happens that is not asked for."""

    def __init__(self) -> None:
        self.host = OneSided()
        here, there = socket.socketpair()
        for line in (here, there):
            line.setblocking(False)
        (mine, mine_read), (theirs, theirs_read) = page(), page()
        self.peer = Peer(1, os.getpid(), here, theirs_read, mine.take(1, LINE), 0)
        self.other = Peer(0, os.getpid(), there, mine_read, theirs.take(0, LINE), 1)
        self.host._peers = {1: self.peer}
        self.host._memory = Memory()

    def run(self) -> None:
        self.host.progress()


@pytest.fixture
def ends() -> Iterator[Ends]:
    try:
        made = Ends()
    except OSError as reason:
        pytest.skip(str(reason))
    yield made
    made.host.close()
    made.other.line.close()


def publish(ends: Ends, tensor: torch.Tensor) -> None:
    ends.other.tell(Word(PUBLISHED, 0, circle_of(SELF), TAG, tensor.data_ptr(), tensor.nbytes, 1))


def test_who_reads_hears_of_the_end_before_the_memory_may_be_written_again(ends: Ends) -> None:
    """Also where another member has ended it, whose own word may come later than that."""
    heard: list[int] = []
    published = ends.host.publish(torch.ones(10), ends.peer, SELF, TAG)
    published.let_go = lambda: heard.extend(word.said for word in ends.other.hear())  # type: ignore[method-assign]
    ends.other.tell(Word(CUT, circle=published.circle))
    ends.host.listen(ends.peer)
    assert published.is_completed()
    assert heard == [PUBLISHED, CUT]


@pytest.mark.parametrize("gone", [False, True])
def test_what_was_read_of_a_process_that_is_gone_is_no_value(ends: Ends, gone: bool) -> None:
    """Its number may be another's by then."""
    wanted, sent = torch.zeros(10), torch.ones(10)
    reading = ends.host.read(wanted, ends.peer, SELF, TAG)
    publish(ends, sent)
    if gone:
        ends.other.line.close()
        ends.run()
        with pytest.raises(RuntimeError, match=GONE):
            reading.wait()
    else:
        ends.run()
        reading.wait()
        assert torch.equal(wanted, sent)


def test_an_interrupt_in_the_middle_of_a_read_is_raised_and_told(ends: Ends) -> None:
    wanted, sent = torch.zeros(10), torch.ones(10)
    reading = ends.host.read(wanted, ends.peer, SELF, TAG)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    ends.host.take = interrupt  # type: ignore[method-assign]
    publish(ends, sent)
    ends.host.cut = partial(_tell, ends)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        ends.run()
    assert [word.said for word in ends.other.hear()] == [CUT]
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        reading.wait()


def _tell(ends: Ends, circle: int, ranks: object, why: str) -> None:
    """``cut`` of a group of both, which ``SELF`` is not."""
    OneSided.cut(ends.host, circle, (0, 1), why)


@pytest.mark.parametrize("moment", ["take", "listen", "has_ended"])
def test_a_call_is_not_lost_to_who_reads_meanwhile(ends: Ends, moment: str) -> None:
    """A rank that reads looks whether its peer has ended, and so may take what that calls with: then it hears what that
    has called for, or nobody would, as this rank may compute for long after. Else the thread is called."""
    first, second, sent = torch.zeros(10), torch.zeros(10), torch.ones(10)
    readings = [ends.host.read(wanted, ends.peer, SELF, TAG) for wanted in (first, second)]
    publish(ends, sent)
    ends.host.listen(ends.peer)
    owner = ends.peer if moment == "has_ended" else ends.host
    plain = getattr(owner, moment)

    def says_more(*args: object) -> object:
        done = plain(*args)
        setattr(owner, moment, plain)
        publish(ends, sent)
        ends.other.call()
        return done

    setattr(owner, moment, says_more)
    ends.run()
    with suppress(BlockingIOError):
        if ends.peer.line.recv(1):
            ends.run()
    assert all(reading.is_completed() for reading in readings)
    assert torch.equal(second, sent)


def test_a_line_without_room_keeps_words_in_their_order(ends: Ends) -> None:
    """More than it has room for, several times over, and heard in parts."""
    said, heard = range(3 * RING * 4 + 7), []
    for number in said:
        ends.other.tell(Word(PUBLISHED, number=number))
    assert ends.other.is_full
    while ends.peer.has_news:
        heard += [word.number for word in ends.peer.hear()]
        ends.other.flush()
    assert not ends.other.is_full
    assert heard == list(said)


# Places: what one rank says in one talk.


def test_a_word_is_heard_of_this_epoch_and_of_the_last() -> None:
    """A rank that parts goes on at once; who has not come to the difference still finds the words before it."""
    written, read = page()
    place, word = written.take(5, 2), lambda text: text.encode().ljust(192)
    for epoch in range(3):
        for index in range(RING // 2 - 3):
            assert place.word(epoch, index) is None
            place.say(word(f"{epoch} {index}"))
        found = read.find(5, 2)
        assert found is not None
        for past in (epoch - 1, epoch):
            if past >= 0:
                assert all(
                    found.word(past, index) == word(f"{past} {index}") for index in range(RING // 2 - 3)
                )
        assert found.word(epoch + 1, 0) is None  # that nobody has begun
        assert not found.has_read(epoch, 1) and found.has_read(epoch, 0)
        place.part()
        assert found.has_read(epoch, 10**6)  # what was to be read before the ranks parted is given up


def test_talks_have_places_of_their_own_and_are_found_by_who_reads() -> None:
    written, read = page()
    assert read.find(1, 0) is None
    places = {key: written.take(*key) for key in [(1, 0), (1, 1), (2**64 - 1, 0), (3, LINE)]}
    for count, place in enumerate(places.values()):
        for _ in range(count):
            place.say(b"x" * 192)
    for count, key in enumerate(places):
        found = read.find(*key)
        assert isinstance(found, Place)
        assert [found.word(0, index) is None for index in range(count + 1)] == [False] * count + [True]
        assert written.take(*key) is places[key]
    assert read.find(4, 0) is None


def test_who_reads_a_page_cannot_write_it() -> None:
    written, read = page()
    written.take(1, 0)
    found = read.find(1, 0)
    assert found is not None
    with pytest.raises(TypeError):
        found.say(b"x" * 192)
