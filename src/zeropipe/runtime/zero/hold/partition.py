"""A partition: parameters of one param group and dtype, whose master is stepped as one tensor or in parts.

    params      a, b, c              ``values`` says where they and the master lie, at every stage (``values.py``)
    segments    |--- a ---|- b |     this rank's elements of each in anything that is laid out like the master
    stepped     [master]  or  [a's part, b's part]     for optimizers that need whole tensors
    state       what the torch optimizer keeps of it

``HeldState`` is that state: moments laid out like what is stepped, and what the parameters share.

    optimizer.state[master]   "exp_avg"  |-- a --|-- b --|-- c --|     one value per element of the master
                              "step"     12                            shared by all parameters but those set apart
    apart                     {b: {"step": 3}, c: None}                b was stepped less often, c never

A flat master is stepped as one tensor, so it has one step count. Where parameters were stepped in different steps
(frozen or absent when a checkpoint was saved, first used late, left out of a step by every rank) the count of those
that part from the rest is kept here, and a step takes each on its own count, as plain PyTorch does (``stepping.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from math import prod
from typing import Any

import torch

from zeropipe.comm.group import SELF
from zeropipe.layout.flat import FlatShards
from zeropipe.runtime.optimizers.shard_view import ShardView
from zeropipe.runtime.optimizers.state_kinds import (
    Shared,
    per_element_keys,
    shapes_in,
    split_shared,
    split_state,
    state_keys,
)
from zeropipe.runtime.zero.hold.offload import Offload
from zeropipe.runtime.zero.hold.shard_values import ShardValues
from zeropipe.runtime.zero.hold.values import FlatValues, Move


class Partition:
    """What one rank holds of its parameters, to be stepped.

    ``names``: dotted names, as in ``module.named_parameters()``. ``group_index``: index of the param group.
    ``flat``: the optimizer steps on the master as one 1-D tensor; otherwise on parts of it, one per parameter: in the
    parameter's own shape where that is whole, else the 1-D shard of it (stage 3).
    """

    def __init__(
        self,
        names: Sequence[str],
        params: Sequence[torch.nn.Parameter],
        group_index: int,
        values: FlatValues | ShardValues,
        offload: Offload,
        optimizer: torch.optim.Optimizer,
        flat: bool = True,
    ) -> None:
        self.names = tuple(names)
        self.params = tuple(params)
        self.group_index = group_index

        # Where all of it lies. What many ask for stands here, too.
        self.values = values
        self.offload = offload
        self.segments, self.shapes = values.segments, values.shapes
        self.dtype, self.device = values.dtype, values.device
        self.group, self.sharded = values.group, values.sharded
        self.master = values.master  # 1D, fp32

        # What the torch optimizer holds, and keeps.
        self.flat = flat
        self.stepped = [self.master] if flat else values.parts()
        self.state = HeldState(self, optimizer)

    def pieces(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """A master-sized tensor cut into what is stepped of each parameter: views, in the shape that is stepped."""
        return [tensor[segment.room].view(segment.shape) for segment in self.segments]

    def local(self, tensor: torch.Tensor, index: int) -> torch.Tensor:
        """This rank's elements of parameter ``index`` in a master-sized tensor: a 1D view, without padding."""
        start, piece = self.segments[index].start, self.segments[index].piece
        return tensor[start : start + (0 if piece is None else piece.numel)]

    def scatter(self, tensor: torch.Tensor, index: int, value: torch.Tensor) -> None:
        """Write this rank's elements of ``value`` (the parameter's shape) into a master-sized tensor."""
        if self.device.type == "cuda":  # a copy from host memory may still be under way
            torch.cuda.current_stream(self.device).synchronize()
        place, piece = self.local(tensor, index), self.segments[index].piece
        if piece is not None:
            place.copy_(value.detach().reshape(-1)[piece.start : piece.start + piece.numel])
        self.offload.let_go(place)

    def write_value(self, index: int, value: torch.Tensor) -> None:
        """Set parameter ``index`` to ``value`` (its shape, the same on every rank): master and values."""
        self.scatter(self.master.detach(), index, value)
        self.values.write(index, value)

    def new_state(self, dtype: torch.dtype) -> torch.Tensor:
        """Zeros for one kind of optimizer state, as the master and where that lives."""
        if self.offload.in_files(self.master):
            return self.offload.state(self.master.numel(), dtype, self.device)
        return torch.zeros_like(self.master, dtype=dtype, requires_grad=False)

    def load_gradient(self, shard: torch.Tensor, factor: float) -> None:
        """Set the master's gradient to ``factor`` times ``shard`` (1D, as the master); may scale it in place."""
        grad = shard
        if shard.dtype != self.master.dtype or shard.device != self.master.device:
            grad = shard.to(self.master.dtype, copy=True)
        if factor != 1.0:
            grad.mul_(factor)
        grad = grad.to(self.master.device)
        if self.flat:
            self.master.grad = grad
            return
        for tensor, part in zip(self.stepped, self.pieces(grad), strict=True):
            tensor.grad = part

    def drop_gradients(self, indices: Sequence[int] | None = None) -> None:
        """Take the gradients off what is stepped: all of it, or (where not flat) of some parameters."""
        if self.flat and indices is not None:
            return
        for index in range(len(self.stepped)) if indices is None else indices:
            self.stepped[index].grad = None

    def flats(self) -> Iterator[tuple[str, FlatShards, int, slice]]:
        """(name, layout, shard, where it lies in a master-sized tensor) of each flat of a checkpoint."""
        for name, layout, where in self.values.flats(self.group_index):
            yield name, layout, self.values.shard, where

    def views(self) -> dict[torch.nn.Parameter, ShardView]:
        """What an optimizer that needs whole tensors is told of each tensor that it steps."""
        group = self.group if self.sharded else SELF
        pairs = zip(self.stepped, self.flats(), strict=True)
        return {tensor: ShardView(layout, shard, group) for tensor, (_, layout, shard, _) in pairs}

    def move_master(self, move: Move) -> None:
        """Let a master that is a tensor of its own be ``move`` of itself."""
        self.values.move_master(move)
        if not self.flat and self.stepped[0] is not self.params[0]:
            for tensor, part in zip(self.stepped, self.pieces(self.master.data), strict=True):
                tensor.data = part


class HeldState:
    """What ``optimizer`` keeps for ``partition``, by parameter."""

    def __init__(self, partition: Partition, optimizer: torch.optim.Optimizer) -> None:
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
                place.copy_(part)
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
            mine.copy_(partition.pieces(shard)[index])

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
                own = {key: pieces[key][index] for key in keys if key in state}
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
