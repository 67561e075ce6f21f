"""A pipeline schedule as frozen data that prints and parses, so that it can be read, compared and written by hand.

Words of this package. The model is cut along its depth into *stages*, numbered along the model. A *pipeline
rank* runs one stage, or several (*chunks*). An instruction names its stage, what to do and the micro-batch::

    2F0  stage 2, forward, micro-batch 0          2UNSHARD      gather the parameters of stage 2
    2B0  full backward                            2RESHARD      release them
    2I0  backward for the input only              2REDUCE_GRAD  reduce its gradients over the data axis
    2W0  backward for the weights only            2REDUCE_TIED  sum its tied gradients over the pipe axis

    2SEND_F0 2RECV_F0 2SEND_B0 2RECV_B0           an activation, or its gradient, leaves or reaches stage 2

A schedule is one line for each rank, comma separated; lines that open with ``#`` are remarks. The vocabulary is
that of ``torch.distributed.pipelining``, so its exported schedules can be read. One need only say what is computed:
`with_transfers` and `with_sharding` add the rest before it runs.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product
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


def computes(step: Instruction) -> bool:
    return step.op in COMPUTE


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
    """What one stage hands to its neighbour; ``op`` is FORWARD (an activation) or BACKWARD (its gradient)."""

    source: int  # stage
    target: int  # stage
    op: Op
    micro_batch: int
    ranks: tuple[int, int]  # who makes it, who needs it; the same rank where nothing has to be sent

    @property
    def crosses(self) -> bool:
        return self.ranks[0] != self.ranks[1]

    @property
    def edge(self) -> tuple[int, int, Op]:
        """What it has in common with those of other micro-batches."""
        return self.source, self.target, self.op

    @property
    def send(self) -> Instruction:
        return Instruction(self.source, Op.SEND_F if self.op is Op.FORWARD else Op.SEND_B, self.micro_batch)

    @property
    def receive(self) -> Instruction:
        return Instruction(self.target, Op.RECV_F if self.op is Op.FORWARD else Op.RECV_B, self.micro_batch)

    def __str__(self) -> str:
        """``0>1 F3``: from stage 0 to stage 1, the activation of micro-batch 3."""
        return f"{self.source}>{self.target} {self.op.value}{self.micro_batch}"


@dataclass(frozen=True, slots=True)
class Schedule:
    """What each pipeline rank does, in order. Which rank runs a stage follows from who names it."""

    ranks: tuple[tuple[Instruction, ...], ...]
    name: str = "custom"
    stage_rank: tuple[int, ...] = field(init=False, repr=False, compare=False)  # rank of each stage
    micro_batches: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Nothing else says who runs a stage, so no second rank may name it.
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

    def made_by(self, step: Instruction) -> Message | None:
        """What ``step`` hands on to a neighbouring stage, on the same rank or another; what a SEND sends."""
        return self._message(step, out=True)

    def needed_by(self, step: Instruction) -> Message | None:
        """What ``step`` waits for from a neighbouring stage, on the same rank or another; what a RECV receives."""
        return self._message(step, out=False)

    def _message(self, step: Instruction, out: bool) -> Message | None:
        op, way = _WAY.get(step.op, (step.op, 0))
        other = step.stage + (way if out else -way)
        # Weight gradients and stage instructions tell nobody; nor has the model a stage before its first.
        if not way or step.micro_batch is None or not 0 <= other < self.num_stages:
            return None
        source, target = (step.stage, other) if out else (other, step.stage)
        ranks = self.stage_rank[source], self.stage_rank[target]
        return Message(source, target, op, step.micro_batch, ranks)

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


def check(schedule: Schedule) -> Schedule:
    """Return ``schedule``, or raise `ScheduleError` that names the stage, the instruction and the rule."""
    trains = schedule.has_backward
    for rank, line in enumerate(schedule.ranks):
        # A step of a micro-batch stands once; where it stands says what comes before it.
        place = {step: i for i, step in reversed(list(enumerate(line)))}
        for step, times in Counter(line).items():
            if times > 1 and step.micro_batch is not None:
                _refuse(rank, step, "once", f"{times} times")
        for stage, m in product(schedule.stages_of(rank), range(schedule.micro_batches)):
            ops = (Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
            forward, full, inputs, weights = (Instruction(stage, op, m) for op in ops)
            if forward not in place:
                _refuse(rank, forward, "each stage runs each micro-batch forward", "nothing")
            # Either one whole backward or both of its halves, and each after what it needs.
            split = {inputs in place, weights in place}
            if trains and ((full in place) == (True in split) or len(split) == 2):
                given = [str(s) for s in (full, inputs, weights) if s in place] or "nothing"
                _refuse(rank, full, f"either {full}, or {inputs} and {weights}", given)
            for later, before in ((full, forward), (inputs, forward), (weights, inputs)):
                if trains and later in place and place[later] < place[before]:
                    _refuse(rank, later, f"{before} before it", "the other order")
    return schedule


def _refuse(rank: int, step: Instruction, expected: str, found: object) -> NoReturn:
    raise ScheduleError(
        f"schedule is wrong at {step} (stage {step.stage})",
        rank=rank,
        expected=expected,
        found=found,
        fix="correct this rank's line, or take a schedule by name",
    )


# What a schedule is given before it runs.
#
# Messages from rank a to rank b form one queue. The receiver takes them in the order in which the sender sends them,
# whatever order it uses them in; that is what keeps NCCL, which matches messages by order alone, from mixing them up
# or hanging:
#
#     rank 0:  0F0 0SEND_F0 0F1 0SEND_F1           queue 0 -> 1:  0F0, 0F1
#     rank 1:  1RECV_F0 1F0 1RECV_F1 1F1 ...


def queues(schedule: Schedule) -> dict[tuple[int, int], tuple[Message, ...]]:
    """The messages from each rank to each other rank, in the order in which they are sent."""
    found: defaultdict[tuple[int, int], list[Message]] = defaultdict(list)
    for step in filter(computes, schedule.steps()):
        made = schedule.made_by(step)
        if made is not None and made.crosses:
            found[made.ranks].append(made)
    return {pair: tuple(messages) for pair, messages in found.items()}


def known_taken(schedule: Schedule) -> dict[Message, int]:
    """For each message: how many messages of the opposite queue its sender had taken before it made this one."""
    # Whoever gets the message so learns, without an acknowledgement, which of its own messages have arrived.
    place = {message: at for queue in queues(schedule).values() for at, message in enumerate(queue)}
    taken: Counter[tuple[int, int]] = Counter()  # by the queue that they came in
    found: dict[Message, int] = {}
    for step in filter(computes, schedule.steps()):
        need, made = schedule.needed_by(step), schedule.made_by(step)
        if need in place:
            # To take one message is to take all before it: they come in order.
            taken[need.ranks] = max(taken[need.ranks], place[need] + 1)
        if made in place:
            found[made] = taken[made.ranks[::-1]]
    return found


def with_transfers(schedule: Schedule, ahead: int = 1) -> Schedule:
    """Add each SEND after the step that makes the value, each RECV ``ahead`` compute steps before its use."""
    # A RECV only opens the receive; the step that uses the value waits for it. Opened early, the transfer runs behind
    # the compute in between.
    waiting = {pair: deque(messages) for pair, messages in queues(schedule).items()}
    lines = []
    for line in schedule.ranks:
        plain = [step for step in line if step.op not in TRANSFER]
        places = [at for at, step in enumerate(plain) if computes(step)]
        before, after = _Added(list), _Added(list)
        for turn, at in enumerate(places):
            need, made = schedule.needed_by(plain[at]), schedule.made_by(plain[at])
            if made is not None and made.crosses:
                after[at].append(made.send)
            # With the message come all before it in its queue that no earlier step has asked for.
            queue = waiting.get(need.ranks, ()) if need is not None else ()
            while queue and need in queue:
                before[places[max(0, turn - ahead)]].append(queue.popleft().receive)
        lines.append(_woven(plain, before, after))
    return Schedule(tuple(lines), schedule.name)


def with_sharding(schedule: Schedule, sharded: bool = False, tied_stages: Collection[int] = ()) -> Schedule:
    """Add REDUCE_TIED and REDUCE_GRAD to a schedule of compute steps; UNSHARD and RESHARD where stages are ``sharded``.

    ``tied_stages``: stages that share parameters with stages of other ranks::

        0UNSHARD 0F0 0F1 ... 0B1 0RESHARD 0REDUCE_GRAD       with ties: ... 0REDUCE_TIED 0REDUCE_GRAD 0RESHARD

    A stage is gathered once in a step, from its first use to its last. Gradients are complete after the last backward:
    reduced once for each step, not for each micro-batch.
    """
    lines = []
    for rank, line in enumerate(schedule.ranks):
        before, after = _Added(list), _Added(list)
        reduced: list[Instruction] = []
        released: list[Instruction] = []
        for stage in schedule.stages_of(rank):
            # A weight gradient is a use too: autograd looks at all that its node saved, the parameter as well.
            uses = [at for at, step in enumerate(line) if step.stage == stage and computes(step)]
            tied = stage in tied_stages
            if sharded:
                before[uses[0]].append(Instruction(stage, Op.UNSHARD))
                # Tied gradients still have to be summed when the stage has been used for the last time.
                (released if tied else after[uses[-1]]).append(Instruction(stage, Op.RESHARD))
            if schedule.has_backward:
                # The first stages to end reduce while the others still compute.
                (reduced if tied else after[uses[-1]]).append(Instruction(stage, Op.REDUCE_GRAD))
        if reduced:
            # One for all ties of the rank, so that every rank can take them in one order; their stages come after.
            reduced.insert(0, Instruction(reduced[0].stage, Op.REDUCE_TIED))
        lines.append((*_woven(line, before, after), *reduced, *released))
    return Schedule(tuple(lines), schedule.name)


_Added = defaultdict[int, list[Instruction]]  # by place in a line


def _woven(line: Sequence[Instruction], before: _Added, after: _Added) -> tuple[Instruction, ...]:
    return tuple(added for at, step in enumerate(line) for added in (*before[at], step, *after[at]))
