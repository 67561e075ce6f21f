"""What torch.distributed does itself: NCCL's collectives, objects and barriers on any backend, and a group of one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from zeropipe.comm.group import Group
from zeropipe.comm.record import Call, Cut, Work

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
# torch 2.13 renames these two and deprecates the old names, which are all that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Transport(Protocol):
    """What carries collectives whose arguments were checked; each may be left to complete later.

    The arguments are those of the functions in ``collectives.py``, which choose the transport.
    """

    def all_reduce(self, call: Call, tensor: torch.Tensor) -> Work: ...
    def reduce_scatter(self, call: Call, output: torch.Tensor, input: torch.Tensor) -> Work: ...
    def reduce_to_owners(self, call: Call, cuts: Sequence[Cut], outputs: Sequence[torch.Tensor]) -> Work: ...
    def all_gather(self, call: Call, output: torch.Tensor, shard: torch.Tensor) -> Work: ...
    def gather_from_owners(self, call: Call, cuts: Sequence[Cut]) -> Work: ...
    def all_to_all(self, call: Call, output: torch.Tensor, input: torch.Tensor) -> Work: ...


def put(output: torch.Tensor, value: torch.Tensor) -> None:
    """``value`` into ``output``, which may be the same memory."""
    if output.data_ptr() != value.data_ptr():
        output.copy_(value)


class Alone:
    """A group of one: every collective is the identity."""

    def all_reduce(self, call: Call, tensor: torch.Tensor) -> Work:
        return Work(call)

    def reduce_scatter(self, call: Call, output: torch.Tensor, input: torch.Tensor) -> Work:
        put(output, input)
        return Work(call)

    def reduce_to_owners(self, call: Call, cuts: Sequence[Cut], outputs: Sequence[torch.Tensor]) -> Work:
        for (_, view), output in zip(cuts, outputs, strict=True):
            put(output, view)
        return Work(call)

    def all_gather(self, call: Call, output: torch.Tensor, shard: torch.Tensor) -> Work:
        put(output, shard)
        return Work(call)

    def gather_from_owners(self, call: Call, cuts: Sequence[Cut]) -> Work:
        return Work(call)

    def all_to_all(self, call: Call, output: torch.Tensor, input: torch.Tensor) -> Work:
        output.copy_(input)
        return Work(call)


class Native:
    """The backend's own algorithms."""

    def all_reduce(self, call: Call, tensor: torch.Tensor) -> Work:
        return Work(call, [dist.all_reduce(tensor, _OPS[call.reduction], call.group.pg, async_op=True)])

    def reduce_scatter(self, call: Call, output: torch.Tensor, input: torch.Tensor) -> Work:
        handle = _reduce_scatter(output, input, _OPS[call.reduction], call.group.pg, async_op=True)
        return Work(call, [handle])

    def reduce_to_owners(self, call: Call, cuts: Sequence[Cut], outputs: Sequence[torch.Tensor]) -> Work:
        group, places, handles = call.group, iter(outputs), list[Any]()
        for owner, view in cuts:
            place = view
            if owner == group.rank:
                # The native reduction writes on the owner's side: into the output, not into the cut.
                place = next(places)
                put(place, view)
            op = _OPS[call.reduction]
            handles.append(dist.reduce(place, group.ranks[owner], op, group.pg, async_op=True))
        return Work(call, handles)

    def all_gather(self, call: Call, output: torch.Tensor, shard: torch.Tensor) -> Work:
        if call.group.hops is not None and output.numel():
            return self._two_hops(call, output, shard)
        return Work(call, [_all_gather(output, shard, call.group.pg, async_op=True)])

    def gather_from_owners(self, call: Call, cuts: Sequence[Cut]) -> Work:
        ranks, pg = call.group.ranks, call.group.pg
        return Work(call, [dist.broadcast(view, ranks[owner], pg, async_op=True) for owner, view in cuts])

    def all_to_all(self, call: Call, output: torch.Tensor, input: torch.Tensor) -> Work:
        return Work(call, [dist.all_to_all_single(output, input, group=call.group.pg, async_op=True)])

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
        on_gpu = output.device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(output.device)) if on_gpu else nullcontext():
            first.wait()
            enter_hop(call, hops.node, output)
            runs = zip(output.tensor_split(nodes), received, strict=True)
            handles = [_all_gather(run, part, hops.node.pg, async_op=True) for run, part in runs]

        def keep(received: torch.Tensor = received) -> None:
            """The device reads ``received`` until the second hop is over."""

        return Work(call, handles, keep)


def enter_hop(call: Call, group: Group, output: torch.Tensor) -> None:
    """Tell who listens of one hop: its group, and the bytes that each of its members then has."""
    assert call.group.hops is not None
    node = call.group.hops.node
    replace(call, group=group).enter(output.nbytes if group is node else output.nbytes // node.size)


# What no other transport carries.


def broadcast(call: Call, tensor: torch.Tensor, src: int) -> Work:
    # The same memory as bytes: gloo's native collectives lack some dtypes, a copy needs none.
    flat = tensor.view(-1).view(torch.uint8)
    return Work(call, [dist.broadcast(flat, call.group.ranks[src], call.group.pg, async_op=True)])


def barrier(group: Group, *, label: str = "") -> None:
    """Return when every member has called it."""
    Call("barrier", group, label).enter()
    if group.size > 1:
        dist.barrier(group.pg)


def all_gather_object(obj: Any, group: Group, *, label: str = "") -> list[Any]:
    """Every member's (small, picklable) object, in group order."""
    Call("all_gather_object", group, label).enter()
    if group.size == 1:
        return [obj]
    found: list[Any] = [None] * group.size
    dist.all_gather_object(found, obj, group.pg)
    return found


def broadcast_object(obj: Any, src: int, group: Group, *, label: str = "") -> Any:
    """Member ``src``'s (small, picklable) object on every member."""
    Call("broadcast_object", group, label).enter()
    box = [obj]
    if group.size > 1:
        dist.broadcast_object_list(box, group.ranks[src], group.pg)
    return box[0]
