"""One end of the memory of a host, with the other end in the test's hands: what is said before what, and to whom."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
import torch

from zeropipe.comm.group import SELF
from zeropipe.comm.host.one_sided import OneSided
from zeropipe.comm.host.reading import CUT, GONE, PUBLISHED, Memory, Peer, Word, circle_of

TAG = 7


class Ends:
    """A rank and its peer, both of this process: no thread, so nothing happens that is not asked for."""

    def __init__(self) -> None:
        self.host = OneSided()
        here, there = socket.socketpair()
        for line in (here, there):
            line.setblocking(False)
        self.peer, self.other = Peer(1, os.getpid(), here), Peer(0, os.getpid(), there)
        self.host._peers = {1: self.peer}
        self.host._memory = Memory()

    def run(self) -> None:
        self.host.listen(self.peer)
        while self.host._ready:
            self.host._ready.popleft().run()


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
