"""The gradients of one partition, from a parameter's ``.grad`` to the reduced shard that a step reads.

accept      .grad -> waits in its own memory for its bucket, or goes into the buffer
launch      bucket -> one message per span: what one rank owns of it -> the average, in the owner's shard

stages 0, 1   the buffer is whole, and reduced once per window
stages 2, 3   the buffer is this rank's shard, as the master lies, to which every reduction adds
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from math import prod

import torch

from zeropipe.comm.collectives import Run, Work, all_reduce, goes_in_one, reduce_run, reduce_to_owners
from zeropipe.comm.group import Group
from zeropipe.layout.buckets import Bucket, Span
from zeropipe.runtime.zero.hold.autograd import Change, Shown
from zeropipe.runtime.zero.hold.offload import Move
from zeropipe.runtime.zero.hold.partition import Partition
from zeropipe.runtime.zero.hold.policy import Place, Policy
from zeropipe.runtime.zero.hold.values import ALONE_NUMEL
from zeropipe.runtime.zero.hold.window import AtMasters, Begun, Stored, most_in_flight, stored
from zeropipe.runtime.zero.param import REDUCE
from zeropipe.streams import STREAMS


class GradStore:
    """The gradients of one partition, in the accumulation's dtype."""

    nothing = 0.0  # stands on the wire where no gradient came

    def __init__(self, partition: Partition, policy: Policy) -> None:
        self.partition = partition
        self.policy = policy
        self.dtype = policy.accumulate_dtype or partition.dtype
        self.buckets = partition.values.buckets(policy.bucket_numel)

        # The memory: ``buffer`` is whole, or the shard. At stage 3 it lives where masters do, copied there on the way.
        self.keeps_whole = policy.keeps_whole
        numel, shard = partition.master.numel(), partition.values.shard
        self._own = slice(shard * numel, (shard + 1) * numel)  # of a whole buffer: this rank's shard
        numel = partition.values.whole_numel if self.keeps_whole else numel
        if policy.shards_parameters:
            buffer = partition.offload.state(numel, self.dtype, partition.device)
        else:
            buffer = torch.zeros(numel, dtype=self.dtype, device=partition.device)
        self._too_large = ALONE_NUMEL if partition.group.size == 1 else sys.maxsize  # to wait for its bucket
        self._streams = STREAMS.of(partition.device)
        self._on_host = self._streams.on_host(buffer)
        self._replace(buffer)
        self._at_masters: AtMasters | None = None
        if self._streams.on_host(partition.master) and not self._on_host:
            numel, pin = partition.master.numel(), policy.pin_memory
            self._at_masters = AtMasters(self._streams, numel, self.dtype, pin)

        # What the window has so far; ``clear`` begins a new one.
        self.seen: set[int] = set()  # parameters with a gradient
        self.shown = Shown(partition.params, partition.names)
        self._held: dict[int, torch.Tensor] = {}  # gradients that wait for their bucket
        self._filled: set[int] = set()  # whose place in the buffer holds a term
        self._written: set[int] = set()  # buckets (by first parameter) whose average the shard has
        self._reduced = False  # keeps_whole: the buffer holds averages

    @property
    def shard(self) -> torch.Tensor:
        """The average so far: 1D, as the master; waits for copies of it that are under way."""
        if self._on_host:
            self._streams.host_turn()
        return self._shard

    def shard_at_masters(self) -> torch.Tensor:
        """The same where the masters lie; waits until it is there."""
        if self._at_masters is None:
            return self.shard
        return self._at_masters.arrived(self._shard, len(self.buckets))

    @property
    def held(self) -> Iterator[torch.Tensor]:
        """Whole gradients that wait for their bucket."""
        yield from self._held.values()

    def _replace(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self._shard = buffer[self._own] if self.keeps_whole else buffer
        # keeps_whole, or a group of one: each parameter's gradient in the buffer, in its shape. Kept, because making
        # a view for every parameter in every step is what a small model would notice.
        partition, policy, alone = self.partition, self.policy, self.partition.group.size == 1
        self._views: list[torch.Tensor] = []
        at = 0
        for shape in partition.shapes if self.keeps_whole or (alone and not policy.shards_parameters) else ():
            self._views.append(buffer[at : at + prod(shape)].view(shape))
            at += prod(shape)
        # Where they go in the end, in a group of one; at stage 3 if nothing lies between autograd and the shard.
        self._places, self._sends = self._views, not alone
        if alone and policy.shards_parameters:
            in_memory = not self._on_host and not partition.offload.has_files
            self._sends = not in_memory or policy.reduce_dtype not in (None, self.dtype)
            rooms = zip(partition.values.segments, partition.shapes, strict=True)
            self._places = [buffer[s.start : s.start + prod(shape)].view(shape) for s, shape in rooms]

    def move(self, move: Move) -> None:
        """Let the buffer be ``move`` of itself. One that a ``.grad`` is a view of stays: that must be where the
        parameter is."""
        if not (self._views and self.shown.whole):
            whole = self.buffer if self.keeps_whole else self.shard
            self._replace(move(whole))

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

    @property
    def takes_all(self) -> bool:
        """Whether it takes over what no reduction follows, which else autograd adds up."""
        return self.keeps_whole

    def waits(self, local_only: bool, boundary: bool) -> bool:
        """Whether a backward leaves its gradients on this rank; ``boundary``: a step follows."""
        return local_only or (self.keeps_whole and not boundary)

    def accept(self, index: int, grad: torch.Tensor, keep_grad: bool) -> None:
        """Take ``grad`` in, which is ``param.grad``. ``keep_grad`` (whole gradients only): no reduction follows, and it
        stays visible."""
        # [1] To the buffer, where it stays visible, or where it cannot wait; [2] else it waits in its own memory, which
        # is freed (or sent from) when its bucket goes.
        if grad.layout is not torch.strided:
            grad = grad.to_dense()
        # It need not go through the buffer, which may hold some and may round; where nothing is sent, a large one had
        # better go while it is in cache.
        waits = not keep_grad and index not in self._filled and grad.numel() < self._too_large
        if waits and grad.dtype is not self.dtype:
            waits = torch.promote_types(grad.dtype, self.dtype) == self.dtype
        if self._views and not waits:
            view = self._views[index]
            if grad.data_ptr() != view.data_ptr() or grad.numel() == 0:
                # Where the view was in .grad, autograd has added already (out of place under create_graph).
                if index in self._filled and index not in self.shown:
                    view.add_(grad)
                else:
                    view.copy_(grad)
            self._filled.add(index)
            if keep_grad and view.dtype == self.partition.dtype and not self.policy.scales_loss:
                self.shown.views(self._views, (index,))
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

    def reopen(self) -> None:
        """A pass begins: a buffer that was reduced becomes one more local term."""
        # Own shard times size, zero elsewhere: so the next average gives reduced + average(new).
        self._changes()
        self.take_changes(lift=True)
        if not self._reduced:
            return
        self._reduced = False
        # Another rank may have had a gradient where this one had none.
        self._filled.update(range(len(self.partition.params)))
        size = self.partition.group.size
        if self.partition.sharded and size > 1:
            self.buffer[: self._own.start].zero_()
            self.buffer[self._own.stop :].zero_()
            self._shard.mul_(size)

    def most_in_flight(self, bucket: Bucket) -> int:
        """How many buckets of its size may be under way at once."""
        return most_in_flight(self._streams, bucket.numel * self.dtype.itemsize)

    def launch(self, bucket: Bucket, last: bool = False) -> Work:
        """Start the reduction of ``bucket``; when the work is done the shard holds (or has added) its average.

        ``last``: a step follows, so that the average goes to where it is read. Where there are streams the host waits
        for none of it, and the stream that computes only where it waits for the work.
        """
        begun = self._launch(bucket)
        if not self._streams.apart:
            return begun.work

        def send() -> None:
            if last and self._at_masters is not None:
                own = self.partition.values.room(bucket).own
                self._at_masters.send(bucket.tensors[0], own, self._shard)

        return Work("gradients", [Stored(self._streams, begun, send)])

    def _launch(self, bucket: Bucket) -> Begun:
        # The first of a window replaces what an earlier one left in the shard, those that follow add to it.
        pop = self._held.pop
        held = {index: grad for index in bucket.tensors if (grad := pop(index, None)) is not None}
        fresh = self.keeps_whole or bucket.tensors[0] not in self._written
        self._written.add(bucket.tensors[0])
        if self.partition.sharded and self._sends:
            if goes_in_one(self.partition.group):
                return self._launch_in_one(bucket, held, fresh)
            return self._launch_to_owners(bucket, held, fresh)
        self._fill(bucket, held, fresh)
        if self.partition.group.size == 1:
            return Begun(Work("gradients"), [])
        region = self.buffer[bucket.start : bucket.start + bucket.numel]
        wire = region.to(self.policy.reduce_dtype or region.dtype)
        work = all_reduce(wire, self.partition.group, op="avg", label="gradients", async_op=True)
        return Begun(work if wire is region else work.then(lambda: self._streams.copy(region, wire)), [wire])

    def _launch_to_owners(self, bucket: Bucket, held: dict[int, torch.Tensor], fresh: bool) -> Begun:
        dtype = self.policy.reduce_dtype or self.dtype  # also for a gradient alone: buckets must not show
        sources = {index: self._source(index, held) for index in bucket.tensors}
        cuts: list[tuple[int, torch.Tensor]] = []
        outputs: list[torch.Tensor] = []
        places: list[torch.Tensor] = []
        for span in self.partition.values.spans(bucket):
            wire = self._wire(span, bucket.start + span.start, held, sources, dtype)
            cuts.append((span.shard, wire))
            if span.shard != self.partition.values.shard:
                continue
            place = self._shard[span.offset : span.offset + span.numel]
            straight = fresh and not self._on_host and dtype == place.dtype
            # Never into the wire: another parameter's gradient, or a user, may share autograd's memory.
            outputs.append(place if straight else torch.empty_like(wire))
            places.append(place)
        group, channel, done = self.partition.group, self._channel, self.partition.offload.let_go
        work = reduce_to_owners(
            cuts, outputs, group, op="avg", label="gradients", async_op=True, channel=channel
        )
        return stored(self._streams, work, places, outputs, fresh, [wire for _, wire in cuts], done)

    def _launch_in_one(self, bucket: Bucket, held: dict[int, torch.Tensor], fresh: bool) -> Begun:
        """The bucket as one run of the flat that the ranks share: nothing here grows with their number."""
        dtype, values = self.policy.reduce_dtype or self.dtype, self.partition.values
        room = values.room(bucket)
        if self.keeps_whole and dtype == self.dtype:
            self._fill(bucket, held, fresh)
            wire = self.buffer[room.start : room.start + room.numel]
        else:
            found = [(index, self._source(index, held)) for index in bucket.tensors]
            sources = [(index, source) for index, source in found if source is not None]
            full = sum(source.numel() for _, source in sources) == room.numel
            make = torch.empty if full else torch.zeros  # holes: padding, and what has no gradient
            wire = make(room.numel, dtype=dtype, device=self.partition.device)
            values.fill(wire, sources, bucket)
        place = self._shard[room.own]
        # Of a whole buffer the part of the wire that this rank owns is the place itself.
        straight = fresh and not self._on_host and dtype == place.dtype
        reduced = place if straight else wire.new_empty(place.numel())
        run, group, channel = Run(wire, room.start, room.shard_numel), self.partition.group, self._channel
        work = reduce_run(run, reduced, group, op="avg", label="gradients", async_op=True, channel=channel)
        done = self.partition.offload.let_go
        return stored(self._streams, work, [place], [reduced], fresh, [wire], done)

    # Stage 3 has gathers under way: reductions need no order among them.
    @property
    def _channel(self) -> int:
        return REDUCE if self.policy.shards_parameters else 0

    def _wire(
        self,
        span: Span,
        start: int,
        held: Collection[int],
        sources: Mapping[int, torch.Tensor | None],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The span's elements (they begin at ``start`` of the buffer) as they are sent; a view where that does."""
        first = span.pieces[0] if len(span.pieces) == 1 and span.pieces[0].numel == span.numel else None
        whole = None if first is None else sources[first.tensor]
        if first is not None and whole is not None and whole.dtype == dtype:
            return whole[first.start :][: span.numel]  # sent from where autograd put it
        if self.keeps_whole and not any(piece.tensor in held for piece in span.pieces):
            wire = self.buffer[start : start + span.numel]
            for piece in span.pieces:
                if sources[piece.tensor] is None:
                    wire[piece.offset - span.offset :][: piece.numel].zero_()
            return wire.to(dtype)
        # Zeros where nothing came, and at stage 3 where each parameter has its own padding.
        wire, parts, at = torch.empty(span.numel, dtype=dtype, device=self.partition.device), [], span.offset
        for piece in span.pieces:
            source = sources[piece.tensor]
            if piece.offset != at:
                parts.append(wire.new_full((piece.offset - at,), self.nothing))
            if source is None:
                parts.append(wire.new_full((piece.numel,), self.nothing))
            else:
                part = (
                    source[piece.start : piece.start + piece.numel]
                    if piece.numel != source.numel()
                    else source
                )
                parts.append(part)
            at = piece.offset + piece.numel
        if at != span.offset + span.numel:
            parts.append(wire.new_full((span.offset + span.numel - at,), self.nothing))
        return torch.cat(parts, out=wire)

    def _source(self, index: int, held: dict[int, torch.Tensor]) -> torch.Tensor | None:
        """Parameter ``index``'s gradient, 1D; None where there is none."""
        if index in held:
            return held[index].reshape(-1)
        return self._views[index].view(-1) if self.keeps_whole and index in self._filled else None

    def _fill(self, bucket: Bucket, held: dict[int, torch.Tensor], fresh: bool) -> None:
        # Whole gradients, or those of a group of one. Where none came there is an earlier window's.
        if fresh and len(held) < len(bucket.tensors):
            for index in bucket.tensors:
                if index not in held and index not in self._filled:
                    self._places[index].zero_()
        if held:
            if self._views:
                self._filled.update(held)
            store = torch._foreach_copy_ if fresh else torch._foreach_add_
            store([self._places[index] for index in held], list(held.values()))

    def take_changes(self, lift: bool = False) -> None:
        """Let what users did to ``.grad`` since the last backward be done to the gradients that are held."""
        for index, change, found in self.shown.changes(lift):
            self._changes()
            # Where the buffer is whole, other ranks' parts of a reduced one have no meaning.
            place = self._views[index] if self._views else self.partition.local(self.shard, index)
            if found is not None:
                place.copy_(found.detach())
                self.shown.views({index: place}, (index,))
                continue
            place.zero_()
            self.partition.offload.let_go(place)
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
        self.shown.views(self._views, self.seen)

    def average_over(self, replicas: Group) -> None:
        """Average the shard over ``replicas``, which hold the same."""
        # Averaged terms and new ones may be mixed: the former are alike on all of them.
        if replicas.size == 1:
            return
        paged = self.policy.optimizer_place is Place.FILE
        self._changes()
        shard, dtype = self.shard, self.policy.reduce_dtype or self.dtype
        for part in shard.split(self.policy.sub_group_numel if paged else max(shard.numel(), 1)):
            wire = part
            if self._on_host or dtype != part.dtype:
                wire = torch.empty(part.numel(), dtype=dtype, device=self.partition.device)
                self._streams.copy(wire, part)
            all_reduce(wire, replicas, op="avg", label="gradients of replicas")
            if wire is not part:
                self._streams.copy(part, wire)
            self.partition.offload.let_go(part)

    def _changes(self) -> None:
        if self._at_masters is not None:
            self._at_masters.stale()

    def settle(self) -> None:
        """A pass that reduces is over: a whole buffer holds averages."""
        self._reduced = self.keeps_whole

    def clear(self) -> None:
        """Start a new window."""
        self.shown.clear()
        self.seen.clear()
        self._filled.clear()
        self._held.clear()
        self._written.clear()
        self._changes()
        self._reduced = False
        if self._on_host:  # sums of the window before that still wait for the host
            self._streams.host_turn()
