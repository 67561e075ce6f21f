"""What torch.distributed does itself: NCCL's collectives, objects and barriers on any backend, and a group of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from zeropipe.comm.group import Group
from zeropipe.comm.record import SEAM, Call, Cut, Cuts, Run, Work, did_not_complete
from zeropipe.comm.witness import WITNESS
from zeropipe.given import Anything
from zeropipe.streams import STREAMS, Side

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
_FEW = 8  # owners of a bucket to which it goes part by part
# torch 2.13 renames these two and deprecates the old names, which are all that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Transport(Protocol):
    """What carries collectives whose arguments were checked; each may be left to complete later.

    The arguments are those of the functions in ``collectives.py``, which choose the transport.
    """

    @property
    def in_one(self) -> bool:
        """Whether it had better be asked once for a bucket or a unit than once for each tensor; its channels then
        need process groups of their own."""

    def all_reduce(self, call: Call, tensor: torch.Tensor) -> Work: ...
    def reduce_scatter(self, call: Call, output: torch.Tensor, input: torch.Tensor) -> Work: ...
    def reduce_to_owners(self, call: Call, cuts: Sequence[Cut], outputs: Sequence[torch.Tensor]) -> Work: ...
    def reduce_run(self, call: Call, run: Run, output: torch.Tensor) -> Work: ...
    def collect(
        self, call: Call, cuts: Sequence[Cuts], outputs: Sequence[torch.Tensor], rows: Sequence[int]
    ) -> Work: ...
    def all_gather(self, call: Call, output: torch.Tensor, shard: torch.Tensor) -> Work: ...
    def all_gather_many(
        self, call: Call, outputs: Sequence[torch.Tensor], shards: Sequence[torch.Tensor]
    ) -> Work: ...
    def gather_from_owners(self, call: Call, cuts: Sequence[Cut]) -> Work: ...
    def all_to_all(self, call: Call, output: torch.Tensor, input: torch.Tensor) -> Work: ...


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory: what only travels needs no dtype that the backend knows."""
    return tensor.view(-1).view(torch.uint8)


def put(output: torch.Tensor, value: torch.Tensor) -> None:
    """``value`` into ``output``, which may be the same memory."""
    if output is not value and output.data_ptr() != value.data_ptr():
        output.copy_(value)


class Alone:
    """A group of one: every collective is the identity."""

    in_one = False

    def all_reduce(self, call: Call, tensor: torch.Tensor) -> Work:
        return Work(call)

    def reduce_scatter(self, call: Call, output: torch.Tensor, input: torch.Tensor) -> Work:
        put(output, input)
        return Work(call)

    def reduce_to_owners(self, call: Call, cuts: Sequence[Cut], outputs: Sequence[torch.Tensor]) -> Work:
        for (_, view), output in zip(cuts, outputs, strict=True):
            put(output, view)
        return Work(call)

    def reduce_run(self, call: Call, run: Run, output: torch.Tensor) -> Work:
        put(output, run.whole)
        return Work(call)

    def collect(
        self, call: Call, cuts: Sequence[Cuts], outputs: Sequence[torch.Tensor], rows: Sequence[int]
    ) -> Work:
        for (_, views), output in zip(cuts, outputs, strict=True):
            for view, row in zip(views, output, strict=True):
                put(row, view)
        return Work(call)

    def all_gather(self, call: Call, output: torch.Tensor, shard: torch.Tensor) -> Work:
        put(output, shard)
        return Work(call)

    def all_gather_many(
        self, call: Call, outputs: Sequence[torch.Tensor], shards: Sequence[torch.Tensor]
    ) -> Work:
        for output, shard in zip(outputs, shards, strict=True):
            put(output, shard)
        return Work(call)

    def gather_from_owners(self, call: Call, cuts: Sequence[Cut]) -> Work:
        return Work(call)

    def all_to_all(self, call: Call, output: torch.Tensor, input: torch.Tensor) -> Work:
        output.copy_(input)
        return Work(call)


def _begun(call: Call, handles: list[Any], finish: Callable[[], None] | None = None) -> Work:
    if not call.group.has_tags:  # gloo has no watchdog: who waits for it hears of a timeout
        WITNESS.note(call, tuple(handles))
    return Work(call, handles, finish)


class Native:
    """The backend's own algorithms. Each is one call of torch's, or a number of them that no number of ranks raises."""

    # NCCL has one rule for many ranks: on one communicator all issue the same, in the same order. So each channel is a
    # communicator, and what ranks may interleave as they like is on different ones. A rank that runs a module which
    # another skips has its reductions at other places among the gathers, and both go on:
    #
    #     rank 0      gather a   reduce 2   gather b              reduce 1     GATHER: a b    REDUCE: 2 1
    #     rank 1      gather a              gather b   reduce 2   reduce 1     GATHER: a b    REDUCE: 2 1
    #
    # Channel 0 has everything else, in the order of the program: norms, broadcasts, what is told at the end of a step.
    in_one = True

    def all_reduce(self, call: Call, tensor: torch.Tensor) -> Work:
        return _begun(call, [dist.all_reduce(tensor, _OPS[call.reduction], call.pg, async_op=True)])

    def reduce_scatter(self, call: Call, output: torch.Tensor, input: torch.Tensor) -> Work:
        return _begun(call, [_reduce_scatter(output, input, _OPS[call.reduction], call.pg, async_op=True)])

    def reduce_to_owners(self, call: Call, cuts: Sequence[Cut], outputs: Sequence[torch.Tensor]) -> Work:
        group, places, handles = call.group, iter(outputs), list[Any]()
        # A call for each cut: this is for few, ``reduce_run`` for what all ranks share.
        for owner, view in cuts:
            place = view
            if owner == group.rank:
                # The native reduction writes on the owner's side: into the output, not into the cut.
                place = next(places)
                put(place, view)
            op = _OPS[call.reduction]
            handles.append(dist.reduce(place, group.ranks[owner], op, call.pg, async_op=True))
        return _begun(call, handles)

    def reduce_run(self, call: Call, run: Run, output: torch.Tensor) -> Work:
        size, rank = call.group.size, call.group.rank
        if run.start == 0 and run.whole.numel() == size * run.shard_numel:
            return self.reduce_scatter(call, output, run.whole)
        # Of a flat that all ranks share a bucket is a few shards. One call must give every rank as much as every other,
        # so it would send up to ``size`` times the bucket; each owner's part by itself is the bucket once.
        owners = run.owners
        if len(owners) <= _FEW:
            cuts = [(owner, run.part(owner)) for owner in owners]
            return self.reduce_to_owners(call, cuts, [output] if rank in owners else [])
        # All to all is the bucket twice, whatever the number of ranks.
        work = self.all_reduce(call, run.whole)
        return work.then(lambda: put(output, run.part(rank))) if rank in owners else work

    def collect(
        self, call: Call, cuts: Sequence[Cuts], outputs: Sequence[torch.Tensor], rows: Sequence[int]
    ) -> Work:
        # All to all in one call: what goes to a member lies together, and what comes from one.
        size, own = call.group.size, sum(output.shape[1] for output in outputs)
        sent = [[view for at, views in cuts if at == owner for view in views] for owner in range(size)]
        wire = torch.cat([view for views in sent for view in views])
        received = wire.new_empty(own * sum(rows))
        given = [sum(view.nbytes for view in views) for views in sent]
        taken = [own * count * wire.itemsize for count in rows]
        handle = dist.all_to_all_single(_bytes(received), _bytes(wire), taken, given, call.pg, async_op=True)

        def place(wire: torch.Tensor = wire) -> None:  # which the device may still read until here
            # By member, of each its cuts, of each its rows.
            places = [
                place for at in zip(*(o.split(list(rows)) for o in outputs), strict=True) for place in at
            ]
            for place, part in zip(places, received.split([p.numel() for p in places]), strict=True):
                place.copy_(part.view_as(place))

        return _begun(call, [handle], place)

    def all_gather(self, call: Call, output: torch.Tensor, shard: torch.Tensor) -> Work:
        if call.group.hops is not None and output.numel():
            return self._two_hops(call, output, shard)
        return _begun(call, [_all_gather(_bytes(output), _bytes(shard), call.pg, async_op=True)])

    def all_gather_many(
        self, call: Call, outputs: Sequence[torch.Tensor], shards: Sequence[torch.Tensor]
    ) -> Work:
        if call.group.hops is not None:
            # Each is two calls, the second of which needs the first: they cannot be one.
            works = [self.all_gather(call, *pair) for pair in zip(outputs, shards, strict=True)]
            return Work(call, works)
        # Each lands where it belongs, and the backend is asked once.
        pg, options = call.pg, AllgatherOptions()
        assert pg is not None
        options.asyncOp = True
        gather = getattr(pg, "all_gather_single_coalesced", None) or pg.allgather_into_tensor_coalesced
        # Tensors of its own: gloo takes views of them on a thread of its own, which races with whoever takes a view
        # of the same tensor here, and ended a process now and then (torch 2.13).
        mine, theirs = ([_bytes(one).data for one in some] for some in (shards, outputs))
        return _begun(call, [gather(theirs, mine, options)])

    def gather_from_owners(self, call: Call, cuts: Sequence[Cut]) -> Work:
        ranks, pg = call.group.ranks, call.pg
        return _begun(call, [dist.broadcast(view, ranks[owner], pg, async_op=True) for owner, view in cuts])

    def all_to_all(self, call: Call, output: torch.Tensor, input: torch.Tensor) -> Work:
        return _begun(call, [dist.all_to_all_single(output, input, group=call.pg, async_op=True)])

    def broadcast(self, call: Call, tensor: torch.Tensor, src: int) -> Work:
        return _begun(call, [dist.broadcast(_bytes(tensor), call.group.ranks[src], call.pg, async_op=True)])

    def exchange(self, call: Call, messages: Sequence[tuple[bool, torch.Tensor, int, int]]) -> Work:
        """Messages (whether it is sent, what, with which member, tag) in one call, which has no order among them."""
        ranks, pg = call.group.ranks, call.pg
        ops = [
            dist.P2POp(dist.isend if sends else dist.irecv, tensor, ranks[member], pg, tag)
            for sends, tensor, member, tag in messages
            if tensor.numel()  # else no message at all, on either side
        ]
        try:
            return _begun(call, dist.batch_isend_irecv(ops) if ops else [])
        except RuntimeError as error:
            raise did_not_complete(call, error) from error

    def _two_hops(self, call: Call, output: torch.Tensor, shard: torch.Tensor) -> Work:
        """One call across nodes, then one per node's run of shards."""
        hops = call.group.hops
        assert hops is not None
        nodes = len(hops.plan.nodes)
        # One call gathers end to end, but the shards of one place in all nodes do not lie so in the output.
        received = output.new_empty((nodes, shard.numel()))  # of this place, from every node
        enter_hop(call, hops.across, output)
        first = _all_gather(received.view(-1), shard, hops.across.pg, async_op=True)
        # The second hop waits for the first on the device, on a stream of its own: this thread goes on, and so does
        # what it has queued to compute.
        with STREAMS.of(output.device).beside(Side.HOP):
            first.wait()
            enter_hop(call, hops.node, output)
            runs = zip(output.tensor_split(nodes), received, strict=True)
            handles = [_all_gather(run, part, hops.node.pg, async_op=True) for run, part in runs]

        def keep(received: torch.Tensor = received) -> None:
            """The device reads ``received`` until the second hop is over."""

        return _begun(call, handles, keep)


def enter_hop(call: Call, group: Group, output: torch.Tensor) -> None:
    """Tell who listens of one hop: its group, and the bytes that each of its members then has."""
    assert call.group.hops is not None
    node = call.group.hops.node
    replace(call, group=group).enter(output.nbytes if group is node else output.nbytes // node.size)


# What no other transport carries.


def barrier(group: Group, *, label: str = "") -> None:
    """Return when every member has called it."""
    with _named(Call("barrier", group, label).enter()):
        if group.size > 1:
            dist.barrier(group.pg)


def all_gather_object(obj: Anything, group: Group, *, label: str = "") -> list[Any]:
    """Every member's (small, picklable) object, in group order."""
    call = Call("all_gather_object", group, label).enter()
    if group.size == 1 or group.imagined:
        return [obj] * group.size
    found: list[Any] = [None] * group.size
    with _named(call):
        dist.all_gather_object(found, obj, (group.speaking or group).pg)
    return found


def broadcast_object(obj: Anything, src: int, group: Group, *, label: str = "") -> Any:
    """Member ``src``'s (small, picklable) object on every member."""
    call, box = Call("broadcast_object", group, label).enter(), [obj]
    if group.size > 1 and not group.imagined:
        with _named(call):
            dist.broadcast_object_list(box, group.ranks[src], (group.speaking or group).pg)
    return box[0]


@contextmanager
def _named(call: Call) -> Iterator[None]:
    """Where the backend gives ``call`` up, as a peer is gone, that is what is raised."""
    try:
        with SEAM.waiting(call):
            yield
    except RuntimeError as error:
        raise did_not_complete(call, error) from error
