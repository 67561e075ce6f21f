"""Runs a schedule for all ranks without processes, so that it is seen before it costs anything.

Time: each rank does its steps in order; a step starts when its rank is free and what it needs has arrived. A
transfer between ranks takes ``costs.transfer`` and keeps neither side busy. Nothing here knows a schedule by name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from zeropipe.errors import ScheduleError, describe
from zeropipe.runtime.pipe.instructions import (
    COMPUTE,
    TRANSFER,
    Instruction,
    Message,
    Op,
    Schedule,
    check,
    made_by,
    needed_by,
)
from zeropipe.runtime.pipe.lowering import with_transfers
from zeropipe.runtime.pipe.schedules.costs import UNIT, Costs


@dataclass(frozen=True, slots=True)
class Event:
    """One step of one rank, in simulated or measured time."""

    rank: int
    step: Instruction
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a schedule costs."""

    schedule: Schedule
    events: tuple[Event, ...]  # compute steps and stage instructions, in order of start
    peaks: tuple[float, ...]  # most activations held at once, by rank

    @property
    def makespan(self) -> float:
        return max((e.end for e in self.events), default=0.0) - min(
            (e.start for e in self.events), default=0.0
        )

    @property
    def busy(self) -> tuple[float, ...]:
        """Time that each rank computes."""
        totals = [0.0] * self.schedule.num_ranks
        for event in self.events:
            if event.step.op in COMPUTE:
                totals[event.rank] += event.end - event.start
        return tuple(totals)

    @property
    def bubble(self) -> float:
        """Idle time of all ranks over the time that they compute: 0 is perfect."""
        work = sum(self.busy)
        return (self.makespan * self.schedule.num_ranks - work) / work if work else 0.0

    @property
    def peak(self) -> float:
        return max(self.peaks)


def simulate(schedule: Schedule, costs: Costs | None = None) -> Simulation:
    """Run ``schedule``; raises `ScheduleError` where it is malformed or deadlocks, naming who waits for what.

    Sends and receives are added where the schedule has none; where it has its own, they are checked: in every
    queue between two ranks the receives must follow the order of the sends.
    """
    check(schedule)
    own = any(step.op in TRANSFER for step in schedule.steps())
    return _Simulator(schedule if own else with_transfers(schedule), costs or UNIT).run(schedule)


class _Simulator:
    """The state of all ranks while a schedule runs."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule, self.costs = schedule, costs
        self.chunks = [max(1, len(schedule.stages_of(r))) for r in range(schedule.num_ranks)]

        # Where each rank stands, and when it is free again.
        self.free = [0.0] * schedule.num_ranks
        self.place = [0] * schedule.num_ranks

        # What is under way between stages: made, sent, received.
        self.values: dict[Message, float] = {}  # when a value is at the stage that needs it
        self.wire: dict[tuple[int, int], deque[tuple[Message, float]]] = {}  # sent, not yet received
        self.opened: dict[tuple[int, int], deque[Message]] = {}  # receives that wait for their message

        # What is found.
        self.events: list[Event] = []
        self.held = [0.0] * schedule.num_ranks
        self.peaks = [0.0] * schedule.num_ranks

    def run(self, asked: Schedule) -> Simulation:
        # Each rank goes as far as it can, over and over, until none can take another step: what is left then waits for
        # something that never comes. The order in which ranks are asked changes no time, only when it is known.
        moved = True
        while moved:
            moved = False
            for rank, line in enumerate(self.schedule.ranks):
                while self.place[rank] < len(line) and self._do(rank, line[self.place[rank]]):
                    self.place[rank] += 1
                    moved = True
        stuck = [r for r, line in enumerate(self.schedule.ranks) if self.place[r] < len(line)]
        if stuck:
            raise ScheduleError(self._deadlock(stuck))
        return Simulation(
            asked, tuple(sorted(self.events, key=lambda e: (e.start, e.rank))), tuple(self.peaks)
        )

    def _do(self, rank: int, step: Instruction) -> bool:
        """Do ``step`` if it can be done; False if it has to wait."""
        if step.op in TRANSFER:
            self._transfer(rank, step)
            return True
        need = needed_by(step, self.schedule.num_stages)
        if need is not None and need not in self.values:
            return False
        start = max(self.free[rank], self.values[need] if need is not None else 0.0)
        self._account(rank, step)
        end = self.free[rank] = start + self.costs.of(step.op, step.stage)
        self.events.append(Event(rank, step, start, end))
        made = made_by(step, self.schedule.num_stages)
        if made is not None and self.schedule.stage_rank[made.target] == rank:
            self.values[made] = end
        return True

    def _transfer(self, rank: int, step: Instruction) -> None:
        """Send, or open a receive; the value has arrived once both are done, in whichever order."""
        sends = step.op in (Op.SEND_F, Op.SEND_B)
        message = (made_by if sends else needed_by)(step, self.schedule.num_stages)
        if message is None:
            return
        pair = (self.schedule.stage_rank[message.source], self.schedule.stage_rank[message.target])
        wire, opened = self.wire.setdefault(pair, deque()), self.opened.setdefault(pair, deque())
        if sends:
            wire.append((message, self.free[rank] + self.costs.transfer))
        else:
            opened.append(message)
        while wire and opened:
            # As NCCL does: the first receive gets the first message, whatever either side meant by it.
            (sent, arrives), wanted = wire.popleft(), opened.popleft()
            if sent != wanted:
                raise ScheduleError(
                    f"rank {pair[1]} receives from rank {pair[0]} in another order than it sends",
                    expected=str(sent.receive),
                    found=str(wanted.receive),
                    fix="put the receives in the order of the sends, or leave both out",
                )
            self.values[sent] = arrives

    def _account(self, rank: int, step: Instruction) -> None:
        # Held from the forward to the last of the backward; in evaluation only while the forward runs.
        size = self.costs.held(step.stage, self.chunks[rank])
        if step.op is Op.FORWARD and self.schedule.has_backward:
            self.held[rank] += size
            self.peaks[rank] = max(self.peaks[rank], self.held[rank])
        elif step.op is Op.FORWARD:
            self.peaks[rank] = max(self.peaks[rank], size)
        elif step.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
            self.held[rank] -= size

    def _deadlock(self, stuck: Sequence[int]) -> str:
        waits = []
        for rank in stuck:
            step = self.schedule.ranks[rank][self.place[rank]]
            need = needed_by(step, self.schedule.num_stages)
            assert need is not None
            maker = "F" if need.op is Op.FORWARD else "B or I"
            waits.append(
                f"rank {rank} stands before {step} (stage {step.stage}), which waits for stage {need.source}'s "
                f"{maker} of micro-batch {need.micro_batch} on rank {self.schedule.stage_rank[need.source]}"
            )
        return describe(
            f"the schedule {self.schedule.name!r} deadlocks: " + "; ".join(waits),
            fix="move what is waited for before what waits",
        )
