"""Takes gradients as backward produces them, reduces them in buckets and leaves the shard that is stepped.

A *window* is the time between two optimizer steps, a *pass* one backward in it. Stages 0 and 1 keep whole
gradients and reduce once per window; stage 2 reduces in every pass, adds into its shard and frees the rest.
Buckets are launched in one fixed order on all ranks, the last parameters first, whatever order backward takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from zeropipe.comm.collectives import Work, all_reduce, reduce_to_owners
from zeropipe.layout.buckets import Bucket, cut_buckets
from zeropipe.runtime.zero.partition import Partition
from zeropipe.runtime.zero.policy import Policy
from zeropipe.runtime.zero.watch import Watch

_MAX_IN_FLIGHT = 2  # buckets: one travels while the next one fills


@dataclass(slots=True)
class _Open:
    """A bucket of the current pass: the parameters it still waits for."""

    store: GradStore
    bucket: Bucket
    waiting: set[int] = field(default_factory=set)


class GradStore:
    """The gradients of one partition. ``shard``: 1D, shard_numel, in the accumulation's dtype."""

    def __init__(self, partition: Partition, policy: Policy) -> None:
        self.partition = partition
        self.policy = policy
        self.dtype = policy.accumulate_dtype or partition.dtype
        self.keeps_whole = not policy.shards_gradients
        layout = partition.layout
        numel = layout.padded_numel if self.keeps_whole else layout.shard_numel
        self.buffer = torch.zeros(numel, dtype=self.dtype, device=partition.values.device)
        start, stop = layout.shard_range(partition.shard)
        self.shard = self.buffer[start:stop] if self.keeps_whole else self.buffer
        self.buckets = cut_buckets(layout, policy.bucket_numel)
        self.seen: set[int] = set()  # parameters with a gradient in this window
        self.reduced = False  # keeps_whole: the buffer holds reduced values
        self._held: dict[int, torch.Tensor] = {}  # sharded: gradients that wait for their bucket
        self._written: set[int] = set()  # sharded: buckets (by start) that the window has written

    @property
    def held(self) -> Iterator[torch.Tensor]:
        """sharded: whole gradients that wait for their bucket."""
        yield from self._held.values()

    def view(self, index: int) -> torch.Tensor:
        """keeps_whole: parameter ``index``'s gradient in the buffer, in its shape."""
        start, stop = self.partition.layout.tensor_range(index)
        return self.buffer[start:stop].view(self.partition.layout.tensors[index].shape)

    def accept(self, index: int, keep_grad: bool) -> None:
        """Take ``param.grad`` in. With ``keep_grad`` (whole gradients only) it becomes a view of the buffer."""
        param = self.partition.params[index]
        grad = param.grad
        assert grad is not None
        if grad.layout != torch.strided:
            grad = grad.to_dense()
        if self.keeps_whole:
            view = self.view(index)
            if grad.data_ptr() != view.data_ptr() or grad.numel() == 0:
                if index in self.seen:
                    view.add_(grad)
                else:
                    view.copy_(grad)
            param.grad = view if keep_grad and view.dtype == param.dtype else None
        else:
            held = self._held.get(index)
            self._held[index] = grad.detach().reshape(-1) if held is None else held + grad.reshape(-1)
            param.grad = None
        self.seen.add(index)

    def reopen(self) -> None:
        """Make the reduced buffer one more local term: own shard times size, zero elsewhere, so that the next
        average gives reduced + average(new)."""
        if not self.reduced:
            return
        self.reduced = False
        size = self.partition.group.size
        if self.partition.sharded and size > 1:
            start, stop = self.partition.layout.shard_range(self.partition.shard)
            self.buffer[:start].zero_()
            self.buffer[stop:].zero_()
            self.shard.mul_(size)

    def launch(self, bucket: Bucket) -> Work:
        """Start the reduction of ``bucket``; when the work is done the shard holds (or has added) its average."""
        return self._launch_whole(bucket) if self.keeps_whole else self._launch_sharded(bucket)

    def _launch_whole(self, bucket: Bucket) -> Work:
        for index in bucket.tensors:
            if index not in self.seen:
                self.view(index).zero_()
        region = self.buffer[bucket.start : bucket.start + bucket.numel]
        wire = (
            region
            if self.policy.reduce_dtype in (None, region.dtype)
            else region.to(self.policy.reduce_dtype)
        )
        group = self.partition.group
        if self.partition.sharded:
            cuts = [(span.shard, wire[span.start : span.start + span.numel]) for span in bucket.spans]
            own = dict(cuts).get(self.partition.shard)
            work = reduce_to_owners(cuts, own, group, op="avg", label="gradients", async_op=True)
        else:
            work = all_reduce(wire, group, op="avg", label="gradients", async_op=True)
        return work if wire is region else work.then(lambda: _copy(region, wire))

    def _launch_sharded(self, bucket: Bucket) -> Work:
        parts = [self._held.pop(index, None) for index in bucket.tensors]
        first = bucket.start not in self._written
        self._written.add(bucket.start)
        if self.partition.group.size == 1:
            self._store_alone(bucket, parts, first)
            return Work("gradients")
        dtype = self.policy.reduce_dtype or (self.dtype if len(parts) > 1 else self.partition.dtype)
        sizes = [self.partition.layout.tensors[index].numel for index in bucket.tensors]
        device = self.buffer.device
        filled = [
            torch.zeros(size, dtype=dtype, device=device) if part is None else part.to(dtype)
            for part, size in zip(parts, sizes, strict=True)
        ]
        wire = filled[0] if len(filled) == 1 else torch.cat(filled)
        cuts = [(span.shard, wire[span.start : span.start + span.numel]) for span in bucket.spans]
        own = dict(cuts).get(self.partition.shard)
        work = reduce_to_owners(cuts, own, self.partition.group, op="avg", label="gradients", async_op=True)

        def store() -> None:
            for span in bucket.spans:
                if span.shard == self.partition.shard and own is not None:
                    place = self.shard[span.offset : span.offset + span.numel]
                    _copy(place, own) if first else place.add_(own)

        return work.then(store)

    def _store_alone(self, bucket: Bucket, parts: list[torch.Tensor | None], first: bool) -> None:
        """A group of one: no wire, straight into the shard."""
        for index, part in zip(bucket.tensors, parts, strict=True):
            start, stop = self.partition.layout.tensor_range(index)
            place = self.shard[start:stop]
            if part is not None:
                _copy(place, part) if first else place.add_(part)
            elif first:
                place.zero_()

    def show(self) -> None:
        """Let every ``.grad`` be its view of the reduced buffer, where this rank has the whole of it."""
        if self.keeps_whole and not self.partition.sharded and self.dtype == self.partition.dtype:
            for index in self.seen:
                self.partition.params[index].grad = self.view(index)

    def clear(self) -> None:
        """Start a new window."""
        for param in self.partition.params:
            param.grad = None
        self.seen.clear()
        self._held.clear()
        self._written.clear()
        self.reduced = False


class Reducer:
    """Hooks every trained parameter and drives the stores' buckets in one fixed order.

    ``is_boundary`` tells, when a pass begins, whether an optimizer step follows it. ``watch`` sees every local
    gradient before it is reduced.
    """

    def __init__(self, policy: Policy, is_boundary: Callable[[], bool], watch: Watch | None = None) -> None:
        self.policy = policy
        self.watch = watch
        self.is_boundary = is_boundary
        self.stores: list[GradStore] = []
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

    def add(self, partition: Partition) -> GradStore:
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

    def _hook(self, store: GradStore, index: int) -> Callable[[torch.nn.Parameter], None]:
        key = (id(store), index)

        def accept(param: torch.nn.Parameter) -> None:
            if not self._open:
                self._begin()
                if not self._explicit:
                    torch.autograd.Variable._execution_engine.queue_callback(self.finish_pass)
            if self.watch is not None and param.grad is not None:
                self.watch.look(store.partition.names[index], param.grad)
            if not self._reducing:
                if store.keeps_whole:
                    store.accept(index, keep_grad=True)
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
        self._reducing = force or (not self._local_only and (not whole or self.is_boundary()))
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


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
