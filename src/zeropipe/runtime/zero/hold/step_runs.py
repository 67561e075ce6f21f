"""Steps a flat master run by run: the torch optimizer sees each run as a parameter, with a step count of its own.

    master     |------- a -------|-- b --|-------- c --------|      b has its own step count, a and c share one
    runs       |=================|       |===================|      one call: aligned views, as they lie
               ^ lines cut by an edge    ^                          are copied, padded to whole lines, and put back

Elementwise updates do not care how their elements are grouped, so with whole lines (see ALIGN) the bits are those of
one step on the whole master. So a step takes parameters that differ in what they were stepped, leaves out what nobody
used, goes through a file window by window, and sends one window while the next is stepped.

A call of an optimizer that updates in one fused kernel has either happened or not. Any other works on copies of a
bounded window, which are put in place once it has returned; so a call that raised can be repeated.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from zeropipe.layout.flat import in_lines, whole_lines
from zeropipe.runtime.optimizers.state_kinds import (
    Shared,
    born_state,
    per_element_keys,
    same_shared,
    shapes_in,
    split_state,
)
from zeropipe.runtime.zero.hold.partition import Partition, copy_of
from zeropipe.runtime.zero.hold.values import ALIGN, cuts

# What is done next, which may be tried again until it returns; it may return what is to be done right after it.
Job = Callable[[], "list[Job] | None"]

Range = tuple[int, int]  # [start, stop): elements of the master

# Elements that an optimizer without a fused kernel works on at a time, copied: on a CPU they stay in its cache, a GPU
# is not slowed down by many small kernels.
WINDOW_NUMEL = {"cpu": 2**18}
_GPU_WINDOW_NUMEL = 2**24


@dataclass(slots=True)
class Cohort:
    """Parameters of a partition that are stepped now and share what the optimizer counts."""

    shared: Shared
    main: bool  # those that are not apart, see ``HeldState``
    members: list[int]
    ranges: list[Range]  # this rank's elements, ascending


def cohorts_of(partition: Partition, unused: Sequence[int]) -> list[Cohort]:
    """The cohorts of this step, the main one first; ``unused``: parameters that are left out."""
    apart, (_, main) = partition.state.apart, partition.state.of_master()
    if not apart and not unused:
        return [Cohort(main, True, list(range(len(partition.params))), [(0, partition.master.numel())])]
    left_out = set(unused)
    found: dict[object, Cohort] = {}
    for index in range(len(partition.params)):
        if index in left_out:
            continue
        shared = apart.get(index, main)
        key = "main" if index not in apart else None if shared is None else id(shared)
        cohort = found.setdefault(key, Cohort(shared, key == "main", [], []))
        cohort.members.append(index)
        start, stop = partition.segments[index].start, partition.segments[index].stop
        if cohort.ranges and cohort.ranges[-1][1] == start:
            cohort.ranges[-1] = (cohort.ranges[-1][0], stop)
        elif start < stop:
            cohort.ranges.append((start, stop))
    return sorted(found.values(), key=lambda cohort: not cohort.main)


def take_counts(
    partition: Partition,
    cohorts: Sequence[Cohort],
    after: Sequence[Shared],
    unused: Sequence[int],
    before: Shared,
) -> tuple[Shared, dict[int, Shared]]:
    """(what the main cohort shares now, what is apart) when each cohort has counted up to ``after``.

    ``before``: what the main one shared until now.
    """
    apart = dict(partition.state.apart)
    mains = [shared for cohort, shared in zip(cohorts, after, strict=True) if cohort.main]
    main = mains[0] if mains else before
    if mains:
        apart |= {index: before for index in unused if index not in apart}
    for cohort, shared in zip(cohorts, after, strict=True):
        if not cohort.main:
            apart |= dict.fromkeys(cohort.members, shared)
    if apart and main is not None:
        alike = {id(s): same_shared(s, main) for s in apart.values() if s is not None}
        apart = {i: s for i, s in apart.items() if s is None or not alike[id(s)]}
    return main, apart


@dataclass(slots=True)
class _Run:
    """A parameter that the optimizer sees for one call: a view of a slice, or a copy of the elements ``where``."""

    param: torch.nn.Parameter
    state: dict[str, Any]
    cohort: int
    where: slice | torch.Tensor | None  # None: elements that stand for none, so that a count goes on

    def put(self, whole: torch.Tensor, value: torch.Tensor) -> None:
        """Let the run's elements of ``whole`` (as the master) be ``value`` (as the run)."""
        if isinstance(self.where, slice):
            place = whole[self.where]
            if place.data_ptr() != value.data_ptr():
                place.copy_(value)
        elif self.where is not None:
            whole.index_copy_(0, self.where, value[: len(self.where)])


class Runs:
    """The runs of one partition in one update.

    ``gradient``: 1D, as the master; it is multiplied by ``factor``. ``on_change`` is told that something was stepped;
    ``done`` that the job which is about to raise is done, and what follows it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        partition: Partition,
        gradient: Callable[[], torch.Tensor],
        factor: float,
        unused: Sequence[int],
        on_change: Callable[[], None],
        done: Callable[[list[Job]], None],
    ) -> None:
        self._optimizer = optimizer
        self._partition = partition
        self._gradient = gradient
        self._factor = factor
        self._unused = unused
        self._on_change = on_change
        self._done = done
        self._cohorts = cohorts_of(partition, unused)
        self._after: list[Shared] = [cohort.shared for cohort in self._cohorts]
        self._moments = partition.state.of_master()[0]
        self._copies = not is_fused(optimizer, partition.group_index)

    def jobs(self, windows: Sequence[Range], after: Callable[[Range], Job | None]) -> Iterator[Job]:
        """Step all windows, in order; ``after`` gives what is to be done once one has been stepped."""
        offload = self._partition.offload
        if offload.pages_state:
            yield self._bring_home
        numel = self._partition.master.numel()
        largest = WINDOW_NUMEL.get(self._partition.master.device.type, _GPU_WINDOW_NUMEL)
        for window in windows or [(0, 0)]:
            start, stop = window
            size = min(largest, max(stop - start, 1)) if self._copies else max(stop - start, 1)
            for a, b in list(cuts(stop - start, size)) or [(0, 0)]:
                part = (start + a, start + b)
                ahead = slice(part[1], min(2 * part[1] - part[0], numel))
                yield partial(self._call, part, True, ahead)
                yield partial(self._call, part, False, ahead)
            job = after(window)
            if job is not None:
                yield job
        yield self._finish

    def _bring_home(self) -> None:
        """State may have been loaded into memory: from now on it lives in files."""
        offload, master = self._partition.offload, self._partition.master
        for key, value in self._moments.items():
            if not offload.in_files(value):
                home = self._partition.new_state(value.dtype)
                offload.copy(home, value)
                self._moments[key] = home
        assert self._gradient().numel() == master.numel()

    def _call(self, window: Range, stepped: bool, ahead: slice) -> list[Job] | None:
        """One call for the window's cohorts that were (``stepped``) or were not stepped before: some optimizers take
        no mixture."""
        offload = self._partition.offload
        if offload.pages_state:
            for tensor in (self._partition.master.detach(), self._gradient(), *self._moments.values()):
                offload.read_ahead(tensor[ahead])
        runs = [
            run
            for at, cohort in enumerate(self._cohorts)
            if (cohort.shared is not None) == stepped
            for run in self._runs(at, cohort, window)
        ]
        if not runs:
            return None
        optimizer = self._optimizer
        with alone(optimizer, self._partition.group_index) as members:
            members += [run.param for run in runs]
            for run in runs:
                if run.state:
                    optimizer.state[run.param] = run.state
            made: list[dict[str, Any]] = []
            returned: list[bool] = []
            store: list[Job] = [partial(self._store, runs, made, window)]
            try:
                with told_of_return(optimizer) as returned:
                    optimizer.step()
            except BaseException:
                made += [optimizer.state.pop(run.param, {}) for run in runs]
                if returned and not self._copies:
                    self._on_change()
                    self._done(store)
                raise
            made += [optimizer.state.pop(run.param, {}) for run in runs]
        self._on_change()
        return store

    def _runs(self, at: int, cohort: Cohort, window: Range) -> Iterator[_Run]:
        options = self._optimizer.param_groups[self._partition.group_index]
        scraps: list[Range] = []
        for start, stop in _clip(cohort.ranges, window):
            # Whole lines as they lie; what shares a line with others in a copy of its own.
            lines = whole_lines(start, stop, ALIGN)
            if lines is None:
                scraps.append((start, stop))
                continue
            yield self._run(at, cohort, slice(*lines), options)
            scraps += [(a, b) for a, b in ((start, lines[0]), (lines[1], stop)) if a < b]
        if scraps:
            where = torch.cat([torch.arange(a, b) for a, b in scraps]).to(self._partition.master.device)
            yield self._run(at, cohort, where, options)
        elif not cohort.ranges and window[0] == 0:
            yield self._run(at, cohort, None, options)

    def _run(
        self, at: int, cohort: Cohort, where: slice | torch.Tensor | None, options: dict[str, Any]
    ) -> _Run:
        copies = self._copies
        master = self._partition.master.detach()

        def cut(whole: torch.Tensor) -> torch.Tensor:
            if isinstance(where, slice):
                return whole[where].clone() if copies else whole[where]
            numel = 0 if where is None else len(where)
            lines = whole.new_zeros(in_lines(max(numel, 1), ALIGN))
            if where is not None:
                lines[:numel] = whole[where]
            return lines

        param = torch.nn.Parameter(cut(master))
        gradient = cut(self._gradient())
        if self._factor != 1.0 or gradient.dtype != master.dtype:
            gradient = gradient.to(master.dtype, copy=True).mul_(self._factor)
        param.grad = gradient.to(master.device)
        state: dict[str, Any] = {}
        if cohort.shared is None:
            state = born_state(self._optimizer, options, param.detach())
        else:
            state = {key: cut(whole) for key, whole in self._moments.items()}
            state |= {key: copy_of(value) for key, value in cohort.shared.items()}
        return _Run(param, state, at, where)

    def _store(self, runs: Sequence[_Run], made: Sequence[dict[str, Any]], window: Range) -> None:
        """Put what the call made in its place; may be done again."""
        partition = self._partition
        for run, state in zip(runs, made, strict=True):
            shape = tuple(run.param.shape)
            tensors, shared = split_state(
                state, per_element_keys(self._optimizer, [(shape, shapes_in(state))])
            )
            run.put(partition.master.detach(), run.param.detach())
            for key, value in tensors.items():
                if key not in self._moments:
                    self._moments[key] = partition.new_state(value.dtype)
                run.put(self._moments[key], value)
            self._after[run.cohort] = shared
        if partition.offload.pages_state:
            for tensor in (partition.master.detach(), self._gradient(), *self._moments.values()):
                partition.offload.let_go(tensor[slice(*window)])

    def _finish(self) -> None:
        """All windows are stepped: what was counted holds now."""
        before = self._partition.state.of_master()[1]
        main, apart = take_counts(self._partition, self._cohorts, self._after, self._unused, before)
        state = {**self._moments, **(main or {})}
        if state:
            self._optimizer.state[self._partition.master] = state
        # An optimizer that keeps nothing has nothing to tell apart.
        self._partition.state.apart = apart if state else {}


def _clip(ranges: Sequence[Range], window: Range) -> Iterator[Range]:
    """The parts of ascending ranges that lie in the window."""
    start, stop = window
    at = max(bisect_right(ranges, (start, start)) - 1, 0)
    while at < len(ranges) and ranges[at][0] < stop:
        a, b = max(ranges[at][0], start), min(ranges[at][1], stop)
        if a < b:
            yield a, b
        at += 1


def is_fused(optimizer: torch.optim.Optimizer, group_index: int) -> bool:
    """Whether a step of the param group is one kernel, which happens or does not."""
    return bool(optimizer.param_groups[group_index].get("fused")) and type(optimizer).__module__.split(".")[
        0
    ] in ("torch", "zeropipe")


@contextmanager
def told_of_return(optimizer: torch.optim.Optimizer) -> Iterator[list[bool]]:
    """Inside, the list gets an element when the optimizer's own step has returned.

    What torch puts around it may raise after that, a profiler say, which does not make the step undone. A kernel
    bumps no version counter that would tell.
    """
    returned: list[bool] = []
    vars(optimizer)["_optimizer_step_code"] = lambda: returned.append(True)
    try:
        yield returned
    finally:
        del vars(optimizer)["_optimizer_step_code"]


@contextmanager
def only(optimizer: torch.optim.Optimizer, tensors: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, the optimizer holds only those of its parameters that are among ``tensors``."""
    wanted = set(map(id, tensors))
    before = [group["params"] for group in optimizer.param_groups]
    for group, params in zip(optimizer.param_groups, before, strict=True):
        group["params"] = [param for param in params if id(param) in wanted]
    try:
        yield
    finally:
        for group, params in zip(optimizer.param_groups, before, strict=True):
            group["params"] = params


@contextmanager
def alone(optimizer: torch.optim.Optimizer, group_index: int) -> Iterator[list[torch.nn.Parameter]]:
    """Inside, the optimizer holds only the parameters that are put into the list, in param group ``group_index``."""
    members: list[torch.nn.Parameter] = []
    groups = optimizer.param_groups
    group = groups[group_index]
    before = group["params"]
    optimizer.param_groups, group["params"] = [group], members
    try:
        yield members
    finally:
        optimizer.param_groups, group["params"] = groups, before
