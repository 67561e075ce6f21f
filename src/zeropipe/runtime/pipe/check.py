"""What every schedule must hold before anything runs: each step once, in an order that each rank can keep."""

from __future__ import annotations

from collections import Counter

from zeropipe.errors import ScheduleError
from zeropipe.runtime.pipe.instructions import COMPUTE, Instruction, Op, Schedule


def check(schedule: Schedule) -> Schedule:
    """Return ``schedule``, or raise `ScheduleError` that names the stage, the instruction and the rule."""
    trains = schedule.has_backward
    for rank, line in enumerate(schedule.ranks):
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
    split = {inputs in place, weights in place}
    if (full in place) == (True in split) or len(split) == 2:
        given = [str(s) for s in (full, inputs, weights) if s in place] or "nothing"
        _refuse(rank, full, f"either {full}, or {inputs} and {weights}", given)
    backward = full if full in place else inputs
    if place[backward] < place[forward]:
        _refuse(rank, backward, f"{forward} before it", "the other order")
    if weights in place and place[weights] < place[inputs]:
        _refuse(rank, weights, f"{inputs} before it", "the other order")


def _refuse(rank: int, step: Instruction, expected: str, found: object) -> None:
    raise ScheduleError(
        f"schedule is wrong at {step} (stage {step.stage})",
        rank=rank,
        expected=expected,
        found=found,
        fix="correct this rank's line, or take a schedule by name",
    )


def computes(line: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    """The compute steps of a line, without transfers and without instructions that concern a whole stage."""
    return tuple(step for step in line if step.op in COMPUTE)
