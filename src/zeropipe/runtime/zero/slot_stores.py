"""The two ways to sum gradients over slots (``slots.py``): nodes of the tree sent once, or slots sent in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from zeropipe.comm.collectives import Cuts, Work, collect_at_owners, gather_from_owners
from zeropipe.layout.buckets import Bucket, Span
from zeropipe.layout.slots import Fold, Node
from zeropipe.runtime.zero.hold.autograd import Change
from zeropipe.runtime.zero.hold.grads import GradStore
from zeropipe.runtime.zero.hold.partition import Partition
from zeropipe.runtime.zero.hold.policy import Policy
from zeropipe.runtime.zero.slots import Row, SlotStore, Term, Turn, runs


class OnceStore(SlotStore):
    """Keeps nodes of the tree, whole, and sends them when the window ends."""

    def __init__(self, partition: Partition, policy: Policy, turn: Turn) -> None:
        super().__init__(partition, policy, turn)
        self._folds: dict[tuple[int, int], Fold[Term]] = {}  # (lane, parameter)

    @property
    def held(self) -> Iterator[torch.Tensor]:
        for fold in self._folds.values():
            yield from (term.tensor for term in fold.values.values() if term is not None)

    def waits(self, local_only: bool, boundary: bool) -> bool:
        return local_only or not boundary

    def accept(self, index: int, grad: torch.Tensor, keep_grad: bool) -> None:
        leaf, turn, lane = self._leaf(index, grad), self._turn, self._turn.lane
        if leaf is None:
            return
        slot = turn.slot
        assert slot is not None, "there is a leaf"
        while (fold := self._folds.setdefault((lane, index), self._sums.fold())).has(slot):
            lane += 1  # a second gradient in one backward
        fold.put((slot, slot + 1), Term(leaf.reshape(-1), ours=False))
        turn.arrived(lane)

    def launch(self, bucket: Bucket, last: bool = False) -> Work:
        turn, group = self._turn, self.partition.group
        lanes = range(turn.reduced, turn.upto)
        fresh = bucket.tensors[0] not in self._written
        self._written.add(bucket.tensors[0])
        folds = [{index: self._folds.pop((lane, index), None) for index in bucket.tensors} for lane in lanes]
        if group.size == 1:
            for lane, own in enumerate(folds):
                for index, fold in own.items():
                    total = None if fold is None else fold.take(turn.tree.root)
                    self._sums.average(self.partition.local(self._shard, index), total, fresh and not lane)
            return Work("gradients")
        nodes = [turn.tree.cover(run[0], run[-1] + 1) for run in map(turn.sharing.run, range(group.size))]
        rows: list[Row] = []
        for own in folds:
            for node in nodes[group.rank]:
                taken = {index: None if fold is None else fold.take(node) for index, fold in own.items()}
                rows.append({index: None if term is None else term.tensor for index, term in taken.items()})
        counts = [len(some) * len(lanes) for some in nodes]
        if not self.partition.sharded:
            return self._to_all(bucket, rows, counts, nodes, fresh)
        spans = self.partition.values.spans(bucket)
        cuts, mine = self._wires(spans, bucket.start, rows), self._mine(spans, sum(counts))
        outputs, channel = [output for _, _, output in mine], self._channel
        work = collect_at_owners(
            cuts, outputs, counts, group, label="gradients", async_op=True, channel=channel
        )

        def average(cuts: list[Cuts] = cuts) -> None:  # what is sent is kept until here
            for _, place, output in mine:
                self._sums.average_rows(output, counts, nodes, place, fresh)

        return work.then(average)

    def _to_all(
        self,
        bucket: Bucket,
        rows: Sequence[Row],
        counts: Sequence[int],
        nodes: Sequence[Sequence[Node]],
        fresh: bool,
    ) -> Work:
        """Stage 0: each rank averages an equal part of the bucket, and gives it to all."""
        group, start, stop = self.partition.group, bucket.start, bucket.start + bucket.numel
        whole = Span(0, start, 0, bucket.numel, tuple(self.partition.segments[0].layout.cut(start, stop)))
        ((_, wires),) = self._wires([whole], start, rows)
        cuts = list(enumerate(zip(*(wire.tensor_split(group.size) for wire in wires), strict=True)))
        parts = list(enumerate(self.buffer[start:stop].tensor_split(group.size)))
        place = parts[group.rank][1]
        output = torch.empty((sum(counts), place.numel()), dtype=self.dtype, device=place.device)
        work = collect_at_owners(cuts, [output], counts, group, label="gradients", async_op=True)

        def spread() -> None:
            work.wait()
            self._sums.average_rows(output, counts, nodes, place, fresh)
            gather_from_owners(parts, group, label="gradients")

        return Work("gradients", finish=spread, sends_late=True)

    def take_changes(self, lift: bool = False) -> None:
        for index, change, _ in self.shown.changes(lift):
            for key in [key for key in self._folds if key[1] == index]:
                del self._folds[key]
            self.partition.local(self.shard, index).zero_()
            if change is Change.DROPPED:
                self.seen.discard(index)
                if lift:
                    self._turn.forgot()

    def clear(self) -> None:
        super().clear()
        self._folds.clear()
        self._turn.clear()


class InTurnStore(SlotStore):
    """Sends each pass's gradients to their owners, which add them to a short stack of nodes, in shard form."""

    def __init__(self, partition: Partition, policy: Policy, turn: Turn) -> None:
        super().__init__(partition, policy, turn)
        # By lane and first element in the shard: a sum of each run of elements.
        self._stacks: dict[tuple[int, int], list[Fold[Term]]] = {}

    @property
    def held(self) -> Iterator[torch.Tensor]:
        yield from self._held.values()
        for stack in self._stacks.values():
            yield from (term.tensor for fold in stack for term in fold.values.values() if term is not None)

    def waits(self, local_only: bool, boundary: bool) -> bool:
        return False

    def accept(self, index: int, grad: torch.Tensor, keep_grad: bool) -> None:
        leaf = self._leaf(index, grad)
        if leaf is not None:
            self._held[index] = leaf

    def launch(self, bucket: Bucket, last: bool = False) -> Work:
        turn, group = self._turn, self.partition.group
        held = {index: self._held.pop(index, None) for index in bucket.tensors}
        row = {index: None if grad is None else grad.reshape(-1) for index, grad in held.items()}
        spans = self.partition.values.spans(bucket)
        cuts, mine = self._wires(spans, bucket.start, [row]), self._mine(spans, group.size)
        outputs, each, channel = [output for _, _, output in mine], [1] * group.size, self._channel
        work = collect_at_owners(
            cuts, outputs, each, group, label="gradients", async_op=True, channel=channel
        )
        slots = [turn.sharing.slot(rank, turn.number) for rank in range(group.size)]
        lane = turn.lane

        def add(cuts: list[Cuts] = cuts) -> None:  # what is sent is kept until here
            for span, place, output in mine:
                self._push((lane, span.offset), place, output, [slot for slot in slots if slot is not None])

        return work.then(add)

    def _push(
        self, key: tuple[int, int], place: torch.Tensor, output: torch.Tensor, slots: Sequence[int]
    ) -> None:
        parts, root = runs(place), self._turn.tree.root
        stack = self._stacks.setdefault(key, [self._sums.fold() for _ in parts])
        for at, fold in zip(parts, stack, strict=True):
            for row, slot in zip(output, slots, strict=False):
                fold.put((slot, slot + 1), Term(row[at], ours=True))
            if slots[-1] + 1 == root[1]:
                self._sums.average(place[at], fold.take(root), key[1] not in self._written)
                continue
            # What stays is kept without the memory that it came in.
            came = output.untyped_storage().data_ptr()
            for node, term in fold.values.items():
                if term is not None and term.tensor.untyped_storage().data_ptr() == came:
                    fold.values[node] = Term(term.tensor.clone(), ours=True)
        if slots[-1] + 1 == root[1]:
            self._written.add(key[1])
            del self._stacks[key]

    def take_changes(self, lift: bool = False) -> None:
        for index, change, _ in self.shown.changes(lift):
            start, stop = self.partition.segments[index].start, self.partition.segments[index].stop
            for (_, at), stack in self._stacks.items():
                for fold in stack:
                    terms = [term.tensor for term in fold.values.values() if term is not None]
                    for tensor in terms:
                        tensor[max(start - at, 0) : max(stop - at, 0)].zero_()
                    at += terms[0].numel() if terms else 0
            self.partition.local(self.shard, index).zero_()
            if change is Change.DROPPED:
                self.seen.discard(index)
                if lift:
                    self._turn.forgot()

    def clear(self) -> None:
        super().clear()
        self._stacks.clear()
        self._turn.clear()


def store_of(partition: Partition, policy: Policy, turn: Turn | None) -> GradStore:
    """The store of the partition's gradients; ``turn``: where they are summed by slots."""
    if turn is None:
        return GradStore(partition, policy)
    return (InTurnStore if turn.sharing.in_turn else OnceStore)(partition, policy, turn)
