"""What follows from what ranks say of themselves: who waits is never at fault while somebody works."""

from __future__ import annotations

import os
import sys

import pytest

from zeropipe.runtime.resilience.beats import (
    Beat,
    Kind,
    Word,
    added,
    beat_of,
    judge,
    removed,
    report,
    word_of,
)
from zeropipe.runtime.resilience.sight import Place, Self, fingerprint, shown, talks

LIMIT = 10.0
PLACE = Place("kernel 1", "node7", 4242, 99, 1, -1)


def said(
    kind: Kind, idle: float, doing: str = "step 3, forward", stack: tuple[str, ...] = ("a.py:1 in f",)
) -> Beat:
    return Beat(5, kind, doing, idle, stack, PLACE)


@pytest.mark.parametrize(
    ("beats", "silent", "stuck", "all_wait"),
    [
        ([said("works", 11), said("waits", 11)], [], (0,), False),
        ([said("works", 9), said("waits", 500)], [], (), False),  # slow is not stuck
        ([said("waits", 11), said("waits", 12)], [], (), True),
        ([said("waits", 11), said("waits", 9)], [], (), False),
        ([said("waits", 11), said("works", 3)], [1], (), False),
        ([said("works", 11), said("works", 12), said("waits", 11)], [], (0, 1), False),
        ([said("debugged", 500), said("waits", 500)], [], (), False),
        ([said("over", 500), said("waits", 500)], [], (), False),
        ([said("works", 11)], [], (0,), False),  # alone
        ([said("waits", 11)], [], (), False),
    ],
)
def test_who_is_named(beats, silent, stuck, all_wait):
    verdict = judge(dict(enumerate(beats)), silent, LIMIT, len(beats))
    assert verdict.stuck == stuck and verdict.silent == tuple(silent) and verdict.all_wait is all_wait
    assert bool(verdict) == bool(stuck or silent or all_wait)


def test_a_rank_that_has_not_begun_proves_nothing():
    assert not judge({0: said("waits", 11)}, [], LIMIT, 2)


def test_a_report_has_a_line_for_each_rank_and_the_stacks_of_those_that_are_named():
    beats = {
        0: said(
            "waits",
            11,
            "step 3, backward: waits for all_reduce 'grads' among ranks [0, 1, 2]",
            ("w.py:9 in wait",),
        ),
        1: said("works", 12, stack=("train.py:40 in main", "model.py:7 in loss")),
    }
    text = report(judge(beats, [], LIMIT, 3), beats, {}, LIMIT, 3)
    assert text.splitlines() == [
        "rank 1 is stuck: no progress for 10 s",
        "  rank 0 (node7, pid 4242): step 3, backward: waits for all_reduce 'grads' among ranks [0, 1, 2], for 11 s",
        "  rank 1 (node7, pid 4242): step 3, forward, for 12 s  <-- stuck",
        "  rank 2: has said nothing yet",
        "  the thread that trains on rank 1, innermost call last:",
        "    train.py:40 in main",
        "    model.py:7 in loss",
    ]


def test_ranks_with_the_same_stack_share_it():
    beats = {
        rank: said("waits", 11, stack=("w.py:9 in wait",) if rank else ("z.py:1 in g",)) for rank in range(3)
    }
    text = report(judge(beats, [], LIMIT, 3), beats, {}, LIMIT, 3)
    assert text.startswith("no rank moves for 10 s")
    assert "on rank 0, innermost" in text and "on ranks 1, 2, innermost" in text and text.count("w.py:9") == 1


def test_what_is_said_comes_back_as_it_was():
    beat = said("works", 1.5)
    assert beat_of(beat.to_text()) == beat
    verdict = judge({0: said("works", 11), 1: said("waits", 11)}, [], LIMIT, 2)
    word = added(Word(), verdict, end=True, by=1)
    assert word == Word((0,), False, True, "rank 0 is stuck", 1) and word_of(word.to_text()) == word
    assert removed(word, 0, waits=False).told == ()
    assert word_of("") == Word()


def test_this_process_is_seen_as_it_is():
    me = Self()
    try:
        assert me.place.is_here and me.place.pid == os.getpid() and not me.place.is_stopped
        frames = me.frames()
        assert shown(frames)[-1].endswith("in frames")  # this very thread, inside of the look
        assert frames[-2].f_code is sys._getframe().f_code
        assert fingerprint(frames[:-1]) == fingerprint(
            me.frames()[:-1]
        )  # another line of the same innermost call
        assert not talks(frames[:-1])
        assert not Place(
            me.place.host, "", me.place.pid, me.place.started - 1, 0, -1
        ).is_here  # another's number
        assert me.place.stack(1.0)[-1].endswith("in stack")
    finally:
        me.close()
    me.close()


def test_of_another_host_nothing_is_known():
    assert PLACE.state == "" and not PLACE.is_here and PLACE.stack(0.1) == ()
