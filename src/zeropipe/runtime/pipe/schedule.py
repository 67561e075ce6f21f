"""The schedules by name: what each needs, what it promises, and the choice of the best one for a memory limit.

Here too are those with an undivided backward; `zero_bubble` has the others. Each is a pure function of sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product

from zeropipe.errors import ScheduleError
from zeropipe.runtime.pipe.instructions import Op, Schedule, check
from zeropipe.runtime.pipe.simulate import UNIT, Costs, Placement, Simulation, simulate
from zeropipe.runtime.pipe.zero_bubble import dualpipe_v, interleaved_zb, zb_h1, zbv

F, B = Op.FORWARD, Op.BACKWARD

# Rank 0 of 3, with 4 micro-batches (time runs right, a backward takes two columns):
#
#     GPipe  0 1 2 3 . . . . . . . . 0 0 1 1 2 2 3 3       all forwards, then all backwards
#     1F1B   0 1 2 . . . . . . 0 0 3 1 1 ...               a rank holds at most as many micro-batches
#                                                          as there are ranks from it to the end


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


@dataclass(frozen=True, slots=True)
class Kind:
    """One named schedule."""

    name: str
    make: Callable[..., Schedule]  # (ranks, micro-batches, chunks)
    chunks: tuple[int, int]  # fewest and most chunks a rank
    default_chunks: int
    placement: Placement = Placement.LOOP
    # Bound on activations a rank, in micro-batches through all its chunks. Rank 0 of 1F1B runs p - 1 forwards ahead and
    # holds one more with the next.
    peak: Callable[[int, int, int], float] = lambda p, m, v: min(p, m)
    aliases: tuple[str, ...] = ()
    trains: bool = True
    played: bool = False  # the list scheduler makes it, so `make` also takes costs


def _ahead_of_1f1b(p: int, m: int, v: int) -> float:
    # 2 (p - 1) + (v - 1) p forwards ahead, each of one chunk, which is 1 / v of a micro-batch.
    return min(m, (2 * (p - 1) + (v - 1) * p + 1) / v)


ANY, VEE = 1 << 30, Placement.VEE
KINDS: tuple[Kind, ...] = (
    Kind("gpipe", gpipe, (1, ANY), 1, peak=lambda p, m, v: m),
    Kind("1f1b", one_f_one_b, (1, 1), 1, aliases=("one-f-one-b",)),
    Kind("interleaved", interleaved_1f1b, (1, ANY), 2, peak=_ahead_of_1f1b, aliases=("interleaved-1f1b",)),
    Kind("zb-h1", zb_h1, (1, 1), 1, aliases=("zbh1",)),
    Kind("interleaved-zb", interleaved_zb, (1, ANY), 2, aliases=("interleaved-zero-bubble",), played=True),
    Kind("zbv", zbv, (2, 2), 2, VEE, aliases=("zb-v",), played=True),
    Kind("dualpipev", dualpipe_v, (2, 2), 2, VEE, lambda p, m, v: min(p + 0.5, m), ("dualpipe-v",)),
    Kind("inference", inference, (1, ANY), 1, peak=lambda p, m, v: 1, trains=False),
)


def find_kind(name: str) -> Kind:
    """The schedule called ``name``; case and the choice of ``-`` or ``_`` do not matter."""
    plain = name.strip().lower().replace("_", "-")
    for kind in KINDS:
        if plain in (kind.name, *kind.aliases):
            return kind
    names = [kind.name for kind in KINDS]
    near = get_close_matches(plain, names, n=1)
    raise ScheduleError(
        "unknown pipeline schedule",
        expected=f"one of {', '.join(names)}",
        found=repr(name),
        fix=f"did you mean {near[0]!r}?" if near else "choose one of these, or give a schedule as text",
    )


def default_chunks(name: str) -> int:
    """Stages on each rank where the user does not say; for a schedule given as text, what it says."""
    if _is_text(name):
        made = Schedule.parse(name)
        return max(1, made.num_stages // made.num_ranks)
    return find_kind(name).default_chunks


def _is_text(name: str) -> bool:
    return "\n" in name or "," in name


def make_schedule(
    name: str, ranks: int, micro_batches: int, chunks: int | None = None, costs: Costs = UNIT
) -> Schedule:
    """The schedule ``name`` for ``ranks`` pipeline ranks, each running ``chunks`` stages.

    ``chunks`` None takes the schedule's own default. ``costs`` (of one chunk) shape the schedules that are played
    out. A text that names instructions is parsed and checked instead.
    """
    if _is_text(name):
        return check(Schedule.parse(name))
    kind = find_kind(name)
    chunks = kind.default_chunks if chunks is None else chunks
    low, high = kind.chunks
    if not low <= chunks <= high:
        wanted = str(low) if low == high else f"at least {low}"
        raise ScheduleError(
            f"schedule {kind.name!r} cannot run with this many chunks",
            expected=wanted,
            found=chunks,
            fix=f"set chunks to {wanted}, or take 'interleaved' or 'interleaved-zb'",
        )
    if ranks < 1 or micro_batches < 1:
        raise ScheduleError(
            "a schedule needs at least one rank and one micro-batch",
            found=f"{ranks} ranks, {micro_batches} micro-batches",
        )
    average = costs.average()
    if not kind.played or average == UNIT:
        return kind.make(ranks, micro_batches, chunks)
    # Playing with the true costs is a greedy choice too, so now and then the plain schedule is the better one.
    both = [kind.make(ranks, micro_batches, chunks, costs=c) for c in (average, UNIT)]
    return min(both, key=lambda made: simulate(made, average).makespan)


def choose(
    ranks: int,
    micro_batches: int,
    memory: float,
    costs: Costs | None = None,
    chunks: Iterable[int] = (1, 2, 3, 4),
) -> list[Simulation]:
    """Every training schedule whose peak fits ``memory`` (activations in micro-batches), the quickest first.

    Costs are those of a rank's whole share of the model for one micro-batch; a chunk costs its part of that. Ties
    go to the smaller peak and then to fewer chunks, because a chunk more is a transfer more.
    """
    found: list[tuple[tuple[float, float, int], Simulation]] = []
    for kind, v in product(KINDS, chunks):
        if not kind.trains or not kind.chunks[0] <= v <= kind.chunks[1]:
            continue
        # A chunk takes its part of a rank's times; a transfer costs what it did, however small the stage.
        share = (costs or UNIT).share(v)
        plan = simulate(make_schedule(kind.name, ranks, micro_batches, v, share), share)
        if plan.peak <= memory + 1e-9:
            found.append(((round(plan.makespan, 9), plan.peak, v), plan))
    return [plan for _, plan in sorted(found, key=lambda one: one[0])]
