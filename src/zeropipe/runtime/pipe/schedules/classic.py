"""Schedules with an undivided backward: GPipe, 1F1B, interleaved 1F1B, and forward only.

Drawn for 3 ranks, 4 micro-batches (time runs right, a backward takes two columns)::

    GPipe  0 1 2 3 . . . . . . . . 0 0 1 1 2 2 3 3       all forwards, then all backwards
    1F1B   0 1 2 . . . . . . 0 0 3 1 1 ...               a rank holds at most as many micro-batches
                                                         as there are ranks from it to the end
"""

from __future__ import annotations

from zeropipe.runtime.pipe.instructions import Op, Schedule, lines_of
from zeropipe.runtime.pipe.schedules.placement import Placement

F, B = Op.FORWARD, Op.BACKWARD


def inference(ranks: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """Forward only; with several chunks, micro-batches go round in packs of ``ranks``."""
    lines = []
    for rank in range(ranks):
        order = _forward_order(rank, ranks, micro_batches, chunks)
        lines.append([(stage, F, m) for stage, m in order if m < micro_batches])
    return Schedule(lines_of(lines), "inference")


def gpipe(ranks: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """All forwards, then all backwards in the same order of micro-batches (Huang et al., arXiv 1811.06965).

    The backward keeps the order of the forward, so that gradients are summed as plain accumulation sums them.
    """
    lines = []
    for rank in range(ranks):
        forward = [(stage, F, m) for stage, m in _forward_order(rank, ranks, micro_batches, chunks)]
        backward = [(stage, B, m) for stage, m in _backward_order(rank, ranks, micro_batches, chunks)]
        lines.append([step for step in forward + backward if step[2] < micro_batches])
    return Schedule(lines_of(lines), "gpipe")


def one_f_one_b(ranks: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """One forward, one backward (Narayanan et al., PipeDream-Flush, arXiv 2006.09503); one stage a rank."""
    assert chunks == 1
    lines = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        line = [(rank, F, m) for m in range(ahead)]
        for m in range(ahead, micro_batches):
            line += [(rank, F, m), (rank, B, m - ahead)]
        line += [(rank, B, m) for m in range(micro_batches - ahead, micro_batches)]
        lines.append(line)
    return Schedule(lines_of(lines), "1f1b")


def interleaved_1f1b(ranks: int, micro_batches: int, chunks: int = 2) -> Schedule:
    """Interleaved 1F1B (Narayanan et al., arXiv 2104.04473, section 2.2): ``chunks`` stages on each rank.

    Micro-batches go through the chunks in packs of ``ranks``. Where they do not come out even, the schedule is
    made for the next multiple and what is missing is left out.
    """
    lines = []
    for rank in range(ranks):
        forward = [(stage, F, m) for stage, m in _forward_order(rank, ranks, micro_batches, chunks)]
        backward = [(stage, B, m) for stage, m in _backward_order(rank, ranks, micro_batches, chunks)]
        ahead = min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks, len(forward))
        line = forward[:ahead]
        for step, back in zip(forward[ahead:], backward, strict=False):
            line += [step, back]
        line += backward[len(forward) - ahead :]
        lines.append([step for step in line if step[2] < micro_batches])
    return Schedule(lines_of(lines), "interleaved")


def _forward_order(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[tuple[int, int]]:
    """(stage, micro-batch) in order, in whole packs: the caller drops micro-batches that do not exist."""
    pack = ranks if chunks > 1 else 1
    return [
        (Placement.LOOP.stage(rank, chunk, ranks), m)
        for first in range(0, micro_batches, pack)
        for chunk in range(chunks)
        for m in range(first, first + pack)
    ]


def _backward_order(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[tuple[int, int]]:
    pack = ranks if chunks > 1 else 1
    return [
        (Placement.LOOP.stage(rank, chunk, ranks), m)
        for first in range(0, micro_batches, pack)
        for chunk in reversed(range(chunks))
        for m in range(first, first + pack)
    ]
