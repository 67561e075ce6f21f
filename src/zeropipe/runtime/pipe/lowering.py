"""What a schedule is given before it runs: its transfers, derived from what is computed, and its sharded stages.

Messages from rank a to rank b form one queue. The receiver takes them in the order in which the sender sends them,
whatever order it uses them in; that is what keeps NCCL, which matches messages by order alone, from mixing them up
or hanging::

    rank 0:  0F0 0SEND_F0 0F1 0SEND_F1           queue 0 -> 1:  0F0, 0F1
    rank 1:  1RECV_F0 1F0 1RECV_F1 1F1 ...

A sharded stage (ZeRO 2 and 3) is gathered before its first use, reduced after its last backward, and released after
its last use or where it rests for long; tied gradients are summed at the end of the line::

    rank 0:  0UNSHARD 0F0 0F1 ... 0B1 0RESHARD 0REDUCE_GRAD       with ties: ... 0REDUCE_TIED 0REDUCE_GRAD 0RESHARD

Both are added to any schedule, so that one need only say what is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from enum import Enum

from zeropipe.runtime.pipe.instructions import (
    COMPUTE,
    TRANSFER,
    Instruction,
    Message,
    Op,
    Schedule,
    made_by,
    needed_by,
)


def _crossings(schedule: Schedule, rank: int) -> Iterator[tuple[Message | None, Message | None]]:
    """Of each compute step of ``rank``: what it takes from another rank, and what it makes for one."""
    here = schedule.stage_rank
    for step in schedule.ranks[rank]:
        if step.op in COMPUTE:
            need, made = needed_by(step, schedule.num_stages), made_by(step, schedule.num_stages)
            yield (
                None if need is None or here[need.source] == rank else need,
                None if made is None or here[made.target] == rank else made,
            )


def queues(schedule: Schedule) -> dict[tuple[int, int], tuple[Message, ...]]:
    """The messages from each rank to each other rank, in the order in which they are sent."""
    found: dict[tuple[int, int], tuple[Message, ...]] = {}
    for rank in range(schedule.num_ranks):
        for _, made in _crossings(schedule, rank):
            if made is not None:
                pair = (rank, schedule.stage_rank[made.target])
                found[pair] = (*found.get(pair, ()), made)
    return found


def known_taken(schedule: Schedule) -> dict[Message, int]:
    """For each message: how many messages of the opposite queue its sender had taken before it made this one."""
    # Whoever gets the message so learns, without an acknowledgement, which of its own messages have arrived.
    place = {message: at for queue in queues(schedule).values() for at, message in enumerate(queue)}
    found: dict[Message, int] = {}
    for rank in range(schedule.num_ranks):
        taken: dict[int, int] = {}  # by the rank that they came from
        for need, made in _crossings(schedule, rank):
            if need is not None:
                source = schedule.stage_rank[need.source]
                # To take one message is to take all before it: they come in order.
                taken[source] = max(taken.get(source, 0), place[need] + 1)
            if made is not None:
                found[made] = taken.get(schedule.stage_rank[made.target], 0)
    return found


def with_transfers(schedule: Schedule, ahead: int = 1) -> Schedule:
    """Add each SEND after the step that makes the value, each RECV ``ahead`` compute steps before its use."""
    # A RECV only opens the receive; the step that uses the value waits for it. Opened early, the transfer runs behind
    # the compute in between.
    waiting = {pair: deque(messages) for pair, messages in queues(schedule).items()}
    lines = []
    for rank, line in enumerate(schedule.ranks):
        plain = [step for step in line if step.op not in TRANSFER]
        places = [at for at, step in enumerate(plain) if step.op in COMPUTE]
        first: dict[int, list[Instruction]] = {}
        then: dict[int, list[Instruction]] = {}
        for turn, (need, made) in enumerate(_crossings(schedule, rank)):
            if made is not None:
                then[places[turn]] = [made.send]
            if need is None:
                continue
            # With the message come all before it in its queue that no earlier step has asked for.
            queue = waiting[schedule.stage_rank[need.source], rank]
            while queue and need in queue:
                first.setdefault(places[max(0, turn - ahead)], []).append(queue.popleft().receive)
        steps: list[Instruction] = []
        for at, step in enumerate(plain):
            steps += [*first.get(at, ()), step, *then.get(at, ())]
        lines.append(tuple(steps))
    return Schedule(tuple(lines), schedule.name)


class Unshard(Enum):
    """When the sharded parameters of a stage are gathered, and what that costs in memory."""

    NEVER = "never"  # parameters are not sharded
    STEP = "step"  # once for each step: the whole stage stays gathered from first to last use
    PHASE = "phase"  # once for each run of uses: gathered stages that rest are released


def with_sharding(
    schedule: Schedule,
    unshard: Unshard = Unshard.NEVER,
    gap: int = 4,
    tied_stages: Collection[int] = (),
) -> Schedule:
    """Add UNSHARD, RESHARD, REDUCE_TIED and REDUCE_GRAD to a schedule of compute steps.

    ``gap``: compute steps of its rank that a stage may rest while gathered (`Unshard.PHASE`). ``tied_stages``: stages
    that share parameters with stages of other ranks.
    """
    lines = []
    for rank, line in enumerate(schedule.ranks):
        before: dict[int, list[Instruction]] = {}
        after: dict[int, list[Instruction]] = {}
        end: list[Instruction] = []
        release_last: list[Instruction] = []
        for stage in schedule.stages_of(rank):
            uses = [i for i, s in enumerate(line) if s.stage == stage and s.op in COMPUTE]
            if unshard is not Unshard.NEVER:
                for first, last in _runs(line, stage, gap if unshard is Unshard.PHASE else len(line)):
                    before.setdefault(first, []).append(Instruction(stage, Op.UNSHARD))
                    release = Instruction(stage, Op.RESHARD)
                    if stage in tied_stages and last == uses[-1]:
                        release_last.append(release)  # its gradients still have to be summed
                    else:
                        after.setdefault(last, []).append(release)
            if not schedule.has_backward:
                continue
            # Complete after its last backward: once for each step, not for each micro-batch, and the first stages to
            # end reduce while the others still compute.
            if stage in tied_stages:
                end.append(Instruction(stage, Op.REDUCE_GRAD))
            else:
                after.setdefault(uses[-1], []).append(Instruction(stage, Op.REDUCE_GRAD))
        if end:
            # One for all ties of the rank, so that every rank can take them in one order; their stages come after.
            end.insert(0, Instruction(end[0].stage, Op.REDUCE_TIED))
        steps: list[Instruction] = []
        for at, step in enumerate(line):
            steps += [*before.get(at, ()), step, *after.get(at, ())]
        lines.append(tuple(steps + end + release_last))
    return Schedule(tuple(lines), schedule.name)


def _runs(line: tuple[Instruction, ...], stage: int, gap: int) -> list[tuple[int, int]]:
    """(first, last) use of each run of uses of a stage's parameters."""
    # A weight gradient counts: autograd looks at all that its node saved, the parameter too.
    uses = [i for i, step in enumerate(line) if step.stage == stage and step.op in COMPUTE]
    runs = [[uses[0], uses[0]]]
    for use in uses[1:]:
        if use - runs[-1][1] > gap:
            runs.append([use, use])
        runs[-1][1] = use
    return [(first, last) for first, last in runs]
