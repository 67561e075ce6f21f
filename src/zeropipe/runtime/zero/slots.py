"""Gradients as sums over slots: the same bits on any number of ranks, at every stage (the tree: ``layout/slots.py``).

    a gradient arrives     it is that of one slot, of its own mean loss; additions round in the accumulation's dtype

    once     stages 0, 1   a rank's slots are neighbours: it adds what the tree allows, and keeps whole nodes
             pipelines     when the window ends, the owner of an element gets the nodes of all and adds the rest
    in turn  stages 2, 3   in every pass the owner gets neighbouring slots, one from each rank, and adds what it can

    the root is there      divided by the slots, in one place, it is the average that a step uses

Several backwards in one micro-step are *lanes*: each is summed over the slots by itself, and the lanes one after the
other, so that it does not show which lane was reduced when. What a slot has no gradient of is absent: see ``Fold``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from zeropipe.comm.collectives import Cuts, all_reduce
from zeropipe.comm.group import Group
from zeropipe.errors import UsageError
from zeropipe.layout.buckets import Span
from zeropipe.layout.slots import Fold, Node, Sharing, Tree
from zeropipe.runtime.zero.hold.grads import GradStore
from zeropipe.runtime.zero.hold.partition import Partition
from zeropipe.runtime.zero.hold.policy import Policy
from zeropipe.streams import Inline


class Turn:
    """Whose gradients arrive now: one for all stores of an optimizer. ``micro_step``: the engine's clock."""

    def __init__(
        self, sharing: Sharing, group: Group, micro_step: Callable[[], int], device: torch.device
    ) -> None:
        self.sharing, self.tree = sharing, Tree(sharing.slots)
        self.group, self.device, self._micro_step = group, device, micro_step
        self._told: int | None = None  # a pipeline says which micro-batch runs backward
        self._at = -1  # the micro-step of the latest pass of the window
        self._over = self._lost = (
            False  # the window is whole; something of its slots was forgotten in its middle
        )
        self.clear()

    def clear(self) -> None:
        """A new window."""
        self.lane = 0  # of the pass in progress
        self.lanes = 0  # that have a gradient on this rank
        self.reduced = 0  # lanes that are
        self.upto = 0  # those that the pass in progress reduces
        self._agreed = False  # ranks know of each other's, and no backward ran since
        self._lost = (self._lost or self._at >= 0) and not self._over and self.number > 0
        self._at = -1
        self._whole = self._over = False

    @property
    def slot(self) -> int | None:
        """That of the gradients that arrive now; None: they count for nothing."""
        return self.sharing.slot(self.group.rank, self.number)

    @property
    def number(self) -> int:
        """The pass in the step, lanes not counted."""
        return self._micro_step() % self.sharing.passes if self._told is None else self._told

    @contextmanager
    def of(self, number: int) -> Iterator[None]:
        """Inside, gradients are those of this pass, in whatever order passes come."""
        before, self._told = self._told, number
        try:
            yield
        finally:
            self._told = before

    def ran_all(self) -> None:
        """Every pass of the window has run, whatever the clock says."""
        self._whole = True

    def mean(self, values: Mapping[int, torch.Tensor]) -> float:
        """Of one number for each slot, of which every rank has its own, along the tree; collective."""
        figures = torch.zeros(2, self.sharing.slots, dtype=torch.float64)  # whether there is one, and it
        for slot, value in values.items():
            figures[0, slot], figures[1, slot] = 1.0, float(value)
        if self.group.size > 1:
            figures = figures.to(self.device)
            all_reduce(figures, self.group, label="losses of slots")
        there, found = figures.cpu()
        fold = Fold(self.tree, torch.add)
        for slot in there.nonzero().view(-1).tolist():
            fold.put((slot, slot + 1), found[slot])
        total = fold.take(self.tree.root)
        return 0.0 if total is None else float(total) / float(there.sum())

    def arrived(self, lane: int) -> None:
        """A gradient of that lane."""
        self.lanes = max(self.lanes, lane + 1)

    def begin_pass(self) -> None:
        """A backward begins."""
        if self._told is None:
            self.lane = self.lane + 1 if self._at == self._micro_step() else 0
            self._at = self._micro_step()
            self._lost = self._lost and self.number > 0  # the step has begun anew
        self.upto = self.lane + 1
        self._agreed = False

    def forgot(self) -> None:
        """The program has set a gradient to None between two passes: those of the slots before are lost with it."""
        self._lost = self._lost or self.number > 0

    def end_pass(self) -> None:
        """One that reduces is over."""
        self.reduced = max(self.reduced, self.upto)

    def end_window(self, own: bool) -> bool:
        """The window is to be reduced; whether something of it is not yet. Collective where nodes are sent once.

        Raises UsageError in the middle of a step, and where each rank is to keep its ``own`` gradients.
        """
        if own:
            raise UsageError(
                "a compressed step exchanges what each rank has added up, so that results follow the number of ranks",
                rank=self.group.ranks[self.group.rank],
                expected="steps of the dense phase, with 'reproducible.slots'",
                fix="set the optimizer's freeze_step (var_freeze_step) past the end of the run, or go on without "
                "'reproducible'",
            )
        number, passes = self.number, self.sharing.passes
        if number + 1 < passes and not self._whole:
            raise UsageError(
                "the gradients of a step are asked for (or a step is taken) in its middle",
                rank=self.group.ranks[self.group.rank],
                expected=f"{passes} micro-steps, as 'reproducible.slots' {self.sharing.slots} has on {self.group.size} "
                "rank(s)",
                found=number + 1,
                fix="run all of them first (drop an epoch's last, incomplete step), or remove 'reproducible'",
            )
        if self._lost:
            raise UsageError(
                "gradients of a step's slots were forgotten in its middle, as by optimizer.zero_grad() or "
                "param.grad = None: how many are left follows the number of ranks",
                rank=self.group.ranks[self.group.rank],
                expected="gradients that are kept until engine.step() has ended the step",
                fix="call zero_grad() after engine.step(), or engine.zero_grad() to begin the step anew",
            )
        self._over = True
        if self.sharing.in_turn or self._agreed:
            return False
        self._agreed = True
        # Ranks need not have had as many backwards in each slot, and all must exchange as much.
        most = torch.tensor([max(self.lanes, 1)], device=self.device)
        if self.group.size > 1:
            all_reduce(most, self.group, op="max", label="backwards of a slot")
        self.upto = int(most)
        return self.upto > self.reduced


Row = Mapping[int, torch.Tensor | None]  # parameters' gradients, 1D; None: absent

_IN_CACHE = 2**16  # elements added up at a time on a CPU


@dataclass(slots=True)
class Term:
    """A gradient, or a sum of some. ``ours``: nobody else has the memory, so that the next is added in place."""

    tensor: torch.Tensor
    ours: bool


class Sums:
    """Adds terms of one store along the tree, and puts averages into its shard. ``dtype``: the accumulation's;
    ``done`` is told of what has changed in the shard, which may be in host memory (``on_host``)."""

    def __init__(
        self,
        turn: Turn,
        dtype: torch.dtype,
        streams: Inline,
        on_host: bool,
        done: Callable[[torch.Tensor], None],
    ) -> None:
        self._turn, self._dtype = turn, dtype
        self._streams, self._on_host, self._done = streams, on_host, done

    def fold(self) -> Fold[Term]:
        return Fold(self._turn.tree, self._add)

    def _add(self, left: Term, right: Term) -> Term:
        if not left.ours:
            left, right = right, left  # a + b is b + a, to the bit
        if left.ours:
            left.tensor.add_(right.tensor)
            return left
        if left.tensor.dtype == right.tensor.dtype == self._dtype:
            return Term(torch.add(left.tensor, right.tensor), True)
        return Term(left.tensor.to(self._dtype, copy=True).add_(right.tensor), True)

    def average(self, place: torch.Tensor, total: Term | None, fresh: bool) -> None:
        """The root of a lane into its place in the shard; not ``fresh``: beside other lanes."""
        if total is None:
            if fresh:
                place.zero_()
            return
        slots, tensor = self._turn.sharing.slots, total.tensor
        if fresh and not self._on_host and tensor.dtype == place.dtype:
            torch.div(tensor, slots, out=place)
            return
        average = tensor.to(self._dtype) / slots
        (self._streams.copy if fresh else self._streams.add)(place, average, self._done)

    def average_rows(
        self,
        rows: torch.Tensor,  # [rows of all members, numel]
        counts: Sequence[int],  # of each member
        nodes: Sequence[Sequence[Node]],  # that each member's rows are, lane after lane
        place: torch.Tensor,
        fresh: bool,
    ) -> None:
        """The average of what members have sent of a run of elements."""
        for at in runs(place):
            members = rows[:, at].split(list(counts))
            for lane in range(counts[0] // len(nodes[0])):
                fold = self.fold()
                for some, member in zip(nodes, members, strict=True):
                    for number, node in enumerate(some):
                        fold.put(node, Term(member[lane * len(some) + number], ours=True))
                self.average(place[at], fold.take(self._turn.tree.root), fresh and not lane)


def runs(place: torch.Tensor) -> list[slice]:
    """The elements (1D) that are added up at a time."""
    numel = place.numel()
    size = _IN_CACHE if place.device.type == "cpu" else max(numel, 1)
    return [slice(at, at + size) for at in range(0, numel, size)]


class SlotStore(GradStore):
    """What both ways have in common; ``turn`` says what a gradient is."""

    nothing = -0.0  # to which everything adds up to itself
    takes_all = True

    def __init__(self, partition: Partition, policy: Policy, turn: Turn) -> None:
        super().__init__(partition, policy)
        self._turn = turn
        self._sums = Sums(turn, self.dtype, self._streams, self._on_host, partition.offload.let_go)

    def _leaf(self, index: int, grad: torch.Tensor) -> torch.Tensor | None:
        """``grad`` as a term; None where this pass counts for nothing."""
        self.shown.hide(index)
        if self._turn.slot is None:
            return None
        self.seen.add(index)
        grad = grad.to_dense() if grad.layout is not torch.strided else grad
        grad = grad.detach() if grad.requires_grad else grad
        # Of a wider one no addition would round in the accumulation's dtype.
        narrows = torch.promote_types(grad.dtype, self.dtype) != self.dtype
        return grad.to(self.dtype) if narrows else grad

    def show(self, reduced: bool) -> None:
        # What is here is a sum that is not divided yet.
        self.shown.absent(self.seen)

    def settle(self) -> None:
        self._turn.end_pass()

    def reopen(self) -> None:
        self._changes()
        self.take_changes(lift=True)

    def _wires(self, spans: Iterable[Span], start: int, rows: Sequence[Row]) -> list[Cuts]:
        """Spans of the bucket that starts there, as they are sent: of each one view for each of the ``rows``."""
        return [
            (span.shard, [self._wire(span, start + span.start, row.keys(), row, self.dtype) for row in rows])
            for span in spans
        ]

    def _mine(self, spans: Iterable[Span], rows: int) -> list[tuple[Span, torch.Tensor, torch.Tensor]]:
        """Of these those of this rank, each with its place in the shard and memory for what it is sent."""
        own = [span for span in spans if span.shard == self.partition.values.shard]
        places = [self._shard[span.offset : span.offset + span.numel] for span in own]
        device = self.partition.device
        made = [torch.empty((rows, place.numel()), dtype=self.dtype, device=device) for place in places]
        return list(zip(own, places, made, strict=True))
