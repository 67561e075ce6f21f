"""A deterministic list scheduler: it fills a simulated pipeline step by step under a limit on live activations.

Zero-bubble schedules are easy to describe (take an input gradient, a forward or a weight gradient, whichever is
ready, in some order of preference) and hard to write down in closed form for every size. So they are played out:
at each moment every free rank takes its preferred ready step. What was played out cannot deadlock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from zeropipe.runtime.pipe.instructions import Op, Schedule, lines_of
from zeropipe.runtime.pipe.schedules.placement import Placement

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
    admit: bool = (
        False  # limit the micro-batches under way instead of each rank's activations: never gets stuck
    )


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Time of a forward, an input gradient, a weight gradient and a transfer between ranks."""

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    transfer: float = 0.0

    def of(self, op: Op) -> float:
        if op is Op.FORWARD:
            return self.forward
        return self.backward_input if op is Op.BACKWARD_INPUT else self.backward_weight


UNIT = StepCosts()


class _Play:
    """One run of the scheduler: the state of every rank as time goes on."""

    def __init__(
        self,
        ranks: int,
        micro_batches: int,
        chunks: int,
        placement: Placement,
        limit: int,
        prefer: Preference,
        costs: StepCosts,
    ) -> None:
        self.ranks, self.micro_batches, self.chunks = ranks, micro_batches, chunks
        self.placement, self.limit, self.prefer, self.costs = placement, limit, prefer, costs
        self.num_stages = ranks * chunks
        self.arrives: dict[Step, float] = {}  # when the result of a step reaches the stage that needs it
        self.next: dict[tuple[int, Op], int] = {
            (stage, op): 0 for stage in range(self.num_stages) for op in prefer.ops
        }
        self.live = [0] * ranks  # activations held, in chunks
        self.lines: list[list[Step]] = [[] for _ in range(ranks)]

    def run(self) -> tuple[float, Schedule] | None:
        """The time taken and the schedule; None where the limit leaves nothing that can run."""
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
        return end, Schedule(lines_of(self.lines))

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


def play(
    ranks: int,
    micro_batches: int,
    chunks: int,
    placement: Placement,
    limit: int,
    prefer: Preference,
    costs: StepCosts = UNIT,
) -> tuple[float, Schedule] | None:
    """Play one preference out: (time taken, schedule), or None where it got stuck.

    ``limit``: how many activations a rank may hold, counted in chunks, from a forward to its weight gradient.
    """
    return _Play(ranks, micro_batches, chunks, placement, limit, prefer, costs).run()
