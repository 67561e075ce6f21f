"""Adds the instructions by which sharded parameters and gradients (ZeRO 2 and 3) join any schedule.

A stage's gradients are complete after its last backward, so REDUCE_GRAD stands right there: once for each step,
not once for each micro-batch, and the first stages to end reduce while the others still compute. A stage's
parameters are gathered (UNSHARD) before its first use. They are released (RESHARD) after the last use of the step,
or between phases: whenever the stage stays idle for longer than ``gap`` of its rank's compute steps.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum

from zeropipe.runtime.pipe.instructions import COMPUTE, Instruction, Op, Schedule


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

    ``tied_stages``: stages that share parameters with stages of other ranks. At the end of the line one REDUCE_TIED
    sums all tied gradients of the rank over the pipe axis (one for all, so that every rank can take the ties in one
    order), and only then are those stages reduced.
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
            if stage in tied_stages:
                end.append(Instruction(stage, Op.REDUCE_GRAD))
            else:
                after.setdefault(uses[-1], []).append(Instruction(stage, Op.REDUCE_GRAD))
        if end:
            end.insert(0, Instruction(end[0].stage, Op.REDUCE_TIED))
        steps: list[Instruction] = []
        for i, step in enumerate(line):
            steps += before.get(i, ())
            steps.append(step)
            steps += after.get(i, ())
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
