"""Schedules that split backward: input gradients go first, weight gradients fill what would be idle time.

With unit costs no schedule can end before ``p - 1 + 3 m v``: the last rank starts at ``p - 1`` and has that much
to do. ZB-H1, interleaved zero-bubble and ZBV all reach it at the memory of 1F1B.
"""

from __future__ import annotations

from zeropipe.runtime.pipe.instructions import Op, Schedule
from zeropipe.runtime.pipe.schedules.costs import UNIT, Costs, Placement
from zeropipe.runtime.pipe.schedules.list_scheduler import Play, Preference, deep_first, packs, shallow_first

F, B, INPUT, WEIGHT = Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT


def _preferences(ranks: int, micro_batches: int) -> list[Preference]:
    """What is tried. Packs come in two sizes: ``p``, and the even size where ``p`` would leave a small last pack."""
    sizes = dict.fromkeys((ranks, -(-micro_batches // max(1, micro_batches // ranks))))
    greedy = [
        Preference(ops, forward, backward)
        for ops in ((INPUT, F, WEIGHT), (F, INPUT, WEIGHT))
        for forward in (*map(packs, sizes), deep_first)
        for backward in (deep_first, shallow_first)
    ]
    return [*greedy, Preference((INPUT, F, WEIGHT), deep_first, deep_first, admit=True)]


def zb_h1(ranks: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """ZB-H1 (Qi et al., arXiv 2401.10241, section 3): 1F1B whose rank r lags r weight gradients behind.

    Rank r starts with ``p - r`` forwards and lags ``r`` weight gradients: every rank holds ``p`` activations.
    """
    assert chunks == 1
    lines = []
    for rank in range(ranks):
        forward = min(ranks - rank, micro_batches)
        line = [(rank, F, m) for m in range(forward)]
        weight = 0
        for m in range(micro_batches):
            line.append((rank, INPUT, m))
            if m - weight >= rank:
                line.append((rank, WEIGHT, weight))
                weight += 1
            if forward < micro_batches:
                line.append((rank, F, forward))
                forward += 1
        line += [(rank, WEIGHT, m) for m in range(weight, micro_batches)]
        lines.append(line)
    return Schedule.made(lines, "zb-h1")


def interleaved_zb(ranks: int, micro_batches: int, chunks: int = 2, costs: Costs = UNIT) -> Schedule:
    """Interleaved zero-bubble: ``chunks`` stages in a loop on each rank, at most ``p`` micro-batches' activations."""
    if chunks == 1:
        return Schedule(zb_h1(ranks, micro_batches).ranks, "interleaved-zb")
    return _best("interleaved-zb", ranks, micro_batches, chunks, Placement.LOOP, costs)


def zbv(ranks: int, micro_batches: int, chunks: int = 2, costs: Costs = UNIT) -> Schedule:
    """ZBV (Qi et al., arXiv 2405.15362, V-ZB): two stages a rank, there and back, the memory of 1F1B."""
    assert chunks == 2
    return _best("zbv", ranks, micro_batches, chunks, Placement.VEE, costs)


def _best(
    name: str, ranks: int, micro_batches: int, chunks: int, placement: Placement, costs: Costs
) -> Schedule:
    """The quickest of all preferences, the first among equals."""
    # No rank holds more than p micro-batches through all its chunks. Early forwards can use that room up and get
    # stuck; the last preference cannot, because it lets a micro-batch in only when another is done.
    limit = ranks * chunks
    preferences = _preferences(ranks, micro_batches)
    played = [Play(ranks, micro_batches, chunks, placement, limit, p, costs).run() for p in preferences]
    best = min((one for one in played if one is not None), key=lambda one: one[0])
    return Schedule(best[1].ranks, name)


def dualpipe_v(ranks: int, micro_batches: int, chunks: int = 2) -> Schedule:
    """DualPipeV, DualPipe cut in half (DeepSeek-V3 report, arXiv 2412.19437, section 3.2.1; Qi, "cut in half").

    Eight phases, stages placed there and back (*near* is a rank's first stage, *far* its second). A forward of one
    stage meets a full backward of the other, so that transfers hide behind compute. The phases need ``2 p``
    micro-batches; with fewer, what is missing is left out.
    """
    assert chunks == 2
    total = max(micro_batches, 2 * ranks)
    lines = []
    for rank in range(ranks):
        maker = _DualLine(rank, 2 * ranks - 1 - rank)
        after = ranks - 1 - rank  # ranks between this one and the turn
        for _ in range(2 * after):
            maker.forward(0)
        for _ in range(rank + 1):
            maker.forward(0)
            maker.forward(1)
        for _ in range(after):
            maker.backward(1, split=True)
            maker.weight()
            maker.forward(1)
        for _ in range(total - 2 * ranks + rank + 1):
            maker.forward(0)
            maker.backward(1)
            maker.forward(1)
            maker.backward(0)
        for _ in range(after):
            maker.backward(1)
            maker.forward(1)
            maker.backward(0)
        for turn in range(rank + 1):
            maker.backward(1, split=2 * turn >= rank + 1)
            maker.backward(0, split=2 * turn + 1 >= rank + 1)
        for _ in range(after):
            maker.weight()
            maker.backward(0, split=True)
        while maker.owed:
            maker.weight()
        lines.append(maker.line)
    return Schedule.made(lines, "dualpipev").only(micro_batches)


class _DualLine:
    """The line of one rank of DualPipeV, with the next micro-batch of each of its two stages."""

    def __init__(self, near: int, far: int) -> None:
        self.stages = (near, far)
        self.forwards = [0, 0]
        self.backwards = [0, 0]
        self.owed: list[tuple[int, int]] = []  # (stage, micro-batch) whose weight gradient is still to come
        self.line: list[tuple[int, Op, int]] = []

    def forward(self, chunk: int) -> None:
        self.line.append((self.stages[chunk], F, self.forwards[chunk]))
        self.forwards[chunk] += 1

    def backward(self, chunk: int, split: bool = False) -> None:
        stage, m = self.stages[chunk], self.backwards[chunk]
        self.backwards[chunk] += 1
        self.line.append((stage, INPUT if split else B, m))
        if split:
            self.owed.append((stage, m))

    def weight(self) -> None:
        if self.owed:
            stage, m = self.owed.pop(0)
            self.line.append((stage, WEIGHT, m))
