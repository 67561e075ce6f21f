"""An update as jobs, and the jobs of a flat master: stepped run by run, each run a parameter for the torch optimizer.

    master     |------- a -------|-- b --|-------- c --------|      b has its own step count, a and c share one
    runs       |=================|       |===================|      one call: aligned views, as they lie
               ^ lines cut by an edge    ^                          are copied, padded to whole lines, and put back

Elementwise updates do not care how their elements are grouped, so with whole lines (see ALIGN) the bits are those of
one step on the whole master. So a step takes parameters that differ in what they were stepped, leaves out what nobody
used, goes through a file window by window, and sends one window while the next is stepped.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from zeropipe.comm.collectives import Work
from zeropipe.comm.record import SEAM
from zeropipe.errors import UsageError
from zeropipe.layout.flat import in_lines, whole_lines
from zeropipe.runtime.optimizers.state_kinds import (
    Shared,
    born_state,
    per_element_keys,
    shapes_in,
    split_state,
)
from zeropipe.runtime.zero.hold.grads import GradStore
from zeropipe.runtime.zero.hold.partition import Cohort, Partition, Range, copy_counts
from zeropipe.runtime.zero.hold.rounding import COUNT
from zeropipe.runtime.zero.hold.values import ALIGN, cuts
from zeropipe.tensor.host import Number, changes

# What is done next, which may be tried again until it returns; it may return what is to be done right after it.
Job = Callable[[], "list[Job] | None"]


class Update:
    """What is left to do of one update."""

    def __init__(self, param_groups: Sequence[dict[str, Any]]) -> None:
        self._groups = param_groups
        self._jobs: deque[Job] = deque()
        self._works: list[Work] = []  # new values on their way
        # What a step that raised leaves behind: gradients may be forgotten while nothing has changed; where part of a
        # call was done and cannot be undone, the step cannot be gone on with either.
        self.changed = False
        self._torn = False

    def add(self, *jobs: Job) -> None:
        self._jobs += jobs

    def run(self) -> None:
        """Do what is left. Raises UsageError where an earlier raise left something that cannot be gone on with."""
        if self._torn:
            raise UsageError(
                "the step that raised before has changed part of the optimizer's state and cannot be repeated: this "
                "optimizer does not step in one kernel",
                fix="load a checkpoint",
            )
        try:
            while self._jobs:
                # A job leaves the list once it has returned: what raises is what the next call begins with.
                more = self._jobs[0]()
                self._jobs.popleft()
                self._jobs.extendleft(reversed(more or ()))
        except BaseException:
            SEAM.keep(*self._works)  # the transport reads and writes the values, whatever becomes of this
            raise

    def on_change(self) -> None:
        """A master or a moment is no longer what it was."""
        self.changed = True

    def done(self, more: Iterable[Job]) -> None:
        """The current job will raise, but must not be done again; ``more`` follows it."""
        self._jobs.popleft()
        self._jobs.extendleft(reversed([*more]))

    def tear(self) -> None:
        self._torn = self.changed = True

    def send(self, partition: Partition, run: Range) -> None:
        """Start to give every rank the new values of a run of each shard."""
        self._works.append(partition.values.publish_run(*run))

    def arrive(self) -> None:
        """Everything is stepped and has been sent: wait for it, and let the next update round by other bits."""
        while self._works:
            self._works[0].wait()
            self._works.pop(0)
        for group in self._groups:
            if COUNT in group:
                group[COUNT] += 1


# Elements that an optimizer without a fused kernel works on at a time, copied: on a CPU they stay in its cache, a GPU
# is not slowed down by many small kernels.
_WINDOW_NUMEL = {"cpu": 2**18, "cuda": 2**24}


@dataclass(slots=True)
class _Run:
    """A parameter that the optimizer sees for one call: a view of a slice, or a copy of the elements ``where``."""

    param: torch.nn.Parameter
    state: dict[str, Any]
    cohort: int
    where: slice | torch.Tensor | None  # None: elements that stand for none, so that a count goes on

    def put(self, whole: torch.Tensor, value: torch.Tensor) -> None:
        """Let the run's elements of ``whole`` (as the master) be ``value`` (as the run, of its dtype)."""
        if isinstance(self.where, slice):
            place = whole[self.where]
            if place.data_ptr() != value.data_ptr():
                place.copy_(value)
        elif self.where is not None:
            whole.index_copy_(0, self.where, value[: len(self.where)])


class Runs:
    """The runs of one store's partition in one update; ``unused``: parameters that are left out of it."""

    def __init__(
        self,
        update: Update,
        optimizer: torch.optim.Optimizer,
        store: GradStore,
        factor: Number,
        unused: Sequence[int],
    ) -> None:
        self._update = update
        self._optimizer = optimizer
        self._store, self._partition = store, store.partition
        self._options = optimizer.param_groups[store.partition.group_index]
        self._unused = unused

        # Gradients in files are read, and multiplied, window by window; others are whole in ``.grad``, and right.
        self._paged = store.partition.offload.pages_state
        self._factor: Number = factor if self._paged or store.partition.rounding is not None else 1.0

        # A call of one fused kernel has happened or not, so it may work in place. Any other works on copies, which
        # are put in place once it has returned: so a call that raised can be repeated.
        # So it goes with what is kept in fewer bits than it is stepped in.
        self._rounding = store.partition.rounding
        self._copies = self._rounding is not None or not is_fused(optimizer, self._options)

        # What was counted and made so far; it holds once all windows are stepped.
        self._cohorts = store.partition.state.cohorts(unused)
        self._after: list[Shared] = [cohort.shared for cohort in self._cohorts]
        self._moments = store.partition.state.of_master()[0]
        for key, value in self._moments.items() if self._rounding is not None else ():
            # What the optimizer itself has loaded is of its master's dtype.
            if value.dtype != (kept := store.partition.kept_dtype(value.dtype)):
                self._moments[key] = store.partition.new_state(kept).copy_(value)

    def jobs(self) -> Iterator[Job]:
        """Step all windows, in order; where new values leave early, each is sent while the next is stepped."""
        partition, numel = self._partition, self._partition.master.numel()
        early = leaves_early(partition)
        if self._paged:
            yield self._bring_home
        size = partition.offload.policy.sub_group_numel if self._paged else numel
        largest = _WINDOW_NUMEL.get(partition.master.device.type, 2**24) if self._copies else numel
        for start, stop in partition.values.runs if early else cuts_or_none(numel, size):
            for a, b in cuts_or_none(stop - start, largest):
                for stepped in (True, False):
                    yield partial(self._call, (start + a, start + b), stepped)
            if early:
                yield partial(self._update.send, partition, (start, stop))
        yield self._finish

    def _gradient(self) -> torch.Tensor:  # 1D, as the master
        gradient = self._store.shard if self._paged else self._partition.master.grad
        assert gradient is not None
        return gradient

    def _paged_tensors(self) -> Iterator[torch.Tensor]:
        if self._paged:
            yield from (self._partition.master.detach(), self._gradient(), *self._moments.values())

    def _bring_home(self) -> None:
        """State may have been loaded into memory: from now on it lives in files."""
        offload = self._partition.offload
        for key, value in self._moments.items():
            if not offload.in_files(value):
                home = self._partition.new_state(value.dtype)
                offload.copy(home, value, self._partition.device)
                self._moments[key] = home

    def _call(self, window: Range, stepped: bool) -> list[Job] | None:
        """One call for the window's cohorts that were (``stepped``) or were not stepped before: some optimizers take
        no mixture."""
        ahead = slice(window[1], 2 * window[1] - window[0])  # the next window's; a slice ends with the tensor
        for tensor in self._paged_tensors():
            self._partition.offload.read_ahead(tensor[ahead])
        runs = [
            run
            for at, cohort in enumerate(self._cohorts)
            if (cohort.shared is not None) == stepped
            for run in self._runs(at, cohort, window)
        ]
        if not runs:
            return None
        made: list[dict[str, Any]] = []
        store: list[Job] = [partial(self._store_runs, runs, made, window)]
        returned: list[bool] = []
        try:
            with self._held(runs, made, returned):
                self._optimizer.step()
        except BaseException:
            # What torch puts around a step may raise after it, a profiler say, which does not make it undone.
            if returned and not self._copies:
                self._update.on_change()
                self._update.done(store)
            raise
        self._update.on_change()
        return store

    @contextmanager
    def _held(self, runs: Sequence[_Run], made: list[dict[str, Any]], returned: list[bool]) -> Iterator[None]:
        """Inside, the optimizer holds the runs and nothing else; ``made``: their states, once it is left;
        ``returned`` gets an element when the optimizer's own step has returned."""
        optimizer, options = self._optimizer, self._options
        groups, params = optimizer.param_groups, options["params"]
        optimizer.param_groups, options["params"] = [options], [run.param for run in runs]
        optimizer.state.update({run.param: run.state for run in runs if run.state})
        # Where torch asks for the code that it runs after a step. A kernel bumps no version counter that would tell.
        vars(optimizer)["_optimizer_step_code"] = lambda: returned.append(True)
        try:
            yield
        finally:
            del vars(optimizer)["_optimizer_step_code"]
            made += [optimizer.state.pop(run.param, {}) for run in runs]
            optimizer.param_groups, options["params"] = groups, params

    def _runs(self, at: int, cohort: Cohort, window: Range) -> Iterator[_Run]:
        scraps: list[Range] = []
        for start, stop in _clip(cohort.ranges, window):
            # Whole lines as they lie; what shares a line with others in a copy of its own.
            lines = whole_lines(start, stop, ALIGN)
            if lines is None:
                scraps.append((start, stop))
                continue
            yield self._run(at, cohort, slice(*lines))
            scraps += [(a, b) for a, b in ((start, lines[0]), (lines[1], stop)) if a < b]
        if scraps:
            device = self._partition.master.device
            yield self._run(at, cohort, torch.cat([torch.arange(a, b, device=device) for a, b in scraps]))
        elif not cohort.ranges and window[0] == 0:
            yield self._run(at, cohort, None)

    def _run(self, at: int, cohort: Cohort, where: slice | torch.Tensor | None) -> _Run:
        copies = self._copies
        master = self._partition.master.detach()

        def cut(whole: torch.Tensor) -> torch.Tensor:
            return piece(whole) if self._rounding is None else piece(whole).float()

        def piece(whole: torch.Tensor) -> torch.Tensor:
            if isinstance(where, slice):
                return whole[where].clone() if copies else whole[where]
            numel = 0 if where is None else len(where)
            lines = whole.new_zeros(in_lines(max(numel, 1), ALIGN))
            if where is not None:
                lines[:numel] = whole[where]
            return lines

        param = torch.nn.Parameter(cut(master))
        gradient = cut(self._gradient())
        if changes(self._factor) or gradient.dtype != param.dtype:
            gradient = gradient.to(param.dtype, copy=True).mul_(self._factor)
        param.grad = gradient.to(master.device)
        if cohort.shared is None:
            return _Run(param, born_state(self._optimizer, self._options, param.detach()), at, where)
        state = {key: cut(whole) for key, whole in self._moments.items()} | copy_counts(cohort.shared)
        return _Run(param, state, at, where)

    def _store_runs(self, runs: Sequence[_Run], made: Sequence[dict[str, Any]], window: Range) -> None:
        """Put what the call made in its place; may be done again."""
        partition, numel = self._partition, self._partition.master.numel()
        for run, state in zip(runs, made, strict=True):
            shapes = [(tuple(run.param.shape), shapes_in(state))]
            tensors, shared = split_state(state, per_element_keys(self._optimizer, shapes))
            rounded = self._rounder(run)
            run.put(partition.master.detach(), rounded("master", run.param.detach(), partition.master))
            for key, value in tensors.items():
                if key not in self._moments:
                    # A first moment of the whole master stays where it was made: two of them would be too much.
                    stays = isinstance(run.where, slice) and len(value) == numel and not self._paged
                    stays = stays and self._rounding is None
                    self._moments[key] = value if stays else partition.new_state(value.dtype)
                run.put(self._moments[key], rounded(key, value, self._moments[key]))
            self._after[run.cohort] = shared
        for tensor in self._paged_tensors():
            partition.offload.let_go(tensor[slice(*window)])

    def _rounder(self, run: _Run) -> Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]:
        """What makes of a run's values what is kept of them in a tensor as the master."""
        rounding, where = self._rounding, run.where
        if rounding is None or where is None:
            return lambda key, value, kept: value
        elements = rounding.elements(where, self._partition.master.device)
        count = self._options[COUNT]

        def rounded(key: str, value: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
            mine = value[: len(elements)]  # without what fills the last line
            return mine if kept.dtype == value.dtype else rounding.rounded(mine, elements, key, count)

        return rounded

    def _finish(self) -> None:
        """All windows are stepped: what was counted holds now."""
        state = self._partition.state
        counts = state.counts_after(self._cohorts, self._after, self._unused, state.of_master()[1])
        state.set_counts(*counts, self._moments)


def leaves_early(partition: Partition) -> bool:
    """Whether new values are sent in several messages, each of which can leave before the next piece is stepped.

    Ranks may differ in when they send: they send each other the same.
    """
    return partition.master.device.type == "cpu" and len(partition.values.runs) > 1


def is_fused(optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> bool:
    """Whether a step of the param group ``options`` is one kernel, which happens or does not."""
    return bool(options.get("fused")) and type(optimizer).__module__.split(".")[0] in ("torch", "zeropipe")


def cuts_or_none(numel: int, size: int) -> list[Range]:
    """As ``cuts``, and one empty run of nothing: a rank without elements counts its steps too."""
    return list(cuts(numel, size)) or [(0, 0)]


def _clip(ranges: Sequence[Range], window: Range) -> Iterator[Range]:
    """The parts of ascending ranges that lie in the window."""
    start, stop = window
    at = max(bisect_right(ranges, (start, start)) - 1, 0)
    while at < len(ranges) and ranges[at][0] < stop:
        a, b = max(ranges[at][0], start), min(ranges[at][1], stop)
        if a < b:
            yield a, b
        at += 1
