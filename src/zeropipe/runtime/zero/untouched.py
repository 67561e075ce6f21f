"""Keeps a parameter that no rank used as it was through a step that its partition takes as a whole.

Plain PyTorch skips a parameter whose gradient is None: no weight decay, no decay of its moments. A step on a
flat shard would give it a zero gradient instead. So its elements are put back afterwards. What it shares with
its partition is the step count of the bias correction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from zeropipe.runtime.zero.types import AnyPartition


@contextmanager
def untouched(
    optimizer: torch.optim.Optimizer, partitions: Iterable[tuple[AnyPartition, Iterable[int]]]
) -> Iterator[None]:
    """Around ``optimizer.step()``: the named parameters' elements keep their master and their state."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for partition, indices in partitions:
        for index in indices:
            piece = partition.local(partition.master.detach(), index)
            kept.append((piece, piece.clone()))
            shards = state_shards(optimizer, partition)
            for shard in shards.values():
                moment = partition.local(shard, index)
                kept.append((moment, moment.clone()))
            if not shards:  # the state is made in this step: with value and gradient 0 it stays as it is made
                piece.zero_()
    yield
    for place, value in kept:
        place.copy_(value)


def state_shards(optimizer: torch.optim.Optimizer, partition: AnyPartition) -> dict[str, torch.Tensor]:
    """The partition's optimizer state that is laid out like its shard, by the optimizer's own keys."""
    state = optimizer.state.get(partition.master, {})
    shape = partition.master.shape
    return {k: v for k, v in state.items() if torch.is_tensor(v) and v.shape == shape}
