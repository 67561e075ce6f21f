"""The optimizer's state of one partition: moments laid out like what is stepped, and what its parameters share.

    optimizer.state[master]   "exp_avg"  |-- a --|-- b --|-- c --|     one value per element of the master
                              "step"     12                            shared by all parameters but those set apart
    apart                     {b: {"step": 3}, c: None}                b was stepped less often, c never

A flat master is stepped as one tensor, so it has one step count. Where parameters were stepped in different steps
(frozen or absent when a checkpoint was saved, first used late, left out of a step by every rank) the count of those
that part from the rest is kept here, and a step takes each on its own count, as plain PyTorch does (``stepping.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from zeropipe.runtime.optimizers.state_kinds import (
    Shared,
    per_element_keys,
    shapes_in,
    split_shared,
    split_state,
    state_keys,
)

if TYPE_CHECKING:
    from zeropipe.runtime.zero.hold.types import AnyPartition


class HeldState:
    """What ``optimizer`` keeps for ``partition``, by parameter."""

    def __init__(self, partition: AnyPartition, optimizer: torch.optim.Optimizer) -> None:
        self._partition = partition
        self._optimizer = optimizer
        self.apart: dict[int, Shared] = {}  # by parameter; empty for one that is stepped by itself

    def keys(self) -> set[str]:
        """The state that is laid out like what is stepped; empty before the first step."""
        keys = self._per_element()
        return {key for tensor in self._partition.stepped for key in self._split(tensor, keys)[0]}

    def shard(self, key: str) -> torch.Tensor | None:
        """State ``key``, 1D as the master; a copy where the optimizer steps on parts of the master."""
        partition = self._partition
        keys = self._per_element()
        parts = [self._split(tensor, keys)[0].get(key) for tensor in partition.stepped]
        if all(part is None for part in parts):
            return None
        if partition.flat:
            return parts[0]
        dtype = next(part.dtype for part in parts if part is not None)
        whole = torch.zeros_like(partition.master, dtype=dtype)
        for place, part in zip(partition.pieces(whole), parts, strict=True):
            if part is not None:
                place.copy_(part.reshape(-1))
        return whole

    def write(self, key: str, index: int, value: torch.Tensor, local: bool = False) -> None:
        """Set state ``key`` of parameter ``index`` to ``value``: its shape, or (``local``) this rank's elements."""
        partition = self._partition
        shard = self.shard(key)
        assert shard is not None, "the caller has checked that there is such state"
        if local:
            partition.local(shard, index).copy_(value)
        else:
            partition.scatter(shard, index, value)
        if not partition.flat:  # what was written to is a copy
            mine = self._optimizer.state[partition.stepped[index]][key]
            mine.copy_(partition.pieces(shard)[index].view(mine.shape))

    def shared(self, index: int) -> Shared:
        """What the optimizer counts for parameter ``index``; None if it was never stepped."""
        if index in self.apart:
            return self.apart[index]
        partition = self._partition
        tensor = partition.stepped[0 if partition.flat else index]
        return self._split(tensor, self._per_element())[1] if self._optimizer.state.get(tensor) else None

    def of_master(self) -> tuple[dict[str, torch.Tensor], Shared]:
        """(moments of a flat master, what those parameters share that are not apart)."""
        master = self._partition.master
        tensors, shared = self._split(master, self._per_element())
        return tensors, shared if self._optimizer.state.get(master) else None

    def set_shared(self, given: Sequence[Shared]) -> None:
        """Let each parameter of a flat partition have what is given for it; the moments are in place already."""
        main, self.apart = split_shared(given, [prod(shape) for shape in self._partition.shapes])
        state = self._optimizer.state
        if main is None:
            state.pop(self._partition.master, None)
        else:
            tensors, _ = self.of_master()
            state[self._partition.master] = {key: copy_of(value) for key, value in main.items()} | tensors

    def _per_element(self) -> set[str]:
        partition, state = self._partition, self._optimizer.state
        if not partition.flat:
            return state_keys(self._optimizer)
        # A master is never of one element, so that it needs no others to tell by.
        shapes = [(tuple(partition.master.shape), shapes_in(state.get(partition.master, {})))]
        return per_element_keys(self._optimizer, shapes)

    def _split(self, tensor: torch.Tensor, keys: Set[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return split_state(self._optimizer.state.get(tensor, {}), keys)

    def adopt(self) -> None:
        """Take over state that the optimizer already has for the parameters: whole, on every rank."""
        partition, states = self._partition, self._optimizer.state
        old = [states.pop(param, {}) for param in partition.params]
        if not any(old):
            return
        pairs = zip(partition.shapes, map(shapes_in, old), strict=True)
        keys = per_element_keys(self._optimizer, pairs)
        merged = {key: self._merged(key, old) for key in keys}
        rest = [{k: v for k, v in s.items() if k not in keys} if s else None for s in old]
        if partition.flat:
            states[partition.master] = merged
            self.set_shared(rest)
            return
        pieces = {key: partition.pieces(whole) for key, whole in merged.items()}
        for index, (tensor, state, shared) in enumerate(zip(partition.stepped, old, rest, strict=True)):
            if shared is not None:
                own = {key: pieces[key][index].view(tensor.shape) for key in keys if key in state}
                states[tensor] = own | shared

    def _merged(self, key: str, states: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """The parameters' whole state ``key`` as this rank's elements, 1D as the master."""
        found = {i: state[key] for i, state in enumerate(states) if torch.is_tensor(state.get(key))}
        shard = self._partition.new_state(next(iter(found.values())).dtype)
        for index, value in found.items():
            self._partition.scatter(shard, index, value)
        return shard


def copy_of(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value
