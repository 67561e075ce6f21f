"""What the steps of a schedule cost, and a run of it for all ranks without processes: seen before it costs anything.

Time: each rank does its steps in order; a step starts when its rank is free and what it needs has arrived. A
transfer between ranks takes ``costs.transfer`` and keeps neither side busy. Nothing here knows a schedule by name.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from math import inf
from typing import Any

from zeropipe.errors import ScheduleError, UsageError
from zeropipe.runtime.pipe.instructions import (
    TRANSFER,
    Instruction,
    Message,
    Op,
    Schedule,
    check,
    computes,
    with_transfers,
)


def fitting(plan: Schedule, stage_rank: tuple[int, ...], micro_batches: int) -> Schedule:
    """``plan``, if it runs and cuts a model and a batch so. Raises ScheduleError or UsageError."""
    simulate(plan)
    if plan.stage_rank != stage_rank or plan.micro_batches != micro_batches:
        raise UsageError(
            "the schedule does not fit this engine",
            expected=f"stages on ranks {stage_rank}, {micro_batches} micro-batches",
            found=f"stages on ranks {plan.stage_rank}, {plan.micro_batches} micro-batches",
            fix="build PipelineModule with that schedule's name and chunks",
        )
    return plan


class Placement(Enum):
    """How the stages of a model are dealt to the ranks of the pipeline."""

    LOOP = "loop"  # stage s on rank s mod p
    VEE = "vee"  # the odd passes run backwards, so the last rank also holds the next stage: no transfer there

    def rank(self, stage: int, ranks: int) -> int:
        # A lap is one chunk of every rank; on odd laps a vee comes back.
        lap, place = divmod(stage, ranks)
        return ranks - 1 - place if self is Placement.VEE and lap % 2 else place

    def stage(self, rank: int, chunk: int, ranks: int) -> int:
        """The stage that is chunk number ``chunk`` of ``rank``."""
        place = ranks - 1 - rank if self is Placement.VEE and chunk % 2 else rank
        return chunk * ranks + place


_BY_STAGE = ("forward", "backward_input", "backward_weight", "activation")
_SINGLE = ("transfer", "unshard", "reduce")


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
        words = text.split(",")
        try:
            forward, backward, weight, transfer = map(float, words if len(words) == 4 else [*words, "0"])
        except ValueError as error:
            raise ScheduleError(
                "cannot read the costs", expected="F,B,W or F,B,W,comm", found=repr(text)
            ) from error
        return cls((forward,), (backward,), (weight,), transfer).checked()

    def checked(self, stages: int | None = None) -> Costs:
        """These costs; raises ScheduleError for what no time can be, or for another number of ``stages``."""
        # Infinity would never end, NaN and negative times order nothing.
        given = {name: getattr(self, name) or (1.0,) for name in _BY_STAGE}
        given[", ".join(_SINGLE)] = [getattr(self, name) for name in _SINGLE]
        for name, values in given.items():
            if not all(0 <= value < inf for value in values):
                raise ScheduleError(
                    f"cost {name}", expected="finite numbers, none negative", found=list(values)
                )
            if name in _BY_STAGE and len(values) not in (1, stages or len(values)):
                raise ScheduleError(
                    f"cost {name}",
                    expected=f"one number, or one for each of {stages} stages",
                    found=list(values),
                )
        if not sum(self.forward + self.backward_input + self.backward_weight):
            raise ScheduleError("every step costs nothing", expected="a forward or backward above 0")
        return self

    def average(self) -> Costs:
        """One number for all stages, and only what decides which step comes first."""
        return replace(UNIT, transfer=self.transfer, **self._times(lambda v: (sum(v) / len(v),)))

    def share(self, chunks: int) -> Costs:
        """The costs of one chunk, given those of a rank's whole share."""
        return replace(self, **self._times(lambda v: tuple(x / chunks for x in v)))

    def _times(self, change: Callable[[tuple[float, ...]], tuple[float, ...]]) -> dict[str, Any]:
        return {name: change(getattr(self, name)) for name in _BY_STAGE if name != "activation"}

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Costs:
        """Read a measured profile: the fields of this class, each a number or one number for each stage."""
        known = {*_BY_STAGE, *_SINGLE}
        wrong = sorted(set(data) - known)
        if wrong:
            raise ScheduleError(
                f"unknown key in the cost profile: {wrong[0]!r}", expected=f"some of {sorted(known)}"
            )
        values: dict[str, Any] = {}
        for key, value in data.items():
            many = key in _BY_STAGE and isinstance(value, list) and value
            try:
                numbers = tuple(map(float, value if many else [value]))
            except (TypeError, ValueError) as error:
                raise ScheduleError(
                    f"cost {key!r} of the profile", expected="numbers", found=repr(value)
                ) from error
            values[key] = numbers if key in _BY_STAGE else numbers[0]
        return cls(**values).checked()

    def of(self, op: Op, stage: int = 0) -> float:
        """How long a step keeps its rank busy."""
        parts = {
            Op.FORWARD: (self.forward,),
            Op.BACKWARD: (self.backward_input, self.backward_weight),
            Op.BACKWARD_INPUT: (self.backward_input,),
            Op.BACKWARD_WEIGHT: (self.backward_weight,),
            Op.UNSHARD: ((self.unshard,),),
            Op.REDUCE_GRAD: ((self.reduce,),),
        }.get(op, ())
        return sum(_at(values, stage) for values in parts)

    def held(self, stage: int, chunks: int) -> float:
        return 1.0 / chunks if self.activation is None else _at(self.activation, stage)


def _at(values: tuple[float, ...], stage: int) -> float:
    return values[0] if len(values) == 1 else values[stage]


UNIT = Costs()


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
            if computes(event.step):
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
        ranks = schedule.num_ranks
        self.chunks = [max(1, len(schedule.stages_of(rank))) for rank in range(ranks)]

        # Where each rank stands, when it is free again, and what it holds.
        self.place = [0] * ranks
        self.free = [0.0] * ranks
        self.held = [0.0] * ranks

        # What is under way between stages, by pair of ranks: sent and not received, or opened and not sent; and when
        # a value that was both is at the stage that needs it.
        self.wire: defaultdict[tuple[int, int], deque[tuple[Message, float]]] = defaultdict(deque)
        self.opened: defaultdict[tuple[int, int], deque[Message]] = defaultdict(deque)
        self.values: dict[Message, float] = {}

        # What is found.
        self.events: list[Event] = []
        self.peaks = [0.0] * ranks

    def run(self, asked: Schedule) -> Simulation:
        # Each rank goes as far as it can, over and over, until none can take another step: what is left then waits for
        # something that never comes. The order in which ranks are asked changes no time, only when it is known.
        lines = self.schedule.ranks
        moved = True
        while moved:
            moved = False
            for rank, line in enumerate(lines):
                while self.place[rank] < len(line) and self._do(rank, line[self.place[rank]]):
                    self.place[rank] += 1
                    moved = True
        stuck = [self._wait(rank) for rank, line in enumerate(lines) if self.place[rank] < len(line)]
        if stuck:
            raise ScheduleError(
                f"the schedule {self.schedule.name!r} deadlocks: " + "; ".join(stuck),
                fix="move what is waited for before what waits",
            )
        events = sorted(self.events, key=lambda e: (e.start, e.rank))
        return Simulation(asked, tuple(events), tuple(self.peaks))

    def _do(self, rank: int, step: Instruction) -> bool:
        """Do ``step`` if it can be done; False if it has to wait."""
        if step.op in TRANSFER:
            self._transfer(rank, step)
            return True
        need, made = self.schedule.needed_by(step), self.schedule.made_by(step)
        if need is not None and need not in self.values:
            return False
        start = max(self.free[rank], self.values[need] if need is not None else 0.0)
        end = self.free[rank] = start + self.costs.of(step.op, step.stage)
        self.events.append(Event(rank, step, start, end))
        if made is not None and not made.crosses:
            self.values[made] = end
        # Held from the forward to the last of the backward; in evaluation only while the forward runs.
        size = self.costs.held(step.stage, self.chunks[rank])
        if step.op is Op.FORWARD:
            self.peaks[rank] = max(self.peaks[rank], self.held[rank] + size)
            self.held[rank] += size if self.schedule.has_backward else 0.0
        elif step.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
            self.held[rank] -= size
        return True

    def _transfer(self, rank: int, step: Instruction) -> None:
        """Send, or open a receive; the value has arrived once both are done, in whichever order."""
        sends = step.op in (Op.SEND_F, Op.SEND_B)
        message = self.schedule.made_by(step) if sends else self.schedule.needed_by(step)
        if message is None:
            return
        wire, opened = self.wire[message.ranks], self.opened[message.ranks]
        if sends:
            wire.append((message, self.free[rank] + self.costs.transfer))
        else:
            opened.append(message)
        while wire and opened:
            # As NCCL does: the first receive gets the first message, whatever either side meant by it.
            (sent, arrives), wanted = wire.popleft(), opened.popleft()
            if sent != wanted:
                raise ScheduleError(
                    "rank {1} receives from rank {0} in another order than it sends".format(*sent.ranks),
                    expected=str(sent.receive),
                    found=str(wanted.receive),
                    fix="put the receives in the order of the sends, or leave both out",
                )
            self.values[sent] = arrives

    def _wait(self, rank: int) -> str:
        step = self.schedule.ranks[rank][self.place[rank]]
        need = self.schedule.needed_by(step)
        assert need is not None, "nothing else is waited for"
        maker = "F" if need.op is Op.FORWARD else "B or I"
        return (
            f"rank {rank} stands before {step} (stage {step.stage}), which waits for stage {need.source}'s "
            f"{maker} of micro-batch {need.micro_batch} on rank {need.ranks[0]}"
        )
