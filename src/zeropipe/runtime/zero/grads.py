"""The gradients of one partition of stages 0 to 2: whole and reduced once per window, or a shard that is added to."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from zeropipe.comm.collectives import Work, all_reduce, reduce_to_owners
from zeropipe.layout.buckets import Bucket, cut_buckets
from zeropipe.runtime.zero.partition import Partition
from zeropipe.runtime.zero.policy import Policy


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
        self.replace(self.buffer)
        self.buckets = cut_buckets(layout, policy.bucket_numel)
        self.seen: set[int] = set()  # parameters with a gradient in this window
        self.reduced = False  # keeps_whole: the buffer holds reduced values
        self._held: dict[int, torch.Tensor] = {}  # sharded: gradients that wait for their bucket
        self._written: set[int] = set()  # sharded: buckets (by first tensor) that the window has written

    @property
    def held(self) -> Iterator[torch.Tensor]:
        """sharded: whole gradients that wait for their bucket."""
        yield from self._held.values()

    def replace(self, buffer: torch.Tensor) -> None:
        """Let ``buffer`` (the same elements, maybe elsewhere) take the place of the buffer."""
        start, stop = self.partition.layout.shard_range(self.partition.shard)
        self.buffer = buffer
        self.shard = buffer[start:stop] if self.keeps_whole else buffer
        alone = not self.keeps_whole and self.partition.layout.num_shards == 1
        # keeps_whole, or a group of one: each parameter's gradient in the buffer, in its shape. Kept, because making
        # a view for every parameter in every step is what a small model would notice.
        self._views = self._cut_views() if self.keeps_whole or alone else []

    def let_go(self, tensor: torch.Tensor) -> None:
        """Nothing to do: the shard is in memory."""

    def view(self, index: int) -> torch.Tensor:
        """keeps_whole: parameter ``index``'s gradient in the buffer, in its shape."""
        return self._views[index]

    def _cut_views(self) -> list[torch.Tensor]:
        layout = self.partition.layout
        ranges = (layout.tensor_range(index) for index in range(len(layout.tensors)))
        return [
            self.buffer[start:stop].view(spec.shape)
            for (start, stop), spec in zip(ranges, layout.tensors, strict=True)
        ]

    def accept(self, index: int, keep_grad: bool) -> None:
        """Take ``param.grad`` in. With ``keep_grad`` (whole gradients only) it becomes a view of the buffer."""
        param = self.partition.params[index]
        grad = param.grad
        assert grad is not None
        if grad.layout != torch.strided:
            grad = grad.to_dense()
        if self.keeps_whole:
            view = self._views[index]
            if grad.data_ptr() != view.data_ptr() or grad.numel() == 0:
                if index in self.seen:
                    view.add_(grad)
                else:
                    view.copy_(grad)
            param.grad = view if keep_grad and view.dtype == param.dtype else None
        else:
            held = self._held.get(index)
            flat = (grad.detach() if grad.requires_grad else grad).reshape(-1)
            self._held[index] = flat if held is None else held.to(self.dtype).add(flat)
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
                self._views[index].zero_()
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
        first = bucket.tensors[0] not in self._written
        self._written.add(bucket.tensors[0])
        if self.partition.group.size == 1:
            self._store_alone(bucket, parts, first)
            return Work("gradients")
        dtype = (
            self.policy.reduce_dtype or self.dtype
        )  # also for one part: buckets must not show in the numbers
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
        found = [
            (self._views[i].view(-1), g) for i, g in zip(bucket.tensors, parts, strict=True) if g is not None
        ]
        if first:
            for index, part in zip(bucket.tensors, parts, strict=True):
                if part is None:
                    self._views[index].zero_()
        if found:
            places, grads = (list(column) for column in zip(*found, strict=True))
            if first:
                torch._foreach_copy_(places, grads)
            else:
                torch._foreach_add_(places, grads)

    def show(self) -> None:
        """Let every ``.grad`` be its view of the reduced buffer, where this rank has the whole of it."""
        if self.keeps_whole and not self.partition.sharded and self.dtype == self.partition.dtype:
            for index in self.seen:
                self.partition.params[index].grad = self._views[index]

    def clear(self) -> None:
        """Start a new window."""
        for param in self.partition.params:
            param.grad = None
        self.seen.clear()
        self._held.clear()
        self._written.clear()
        self.reduced = False


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
