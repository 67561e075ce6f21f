"""How long a batch of a pipeline takes, and how much of that its ranks wait: its own schedule, played with the times of
the stages that were rehearsed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from zeropipe.planning.devices import Device, Seconds, seconds
from zeropipe.planning.rehearse import Rehearsal
from zeropipe.runtime.pipe.instructions import Op, computes
from zeropipe.runtime.pipe.simulate import Costs, Simulation, simulate

_MESSAGES = ("send", "recv")


def played(rehearsals: Sequence[Rehearsal], device: Device) -> tuple[Seconds, Simulation] | None:
    """Seconds of a step, and the batch as its ranks play it; None where the program is no pipeline."""
    schedule = rehearsals[0].schedule
    if schedule is None:
        return None
    times = [_times(one, device) for one in rehearsals]
    # A stage that nobody has rehearsed lies inside of the pipeline, as the rank in the middle does.
    owner = {stage: number for number, one in enumerate(rehearsals) for stage in one.stages}
    each = [times[owner.get(stage, len(times) // 2)] for stage in range(schedule.num_stages)]
    # Half of a backward is for the weights, where a schedule has it apart: a product for each of the two.
    halves = tuple(backward / 2 for _, backward, _ in each)
    costs = Costs(
        tuple(forward for forward, _, _ in each), halves, halves, max(message for *_, message in each)
    )
    batch = simulate(schedule, costs)
    # Around the batch: what is reduced, and the step. The slowest rank counts.
    rest = [seconds(*_outside(one), device) for one in rehearsals]
    slowest = max(rest, key=lambda one: one.total)
    slowest.computing["pipeline"] = batch.makespan
    return slowest, batch


def _times(one: Rehearsal, device: Device) -> tuple[float, float, float]:
    """Seconds of a forward and of a backward of one micro-batch in one stage of the rank, and of a message."""
    schedule = one.schedule
    assert schedule is not None
    rank = schedule.stage_rank[one.stages[0]]
    steps = Counter(step.op is Op.FORWARD for step in schedule.ranks[rank] if computes(step))
    count = max(1, steps[True])
    computing = seconds(
        {k: n for k, n in one.kernels.items() if k.phase in ("forward", "backward")}, {}, device
    )
    messages = [
        device.sends(op, nbytes, ranks)
        for (op, _, nbytes, ranks, _), _ in one.traffic.items()
        if op in _MESSAGES
    ]
    forward, backward = (computing.computing.get(phase, 0.0) / count for phase in ("forward", "backward"))
    return forward, backward, max(messages, default=0.0)


def _outside(one: Rehearsal) -> tuple[dict, dict]:
    kernels = {k: n for k, n in one.kernels.items() if k.phase not in ("forward", "backward")}
    return kernels, {key: n for key, n in one.traffic.items() if key[0] not in _MESSAGES}
