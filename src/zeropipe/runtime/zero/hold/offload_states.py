"""Moves what an engine holds out of the device's memory for a while, and back: between phases of a program.

Nothing is recomputed and no bit changes; tensors that live in host memory or in files by themselves stay there.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import torch

from zeropipe.errors import UsageError
from zeropipe.runtime.optimizers.state_kinds import split_state, state_keys
from zeropipe.runtime.zero.hold.offload import Move
from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer
from zeropipe.streams import STREAMS


class OffloadStateTypeEnum(StrEnum):
    """What can be moved; the names are DeepSpeed's."""

    optim_states = "optim_states"  # the optimizer's moments
    hp_params = "hp_params"  # masters
    lp_params = "lp_params"  # what the module computes with; in fp32 the masters are a part of it
    lp_grads = "lp_grads"  # gradients of the window; at stages 0 and 1 those of a window that has begun stay
    contiguous_grad_buffer = "contiguous_grad_buffer"  # the same buffers here


Kind = OffloadStateTypeEnum


class Offloaded:
    """Which kinds of an optimizer's tensors are away from ``device``, where they work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._away: frozenset[Kind] = frozenset()

    def send(
        self,
        optimizer: ZeroOptimizer,
        include: Iterable[object] | None,
        device: object,
        pin_memory: bool,
        non_blocking: bool,
    ) -> None:
        """See ``engine.offload_states``."""
        name = getattr(device, "value", str(device))
        if name != "cpu":
            raise UsageError("offload_states: device", expected="cpu", found=name, fix="leave it out")
        kinds = _wanted(include) - self._away
        streams = STREAMS.of(self._device)

        def to_host(tensor: torch.Tensor) -> torch.Tensor:
            # Its own place is in a file, or in host memory: there it stays.
            if optimizer.offload.in_files(tensor) or streams.on_host(tensor):
                return tensor
            host = streams.zeros(tensor.numel(), tensor.dtype, pin_memory).view(tensor.shape)
            streams.bring(host, tensor.contiguous())
            return host

        # A reduction under way reads what is about to move.
        optimizer.reducer.settle()
        _move(optimizer, kinds, to_host)
        # The copies are done before the allocator gives the memory back to the driver.
        streams.host_turn()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._away |= kinds

    def bring_back(
        self, optimizer: ZeroOptimizer | None, kinds: Iterable[Kind] = Kind, non_blocking: bool = False
    ) -> None:
        """Those of ``kinds`` that are away return to the device."""
        due = self._away.intersection(kinds)
        streams = STREAMS.of(self._device)

        def to_device(tensor: torch.Tensor) -> torch.Tensor:
            if not streams.on_host(tensor) or (optimizer is not None and optimizer.offload.in_files(tensor)):
                return tensor
            back = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
            streams.bring(back, tensor)
            return back

        if due and optimizer is not None:
            _move(optimizer, due, to_device)
            if not non_blocking:
                streams.host_turn()
        self._away -= due

    def bring_back_for_forward(self, optimizer: ZeroOptimizer) -> None:
        """What the coming forward reads, and where gradients will follow, their buffers."""
        if not self._away:
            return
        # At stage 3 gathers read the masters.
        reads = {Kind.lp_params, Kind.hp_params}
        kinds = set(Kind) - {Kind.optim_states} if torch.is_grad_enabled() else reads
        self.bring_back(optimizer, kinds, non_blocking=True)


def _wanted(include: Iterable[object] | None) -> frozenset[Kind]:
    """The kinds that ``include`` names (None: all). Raises UsageError for one that there is not."""
    found = set()
    for kind in Kind if include is None else include:
        try:
            found.add(Kind(str(getattr(kind, "value", kind))))
        except ValueError:
            names = ", ".join(k.value for k in Kind)
            raise UsageError("offload_states: include", expected=names, found=kind) from None
    return frozenset(found)


def _move(optimizer: ZeroOptimizer, kinds: frozenset[Kind], move: Move) -> None:
    """Let every tensor of these kinds be ``move`` of itself; who holds views of them gets new ones."""
    policy = optimizer.policy
    # What lives in host memory or in files by the configuration has its own place, and is not moved from here.
    own_place = policy.offload_optimizer
    for partition, store in zip(optimizer.partitions, optimizer.reducer.stores, strict=True):
        if Kind.lp_params in kinds:
            partition.values.move(move)
        if Kind.hp_params in kinds and not own_place:
            partition.move_master(move)
        if kinds & {Kind.lp_grads, Kind.contiguous_grad_buffer} and not (
            own_place and policy.shards_parameters
        ):
            store.move(move)
    if Kind.optim_states in kinds and not own_place:
        names = state_keys(optimizer.optimizer)
        for state in optimizer.optimizer.state.values():
            for key, value in split_state(state, names)[0].items():
                state[key] = move(value)
