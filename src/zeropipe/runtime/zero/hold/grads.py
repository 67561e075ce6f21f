"""The gradients of one partition of stages 0 to 2: whole and reduced once per window, or a shard that is added to.

Where the optimizer is sharded a gradient that a reduction follows at once is not copied into the buffer: it waits
in its own memory, and a large one is sent from there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from zeropipe.comm.collectives import Work, all_reduce, reduce_to_owners
from zeropipe.layout.buckets import Bucket, Span, cut_buckets
from zeropipe.runtime.zero.hold.partition import Partition
from zeropipe.runtime.zero.hold.policy import Policy
from zeropipe.runtime.zero.hold.shown import Change, Shown

# Elements from which a message of its own costs less than a copy into a common one; only gloo sends one by one.
ALONE_NUMEL = 2**16


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
        on_gloo = self.buffer.device.type == "cpu"
        self.buckets = cut_buckets(layout, policy.bucket_numel, ALONE_NUMEL if on_gloo else None)
        self.seen: set[int] = set()  # parameters with a gradient in this window
        self.shown = Shown(partition.params, partition.names)
        self._filled: set[int] = set()  # whose place in the buffer holds a term
        self.reduced = False  # keeps_whole: the buffer holds reduced values
        self._held: dict[int, torch.Tensor] = {}  # gradients that wait for their bucket
        self._written: set[int] = set()  # sharded: buckets (by first tensor) that the window has written

    @property
    def held(self) -> Iterator[torch.Tensor]:
        """Whole gradients that wait for their bucket."""
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

    def local(self, index: int) -> torch.Tensor | None:
        """What was taken of parameter ``index``'s gradient on this rank, to be changed in place; None if nothing."""
        held = self._held.get(index)
        if held is not None:  # maybe autograd's memory, and of the parameter's dtype
            self._held[index] = held = held.to(self.dtype, copy=True)
            return held
        return self._views[index] if index in self._filled else None

    def _cut_views(self) -> list[torch.Tensor]:
        layout = self.partition.layout
        ranges = (layout.tensor_range(index) for index in range(len(layout.tensors)))
        return [
            self.buffer[start:stop].view(spec.shape)
            for (start, stop), spec in zip(ranges, layout.tensors, strict=True)
        ]

    def accept(self, index: int, keep_grad: bool) -> None:
        """Take ``param.grad`` in. ``keep_grad`` (whole gradients only): no reduction follows, and it stays visible."""
        param = self.partition.params[index]
        grad = param.grad
        assert grad is not None
        if grad.layout != torch.strided:
            grad = grad.to_dense()
        if self._views and (keep_grad or not self._may_wait(index, grad)):
            view = self._views[index]
            if grad.data_ptr() != view.data_ptr() or grad.numel() == 0:
                # Where the view was in .grad, autograd has added already (out of place under create_graph).
                if index in self._filled and index not in self.shown:
                    view.add_(grad)
                else:
                    view.copy_(grad)
            self._filled.add(index)
            if keep_grad and view.dtype == param.dtype and not self.policy.scales_loss:
                self.shown.view(index, view)
            else:
                self.shown.hide(index)
                if keep_grad:
                    self.shown.absent((index,))
        else:
            held = self._held.get(index)
            grad = grad.detach() if grad.requires_grad else grad
            self._held[index] = grad if held is None else held.to(self.dtype).add(grad)
            self.shown.hide(index)
        self.seen.add(index)

    def _may_wait(self, index: int, grad: torch.Tensor) -> bool:
        """Whether the gradient need not go through the buffer, which may hold some and may round; where nothing is
        sent, a large one had better go while it is in cache."""
        if index in self._filled or (self.partition.group.size == 1 and grad.numel() >= ALONE_NUMEL):
            return False
        return grad.dtype == self.dtype or torch.promote_types(grad.dtype, self.dtype) == self.dtype

    def reopen(self) -> None:
        """Make the reduced buffer one more local term: own shard times size, zero elsewhere, so that the next
        average gives reduced + average(new)."""
        self.take_changes(lift=True)
        if not self.reduced:
            return
        self.reduced = False
        # Another rank may have had a gradient where this one had none.
        self._filled.update(range(len(self.partition.params)))
        size = self.partition.group.size
        if self.partition.sharded and size > 1:
            start, stop = self.partition.layout.shard_range(self.partition.shard)
            self.buffer[:start].zero_()
            self.buffer[stop:].zero_()
            self.shard.mul_(size)

    def launch(self, bucket: Bucket) -> Work:
        """Start the reduction of ``bucket``; when the work is done the shard holds (or has added) its average."""
        held = {index: self._held.pop(index) for index in bucket.tensors if index in self._held}
        fresh = self.keeps_whole or bucket.tensors[0] not in self._written
        self._written.add(bucket.tensors[0])
        if self.partition.sharded and self.partition.group.size > 1:
            return self._launch_to_owners(bucket, held, fresh)
        self._fill(bucket, held, fresh)
        if self.partition.group.size == 1:
            return Work("gradients")
        region = self.buffer[bucket.start : bucket.start + bucket.numel]
        wire = region.to(self.policy.reduce_dtype or region.dtype)
        work = all_reduce(wire, self.partition.group, op="avg", label="gradients", async_op=True)
        return work if wire is region else work.then(lambda: _copy(region, wire))

    def _launch_to_owners(self, bucket: Bucket, held: dict[int, torch.Tensor], fresh: bool) -> Work:
        dtype = self.policy.reduce_dtype or self.dtype  # also for a gradient alone: buckets must not show
        cuts: list[tuple[int, torch.Tensor]] = []
        outputs: list[torch.Tensor] = []
        detours: list[tuple[torch.Tensor, torch.Tensor]] = []
        for span in bucket.spans:
            wire = self._wire(span, bucket.start + span.start, held, dtype)
            cuts.append((span.shard, wire))
            if span.shard != self.partition.shard:
                continue
            place = self.shard[span.offset : span.offset + span.numel]
            straight = fresh and dtype == place.dtype
            # Never into the wire: another parameter's gradient, or a user, may share autograd's memory.
            outputs.append(place if straight else torch.empty_like(wire))
            if not straight:
                detours.append((place, outputs[-1]))
        work = reduce_to_owners(
            cuts, outputs, self.partition.group, op="avg", label="gradients", async_op=True
        )

        def store() -> None:
            for place, reduced in detours:
                _copy(place, reduced) if fresh else place.add_(reduced)

        return work.then(store) if detours else work

    def _wire(
        self, span: Span, start: int, held: dict[int, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """The span's elements (they begin at ``start`` of the buffer) as they are sent; a view where that does."""
        sources = [self._source(piece.tensor, held) for piece in span.pieces]
        if len(sources) == 1 and sources[0] is not None and sources[0].dtype == dtype:
            return sources[0][span.pieces[0].start : span.pieces[0].start + span.numel]
        if self.keeps_whole and not any(piece.tensor in held for piece in span.pieces):
            for piece, source in zip(span.pieces, sources, strict=True):
                if source is None:
                    self._views[piece.tensor].zero_()
            return self.buffer[start : start + span.numel].to(dtype)
        wire = torch.empty(span.numel, dtype=dtype, device=self.buffer.device)
        at = 0
        for piece, source in zip(span.pieces, sources, strict=True):
            part = wire[at : at + piece.numel]
            at += piece.numel
            if source is None:
                part.zero_()
            else:
                part.copy_(source[piece.start : piece.start + piece.numel])
        return wire

    def _source(self, index: int, held: dict[int, torch.Tensor]) -> torch.Tensor | None:
        """Parameter ``index``'s gradient, 1D; None where there is none."""
        if index in held:
            return held[index].reshape(-1)
        return self._views[index].view(-1) if self.keeps_whole and index in self._filled else None

    def _fill(self, bucket: Bucket, held: dict[int, torch.Tensor], fresh: bool) -> None:
        """Put what waits into the buffer: whole gradients, or those of a group of one."""
        if fresh:
            for index in bucket.tensors:
                if index not in held and index not in self._filled:
                    self._views[index].zero_()
        if held:
            self._filled.update(held)
            store = torch._foreach_copy_ if fresh else torch._foreach_add_
            store([self._views[index] for index in held], list(held.values()))

    def take_changes(self, lift: bool = False) -> None:
        """Let what users did to ``.grad`` since the last backward be done to the gradients that are held."""
        for index, change, found in self.shown.changes(lift):
            # Where the buffer is whole, other ranks' parts of a reduced one have no meaning.
            place = self._views[index] if self._views else self.partition.local(self.shard, index)
            if found is not None:
                place.copy_(found.detach())
                self.shown.view(index, place)
                continue
            place.zero_()
            if change is Change.DROPPED:
                self.seen.discard(index)
                self._filled.discard(index)

    def show(self, reduced: bool) -> None:
        """After a pass: let ``.grad`` be the view of the buffer where that is whole here, else a stand-in."""
        if self.keeps_whole and not reduced:
            return  # ``accept`` has shown it
        whole = self._views and (not self.partition.sharded or self.partition.group.size == 1)
        if not whole or self.dtype != self.partition.dtype or self.policy.scales_loss:
            self.shown.absent(self.seen, reduced)
            return
        for index in self.seen:
            self.shown.view(index, self._views[index])

    def clear(self) -> None:
        """Start a new window."""
        self.shown.clear()
        self.seen.clear()
        self._filled.clear()
        self._held.clear()
        self._written.clear()
        self.reduced = False


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
