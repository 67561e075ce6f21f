"""The optimizer's state as flats: what a checkpoint saves of it, and how the optimizer takes over what was read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zeropipe.checkpoint.save.records import FP32, PARAM, FlatState, LoadedFlat
from zeropipe.checkpoint.utils import clone_tensors_for_torch_save
from zeropipe.layout.flat import FlatShards
from zeropipe.runtime.optimizers.state_kinds import (
    Shared,
    named_numbers,
    numbers_by_tensor,
    same_shared,
    split_state,
    state_keys,
)
from zeropipe.runtime.zero.hold.partition import Partition
from zeropipe.runtime.zero.hold.survey import Communicates

if TYPE_CHECKING:
    from zeropipe.runtime.zero.hold.optimizer import ZeroOptimizer


@dataclass(frozen=True, slots=True)
class Holding:
    """A flat, and where the torch optimizer keeps its state."""

    flat: FlatState
    owner: torch.nn.Parameter  # the key in ``optimizer.state``
    where: slice  # the flat's elements in the owner, in 1D
    partition: Partition

    def new_state(self, dtype: torch.dtype) -> torch.Tensor:
        """Zeros for one kind of state of the owner, where its state lives."""
        if self.owner is self.partition.master:
            return self.partition.new_state(dtype)
        return torch.zeros_like(self.owner, dtype=dtype, requires_grad=False)


def optimizer_flats(optimizer: ZeroOptimizer) -> Iterator[Holding]:
    """Every flat of the optimizer on this rank: per partition at stages 0 to 2, per parameter at stage 3."""
    keys = state_keys(optimizer.optimizer)
    for partition in optimizer.partitions:
        replicas = partition.values.replicas
        whole = partition.flat
        if whole or partition.sharded:
            owners = [partition.master] * len(partition.names) if whole else list(partition.stepped)
            parts = [
                (name, layout, shard, owner, where if whole else slice(0, layout.shard_numel))
                for owner, (name, layout, shard, where) in zip(owners, partition.flats(), strict=False)
            ]
        else:
            parts = [
                (name, FlatShards((segment.layout.tensors[at],), 1), 0, owner, slice(0, owner.numel()))
                for at, (name, segment, owner) in enumerate(
                    zip(partition.names, partition.segments, partition.stepped, strict=True)
                )
            ]
        _, main = partition.state.of_master() if whole else ({}, None)
        for number, (name, layout, shard, owner, where) in enumerate(parts):
            moments, scalars = split_state(optimizer.state.get(owner, {}), keys)
            tensors = {FP32: owner.detach()} | moments
            tensors = {key: value.reshape(-1)[where] for key, value in tensors.items()}
            index = partition.group_index
            specs = layout.tensors
            if whole:
                members = [number] if len(parts) > 1 else range(len(specs))
                shared = [partition.state.apart.get(at, main) for at in members]
                if moments or main is not None:
                    names, numels = [spec.name for spec in specs], [spec.numel for spec in specs]
                    scalars = named_numbers(names, shared, numels)
            flat = FlatState(name, layout, shard, tensors, scalars, index, replicas.rank, replicas.size)
            yield Holding(flat, owner, where, partition)


def adopt_flats(optimizer: ZeroOptimizer, loaded: Mapping[str, LoadedFlat]) -> None:
    """Give the torch optimizer the moments and scalars that were read; the masters are in place already."""
    base = optimizer.optimizer
    moments: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
    kinds: dict[torch.nn.Parameter, list[Shared]] = {}
    numbers: dict[torch.nn.Parameter, dict[str, Any]] = {}  # of single tensors
    partitions: dict[torch.nn.Parameter, Partition] = {}
    for held in optimizer_flats(optimizer):
        owner, found = held.owner, loaded[held.flat.name]
        partitions[owner] = held.partition
        names = [spec.name for spec in held.flat.layout.tensors]
        shared, further = numbers_by_tensor(found.scalars, names)
        kinds.setdefault(owner, []).extend(_as_made(base, own) for own in shared)
        numbers.setdefault(owner, {}).update(further)
        state = moments.setdefault(owner, {})
        for key, tensor in found.tensors.items():
            if key in (FP32, PARAM):
                continue
            if key in held.flat.tensors:  # read into the optimizer's own tensor
                state[key] = base.state[owner][key]
                continue
            if key not in state:
                state[key] = held.new_state(tensor.dtype)
            state[key].view(-1)[held.where].copy_(tensor)
    for owner, state in moments.items():
        given = kinds[owner]
        base.state.pop(owner, None)
        partitions[owner].state.apart = {}
        if all(own is None for own in given):  # saved before the first step
            continue
        if isinstance(base, Communicates):  # it counts for all its parameters together
            base.state[owner] = _merged(given) | numbers[owner] | state
        elif partitions[owner].flat:
            base.state[owner] = dict(state)
            partitions[owner].state.set_shared(given)
        else:
            base.state[owner] = (given[0] or {}) | state


def _as_made(base: torch.optim.Optimizer, shared: Shared) -> Shared:
    """As the optimizer would have made it: torch counts in tensors, others in ints."""
    if shared is None:
        return None
    made = {key: clone_tensors_for_torch_save(value) for key, value in shared.items()}
    if isinstance(made.get("step"), (int, float)) and _counts_in_tensors(base):
        made["step"] = torch.tensor(float(made["step"]))
    return made


def _merged(kinds: Iterable[Shared]) -> dict[str, Any]:
    """One for all: of values that differ the largest."""
    merged: dict[str, Any] = {}
    for shared in kinds:
        for key, value in (shared or {}).items():
            larger = (
                key in merged and not same_shared({key: value}, {key: merged[key]}) and value > merged[key]
            )
            if larger or key not in merged:
                merged[key] = value
    return merged


def _counts_in_tensors(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith(("torch.", "zeropipe."))
