"""Steps that an optimizer takes as a whole: it needs whole tensors, or somebody watches its steps.

    call 1   |  a  |#####|  c  |        a and c share a step count; what b has is kept aside and put back
    call 2   |#####|  b  |#####|        then b, on its own count

A flat master whose parameters were stepped in different steps, or of which no rank used some, is stepped once for each
step count. What is not meant is put back: whatever the optimizer computes of a tensor depends on that tensor alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch

from zeropipe.runtime.optimizers.state_kinds import Shared, split_state, state_keys
from zeropipe.runtime.zero.hold.partition import Partition, copy_of
from zeropipe.runtime.zero.hold.step_runs import Cohort, Range, cohorts_of, only, take_counts


class Undo:
    """What a call may change: copies of tensors, their gradients and their state, to be put back where it raises."""

    def __init__(self, optimizer: torch.optim.Optimizer, tensors: Sequence[torch.Tensor]) -> None:
        self._optimizer = optimizer
        self._tensors = [tensor for tensor in tensors if tensor.grad is not None]
        keys = state_keys(optimizer)
        self._places: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._states = []
        for tensor in self._tensors:
            moments, shared = split_state(optimizer.state.get(tensor, {}), keys)
            assert tensor.grad is not None
            places = [tensor.detach(), tensor.grad, *moments.values()]
            self._places += [(place, place.clone()) for place in places if place.layout == torch.strided]
            # The tensors themselves come back as they are; what is shared may be changed in place or replaced.
            self._states.append(moments | {key: copy_of(value) for key, value in shared.items()})

    def restore(self) -> None:
        for place, value in self._places:
            place.copy_(value)
        for tensor, state in zip(self._tensors, self._states, strict=True):
            held = self._optimizer.state.get(tensor)
            if held is not None:
                held.clear()
                held.update(state)
                if not state:
                    del self._optimizer.state[tensor]


def step_whole(
    optimizer: torch.optim.Optimizer,
    partitions: Sequence[Partition],
    left_out: Mapping[int, Sequence[int]],
    counts: bool,
    alone: bool,
) -> None:
    """Step the partitions; ``left_out``: by id of the partition, parameters that are not.

    ``counts``: parameters may differ in what they were stepped; else one count is for all, as the optimizer wants it.
    ``alone``: what else the optimizer holds must not be stepped.
    """
    flats = [p for p in partitions if p.flat]
    cohorts = {id(p): cohorts_of(p, left_out.get(id(p), ())) for p in flats}
    after: dict[int, list[Shared]] = {id(p): [] for p in flats}
    gradients = {id(p): p.master.grad for p in flats}
    try:
        with (
            only(optimizer, [tensor for p in partitions for tensor in p.stepped]) if alone else nullcontext()
        ):
            for level in range(max([1, *map(len, cohorts.values())])):
                now = [(p, cohorts[id(p)][level]) for p in flats if level < len(cohorts[id(p)])]
                asides = [
                    _Aside(optimizer, p, cohort, counts and bool(p.state.apart or left_out.get(id(p))))
                    for p, cohort in now
                ]
                for p in flats:
                    p.master.grad = gradients[id(p)] if level < len(cohorts[id(p)]) else None
                for p in partitions if level else ():
                    if not p.flat:
                        p.drop_gradients()
                optimizer.step()
                for aside, (p, _) in zip(asides, now, strict=True):
                    aside.put_back()
                    _, shared = p.state.of_master()
                    after[id(p)].append({k: copy_of(v) for k, v in (shared or {}).items()})
    finally:
        for p in flats:
            p.master.grad = gradients[id(p)]
    counted = {
        p: take_counts(p, found, after[id(p)], left_out.get(id(p), ()), _before(found))
        for p in flats
        if counts and (p.state.apart or left_out.get(id(p)))
        for found in [cohorts[id(p)]]
    }
    for p, (main, apart) in counted.items():  # all at once, so that a raise leaves none of it
        p.state.apart = apart
        optimizer.state[p.master].update(main or {})


def _before(cohorts: Sequence[Cohort]) -> Shared:
    """What the main cohort shared before this step."""
    return next((cohort.shared for cohort in cohorts if cohort.main), None)


class _Aside:
    """The elements of a master that a call is not meant for, and the count of those that it is meant for."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, partition: Partition, cohort: Cohort, own_count: bool
    ) -> None:
        self._partition = partition
        self._state = optimizer.state
        self._ranges = cohort.ranges
        self._others = list(_complement(cohort.ranges, partition.master.numel()))
        self._known, shared = partition.state.of_master()
        self._anew = own_count and cohort.shared is None and shared is not None
        # What is made anew is made beside what is there, which no call touches then.
        wholes = [partition.master.detach(), *([] if self._anew else self._known.values())]
        self._kept = [(whole[a:b], whole[a:b].clone()) for whole in wholes for a, b in self._others]
        if not own_count:
            return
        state = optimizer.state[partition.master]
        state.clear()
        if not self._anew:
            state.update({key: copy_of(value) for key, value in (cohort.shared or {}).items()})
            state.update(self._known)

    def put_back(self) -> None:
        for place, value in self._kept:
            place.copy_(value)
        state = self._state[self._partition.master]
        for key, made in self._partition.state.of_master()[0].items():
            old = self._known.get(key)
            if self._anew and old is not None:
                for a, b in self._ranges:
                    old[a:b].copy_(made[a:b])
                state[key] = old
            elif old is None:
                for a, b in self._others:
                    made[a:b].zero_()


def _complement(ranges: Sequence[Range], numel: int) -> Iterator[Range]:
    at = 0
    for start, stop in [*ranges, (numel, numel)]:
        if at < start:
            yield at, start
        at = stop
