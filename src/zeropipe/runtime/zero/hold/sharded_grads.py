"""The gradients of a stage-3 partition: reduced bucket by bucket into a shard that lies as the master does.

bucket of a, b    wire, row r:  | a's shard r | b's shard r |     reduced onto rank r
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from zeropipe.comm.collectives import Work, reduce_to_owners
from zeropipe.layout.buckets import Bucket, cut_buckets
from zeropipe.layout.flat import FlatShards, flat_shards
from zeropipe.runtime.zero.hold.grads import ALONE_NUMEL
from zeropipe.runtime.zero.hold.offload import HostCopies
from zeropipe.runtime.zero.hold.policy import Policy
from zeropipe.runtime.zero.hold.sharded_partition import ShardedPartition
from zeropipe.runtime.zero.hold.shown import Change, Shown

REDUCE = 2  # the channel of gradients: they need no order among gathers


class ShardedGradStore:
    """Holds ``shard`` (1D, as the master, in the accumulation's dtype). The interface is GradStore's."""

    keeps_whole = False
    reduced = False

    def __init__(self, partition: ShardedPartition, policy: Policy) -> None:
        self.partition = partition
        self.policy = policy
        self.dtype = policy.accumulate_dtype or partition.dtype
        self._offload = partition.owner.offload
        self._shard = self._offload.state(partition.local_layout.padded_numel, self.dtype, partition.device)
        self._copies = HostCopies(partition.device) if self._shard.device != partition.device else None
        self._whole: FlatShards = flat_shards(((s.name, tuple(s.shape), "") for s in partition.shards), 1)
        self.buckets = cut_buckets(self._whole, policy.bucket_numel)
        self.seen: set[int] = set()
        self.shown = Shown(partition.params, partition.names)
        self._held: dict[int, torch.Tensor] = {}  # whole gradients that wait for their bucket, 1D
        self._written: set[int] = set()  # buckets (by first parameter) that the window has written

    @property
    def shard(self) -> torch.Tensor:  # 1D, as the master
        """The average so far; waits for copies of it that are under way."""
        if self._copies is not None:
            self._copies.wait()
        return self._shard

    def replace(self, shard: torch.Tensor) -> None:
        """Let ``shard`` (the same elements, maybe elsewhere) take the place of the shard."""
        self._shard = shard

    def let_go(self, tensor: torch.Tensor) -> None:
        """A part of the shard was read and is not needed for a while."""
        self._offload.let_go(tensor)

    @property
    def held(self) -> Iterator[torch.Tensor]:
        """Whole gradients that wait for their bucket."""
        yield from self._held.values()

    def accept(self, index: int, keep_grad: bool) -> None:
        """Take ``param.grad`` in until its bucket is complete."""
        param = self.partition.params[index]
        grad = param.grad
        assert grad is not None
        if grad.layout != torch.strided:
            grad = grad.to_dense()
        held = self._held.get(index)
        flat = grad.detach().reshape(-1)
        self._held[index] = flat if held is None else held.to(self.dtype).add(flat)
        self.shown.hide(index)
        self.seen.add(index)

    def local(self, index: int) -> torch.Tensor | None:
        """What was taken of parameter ``index``'s gradient here, 1D, to be changed in place; None if nothing."""
        held = self._held.get(index)
        if held is not None:  # maybe autograd's memory, and of the parameter's dtype
            self._held[index] = held = held.to(self.dtype, copy=True)
        return held

    def reopen(self) -> None:
        """Each reduction adds to the shard."""
        self.take_changes(lift=True)

    def take_changes(self, lift: bool = False) -> None:
        """Let what users did to ``.grad`` since the last backward be done to the shard."""
        for index, change, _ in self.shown.changes(lift):
            place = self.partition.local(self.shard, index)
            place.zero_()
            self._offload.let_go(place)
            if change is Change.DROPPED:
                self.seen.discard(index)

    def show(self, reduced: bool) -> None:
        """No rank has a whole gradient: stand-ins say so."""
        self.shown.absent(self.seen, reduced)

    def launch(self, bucket: Bucket) -> Work:
        """Start the reduction of ``bucket``; when the work is done the shard holds (or has added) its average."""
        held = {index: self._held.pop(index) for index in bucket.tensors if index in self._held}
        first = bucket.tensors[0] not in self._written
        self._written.add(bucket.tensors[0])
        group, rank = self.partition.group, self.partition.shard
        dtype = self.policy.reduce_dtype or self.dtype
        cuts: list[tuple[int, torch.Tensor]] = []
        outputs: list[torch.Tensor] = []
        runs = list(self._runs(bucket))
        for run in runs:
            wire = self._wire(run, held, dtype)  # [ranks, elements of the run per rank]
            cuts += [(owner, wire[owner]) for owner in range(group.size)]
            straight = first and self._copies is None and len(run) == 1 and dtype == self.dtype
            # Never into the wire: another parameter's gradient, or a user, may share autograd's memory.
            outputs.append(self._place(run[0]) if straight else torch.empty_like(wire[rank]))
        work = reduce_to_owners(
            cuts, outputs, group, op="avg", label="gradients", async_op=True, channel=REDUCE
        )

        def store() -> None:
            for run, own in zip(runs, outputs, strict=True):
                at = 0
                for index in run:
                    place = self._place(index)
                    piece = own[at : at + place.numel()]
                    at += place.numel()
                    if self._copies is not None:
                        self._copies.store(place, piece, add=not first)
                    elif not first:
                        place.add_(piece)
                    elif piece.data_ptr() != place.data_ptr():
                        place.copy_(piece)
                    self._offload.let_go(place)

        return work.then(store)

    def _place(self, index: int) -> torch.Tensor:
        """Where parameter ``index``'s average goes: 1D, this rank's part."""
        return self._shard[slice(*self.partition.local_layout.tensor_range(index))]

    def _runs(self, bucket: Bucket) -> Iterator[list[int]]:
        """The bucket's parameters by message: a large one without padding is sent from where it lies."""
        together: list[int] = []
        on_gloo = self.partition.device.type == "cpu"
        for index in bucket.tensors:
            layout = self.partition.shards[index].layout
            if on_gloo and layout.padding == 0 and layout.shard_numel >= ALONE_NUMEL:
                yield [index]
            else:
                together.append(index)
        if together:
            yield together

    def _wire(self, run: list[int], held: dict[int, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The run laid out rank by rank; a lone gradient that needs no padding is sent as it is."""
        size = self.partition.group.size
        shards = self.partition.shards
        if len(run) == 1 and run[0] in held and shards[run[0]].layout.padding == 0:
            return held[run[0]].to(dtype).view(size, shards[run[0]].shard_numel)
        width = sum(shards[index].shard_numel for index in run)
        wire = torch.zeros((size, width), dtype=dtype, device=self.partition.device)
        at = 0
        for index in run:
            layout = shards[index].layout
            if index in held:
                for piece in layout.tensor_pieces(0):
                    row = wire[piece.shard, at + piece.offset : at + piece.offset + piece.numel]
                    row.copy_(held[index][piece.start : piece.start + piece.numel])
            at += layout.shard_numel
        return wire

    def clear(self) -> None:
        """Start a new window."""
        self.shown.clear()
        self.seen.clear()
        self._held.clear()
        self._written.clear()
