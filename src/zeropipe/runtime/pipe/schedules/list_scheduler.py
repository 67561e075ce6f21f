"""A deterministic list scheduler: it fills a simulated pipeline step by step under a limit on live activations.

Zero-bubble schedules are easy to describe (take an input gradient, a forward or a weight gradient, whichever is
ready, in some order of preference) and hard to write down in closed form for every size. So they are played out:
at each moment every free rank takes its preferred ready step. What was played out cannot deadlock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from zeropipe.runtime.pipe.instructions import Op, Schedule
from zeropipe.runtime.pipe.schedules.costs import UNIT, Costs, Placement

Step = tuple[int, Op, int]  # stage, op, micro-batch
Order = Callable[[int, int], tuple[int, ...]]  # (chunk, micro-batch) -> sort key, least first


def deep_first(chunk: int, micro_batch: int) -> tuple[int, ...]:
    return (-chunk, micro_batch)


def shallow_first(chunk: int, micro_batch: int) -> tuple[int, ...]:
    return (chunk, micro_batch)


def packs(size: int) -> Order:
    """Packs of ``size`` micro-batches, each through all chunks before the next pack."""

    def key(chunk: int, micro_batch: int) -> tuple[int, ...]:
        return (micro_batch // size, chunk, micro_batch)

    return key


@dataclass(frozen=True, slots=True)
class Preference:
    """Which ready step a rank takes first."""

    ops: tuple[Op, ...]
    forward: Order
    backward: Order
    # Limit the micro-batches under way instead of each rank's activations: never gets stuck.
    admit: bool = False


@dataclass(slots=True)
class Play:
    """One run of the scheduler: what is asked, and the state of every rank as time goes on."""

    ranks: int
    micro_batches: int
    chunks: int
    placement: Placement
    limit: int  # activations that a rank may hold, counted in chunks, from a forward to its weight gradient
    prefer: Preference
    costs: Costs = UNIT

    arrives: dict[Step, float] = field(default_factory=dict)  # a result reaches the stage that needs it
    next: dict[tuple[int, Op], int] = field(default_factory=dict)  # micro-batch of each (stage, op)
    live: dict[int, int] = field(default_factory=dict)  # activations held by each rank, in chunks
    lines: list[list[Step]] = field(default_factory=list)

    @property
    def num_stages(self) -> int:
        return self.ranks * self.chunks

    def run(self) -> tuple[float, Schedule] | None:
        """The time taken and the schedule; None where the limit leaves nothing that can run."""
        self.next = {(stage, op): 0 for stage in range(self.num_stages) for op in self.prefer.ops}
        self.live = dict.fromkeys(range(self.ranks), 0)
        self.lines = [[] for _ in range(self.ranks)]
        left = 3 * self.micro_batches * self.num_stages
        moments = [0.0]
        free = [0.0] * self.ranks
        end = 0.0
        while left:
            if not moments:
                return None
            now = heapq.heappop(moments)
            while moments and moments[0] == now:
                heapq.heappop(moments)
            chosen = [(rank, self._choose(rank, now)) for rank in range(self.ranks) if free[rank] <= now]
            for rank, step in chosen:
                if step is None:
                    continue
                free[rank] = self._take(rank, step, now)
                end = max(end, free[rank])
                left -= 1
                heapq.heappush(moments, free[rank])
                if self.costs.transfer:
                    heapq.heappush(moments, free[rank] + self.costs.transfer)
        return end, Schedule.made(self.lines)

    def _choose(self, rank: int, now: float) -> Step | None:
        best: tuple[tuple[int, ...], Step] | None = None
        for chunk in range(self.chunks):
            stage = self.placement.stage(rank, chunk, self.ranks)
            for preference, op in enumerate(self.prefer.ops):
                m = self.next[stage, op]
                if m >= self.micro_batches or not self._ready(rank, stage, op, m, now):
                    continue
                if op is Op.FORWARD:
                    key = (preference, *self.prefer.forward(chunk, m))
                elif op is Op.BACKWARD_INPUT:
                    key = (preference, *self.prefer.backward(chunk, m))
                else:
                    key = (preference, m, -chunk)
                if best is None or key < best[0]:
                    best = key, (stage, op, m)
        return None if best is None else best[1]

    def _ready(self, rank: int, stage: int, op: Op, m: int, now: float) -> bool:
        if op is Op.FORWARD:
            if self.prefer.admit:
                # p micro-batches under way hold at most p x chunks activations on any rank.
                if stage == 0 and m >= self.ranks and not self._finished(m - self.ranks):
                    return False
            elif self.live[rank] >= self.limit:
                return False
            need: Step | None = (stage - 1, op, m) if stage else None
        elif op is Op.BACKWARD_INPUT:
            last = stage == self.num_stages - 1
            need = (stage, Op.FORWARD, m) if last else (stage + 1, op, m)
        else:
            return m < self.next[stage, Op.BACKWARD_INPUT]
        return need is None or self.arrives.get(need, float("inf")) <= now

    def _finished(self, m: int) -> bool:
        return all(self.next[stage, Op.BACKWARD_WEIGHT] > m for stage in range(self.num_stages))

    def _take(self, rank: int, step: Step, now: float) -> float:
        stage, op, _ = step
        done = now + self.costs.of(op)
        onward = stage + 1 if op is Op.FORWARD else stage - 1
        stays = not 0 <= onward < self.num_stages or self.placement.rank(onward, self.ranks) == rank
        self.arrives[step] = done if stays else done + self.costs.transfer
        self.next[stage, op] += 1
        self.live[rank] += {Op.FORWARD: 1, Op.BACKWARD_WEIGHT: -1}.get(op, 0)
        self.lines[rank].append(step)
        return done
