"""A sharded step whose new values travel while the rest is still being stepped.

    this rank's shard   |-- piece 0 --|-- piece 1 --|-- piece 2 --|
                          stepped       stepping
                          on its way

Elementwise updates do not care how their elements are grouped, so the result has the bits of one step on the whole
shard. It takes point-to-point messages, which make progress on a thread of their own; elsewhere, and in the first step,
which makes the state, the optimizer steps as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import optimizer as torch_optimizer

from zeropipe.comm.collectives import Work
from zeropipe.comm.record import SEAM
from zeropipe.runtime.zero.offload_step import alone, copy_of
from zeropipe.runtime.zero.partition import Partition
from zeropipe.runtime.zero.types import AnyPartition


def can_overlap(optimizer: torch.optim.Optimizer, partitions: Sequence[AnyPartition]) -> bool:
    """Whether these may be stepped in pieces, and it pays. Ranks may differ in it: they send each other the same."""
    return (
        not _watched(optimizer)
        and all(isinstance(p, Partition) and p.sharded and p.layout.numel for p in partitions)
        and all(p.master.device.type == "cpu" and optimizer.state.get(p.master) for p in partitions)
        and any(isinstance(p, Partition) and len(p.runs) > 1 for p in partitions)
    )


def _watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody is told of the optimizer's steps, and would be told of pieces."""
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    own = vars(optimizer).get("step")  # torch's schedulers put a wrapper here that pieces do not disturb
    return any(hooks) or (own is not None and not hasattr(own, "_wrapped_by_lr_sched"))


def step_and_publish(optimizer: torch.optim.Optimizer, partitions: Sequence[AnyPartition]) -> None:
    """Step each partition on its master's gradient and give every rank the new values; elementwise optimizers."""
    works: list[Work] = []
    try:
        for partition in partitions:
            assert isinstance(partition, Partition)
            _in_pieces(optimizer, partition, works)
        while works:
            works[0].wait()
            works.pop(0)
    except BaseException:
        SEAM.abandoned += works  # the transport still reads and writes the values
        raise


def _in_pieces(optimizer: torch.optim.Optimizer, partition: Partition, works: list[Work]) -> None:
    """Step the pieces; what sends each of them is added to ``works``."""
    master, gradient = partition.master.detach(), partition.master.grad
    assert gradient is not None
    whole = optimizer.state[partition.master]
    per_element = {k for k, v in whole.items() if torch.is_tensor(v) and v.dim() and v.shape == master.shape}
    shared = {key: value for key, value in whole.items() if key not in per_element}
    after = shared
    with alone(optimizer, partition.group_index) as members:
        for start, stop in partition.runs:
            piece = torch.nn.Parameter(master[start:stop])
            piece.grad = gradient[start:stop]
            optimizer.state[piece] = {key: whole[key][start:stop] for key in per_element} | {
                key: copy_of(value) for key, value in shared.items()
            }
            members[:] = [piece]
            try:
                optimizer.step()
            finally:
                made = optimizer.state.pop(piece)
            for key in per_element:  # an optimizer may have put a new tensor in the old one's place
                place = whole[key][start:stop]
                if made[key].data_ptr() != place.data_ptr():
                    place.copy_(made[key])
            after = {key: made[key] for key in shared}
            works.append(partition.publish_run(start, stop))
    whole.update(after)
