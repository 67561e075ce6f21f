"""What all ranks tell each other once a batch has run: who failed, and what the last stages found. One small sum.

Every rank fills in its own places of a row and leaves zeros elsewhere, so the sum brings each value to every rank as
it was, and all compute the same mean from them::

    failed, by pipeline rank | new names | for each slice and replica: fp64?, loss, terms, losses by micro-batch
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeropipe.comm.collectives import all_gather_object, all_reduce
from zeropipe.comm.group import world
from zeropipe.errors import CommunicationError, UsageError
from zeropipe.runtime.pipe.feed import Losses
from zeropipe.runtime.pipe.grid import PipelineParallelGrid


@dataclass(frozen=True, slots=True)
class Outcome:
    """The losses of a batch, averaged over the replicas; the same on every rank of a pipeline."""

    loss: torch.Tensor  # [], the mean or the sum over micro-batches
    terms: dict[str, torch.Tensor]  # [] each, means
    each: list[torch.Tensor]  # [] each, by micro-batch


class Settlement:
    """Ends each batch of a pipeline on all ranks alike; collective over the world. ``last``: the rank of the loss."""

    def __init__(self, grid: PipelineParallelGrid, device: torch.device, last: int) -> None:
        self._grid, self._device, self._last = grid, device, last
        self._names: list[str] = []  # of the loss function's other terms, as all ranks know them

    def settle(
        self,
        losses: Losses | None,
        count: int,
        how: str | None,
        failure: BaseException | None = None,
        first: bool = False,
    ) -> Outcome | BaseException:
        """What came of ``count`` micro-batches, or the error that this rank is to raise, as every rank then is.

        The error is ``failure`` where there is one (``first``: it arose here, it was not heard of from another rank),
        else a CommunicationError if another rank failed, or a UsageError if replicas have other terms.
        """
        grid = self._grid
        speaks = failure is None and losses is not None and grid.stage_id == self._last
        mine = sorted(losses.terms) if speaks and losses is not None else self._names
        head = grid.pipe_parallel_size + 1
        width = 2 + len(self._names) + count
        figures = torch.zeros(
            head + grid.model_parallel_size * grid.data_parallel_size * width, dtype=torch.float64
        )
        figures[grid.stage_id] = first
        figures[head - 1] = mine != self._names
        if speaks and losses is not None and mine == self._names:
            place = head + (grid.slice_parallel_id * grid.data_parallel_size + grid.data_parallel_id) * width
            figures[place : place + width] = losses.row(self._names, count, how)
        figures = figures.to(self._device)
        all_reduce(figures, world(), label="losses")
        failed = figures[:head].tolist()
        if failure is not None:
            return failure
        if any(failed[:-1]):
            return self._others_failed([rank for rank, times in enumerate(failed[:-1]) if times])
        if failed[-1]:
            return self._learn(mine if speaks else None) or self.settle(losses, count, how)
        rows = figures[head:].view(grid.model_parallel_size, grid.data_parallel_size, width)
        return self._average(rows[grid.slice_parallel_id], count)

    def _average(self, rows: torch.Tensor, count: int) -> Outcome:
        """``rows``: [replicas, width]."""
        total = rows[0].to(torch.float64 if bool(rows[0, 0]) else torch.float32)
        for row in rows[1:]:
            total = total + row.to(total.dtype)
        total = total / len(rows)
        terms = {name: total[at] for at, name in enumerate(self._names, 2)}
        return Outcome(total[1], terms, list(total[len(total) - count :]))

    def _learn(self, mine: list[str] | None) -> UsageError | None:
        """Take over the names of the terms, which have changed."""
        everyone = {
            rank: names
            for rank, names in enumerate(all_gather_object(mine, world(), label="loss terms"))
            if names is not None
        }
        first = next(iter(everyone.values()))
        for rank, names in everyone.items():
            if names != first:
                return UsageError(
                    f"the loss function returned other terms on rank {rank} than on rank {next(iter(everyone))}",
                    expected=first,
                    found=names,
                    fix="return the same terms on every replica",
                )
        self._names = first
        return None

    def _others_failed(self, ranks: list[int]) -> CommunicationError:
        return CommunicationError(
            f"pipeline rank(s) {', '.join(map(str, ranks))} failed in this batch, so no rank takes a step",
            rank=self._grid.global_rank,
            fix="read the traceback of the rank that failed; no message was lost, so the next batch may follow",
        )
