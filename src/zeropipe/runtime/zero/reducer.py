"""Takes gradients as backward produces them and reduces them in buckets, in one order on all ranks.

A *window* is the time between two optimizer steps, a *pass* one backward in it. Stages 0 and 1 keep whole
gradients and reduce once per window; stages 2 and 3 reduce in every pass, add into their shard and free the rest.
Buckets are launched in one fixed order on all ranks, the last parameters first, whatever order backward takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from zeropipe.comm.collectives import Work
from zeropipe.layout.buckets import Bucket
from zeropipe.runtime.zero.grads import GradStore
from zeropipe.runtime.zero.policy import Policy
from zeropipe.runtime.zero.sharded_grads import ShardedGradStore
from zeropipe.runtime.zero.sharded_partition import ShardedPartition
from zeropipe.runtime.zero.types import AnyPartition, AnyStore
from zeropipe.runtime.zero.watch import Watch

_MAX_IN_FLIGHT = 2  # buckets: one travels while the next one fills


@dataclass(slots=True)
class _Open:
    """A bucket of the current pass: the parameters it still waits for."""

    store: AnyStore
    bucket: Bucket
    waiting: set[int] = field(default_factory=set)


class Reducer:
    """Hooks every trained parameter and drives the stores' buckets in one fixed order.

    ``is_boundary`` tells, when a pass begins, whether an optimizer step follows it. ``watch`` sees every local
    gradient before it is reduced.
    """

    def __init__(self, policy: Policy, is_boundary: Callable[[], bool], watch: Watch | None = None) -> None:
        self.policy = policy
        self.watch = watch
        self.is_boundary = is_boundary
        # Whether the window's gradients stay on their rank, for an optimizer that exchanges something else.
        self.keeps_own: Callable[[], bool] = lambda: False
        self.stores: list[AnyStore] = []
        self.passes = 0  # finished ones, ever
        self._window_start = 0  # passes when the window began
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._order: list[_Open] = []  # the current pass's buckets, in launch order
        self._place: dict[tuple[int, int], _Open] = {}  # (id of the store, parameter) -> its bucket
        self._next = 0  # the first bucket of _order that is not launched
        self._in_flight: deque[Work] = deque()
        self._open = False
        self._reducing = False
        self._local_only = False
        self._explicit = False
        self._owes = True  # something of the window may not have been reduced yet; the same on all ranks

    @property
    def window_is_empty(self) -> bool:
        """Whether no backward ran since the last step; the same on all ranks."""
        return self.passes == self._window_start and not self._open

    def add(self, partition: AnyPartition) -> AnyStore:
        """Hook the partition's parameters and return the store of their gradients."""
        store: AnyStore
        if isinstance(partition, ShardedPartition):
            store = ShardedGradStore(partition, self.policy)
        else:
            store = GradStore(partition, self.policy)
        self.stores.append(store)
        for index, param in enumerate(partition.params):
            self._handles.append(param.register_post_accumulate_grad_hook(self._hook(store, index)))
        return store

    def remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def local_only(self) -> Iterator[None]:
        """Inside, gradients accumulate on this rank and nothing is reduced."""
        self.finish_pass()
        before, self._local_only = self._local_only, True
        try:
            yield
        finally:
            self._local_only = before

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Around one backward: the pass ends with the block, also when no parameter got a gradient."""
        self.finish_pass()
        before, self._explicit = self._explicit, True
        try:
            yield
            self._begin()
            self.finish_pass()
        finally:
            self._explicit = before

    def finish_pass(self) -> None:
        """End the pass in progress, if any: launch what is left, wait for all."""
        if not self._open:
            return
        self._open = False
        if self._reducing:
            while self._next < len(self._order):
                self._launch_next()
            while self._in_flight:
                self._in_flight.popleft().wait()
            for store in self.stores:
                store.reduced = store.keeps_whole
                store.show()
        self._owes = not self._reducing
        self.passes += 1

    def finish_window(self) -> None:
        """Leave the reduced gradients of the whole window in the stores' shards."""
        self.finish_pass()
        if self._owes:
            self._begin(force=True)
            self.finish_pass()

    def clear(self) -> None:
        """Forget the window's gradients."""
        self.finish_pass()
        self._owes = True
        self._window_start = self.passes
        if self.watch is not None:
            self.watch.clear()
        for store in self.stores:
            store.clear()

    def _hook(self, store: AnyStore, index: int) -> Callable[[torch.nn.Parameter], None]:
        key = (id(store), index)

        def accept(param: torch.nn.Parameter) -> None:
            if not self._open:
                self._begin()
                if not self._explicit:
                    torch.autograd.Variable._execution_engine.queue_callback(self.finish_pass)
            if self.watch is not None and param.grad is not None:
                self.watch.look(store.partition.names[index], param.grad)
            if not self._reducing:
                # Where the dtype is the parameter's own, autograd itself adds up a sharded store's gradients.
                if store.keeps_whole or store.dtype != store.partition.dtype:
                    store.accept(index, keep_grad=store.keeps_whole)
                return
            place = self._place[key]
            if index not in place.waiting:  # a second gradient in one pass: re-entrant backward
                self.finish_pass()
                self._begin()
                place = self._place[key]
            store.accept(index, keep_grad=False)
            place.waiting.discard(index)
            while self._next < len(self._order) and not self._order[self._next].waiting:
                self._launch_next()

        return accept

    def _begin(self, force: bool = False) -> None:
        if self._open:
            return
        self._open = True
        whole = self.stores[0].keeps_whole if self.stores else False
        wanted = force or (not self._local_only and (not whole or self.is_boundary()))
        self._reducing = wanted and not self.keeps_own()
        for store in self.stores:
            store.reopen()
        if not self._reducing:
            return
        self._order = [_Open(s, b, set(b.tensors)) for s in reversed(self.stores) for b in s.buckets]
        self._place = {(id(o.store), index): o for o in self._order for index in o.bucket.tensors}
        self._next = 0

    def _launch_next(self) -> None:
        entry = self._order[self._next]
        self._next += 1
        for index in sorted(entry.waiting):  # no gradient in this pass; maybe an earlier, unreduced one
            if entry.store.partition.params[index].grad is not None:
                entry.store.accept(index, keep_grad=False)
        while len(self._in_flight) >= _MAX_IN_FLIGHT:
            self._in_flight.popleft().wait()
        work = entry.store.launch(entry.bucket)
        if self.policy.overlap_comm:
            self._in_flight.append(work)
        else:
            work.wait()
