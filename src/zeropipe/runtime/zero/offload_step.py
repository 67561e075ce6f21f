"""Steps a master that lives in a file: one piece after the other, so that no more than a piece is in memory.

    master     |-- piece 0 --|-- piece 1 --|-- piece 2 --|      each: read, step with its moments, let go
    exp_avg    |             |   stepping  |   reading   |

The torch optimizer sees a parameter per piece, one at a time, and afterwards the whole master with whole state
again: elementwise updates do not care how their elements are grouped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zeropipe.runtime.zero.offload import Offload
from zeropipe.runtime.zero.partition import cuts
from zeropipe.runtime.zero.sharded_partition import ShardedPartition


def step_in_pieces(
    optimizer: torch.optim.Optimizer, partition: ShardedPartition, gradient: torch.Tensor, factor: float
) -> None:
    """Step the partition's master on ``factor`` times ``gradient`` (1D, as the master); elementwise optimizers."""
    offload = partition.owner.offload
    master = partition.master.detach()
    state: dict[str, Any] = dict(optimizer.state.get(partition.master, {}))
    per_element = {k for k, v in state.items() if torch.is_tensor(v) and v.dim() and v.shape == master.shape}
    for key in per_element:  # it may have been loaded into memory
        state[key] = _at_home(offload, state[key], partition)
    shared = {key: value for key, value in state.items() if key not in per_element}
    after = shared
    with alone(optimizer, partition.group_index) as members:
        for start, stop in cuts(master.numel(), offload.policy.sub_group_numel):
            following = slice(stop, 2 * stop - start)
            for tensor in (master, gradient, *(state[key] for key in per_element)):
                offload.read_ahead(tensor[following])
            piece = torch.nn.Parameter(master[start:stop])
            piece.grad = gradient[start:stop].to(master.dtype, copy=True).mul_(factor)
            own = {key: state[key][start:stop] for key in per_element}
            if own or shared:
                optimizer.state[piece] = own | {key: copy_of(value) for key, value in shared.items()}
            members[:] = [piece]
            optimizer.step()
            made = optimizer.state.pop(piece, {})
            for key, value in made.items():
                if key in own:
                    if value is not own[key]:
                        own[key].copy_(value)
                elif torch.is_tensor(value) and value.dim() and value.shape == piece.shape:
                    if key not in state:
                        state[key] = offload.state(master.numel(), value.dtype, partition.device)
                    state[key][start:stop].copy_(value)
            after = {k: v for k, v in made.items() if k in shared or k not in state}
            for tensor in (master, gradient, *(v for k, v in state.items() if k not in shared)):
                offload.let_go(tensor[start:stop])
    whole = {key: value for key, value in state.items() if key not in shared} | after
    if whole:
        optimizer.state[partition.master] = whole


@contextmanager
def alone(optimizer: torch.optim.Optimizer, group_index: int) -> Iterator[list[torch.nn.Parameter]]:
    """Inside, the optimizer holds only the parameters that are put into the list, in param group ``group_index``."""
    members: list[torch.nn.Parameter] = []
    before = [group["params"] for group in optimizer.param_groups]
    for index, group in enumerate(optimizer.param_groups):
        group["params"] = members if index == group_index else []
    try:
        yield members
    finally:
        for group, params in zip(optimizer.param_groups, before, strict=True):
            group["params"] = params


def _at_home(offload: Offload, tensor: torch.Tensor, partition: ShardedPartition) -> torch.Tensor:
    """``tensor`` itself if it lives in a file, else a copy that does."""
    if offload.in_files(tensor):
        return tensor
    home = offload.state(tensor.numel(), tensor.dtype, partition.device)
    offload.copy(home, tensor)
    return home


def copy_of(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value
