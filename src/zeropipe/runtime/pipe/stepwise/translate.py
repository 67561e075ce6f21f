"""Turns the lists of all stages into one `Schedule`, by playing them: which micro-batch lies in which buffer, and when.

A list names buffers and never micro-batches. Those follow from the order in which they are loaded and sent::

    stage 0   Load(0) Forward(0) | Load(1) Send(0) Forward(1) | ...
    stage 1                      | Recv(0) Load(0) Forward(0) | ...      buffer 0 holds micro-batch 0, so this is 1F0

What a buffer goes through, and the instructions that are refused elsewhere::

    empty -Load, Recv-> input -Forward-> output -Send-> waits -RecvGrad-> gradient -Backward-> done -SendGrad-> empty
                                         (on the last stage -Backward-> at once)
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from zeropipe.errors import ScheduleError
from zeropipe.runtime.pipe.instructions import Instruction, Op, Schedule, check


@dataclass(frozen=True, slots=True)
class Listed:
    """An instruction of a list, as ranks tell it each other: the built-in class that it is one of, or its own name."""

    kind: str
    buffer: int | None
    step: int  # of its stage

    def __str__(self) -> str:
        return f"{self.kind}({'' if self.buffer is None else f'buffer_id={self.buffer}'})"


List = Sequence[Listed]
_FIX = "correct the steps() of that stage"
_ORDER = "messages are taken in the order in which they are sent: see that no stage leaves one out"
_SENDS = {"SendActivation": ("RecvActivation", 1), "SendGrad": ("RecvGrad", -1)}
_COMES_FROM = {"RecvActivation": -1, "RecvGrad": 1}


@dataclass(slots=True)
class _Buffer:
    """One buffer of one stage; micro-batch numbers, None where there is none."""

    input: int | None = None
    labels: int | None = None
    output: int | None = None  # its forward has run, its backward has not
    unsent: int | None = None  # an output that the next stage has not been sent
    gradient: int | None = None  # of its output
    owed: int | None = None  # a gradient that the stage before has not been sent


@dataclass(slots=True)
class _Stage:
    number: int
    listed: List
    trains: bool
    at: int = 0  # what comes next in the list
    loaded: int = 0  # micro-batches read
    buffers: dict[int | None, _Buffer] = field(default_factory=dict)
    places: list[Instruction | None] = field(default_factory=list)  # what of ours each listed one is

    @property
    def next(self) -> Listed | None:
        return self.listed[self.at] if self.at < len(self.listed) else None

    def refuse(self, one: Listed, expected: str, found: str | None = None, fix: str = _FIX) -> NoReturn:
        raise ScheduleError(
            f"the schedule of stage {self.number} is wrong at step {one.step}, {one}",
            expected=expected,
            found=found,
            fix=fix,
        )


def translate(lists: Sequence[List], name: str) -> tuple[Schedule, list[list[Instruction | None]]]:
    """The schedule that ``lists``, one of each stage, amount to; and what of it each listed instruction is.

    Raises ScheduleError that names the stage, the step and the instruction for which something is missing.
    """
    stages = [
        _Stage(s, line, any(one.kind == "BackwardPass" for one in line)) for s, line in enumerate(lists)
    ]
    play = _Play(stages)
    # Stage by stage as far as each comes, until nothing moves: the order of ranks among each other decides nothing.
    while any(play.advance(stage) for stage in stages):
        pass
    for stage in stages:
        if stage.next is not None:
            play.tell_why(stage, stage.next)
    play.check_ends()
    lines = [[place for place in stage.places if place is not None] for stage in stages]
    return check(Schedule(tuple(map(tuple, lines)), name)), [stage.places for stage in stages]


class _Play:
    def __init__(self, stages: Sequence[_Stage]) -> None:
        self._stages = stages
        self._messages: dict[tuple[int, str], deque[int]] = {}  # (stage, what it receives) -> micro-batches

    def _inbox(self, stage: int, kind: str) -> deque[int]:
        return self._messages.setdefault((stage, kind), deque())

    def advance(self, stage: _Stage) -> bool:
        """Play ``stage`` until it waits or ends; whether it moved."""
        before = stage.at
        while (one := stage.next) is not None:
            if one.kind in _COMES_FROM and not self._arrives(stage, one):
                break
            stage.places.append(self._do(stage, one))
            stage.at += 1
        return stage.at != before

    def _arrives(self, stage: _Stage, one: Listed) -> bool:
        if not 0 <= stage.number + _COMES_FROM[one.kind] < len(self._stages):
            stage.refuse(one, "an instruction that has a stage on the other side", "none there")
        return bool(self._inbox(stage.number, one.kind))

    def _do(self, stage: _Stage, one: Listed) -> Instruction | None:
        """The effect of ``one``, and what it is of ours."""
        buffer = stage.buffers.setdefault(one.buffer, _Buffer())
        first, last = stage.number == 0, stage.number == len(self._stages) - 1
        match one.kind:
            case "LoadMicroBatch" if first or last:
                if first:
                    self._fill(stage, one, buffer, stage.loaded)
                buffer.labels, stage.loaded = stage.loaded, stage.loaded + 1
            case "RecvActivation":
                self._fill(stage, one, buffer, self._inbox(stage.number, one.kind).popleft())
            case "ForwardPass":
                return self._forward(stage, one, buffer, last)
            case "SendActivation" | "SendGrad":
                self._send(stage, one, buffer)
            case "RecvGrad":
                micro = self._inbox(stage.number, one.kind).popleft()
                if buffer.output != micro:
                    need = f"micro-batch {micro}, whose gradient comes"
                    stage.refuse(one, need, _holds(buffer.output), _ORDER)
                buffer.gradient = micro
            case "BackwardPass":
                return self._backward(stage, one, buffer, first, last)
            case "OptimizerStep":
                after = next(
                    (o for o in stage.listed[stage.at :] if o.kind in ("ForwardPass", "BackwardPass")), None
                )
                if after is not None:
                    stage.refuse(one, "the end of the batch", f"{after} after it, at step {after.step}")
        return None

    def _fill(self, stage: _Stage, one: Listed, buffer: _Buffer, micro: int) -> None:
        busy = next((m for m in (buffer.unsent, buffer.owed) if m is not None), None)
        if busy is not None or (stage.trains and buffer.output is not None):
            held = busy if busy is not None else buffer.output
            stage.refuse(one, "a buffer that is free", f"micro-batch {held}, which is not done there")
        buffer.input = micro

    def _forward(self, stage: _Stage, one: Listed, buffer: _Buffer, last: bool) -> Instruction:
        micro = buffer.input
        if micro is None:
            need = "LoadMicroBatch" if stage.number == 0 else "RecvActivation"
            stage.refuse(one, f"{need}(buffer_id={one.buffer}) before it", "an empty buffer")
        if last and buffer.labels != micro:
            need = f"the labels of micro-batch {micro} (LoadMicroBatch)"
            stage.refuse(one, need, _holds(buffer.labels), _ORDER)
        buffer.input, buffer.output = None, micro if stage.trains else None
        buffer.unsent = None if last else micro
        return Instruction(stage.number, Op.FORWARD, micro)

    def _backward(self, stage: _Stage, one: Listed, buffer: _Buffer, first: bool, last: bool) -> Instruction:
        micro = buffer.output
        if micro is None:
            stage.refuse(one, f"ForwardPass(buffer_id={one.buffer}) before it", "no output there")
        if not last and buffer.gradient != micro:
            stage.refuse(one, f"RecvGrad(buffer_id={one.buffer}) before it", "no gradient there")
        buffer.output = buffer.gradient = None
        buffer.owed = None if first else micro
        return Instruction(stage.number, Op.BACKWARD, micro)

    def _send(self, stage: _Stage, one: Listed, buffer: _Buffer) -> None:
        kind, away = _SENDS[one.kind]
        if not 0 <= stage.number + away < len(self._stages):
            stage.refuse(one, "an instruction that has a stage on the other side", "none there")
        micro = buffer.unsent if away == 1 else buffer.owed
        if micro is None:
            need = "ForwardPass" if away == 1 else "BackwardPass"
            stage.refuse(one, f"{need}(buffer_id={one.buffer}) before it", "nothing to send")
        if away == 1:
            buffer.unsent = None
        else:
            buffer.owed = None
        self._inbox(stage.number + away, kind).append(micro)

    def tell_why(self, stage: _Stage, one: Listed) -> NoReturn:
        """Raise for stages that wait for ever: of the last in the chain, whose other stage has ended or is in it."""
        seen: set[int] = set()
        while True:
            seen.add(stage.number)
            other = self._stages[stage.number + _COMES_FROM[one.kind]]
            if other.next is None or other.number in seen:
                break
            stage, one = other, other.next
        sends = (
            "it sends none"
            if other.next is None
            else f"it waits too, at step {other.next.step} in {other.next}"
        )
        stage.refuse(one, f"a message from stage {other.number}", sends)

    def check_ends(self) -> None:
        """Raise for what is left over where all lists have ended."""
        for stage in self._stages:
            done = stage.listed[-1] if stage.listed else Listed("an empty list", None, 0)
            for kind in _COMES_FROM:
                if left := self._inbox(stage.number, kind):
                    stage.refuse(done, f"{kind} of micro-batch {left[0]}, which was sent", "the end")
            for number, buffer in stage.buffers.items():
                if buffer.output is not None:
                    stage.refuse(
                        done, f"BackwardPass(buffer_id={number}) of micro-batch {buffer.output}", "the end"
                    )
        # A rank that steps alone would step on other gradients than its peers.
        steps = [Counter(one.kind for one in stage.listed)["OptimizerStep"] for stage in self._stages]
        if len(set(steps)) > 1 or max(steps, default=0) > 1:
            raise ScheduleError(
                "the schedule steps the optimizer on some stages or more than once",
                expected="OptimizerStep once at the end of every stage, or on none",
                found=f"{steps} by stage",
            )


def _holds(micro: int | None) -> str:
    return "none" if micro is None else f"those of micro-batch {micro}"
