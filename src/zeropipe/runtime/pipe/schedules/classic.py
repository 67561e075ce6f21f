"""Schedules with an undivided backward: GPipe, 1F1B, interleaved 1F1B, and forward only.

Drawn for 3 ranks, 4 micro-batches (time runs right, a backward takes two columns)::

    GPipe  0 1 2 3 . . . . . . . . 0 0 1 1 2 2 3 3       all forwards, then all backwards
    1F1B   0 1 2 . . . . . . 0 0 3 1 1 ...               a rank holds at most as many micro-batches
                                                         as there are ranks from it to the end
"""

from __future__ import annotations

from collections.abc import Callable

from zeropipe.runtime.pipe.instructions import Op, Schedule
from zeropipe.runtime.pipe.schedules.costs import Placement

F, B = Op.FORWARD, Op.BACKWARD


def inference(ranks: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """Forward only; with several chunks, micro-batches go round in packs of ``ranks``."""
    return Schedule(gpipe(ranks, micro_batches, chunks).forward_only().ranks, "inference")


def gpipe(ranks: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """All forwards, then all backwards in the same order of micro-batches (Huang et al., arXiv 1811.06965)."""
    # The backward keeps the order of the forward, so that gradients are summed as plain accumulation sums them.
    everything = (micro_batches + ranks) * chunks
    return _schedule("gpipe", ranks, micro_batches, chunks, lambda rank: everything)


def one_f_one_b(ranks: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """One forward, one backward (Narayanan et al., PipeDream-Flush, arXiv 2006.09503); one stage a rank."""
    assert chunks == 1
    return _schedule("1f1b", ranks, micro_batches, chunks, lambda rank: ranks - 1 - rank)


def interleaved_1f1b(ranks: int, micro_batches: int, chunks: int = 2) -> Schedule:
    """Interleaved 1F1B (Narayanan et al., arXiv 2104.04473, section 2.2): ``chunks`` stages on each rank."""
    laps = (chunks - 1) * ranks
    return _schedule("interleaved", ranks, micro_batches, chunks, lambda rank: 2 * (ranks - 1 - rank) + laps)


def _schedule(
    name: str, ranks: int, micro_batches: int, chunks: int, ahead: Callable[[int], int]
) -> Schedule:
    """``ahead(rank)`` forwards, then one forward and one backward in turn, then the backwards that are left."""
    lines = []
    for rank in range(ranks):
        forward, backward = (_order(op, rank, ranks, micro_batches, chunks) for op in (F, B))
        first = min(ahead(rank), len(forward))
        line = forward[:first]
        for pair in zip(forward[first:], backward, strict=False):
            line += pair
        line += backward[len(forward) - first :]
        # Made for whole packs; where micro-batches do not come out even, what is missing is left out.
        lines.append([step for step in line if step[2] < micro_batches])
    return Schedule.made(lines, name)


def _order(op: Op, rank: int, ranks: int, micro_batches: int, chunks: int) -> list[tuple[int, Op, int]]:
    """The steps of a rank: packs of ``ranks`` micro-batches, each pack through all chunks."""
    pack = ranks if chunks > 1 else 1
    way = range(chunks) if op is F else range(chunks)[::-1]
    return [
        (Placement.LOOP.stage(rank, chunk, ranks), op, m)
        for first in range(0, micro_batches, pack)
        for chunk in way
        for m in range(first, first + pack)
    ]
