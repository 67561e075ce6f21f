"""Runs a schedule for all ranks without processes, so that it is seen before it costs anything.

Time: each rank does its steps in order; a step starts when its rank is free and what it needs has arrived. A
transfer between ranks takes ``costs.transfer`` and keeps neither side busy. Nothing here knows a schedule by name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from zeropipe.errors import ScheduleError, describe
from zeropipe.runtime.pipe.check import check
from zeropipe.runtime.pipe.instructions import COMPUTE, TRANSFER, Instruction, Op, Schedule
from zeropipe.runtime.pipe.schedules.list_scheduler import StepCosts
from zeropipe.runtime.pipe.transfers import Message, made_by, needed_by, with_transfers


@dataclass(frozen=True, slots=True)
class Costs:
    """Time and memory of each stage. A tuple of one entry holds for all stages; units are the user's own."""

    forward: tuple[float, ...] = (1.0,)
    backward_input: tuple[float, ...] = (1.0,)
    backward_weight: tuple[float, ...] = (1.0,)
    transfer: float = 0.0
    unshard: float = 0.0
    reduce: float = 0.0
    activation: tuple[float, ...] | None = None  # held from forward to the last backward; None: 1 / chunks

    @classmethod
    def parse(cls, text: str) -> Costs:
        """Read ``F,B,W`` or ``F,B,W,comm`` (B is the input gradient alone)."""
        try:
            parts = [float(word) for word in text.split(",")]
            forward, backward, weight = parts[:3]
            transfer = parts[3] if len(parts) == 4 else 0.0
            if len(parts) > 4:
                raise ValueError(text)
        except ValueError as error:
            raise ScheduleError(
                "cannot read the costs", expected="F,B,W or F,B,W,comm", found=repr(text)
            ) from error
        return cls((forward,), (backward,), (weight,), transfer).checked()

    def checked(self, stages: int | None = None) -> Costs:
        """These costs; raises ScheduleError for what no time can be, or for another number of ``stages``."""
        times = {
            "forward": self.forward,
            "backward_input": self.backward_input,
            "backward_weight": self.backward_weight,
            "activation": self.activation or (1.0,),
        }
        single = [self.transfer, self.unshard, self.reduce]
        for name, values in (*times.items(), ("transfer, unshard, reduce", single)):
            if not all(0 <= value < inf for value in values):
                raise ScheduleError(
                    f"cost {name}", expected="finite numbers, none negative", found=list(values)
                )
            if values is not single and len(values) not in (1, stages or len(values)):
                raise ScheduleError(
                    f"cost {name}",
                    expected=f"one number, or one for each of {stages} stages",
                    found=list(values),
                )
        if not sum(self.forward + self.backward_input + self.backward_weight):
            raise ScheduleError("every step costs nothing", expected="a forward or backward above 0")
        return self

    @classmethod
    def of_steps(cls, costs: StepCosts) -> Costs:
        return cls(
            (costs.forward,), (costs.backward_input,), (costs.backward_weight,), transfer=costs.transfer
        )

    def steps(self) -> StepCosts:
        """The average stage, as the list scheduler takes it."""
        forward, backward, weight = (
            sum(v) / len(v) for v in (self.forward, self.backward_input, self.backward_weight)
        )
        return StepCosts(forward, backward, weight, self.transfer)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Costs:
        """Read a measured profile: the fields of this class, each a number or one number for each stage."""
        lists = {"forward", "backward_input", "backward_weight", "activation"}
        known = lists | {"transfer", "unshard", "reduce"}
        wrong = sorted(set(data) - known)
        if wrong:
            raise ScheduleError(
                f"unknown key in the cost profile: {wrong[0]!r}", expected=f"some of {sorted(known)}"
            )
        values: dict[str, Any] = {}
        for key, value in data.items():
            many = key in lists and isinstance(value, list) and value
            try:
                numbers = tuple(map(float, value if many else [value]))
            except (TypeError, ValueError) as error:
                raise ScheduleError(
                    f"cost {key!r} of the profile", expected="numbers", found=repr(value)
                ) from error
            values[key] = numbers if key in lists else numbers[0]
        return cls(**values).checked()

    def of(self, step: Instruction) -> float:
        """How long ``step`` keeps its rank busy."""
        if step.op is Op.FORWARD:
            return self._at(self.forward, step.stage)
        if step.op is Op.BACKWARD:
            return self._at(self.backward_input, step.stage) + self._at(self.backward_weight, step.stage)
        if step.op is Op.BACKWARD_INPUT:
            return self._at(self.backward_input, step.stage)
        if step.op is Op.BACKWARD_WEIGHT:
            return self._at(self.backward_weight, step.stage)
        return {Op.UNSHARD: self.unshard, Op.REDUCE_GRAD: self.reduce}.get(step.op, 0.0)

    def held(self, stage: int, chunks: int) -> float:
        return 1.0 / chunks if self.activation is None else self._at(self.activation, stage)

    @staticmethod
    def _at(values: tuple[float, ...], stage: int) -> float:
        return values[0] if len(values) == 1 else values[stage]


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
    return _Simulator(schedule if own else with_transfers(schedule), costs or Costs()).run(schedule)


class _Simulator:
    """The state of all ranks while a schedule runs."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule, self.costs = schedule, costs
        self.free = [0.0] * schedule.num_ranks
        self.place = [0] * schedule.num_ranks
        self.values: dict[Message, float] = {}  # when a value is at the stage that needs it
        self.wire: dict[tuple[int, int], deque[tuple[Message, float]]] = {}  # sent, not yet received
        self.opened: dict[tuple[int, int], deque[Message]] = {}  # receives that wait for their message
        self.events: list[Event] = []
        self.held = [0.0] * schedule.num_ranks
        self.peaks = [0.0] * schedule.num_ranks
        self.chunks = [max(1, len(schedule.stages_of(r))) for r in range(schedule.num_ranks)]

    def run(self, asked: Schedule) -> Simulation:
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
        if step.op in (Op.SEND_F, Op.SEND_B):
            self._send(rank, step)
            return True
        if step.op in (Op.RECV_F, Op.RECV_B):
            message = _message_of(step)
            pair = (self.schedule.stage_rank[message.source], rank)
            self.opened.setdefault(pair, deque()).append(message)
            self._match(pair)
            return True
        need = needed_by(step, self.schedule.num_stages)
        if need is not None and need not in self.values:
            return False
        start = max(self.free[rank], self.values[need] if need is not None else 0.0)
        self._account(rank, step)
        end = self.free[rank] = start + self.costs.of(step)
        self.events.append(Event(rank, step, start, end))
        made = made_by(step, self.schedule.num_stages)
        if made is not None and self.schedule.stage_rank[made.target] == rank:
            self.values[made] = end
        return True

    def _send(self, rank: int, step: Instruction) -> None:
        message = _message_of(step)
        pair = (rank, self.schedule.stage_rank[message.target])
        self.wire.setdefault(pair, deque()).append((message, self.free[rank] + self.costs.transfer))
        self._match(pair)

    def _match(self, pair: tuple[int, int]) -> None:
        wire, opened = self.wire.get(pair), self.opened.get(pair)
        while wire and opened:
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


def _message_of(step: Instruction) -> Message:
    assert step.micro_batch is not None
    match step.op:
        case Op.SEND_F:
            return Message(step.stage, step.stage + 1, Op.FORWARD, step.micro_batch)
        case Op.RECV_F:
            return Message(step.stage - 1, step.stage, Op.FORWARD, step.micro_batch)
        case Op.SEND_B:
            return Message(step.stage, step.stage - 1, Op.BACKWARD, step.micro_batch)
        case _:
            return Message(step.stage + 1, step.stage, Op.BACKWARD, step.micro_batch)
