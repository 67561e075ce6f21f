"""The thread that hands messages over: their order, what it tells who waits, and what it must never do: stop."""

import os
import threading
from functools import partial

import pytest

from zeropipe.comm.messages import Posted, Poster


class Handle:
    """What the transport gives back: done when it is told so."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.waits = 0

    def wait(self) -> None:
        self.waits += 1
        assert self.arrived.wait(10)

    def is_completed(self) -> bool:
        return self.arrived.is_set()


def test_messages_are_handed_over_in_their_order_by_one_other_thread() -> None:
    poster = Poster()
    order: list[tuple[int, int]] = []

    def message(number: int) -> None:
        order.append((number, threading.get_ident()))

    works = [poster.post([partial(message, n), partial(message, n + 1)]) for n in range(0, 100, 2)]
    for work in works:
        work.wait()
    assert [number for number, _ in order] == list(range(100))
    threads = {thread for _, thread in order}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_posting_does_not_wait_for_the_transport() -> None:
    poster = Poster()
    free = threading.Event()
    handle = Handle()

    def slow() -> Handle:
        assert free.wait(10)
        return handle

    work = poster.post([slow])
    assert not work.is_completed()
    free.set()
    handle.arrived.set()
    work.wait()
    assert work.is_completed()


def test_waiting_ends_when_every_message_has_arrived_and_may_be_repeated() -> None:
    poster = Poster()
    first, second = Handle(), Handle()
    work = poster.post([lambda: first, lambda: None, lambda: second])
    first.arrived.set()
    second.arrived.set()
    work.wait()
    work.wait()
    assert (first.waits, second.waits) == (
        1,
        1,
    )  # a second wait on gloo's handle would be for a second message


def test_an_error_of_the_transport_is_raised_to_who_waits_and_later_messages_go_on() -> None:
    poster = Poster()

    def broken() -> None:
        raise RuntimeError("connection closed by peer")

    work = poster.post([broken])
    after = poster.post([lambda: None])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed by peer"):
            work.wait()
    after.wait()


def test_closing_hands_over_what_is_posted_and_a_later_message_starts_anew() -> None:
    poster = Poster()
    seen: list[int] = []
    for number in range(20):
        poster.post([partial(seen.append, number)])
    poster.close()
    assert seen == list(range(20))
    poster.close()
    poster.post([partial(seen.append, 20)]).wait()
    assert seen[-1] == 20


def test_a_forked_process_posts_its_own_messages_and_not_its_parents() -> None:
    poster = Poster()
    busy, free = threading.Event(), threading.Event()

    def stay() -> None:
        busy.set()
        assert free.wait(10)

    seen: list[str] = []
    first = poster.post([stay])
    queued = poster.post([lambda: seen.append("parent")])
    assert busy.wait(10)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        poster.post([lambda: seen.append("child")]).wait()
        os.write(writer, ",".join(seen).encode())
        os._exit(0)
    free.set()
    assert os.read(reader, 100) == b"child"
    assert os.waitpid(child, 0)[1] == 0
    first.wait()
    queued.wait()
    assert seen == ["parent"]


def test_a_peer_that_is_gone_keeps_no_message_from_the_others() -> None:
    """A last word goes to every member; the first that cannot be reached is what waiting for it raises."""
    reached: list[str] = []

    def gone() -> None:
        raise RuntimeError("Connection closed by peer")

    posted = Posted([lambda: reached.append("one"), gone, lambda: reached.append("two")])
    posted.hand_over()
    assert reached == ["one", "two"]
    with pytest.raises(RuntimeError, match="closed by peer"):
        posted.wait()
