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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from zeropipe.comm.group import SELF
from zeropipe.runtime.optimizers.shard_view import ShardView
from zeropipe.runtime.optimizers.state_kinds import (
    Shared,
    State,
    per_element_keys,
    same_shared,
    shapes_in,
    split_shared,
    split_state,
    state_keys,
)
from zeropipe.runtime.zero.hold.offload import Move, Offload
from zeropipe.runtime.zero.hold.rounding import COUNT, Rounding
from zeropipe.runtime.zero.hold.shard_values import ShardValues
from zeropipe.runtime.zero.hold.values import FlatValues
from zeropipe.streams import STREAMS
from zeropipe.tensor.host import HOST, Number, changes


class Partition:
    """What one rank holds of its parameters, to be stepped.

    ``names``: dotted names, as in ``module.named_parameters()``. ``group_index``: index of the param group.
    ``flat``: the optimizer steps on the master as one 1-D tensor; otherwise on parts of it, one per parameter: in the
    parameter's own shape where that is whole, else the 1-D shard of it (stage 3). ``state_dtype``: of moments, where
    the optimizer is known to make no others; bf16 is rounded to (``rounding.py``).
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
        state_dtype: torch.dtype | None = None,
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
        self.master = values.master  # 1D

        # What is kept in 16 bits of what a step computes in 32.
        self._state_dtype = state_dtype
        narrow = torch.bfloat16 in (state_dtype, self.master.dtype)
        self.rounding = Rounding(self.segments) if narrow else None
        if narrow:
            optimizer.param_groups[group_index].setdefault(COUNT, 0)

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

    def put(self, tensor: torch.Tensor, index: int, value: torch.Tensor, whole: bool = True) -> None:
        """Write parameter ``index`` into a master-sized tensor: from its shape, or (not ``whole``) from this piece."""
        place, piece = self.local(tensor, index), self.segments[index].piece
        STREAMS.of(self.device).host_turn()  # a gather may still read it
        if not whole:
            place.copy_(value)
            return
        if piece is not None:
            place.copy_(value.detach().reshape(-1)[piece.start : piece.start + piece.numel])
        self.offload.let_go(place)

    def take_master(self, master: torch.Tensor) -> None:
        """Let ``master`` (1D, as this one) be the values, on every rank, each of which calls this."""
        self.values.before_write()
        self.master.detach().copy_(master)
        self.values.publish()

    def new_state(self, dtype: torch.dtype) -> torch.Tensor:
        """Zeros for one kind of optimizer state, as the master and where that lives."""
        dtype = self.kept_dtype(dtype)
        if self.offload.in_files(self.master):
            return self.offload.state(self.master.numel(), dtype, self.device)
        return torch.zeros_like(self.master, dtype=dtype, requires_grad=False)

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In what optimizer state is kept that is made, or was saved, in ``dtype``."""
        return self._state_dtype or dtype if dtype.is_floating_point else dtype

    def before_rounding(self, factor: Number) -> Number:
        """By what gradients are multiplied as they are: what is rounded anyway is multiplied in fp32 (``runs.py``)."""
        return factor if self.rounding is None else 1.0

    def load_gradient(self, shard: torch.Tensor, factor: Number, unused: Sequence[int]) -> None:
        """Let what is stepped have ``factor`` times ``shard`` (1D, as the master) as its gradient."""
        # A copy is scaled here; a shard that is read where it lies has been, by a job of its own (``stepping.py``).
        grad = shard.to(self.master.dtype, copy=True).mul_(factor) if changes(factor) else shard
        grad = grad.to(self.master.device, self.master.dtype)
        if self.flat:
            self.master.grad = grad
            return
        for index, (tensor, part) in enumerate(zip(self.stepped, self.pieces(grad), strict=True)):
            tensor.grad = None if index in unused else part

    def drop_gradients(self) -> None:
        for tensor in self.stepped:
            tensor.grad = None

    def views(self) -> dict[torch.nn.Parameter, ShardView]:
        """What an optimizer that needs whole tensors is told of each tensor that it steps."""
        group = self.group if self.sharded else SELF
        pairs = zip(self.stepped, self.values.flats(self.group_index), strict=True)
        return {tensor: ShardView(layout, self.values.shard, group) for tensor, (_, layout, _) in pairs}

    def move_master(self, move: Move) -> None:
        """Let a master that is a tensor of its own be ``move`` of itself."""
        self.values.move_master(move)
        if not self.flat and self.stepped[0] is not self.params[0]:
            for tensor, part in zip(self.stepped, self.pieces(self.master.data), strict=True):
                tensor.data = part


Range = tuple[int, int]  # [start, stop): elements of the master


@dataclass(slots=True)
class Cohort:
    """Parameters of a flat partition that are stepped now and share what the optimizer counts."""

    shared: Shared
    main: bool  # those that are not apart
    members: list[int]
    ranges: list[Range]  # this rank's elements, ascending


class HeldState:
    """What ``optimizer`` keeps for ``partition``, by parameter."""

    def __init__(self, partition: Partition, optimizer: torch.optim.Optimizer) -> None:
        self._partition = partition
        self._optimizer = optimizer
        self.apart: dict[int, Shared] = {}  # by parameter; empty for one that is stepped by itself

    def keys(self) -> set[str]:
        """The state that is laid out like what is stepped; empty before the first step."""
        return {key for tensors, _ in self._split() for key in tensors}

    def shard(self, key: str) -> torch.Tensor | None:
        """State ``key``, 1D as the master; a copy where the optimizer steps on parts of the master."""
        partition = self._partition
        parts = [tensors.get(key) for tensors, _ in self._split()]
        found = next((part for part in parts if part is not None), None)
        if found is None or partition.flat:
            return found
        whole = torch.zeros_like(partition.master, dtype=found.dtype)
        for place, part in zip(partition.pieces(whole), parts, strict=True):
            if part is not None:
                place.copy_(part)
        return whole

    def write(self, key: str, index: int, value: torch.Tensor, whole: bool) -> None:
        """Set state ``key`` of parameter ``index``: see ``Partition.put``."""
        partition = self._partition
        shard = self.shard(key)
        assert shard is not None, "the caller has checked that there is such state"
        partition.put(shard, index, value, whole)
        if not partition.flat:  # what was written to is a copy
            mine = self._optimizer.state[partition.stepped[index]][key]
            mine.copy_(partition.pieces(shard)[index])

    def shared(self, index: int) -> Shared:
        """What the optimizer counts for parameter ``index``; None if it was never stepped."""
        if index in self.apart:
            return self.apart[index]
        at = 0 if self._partition.flat else index
        return self._split()[at][1] if self._optimizer.state.get(self._partition.stepped[at]) else None

    def of_master(self) -> tuple[dict[str, torch.Tensor], Shared]:
        """(moments of a flat master, what those parameters share that are not apart)."""
        tensors, shared = self._split()[0]
        return tensors, shared if self._optimizer.state.get(self._partition.master) else None

    def cohorts(self, unused: Sequence[int]) -> list[Cohort]:
        """Who is stepped together in this step, the main cohort first; ``unused``: parameters that are left out."""
        partition, (_, main) = self._partition, self.of_master()
        # The common case costs nothing for each parameter, and goes over padding too: it holds zeros.
        if not self.apart and not unused:
            numel = partition.master.numel()
            return [Cohort(main, True, list(range(len(partition.params))), [(0, numel)] if numel else [])]
        found: dict[object, Cohort] = {}
        for index, segment in enumerate(partition.segments):
            if index in unused:
                continue
            # By identity: a value may be compared when the step is over, see ``counts_after``.
            shared = self.apart.get(index, main)
            key = "main" if index not in self.apart else None if shared is None else id(shared)
            cohort = found.setdefault(key, Cohort(shared, key == "main", [], []))
            cohort.members.append(index)
            if cohort.ranges and cohort.ranges[-1][1] == segment.start:
                cohort.ranges[-1] = (cohort.ranges[-1][0], segment.stop)
            elif segment.start < segment.stop:
                cohort.ranges.append((segment.start, segment.stop))
        return sorted(found.values(), key=lambda cohort: not cohort.main)

    def counts_after(
        self, cohorts: Sequence[Cohort], after: Sequence[Shared], unused: Sequence[int], before: Shared
    ) -> tuple[Shared, dict[int, Shared]]:
        """(what the main cohort shares, what is apart) once each has counted up to ``after``; nothing is set yet.

        ``before``: what the main cohort shared until now.
        """
        apart, main = dict(self.apart), before
        for cohort, shared in zip(cohorts, after, strict=True):
            if cohort.main:
                main = shared
                # It counts on, so those of it that were left out part from it.
                apart |= {index: before for index in unused if index not in apart}
            else:
                apart |= dict.fromkeys(cohort.members, shared)
        # Who has caught up with it is apart no longer. It may have while the main cohort was left out; where a look at
        # counts would wait for a device, it is only looked for then.
        waits = any(torch.is_tensor(value) and not HOST.sees(value) for value in (main or {}).values())
        if apart and main is not None and not (waits and any(cohort.main for cohort in cohorts)):
            alike = {id(s): same_shared(s, main) for s in apart.values() if s is not None}
            apart = {i: s for i, s in apart.items() if s is None or not alike[id(s)]}
        return main, apart

    def set_counts(self, main: Shared, apart: Mapping[int, Shared], moments: State | None = None) -> None:
        """Let the counts of a flat master be these; ``moments``: its others, where they are no longer those held."""
        state = {**(main or {}), **(self.of_master()[0] if moments is None else moments)}
        # An optimizer that keeps nothing has nothing to tell apart.
        self.apart = dict(apart) if state else {}
        if state:
            self._optimizer.state[self._partition.master] = state
        else:
            self._optimizer.state.pop(self._partition.master, None)

    def set_apart(self, apart: Mapping[int, Shared]) -> None:
        """Let these parameters have counts of their own, copies of those given."""
        # Those that were one object stay one: parameters that count together are stepped in one call.
        copies = {id(own): None if own is None else copy_counts(own) for own in apart.values()}
        self.apart = {index: copies[id(own)] for index, own in apart.items()}

    def set_shared(self, given: Sequence[Shared]) -> None:
        """Let each parameter of a flat partition have what is given for it; the moments are in place already."""
        main, apart = split_shared(given, [prod(shape) for shape in self._partition.shapes])
        self.set_counts(copy_counts(main), apart)

    def _split(self) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
        """(moments, what is shared) of each tensor that is stepped."""
        partition, state = self._partition, self._optimizer.state
        if partition.flat:
            # A master is never of one element, so that it needs no others to tell by.
            shapes = [(tuple(partition.master.shape), shapes_in(state.get(partition.master, {})))]
            keys = per_element_keys(self._optimizer, shapes)
        else:
            keys = state_keys(self._optimizer)
        return [split_state(state.get(tensor, {}), keys) for tensor in partition.stepped]

    def adopt(self) -> None:
        """Take over state that the optimizer already has for the parameters: whole, on every rank."""
        # The user's optimizer may have made steps, or been given a state dict, before the engine was built.
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
            self._partition.put(shard, index, value)
        return shard


def copy_counts(shared: Shared) -> dict[str, Any]:
    """A copy of what parameters share, which a step may change in place; {} where they were never stepped."""
    return {key: value.clone() if torch.is_tensor(value) else value for key, value in (shared or {}).items()}
