"""Schedules that split backward: input gradients go first, weight gradients fill what would be idle time.

With unit costs no schedule can end before ``p - 1 + 3 m v``: the last rank starts at ``p - 1`` and has that much
to do. ZB-H1, interleaved zero-bubble and ZBV all reach it at the memory of 1F1B.

Some are easy to describe (take an input gradient, a forward or a weight gradient, whichever is ready, in some order
of preference) and hard to write down in closed form for every size. So they are played out: at each moment every free
rank takes its preferred ready step. What was played out cannot deadlock.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from zeropipe.runtime.pipe.instructions import Op, Schedule
from zeropipe.runtime.pipe.simulate import UNIT, Costs, Placement

F, B, INPUT, WEIGHT = Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT
Step = tuple[int, Op, int]  # stage, op, micro-batch


def zb_h1(ranks: int, micro_batches: int, chunks: int = 1) -> Schedule:
    """ZB-H1 (Qi et al., arXiv 2401.10241, section 3): 1F1B whose rank r lags r weight gradients behind.

    Rank r starts with ``p - r`` forwards and lags ``r`` weight gradients: every rank holds ``p`` activations.
    """
    assert chunks == 1
    lines = []
    for rank in range(ranks):
        forward = min(ranks - rank, micro_batches)
        line = [(rank, F, m) for m in range(forward)]
        weight = 0  # the next weight gradient, r behind the input gradients
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


# Played out.

# In which order a rank takes its ready forwards or input gradients: packs of so many micro-batches, each pack through
# all chunks before the next; or all of the first chunk before the second; or the deepest chunk first.
DEEP, SHALLOW = 0, 1 << 30


@dataclass(frozen=True, slots=True)
class _Preference:
    """Which ready step a rank takes first."""

    ops: tuple[Op, ...]
    forward: int  # size of packs, or DEEP
    backward: int
    # Limit the micro-batches under way instead of each rank's activations: never gets stuck.
    admit: bool = False


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
    # Packs come in two sizes: p, and the even size where p would leave a small last pack.
    sizes = dict.fromkeys((ranks, -(-micro_batches // max(1, micro_batches // ranks))))
    preferences = [
        _Preference(ops, forward, backward)
        for ops in ((INPUT, F, WEIGHT), (F, INPUT, WEIGHT))
        for forward in (*sizes, DEEP)
        for backward in (DEEP, SHALLOW)
    ]
    # No rank holds more than p micro-batches through all its chunks. Early forwards can use that room up and get
    # stuck; the last preference cannot, because it lets a micro-batch in only when another is done.
    preferences.append(_Preference((INPUT, F, WEIGHT), DEEP, DEEP, admit=True))
    played = [_Play(ranks, micro_batches, chunks, placement, one, costs).run() for one in preferences]
    _, lines = min((one for one in played if one is not None), key=lambda one: one[0])
    return Schedule.made(lines, name)


class _Play:
    """One run of the scheduler: what is asked, and the state of every rank as time goes on."""

    def __init__(
        self,
        ranks: int,
        micro_batches: int,
        chunks: int,
        placement: Placement,
        prefer: _Preference,
        costs: Costs,
    ) -> None:
        self.ranks, self.micro_batches, self.chunks = ranks, micro_batches, chunks
        self.placement, self.prefer, self.costs = placement, prefer, costs
        self.num_stages = ranks * chunks

        self.arrives: dict[Step, float] = {}  # when a result reaches the stage that needs it
        self.next = {(stage, op): 0 for stage in range(self.num_stages) for op in prefer.ops}  # micro-batch
        self.live = [0] * ranks  # activations held, in chunks: from a forward to its weight gradient
        self.lines: list[list[Step]] = [[] for _ in range(ranks)]

    def run(self) -> tuple[float, list[list[Step]]] | None:
        """The time taken and the lines of the schedule; None where the limit leaves nothing that can run."""
        left = 3 * self.micro_batches * self.num_stages
        moments = [0.0]
        free = [0.0] * self.ranks
        while left:
            if not moments:
                return None
            # All that happens at one moment has happened before any rank chooses.
            now = heapq.heappop(moments)
            while moments and moments[0] == now:
                heapq.heappop(moments)
            chosen = [(rank, self._choose(rank, now)) for rank in range(self.ranks) if free[rank] <= now]
            for rank, step in chosen:
                if step is not None:
                    free[rank] = self._take(rank, step, now)
                    left -= 1
                    heapq.heappush(moments, free[rank])
                    if self.costs.transfer:
                        heapq.heappush(moments, free[rank] + self.costs.transfer)
        return max(free), self.lines

    def _choose(self, rank: int, now: float) -> Step | None:
        best: tuple[tuple[int, ...], Step] | None = None
        for chunk in range(self.chunks):
            stage = self.placement.stage(rank, chunk, self.ranks)
            for preference, op in enumerate(self.prefer.ops):
                m = self.next[stage, op]
                if m >= self.micro_batches or not self._ready(rank, stage, op, m, now):
                    continue
                if op is WEIGHT:
                    key: tuple[int, ...] = (preference, m, -chunk)
                else:
                    pack = self.prefer.forward if op is F else self.prefer.backward
                    order = (-chunk, m) if pack == DEEP else (m // pack, chunk, m)
                    key = (preference, *order)
                if best is None or key < best[0]:
                    best = key, (stage, op, m)
        return None if best is None else best[1]

    def _ready(self, rank: int, stage: int, op: Op, m: int, now: float) -> bool:
        if op is F:
            if self.prefer.admit:
                # p micro-batches under way hold at most p x chunks activations on any rank.
                oldest = m - self.ranks
                if stage == 0 and any(self.next[s, WEIGHT] <= oldest for s in range(self.num_stages)):
                    return False
            elif self.live[rank] >= self.num_stages:
                return False
            need: Step | None = (stage - 1, op, m) if stage else None
        elif op is INPUT:
            last = stage == self.num_stages - 1
            need = (stage, F, m) if last else (stage + 1, op, m)
        else:
            return m < self.next[stage, INPUT]
        return need is None or self.arrives.get(need, float("inf")) <= now

    def _take(self, rank: int, step: Step, now: float) -> float:
        stage, op, _ = step
        done = now + self.costs.of(op)
        onward = stage + 1 if op is F else stage - 1
        stays = not 0 <= onward < self.num_stages or self.placement.rank(onward, self.ranks) == rank
        self.arrives[step] = done if stays else done + self.costs.transfer
        self.next[stage, op] += 1
        self.live[rank] += {F: 1, WEIGHT: -1}.get(op, 0)
        self.lines[rank].append(step)
        return done
