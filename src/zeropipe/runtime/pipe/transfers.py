"""Derives who sends what to whom, so that a schedule need only say what is computed.

Messages from rank a to rank b form one queue. The receiver takes them in the order in which the sender sends them,
whatever order it uses them in; that is what keeps NCCL, which matches messages by order alone, from mixing them up
or hanging::

    rank 0:  0F0 0SEND_F0 0F1 0SEND_F1           queue 0 -> 1:  0F0, 0F1
    rank 1:  1RECV_F0 1F0 1RECV_F1 1F1 ...
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from zeropipe.runtime.pipe.instructions import COMPUTE, TRANSFER, Instruction, Op, Schedule


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
    """What ``step`` hands on to a neighbouring stage (on the same rank or another)."""
    if step.micro_batch is None:
        return None
    if step.op is Op.FORWARD and step.stage + 1 < num_stages:
        return Message(step.stage, step.stage + 1, Op.FORWARD, step.micro_batch)
    if step.op in (Op.BACKWARD, Op.BACKWARD_INPUT) and step.stage > 0:
        return Message(step.stage, step.stage - 1, Op.BACKWARD, step.micro_batch)
    return None


def needed_by(step: Instruction, num_stages: int) -> Message | None:
    """What ``step`` waits for from a neighbouring stage (on the same rank or another)."""
    if step.micro_batch is None:
        return None
    if step.op is Op.FORWARD and step.stage > 0:
        return Message(step.stage - 1, step.stage, Op.FORWARD, step.micro_batch)
    if step.op in (Op.BACKWARD, Op.BACKWARD_INPUT) and step.stage + 1 < num_stages:
        return Message(step.stage + 1, step.stage, Op.BACKWARD, step.micro_batch)
    return None


def queues(schedule: Schedule) -> dict[tuple[int, int], tuple[Message, ...]]:
    """The messages from each rank to each other rank, in the order in which they are sent."""
    found: dict[tuple[int, int], list[Message]] = {}
    for rank, line in enumerate(schedule.ranks):
        for step in line:
            message = made_by(step, schedule.num_stages)
            if message is not None and schedule.stage_rank[message.target] != rank:
                found.setdefault((rank, schedule.stage_rank[message.target]), []).append(message)
    return {pair: tuple(messages) for pair, messages in found.items()}


def known_taken(schedule: Schedule) -> dict[Message, int]:
    """For each message: how many messages of the opposite queue its sender had taken before it made this one.

    Whoever gets the message so learns, without an acknowledgement, which of its own messages have arrived.
    """
    sent = queues(schedule)
    place = {message: at for queue in sent.values() for at, message in enumerate(queue)}
    found: dict[Message, int] = {}
    for rank, line in enumerate(schedule.ranks):
        taken: dict[int, int] = {}  # by the rank that they came from
        for step in line:
            need = needed_by(step, schedule.num_stages)
            if need is not None and schedule.stage_rank[need.source] != rank:
                source = schedule.stage_rank[need.source]
                taken[source] = max(taken.get(source, 0), place[need] + 1)
            made = made_by(step, schedule.num_stages)
            if made is not None and schedule.stage_rank[made.target] != rank:
                found[made] = taken.get(schedule.stage_rank[made.target], 0)
    return found


def with_transfers(schedule: Schedule, ahead: int = 1) -> Schedule:
    """Add each SEND after the step that makes the value, each RECV ``ahead`` compute steps before its use.

    A RECV only opens the receive; the step that uses the value waits for it. Opened early, the transfer runs
    behind the compute in between.
    """
    waiting = {pair: deque(messages) for pair, messages in queues(schedule).items()}
    lines = []
    for rank, line in enumerate(schedule.ranks):
        plain = [step for step in line if step.op not in TRANSFER]
        opens: list[list[Instruction]] = [[] for _ in plain]
        compute_places = [i for i, step in enumerate(plain) if step.op in COMPUTE]
        for turn, i in enumerate(compute_places):
            message = needed_by(plain[i], schedule.num_stages)
            if message is None or schedule.stage_rank[message.source] == rank:
                continue
            queue = waiting.get((schedule.stage_rank[message.source], rank), deque())
            while queue and message in queue:
                opens[compute_places[max(0, turn - ahead)]].append(queue.popleft().receive)
        steps: list[Instruction] = []
        for step, first in zip(plain, opens, strict=True):
            steps += first
            steps.append(step)
            made = made_by(step, schedule.num_stages)
            if made is not None and schedule.stage_rank[made.target] != rank:
                steps.append(made.send)
        lines.append(tuple(steps))
    return Schedule(tuple(lines), schedule.name)
