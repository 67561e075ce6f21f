"""A pipeline schedule as frozen data that prints and parses, so that it can be read, compared and written by hand.

Words of this package. The model is cut along its depth into *stages*, numbered along the model. A *pipeline
rank* runs one stage, or several (*chunks*). An instruction names its stage, what to do and the micro-batch::

    2F0  stage 2, forward, micro-batch 0          2UNSHARD      gather the parameters of stage 2
    2B0  full backward                            2RESHARD      release them
    2I0  backward for the input only              2REDUCE_GRAD  reduce its gradients over the data axis
    2W0  backward for the weights only            2REDUCE_TIED  sum its tied gradients over the pipe axis

    2SEND_F0 2RECV_F0 2SEND_B0 2RECV_B0           an activation, or its gradient, leaves or reaches stage 2

A schedule is one line for each rank, comma separated; lines that open with ``#`` are remarks. The vocabulary is
that of ``torch.distributed.pipelining``, so its exported schedules can be read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NoReturn

from zeropipe.errors import ScheduleError


class Op(StrEnum):
    """What an instruction does; the value is what it prints."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    UNSHARD = "UNSHARD"
    RESHARD = "RESHARD"
    REDUCE_GRAD = "REDUCE_GRAD"
    REDUCE_TIED = "REDUCE_TIED"


COMPUTE = frozenset({Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT})
TRANSFER = frozenset({Op.SEND_F, Op.RECV_F, Op.SEND_B, Op.RECV_B})
OF_STAGE = frozenset({Op.UNSHARD, Op.RESHARD, Op.REDUCE_GRAD, Op.REDUCE_TIED})  # these have no micro-batch

_PATTERN = re.compile(
    r"(?P<stage>\d+)(?P<op>" + "|".join(sorted(Op, key=len, reverse=True)) + r")(?P<micro_batch>\d+)?"
)


@dataclass(frozen=True, slots=True, order=True)
class Instruction:
    """One step of one rank: ``str()`` gives ``2F0``, ``Instruction.parse`` reads it back."""

    stage: int
    op: Op
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if (self.micro_batch is None) != (self.op in OF_STAGE):
            need = "no micro-batch" if self.op in OF_STAGE else "a micro-batch"
            raise ScheduleError(f"instruction {self.stage}{self.op.value} is malformed", expected=need)

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{'' if self.micro_batch is None else self.micro_batch}"

    @classmethod
    def parse(cls, text: str) -> Instruction:
        found = _PATTERN.fullmatch(text.strip())
        if found is None:
            raise ScheduleError(
                f"cannot read the instruction {text.strip()!r}",
                expected="STAGE OP MICRO_BATCH such as 2F0, 1I3, 0W3, 2B1, or STAGE OP such as 0UNSHARD",
                fix=f"use one of {', '.join(Op)}",
            )
        micro_batch = found["micro_batch"]
        return cls(int(found["stage"]), Op(found["op"]), None if micro_batch is None else int(micro_batch))


@dataclass(frozen=True, slots=True)
class Schedule:
    """What each pipeline rank does, in order. Which rank runs a stage follows from who names it."""

    ranks: tuple[tuple[Instruction, ...], ...]
    name: str = "custom"
    stage_rank: tuple[int, ...] = field(init=False, repr=False, compare=False)  # rank of each stage
    micro_batches: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Which rank runs a stage is nowhere said: it follows from who names it, so nobody else may.
        owner: dict[int, int] = {}
        for rank, line in enumerate(self.ranks):
            for step in line:
                if owner.setdefault(step.stage, rank) != rank:
                    raise ScheduleError(
                        f"stage {step.stage} runs on two ranks",
                        expected=f"only rank {owner[step.stage]}",
                        found=f"{step} on rank {rank} too",
                        fix="give each stage to one rank",
                    )
        if sorted(owner) != list(range(len(owner))) or not owner:
            raise ScheduleError(
                "stages must be numbered from 0 without a gap",
                found=sorted(owner),
                fix="name every stage of the model in the schedule",
            )
        highest = max((s.micro_batch for s in self.steps() if s.micro_batch is not None), default=-1)
        object.__setattr__(self, "stage_rank", tuple(owner[s] for s in range(len(owner))))
        object.__setattr__(self, "micro_batches", highest + 1)

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        return len(self.stage_rank)

    @property
    def has_backward(self) -> bool:
        return any(step.op in (Op.BACKWARD, Op.BACKWARD_INPUT) for step in self.steps())

    def steps(self) -> Iterator[Instruction]:
        """All instructions, rank after rank."""
        for line in self.ranks:
            yield from line

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that ``rank`` runs, in model order."""
        return tuple(s for s, owner in enumerate(self.stage_rank) if owner == rank)

    def only(self, micro_batches: int) -> Schedule:
        """The same order for the first ``micro_batches`` alone."""
        # A micro-batch depends on no other, so what is left of a valid schedule is valid.
        return self._of(lambda s: s.micro_batch is None or s.micro_batch < micro_batches)

    def forward_only(self) -> Schedule:
        """The forwards alone, in the same order: what evaluation runs."""
        return self._of(lambda s: s.op in (Op.FORWARD, Op.UNSHARD, Op.RESHARD))

    def _of(self, keep: Callable[[Instruction], bool]) -> Schedule:
        return Schedule(tuple(tuple(filter(keep, line)) for line in self.ranks), self.name)

    @classmethod
    def made(cls, lines: Iterable[Iterable[tuple[int, Op, int]]], name: str = "custom") -> Schedule:
        """The schedule of (stage, op, micro-batch) triples."""
        return cls(tuple(tuple(Instruction(*step) for step in line) for line in lines), name)

    def __str__(self) -> str:
        lines = (",".join(map(str, line)) for line in self.ranks)
        return "\n".join((f"# {self.name}", *lines)) + "\n"

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read what ``str`` prints. The first remark is the name; an empty line is a rank that does nothing."""
        # Only the end is stripped of line breaks: an empty line before it is a rank that does nothing.
        remarks = [line.lstrip("# ").strip() for line in text.splitlines() if line.lstrip().startswith("#")]
        lines = [line for line in text.rstrip("\n").split("\n") if not line.lstrip().startswith("#")]
        ranks = tuple(
            tuple(Instruction.parse(word) for word in line.split(",") if word.strip()) for line in lines
        )
        return cls(ranks, remarks[0] if remarks and remarks[0] else "custom")


# What a step makes for a neighbouring stage, or a transfer carries, and which way that goes along the model.
_WAY = {
    Op.FORWARD: (Op.FORWARD, 1),
    Op.SEND_F: (Op.FORWARD, 1),
    Op.RECV_F: (Op.FORWARD, 1),
    Op.BACKWARD: (Op.BACKWARD, -1),
    Op.BACKWARD_INPUT: (Op.BACKWARD, -1),
    Op.SEND_B: (Op.BACKWARD, -1),
    Op.RECV_B: (Op.BACKWARD, -1),
}


@dataclass(frozen=True, slots=True)
class Message:
    """One transfer between neighbouring stages; ``op`` is FORWARD (activation) or BACKWARD (its gradient)."""

    source: int  # stage
    target: int  # stage
    op: Op
    micro_batch: int

    @property
    def send(self) -> Instruction:
        return Instruction(self.source, Op.SEND_F if self.op is Op.FORWARD else Op.SEND_B, self.micro_batch)

    @property
    def receive(self) -> Instruction:
        return Instruction(self.target, Op.RECV_F if self.op is Op.FORWARD else Op.RECV_B, self.micro_batch)


def made_by(step: Instruction, num_stages: int) -> Message | None:
    """What ``step`` hands on to a neighbouring stage, on the same rank or another; what a SEND sends."""
    op, way = _WAY.get(step.op, (step.op, 0))
    if not way or step.micro_batch is None or not 0 <= step.stage + way < num_stages:
        return None
    return Message(step.stage, step.stage + way, op, step.micro_batch)


def needed_by(step: Instruction, num_stages: int) -> Message | None:
    """What ``step`` waits for from a neighbouring stage, on the same rank or another; what a RECV receives."""
    op, way = _WAY.get(step.op, (step.op, 0))
    if not way or step.micro_batch is None or not 0 <= step.stage - way < num_stages:
        return None
    return Message(step.stage - way, step.stage, op, step.micro_batch)


def check(schedule: Schedule) -> Schedule:
    """Return ``schedule``, or raise `ScheduleError` that names the stage, the instruction and the rule."""
    trains = schedule.has_backward
    for rank, line in enumerate(schedule.ranks):
        # A step of a micro-batch stands once; where it stands says what comes before it.
        seen = Counter(line)
        place = {step: i for i, step in reversed(list(enumerate(line)))}
        for step, times in seen.items():
            if times > 1 and step.micro_batch is not None:
                _refuse(rank, step, "once", f"{times} times")
        for stage in schedule.stages_of(rank):
            for m in range(schedule.micro_batches):
                _check_micro_batch(rank, place, stage, m, trains)
    return schedule


def _check_micro_batch(rank: int, place: dict[Instruction, int], stage: int, m: int, trains: bool) -> None:
    forward, full, inputs, weights = (
        Instruction(stage, op, m) for op in (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
    )
    if forward not in place:
        _refuse(rank, forward, "each stage runs each micro-batch forward", "nothing")
    if not trains:
        return
    # Either one whole backward or both of its halves, and each after what it needs.
    split = {inputs in place, weights in place}
    if (full in place) == (True in split) or len(split) == 2:
        given = [str(s) for s in (full, inputs, weights) if s in place] or "nothing"
        _refuse(rank, full, f"either {full}, or {inputs} and {weights}", given)
    backward = full if full in place else inputs
    if place[backward] < place[forward]:
        _refuse(rank, backward, f"{forward} before it", "the other order")
    if weights in place and place[weights] < place[inputs]:
        _refuse(rank, weights, f"{inputs} before it", "the other order")


def _refuse(rank: int, step: Instruction, expected: str, found: object) -> NoReturn:
    raise ScheduleError(
        f"schedule is wrong at {step} (stage {step.stage})",
        rank=rank,
        expected=expected,
        found=found,
        fix="correct this rank's line, or take a schedule by name",
    )
