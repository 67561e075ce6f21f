"""Ranks that talk on a board, all in one process, whose every load and store of a shared word may be where another one
goes on: what each reads is what the owner had when it came to the same word, and nobody waits for ever."""

from __future__ import annotations

import mmap
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropipe.comm.group import Group
from zeropipe.comm.host import board, near
from zeropipe.comm.host.board import LINE, Line, Page, Place
from zeropipe.comm.host.near import NearTalk, NearWord
from zeropipe.errors import DesyncError

CHANNEL, RING, ELEMENTS, PLACES = 1, 4, 3, 8


class Stuck(Exception):
    """All ranks wait, and none of them has anything to say."""


class Baton:
    """One rank moves at a time; another may take over wherever one looks at what others write, or writes."""

    def __init__(self, ranks: int, seed: int) -> None:
        self._choice = random.Random(seed)
        self._turns = [threading.Semaphore(0) for _ in range(ranks)]
        self._alive = list(range(ranks))
        self._seen = [-1] * ranks  # stores that a rank knew of when it found that it has to wait
        self._stores = 0
        self._me = threading.local()
        self.over = threading.Event()
        self.stuck = False

    def run(self, rank: int, work: Callable[[], None]) -> None:
        self._me.rank = rank
        self._turns[rank].acquire()
        try:
            work()
        finally:
            self._alive.remove(rank)
            if self._alive:
                self._turns[self._choice.choice(self._alive)].release()
            else:
                self.over.set()

    def begin(self) -> None:
        self._turns[self._choice.choice(self._alive)].release()

    def look(self) -> None:
        if self._choice.random() < 0.15:
            self._pass_on()

    def store(self) -> None:
        self._stores += 1
        self.look()

    def naps(self, seconds: float, before: Callable[[], None]) -> Iterator[None]:
        rank = self._me.rank
        while True:
            known = self._stores
            yield
            self._seen[rank] = known
            self.stuck = self.stuck or all(self._seen[one] == self._stores for one in self._alive)
            if self.stuck:
                raise Stuck
            self._pass_on()

    def _pass_on(self) -> None:
        rank = self._me.rank
        other = self._choice.choice(self._alive)
        if other != rank:
            self._turns[other].release()
            self._turns[rank].acquire()


class Head:
    """The numbers of a place, each whole, as all ranks see them."""

    def __init__(self, words: memoryview, baton: Baton) -> None:
        self._words, self._baton = words, baton

    def __getitem__(self, at: int) -> int:
        self._baton.look()
        return self._words[at]

    def __setitem__(self, at: int, value: int) -> None:
        self._baton.store()
        self._words[at] = value
        self._baton.store()


class World:
    """Ranks that have mapped each other's pages. ``values``: what each exposes, one version in all elements."""

    def __init__(self, ranks: int, seed: int) -> None:
        self.baton = Baton(ranks, seed)
        memories = [mmap.mmap(-1, PLACES * board._PLACE_BYTES) for _ in range(ranks)]
        self.pages = [Page(memory) for memory in memories]
        seen = [Page(memory) for memory in memories]  # by the others
        self.peers = [SimpleNamespace(page=page, gone=False) for page in seen]
        self.values = [[0] * ELEMENTS for _ in range(ranks)]
        self.ranks = ranks

    def talk(self, rank: int) -> NearTalk:
        return NearTalk(Group(ranks=tuple(range(self.ranks)), rank=rank), CHANNEL)

    @contextmanager
    def shared(self, ring: int = RING) -> Iterator[None]:
        """Every talk of this process is one of these ranks."""

        def lay_out(place: Place, page: memoryview, index: int) -> None:
            usual(place, page, index)
            place.head = Head(place.head, self.baton)  # type: ignore[assignment]

        usual = Place.__init__
        host = SimpleNamespace(
            peers_of=lambda group: {m: self.peers[m] for m in range(self.ranks) if m != group.rank},
            own_page=lambda: (self.pages[self.baton._me.rank], -1),
            progress=lambda: None,
            why_cut=lambda circle: "",
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(near, "ONE_SIDED", host)
            patch.setattr(near, "naps", self.baton.naps)
            patch.setattr(near, "RING", ring)
            patch.setattr(board, "RING", ring)
            patch.setattr(Place, "__init__", lay_out)
            yield

    def run(self, work: Callable[[int], None]) -> None:
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                work(rank)
            except BaseException as error:
                errors.append(error)

        threads = [
            threading.Thread(target=self.baton.run, args=(rank, partial(one, rank)))
            for rank in range(self.ranks)
        ]
        for thread in threads:
            thread.start()
        self.baton.begin()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        for error in errors:
            raise error


@dataclass
class Rank:
    """One rank that runs the program of all, and what it has seen."""

    world: World
    rank: int
    talk: NearTalk = field(init=False)
    version: int = 0
    came: dict[tuple[int, int], int] = field(
        default_factory=dict
    )  # its version, by where it said a read's word
    read: dict[tuple[int, int], list[list[int]]] = field(default_factory=dict)  # what it read there
    told: set[int] = field(default_factory=set)  # segments in which it heard that ranks differ
    pending: list[tuple[tuple[int, int], NearWord, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.talk = self.world.talk(self.rank)

    def do(self, op: str, at: tuple[int, int]) -> None:
        talk = self.talk
        if op == "meet":
            talk.meet(talk.say(f"meeting {at}"))
        elif op == "pass":
            talk.withdraw()
            talk.meet(talk.say(f"forward {at}"))
            talk.promise()
        elif op in ("read", "early", "late"):
            self._start(at, op != "late")
            self._finish(0)
        elif op == "ahead":
            self._start(at, True)
        elif op == "use":
            self._finish(0)
        elif op == "use last":
            self._finish(len(self.pending) - 1)
        elif op == "sync":
            self._start(at, False)
            self._finish(len(self.pending) - 1)
            talk.drain()
            self._write()
        elif op == "write":
            talk.drain()
            self._write()

    def _start(self, at: tuple[int, int], early: bool) -> None:
        found: list[list[int]] = []
        word = self.talk.say(f"read {at}", copy=partial(self._copy, found))
        self.came[at] = self.version
        self.pending.append((at, word, early))
        self.found[at] = found

    def _copy(self, found: list[list[int]]) -> None:
        found.clear()
        for values in self.world.values:
            copied = []
            for value in values:
                copied.append(value)
                self.world.baton.look()
            found.append(copied)

    def _finish(self, which: int) -> None:
        if self.pending:
            at, word, early = self.pending.pop(which)
            self.talk.read(word, early)
            self.read[at] = self.found[at]

    def _write(self) -> None:
        self.version += 1
        for element in range(ELEMENTS):
            self.world.values[self.rank][element] = self.version
            self.world.baton.look()

    found: dict[tuple[int, int], list[list[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Segment:
    """What all ranks do, up to a meeting; ``leaver`` raises or does something else before ``at``."""

    ops: tuple[str, ...]
    leaver: int = -1
    at: int = 0
    leaves: bool = True
    writes: bool = True  # what follows


OPS = ("meet", "pass", "early", "late", "ahead", "ahead", "use", "use last", "sync", "write")


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    ops = tuple(draw(st.lists(st.sampled_from(OPS), min_size=1, max_size=9)))
    return Segment(
        ("pass", *ops, "meet"),
        draw(st.sampled_from([-1, -1, 0, 1])),
        draw(st.integers(0, len(ops) + 1)),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def run_one(rank: Rank, program: list[Segment]) -> None:
    left: NearWord | None = None
    for number, segment in enumerate(program):
        if left is not None:  # as ``Peers.meet``: who has left hears whether the others have, too
            with pytest.raises(DesyncError):
                rank.talk.meet(left)
            left = None
        rank.pending.clear()  # whatever an error took away
        try:
            for at, op in enumerate(segment.ops):
                if rank.rank == segment.leaver and at == segment.at:
                    if segment.leaves:
                        left = rank.talk.leave(f"rank {rank.rank} raised at {number}, {at}", None)
                        break
                    rank.talk.meet(rank.talk.say(f"something else at {number}, {at}"))
                rank.do(op, (number, at))
        except DesyncError:
            rank.told.add(number)
        if segment.writes:  # as who loads a checkpoint then
            rank.do("write", (number, -1))
    if left is not None:
        with pytest.raises(DesyncError):
            rank.talk.meet(left)
    rank.do("meet", (len(program), 0))


@settings(max_examples=150)
@given(st.integers(2, 4), st.lists(segments(), min_size=1, max_size=3), st.integers(0, 2**20))
def test_who_reads_has_what_the_owner_had_at_the_same_word(
    ranks: int, program: list[Segment], seed: int
) -> None:
    world = World(ranks, seed)
    with world.shared():
        every: dict[int, Rank] = {}

        def work(rank: int) -> None:
            every[rank] = Rank(world, rank)
            run_one(every[rank], program)

        world.run(work)
    for one in every.values():
        for at, found in one.read.items():
            assert len(found) == ranks
            for owner, values in enumerate(found):
                came = every[owner].came.get(at)
                if came is not None:
                    assert values == [came] * ELEMENTS, (one.rank, at, owner)
    for number, segment in enumerate(program):
        differs = segment.leaver in every
        heard = {rank for rank, one in every.items() if number in one.told}
        assert heard == (set(every) - ({segment.leaver} if segment.leaves else set()) if differs else set())


@settings(max_examples=60)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(0, 2**20))
def test_a_line_loses_no_word(bursts: list[int], seed: int) -> None:
    """Where it has no room the words wait at who says them (``Peer.tell``)."""
    world = World(2, seed)
    heard: list[bytes] = []
    sent = [number.to_bytes(48) for number in range(sum(bursts))]
    with world.shared(ring=1):  # four words of 48 bytes

        def work(rank: int) -> None:
            place, nap = world.pages[rank].take(1 - rank, LINE), world.baton.naps(0, lambda: None)
            line, left = Line(place, 48), list(sent)
            while (left if rank == 0 else len(heard) < len(sent)) and next(nap, True) is None:
                theirs = world.peers[1 - rank].page.find(rank, LINE)
                if rank == 0:
                    while left and line.room(theirs) > 0:
                        line.say(left.pop(0))
                elif theirs is not None and line.has_news(theirs):
                    found = line.hear(theirs)
                    heard.extend(found[at : at + 48] for at in range(0, len(found), 48))

        world.run(work)
    assert heard == sent


@settings(max_examples=60)
@given(st.integers(0, 2**20))
def test_two_threads_find_all_places_of_a_page(seed: int) -> None:
    world = World(2, seed)
    with world.shared():

        def work(thread: int) -> None:
            for circle in range(6):
                mine = world.pages[0].take(circle, CHANNEL) if thread == 0 else None
                found = (world.peers[0].page.find(circle, CHANNEL) for _ in range(5000))
                place = next((place for place in found if place is not None), None)
                assert place is not None
                assert mine is None or place.head._words == mine.head._words  # type: ignore[attr-defined]

        world.run(work)
