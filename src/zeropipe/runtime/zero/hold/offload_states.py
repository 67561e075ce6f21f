"""Moves what an engine holds out of the device's memory for a while, and back: between phases of a program.

Nothing is recomputed and no bit changes; tensors that live in host memory or in files by themselves stay there.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import torch

from zeropipe.errors import UsageError
from zeropipe.runtime.optimizers.state_kinds import split_state, state_keys
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer
from zeropipe.runtime.zero.hold.values import Move


class OffloadStateTypeEnum(StrEnum):
    """What can be moved; the names are DeepSpeed's."""

    optim_states = "optim_states"  # the optimizer's moments
    hp_params = "hp_params"  # masters
    lp_params = "lp_params"  # what the module computes with; in fp32 the masters are a part of it
    lp_grads = "lp_grads"  # gradients of the window; at stages 0 and 1 those of a window that has begun stay
    contiguous_grad_buffer = "contiguous_grad_buffer"  # the same buffers here


def wanted(include: Iterable[object] | None) -> frozenset[OffloadStateTypeEnum]:
    """The kinds that ``include`` names (None: all). Raises UsageError for one that there is not."""
    found = set()
    for kind in OffloadStateTypeEnum if include is None else include:
        try:
            found.add(OffloadStateTypeEnum(str(getattr(kind, "value", kind))))
        except ValueError:
            names = ", ".join(k.value for k in OffloadStateTypeEnum)
            raise UsageError("offload_states: include", expected=names, found=kind) from None
    return frozenset(found)


def to_host(optimizer: ZeroOptimizer, pin_memory: bool, non_blocking: bool) -> Move:
    """How a tensor goes to host memory; one that is there already by its own place stays."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        on_gpu = tensor.device.type == "cuda"
        if optimizer.offload.in_files(tensor) or (not on_gpu and torch.cuda.is_available()):
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin_memory and on_gpu)
        return host.copy_(tensor, non_blocking=non_blocking)

    return move


def to_device(optimizer: ZeroOptimizer, device: torch.device, non_blocking: bool) -> Move:
    """How a tensor that ``to_host`` moved comes back."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if optimizer.offload.in_files(tensor):
            return tensor
        return tensor.to(device, non_blocking=non_blocking)

    return move


def move_states(optimizer: ZeroOptimizer, kinds: frozenset[OffloadStateTypeEnum], move: Move) -> None:
    """Let every tensor of these kinds be ``move`` of itself; who holds views of them gets new ones."""
    grads = {OffloadStateTypeEnum.lp_grads, OffloadStateTypeEnum.contiguous_grad_buffer}
    host_steps = optimizer.policy.offload_optimizer  # masters and moments live in their own place
    for partition, store in zip(optimizer.partitions, optimizer.reducer.stores, strict=True):
        if OffloadStateTypeEnum.lp_params in kinds:
            partition.values.move(move)
        if OffloadStateTypeEnum.hp_params in kinds and not host_steps:
            partition.move_master(move)
        if kinds & grads and not (host_steps and optimizer.policy.shards_parameters):
            store.move(move)
    if OffloadStateTypeEnum.optim_states in kinds and not host_steps:
        names = state_keys(optimizer.optimizer)
        for state in optimizer.optimizer.state.values():
            for key, value in split_state(state, names)[0].items():
                state[key] = move(value)
