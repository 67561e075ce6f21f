"""The only place where collectives are issued: flat tensors in, the backend's fastest algorithm inside.

On gloo a point-to-point exchange with a local sum beats the native collectives several times over, and it
sums in rank order on whoever owns the elements. So every algorithm here gives the same bits on every rank,
for every cut of the tensor: all_reduce = reduce_scatter + all_gather = reduce_to_owners, bitwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from zeropipe.comm.exchange import (
    SECOND_HOP,
    Cut,
    Work,
    gather_exchange,
    greet,
    hand_on,
    one_hop,
    peers,
    receive_from,
    reduce_exchange,
    send_to,
    since_parting,
    then,
)
from zeropipe.comm.group import Group
from zeropipe.comm.record import SEAM
from zeropipe.comm.relay import two_hop_gather
from zeropipe.errors import UsageError

__all__ = [
    "Cut",
    "Work",
    "all_gather",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "announce",
    "barrier",
    "broadcast",
    "broadcast_object",
    "gather_from_owners",
    "greets",
    "hand_on",
    "meet",
    "recv",
    "reduce_scatter",
    "reduce_to_owners",
    "send",
]

_SMALL = 4096  # elements; below this one hop (everyone sends all to all) beats two
_NATIVE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
# torch 2.13 renames these two and deprecates the old names, which are all that 2.11 has.
_all_gather_native = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_native = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(
    tensor: torch.Tensor, group: Group, *, op: str = "sum", label: str = "", async_op: bool = False
) -> Work:
    """Reduce ``tensor`` (any shape, contiguous) over the group, in place, to the same bits on every rank.

    ``op``: ``sum``, ``avg``, ``max`` or ``min``. Integer ``avg`` is refused.
    """
    what = _enter("all_reduce", tensor, group, label, async_op, op)
    if group.size == 1 or tensor.numel() == 0:
        return Work(what)
    if not _point_to_point(tensor, group):
        handle = dist.all_reduce(tensor, _NATIVE_OPS[op], group.pg, async_op=True)
        return _settle(Work(what, [handle]), async_op)
    flat = tensor.view(-1)
    if flat.numel() <= _SMALL:
        return _settle(one_hop(flat, group, op, what), async_op)
    cuts = list(enumerate(flat.tensor_split(group.size)))
    reduced = reduce_exchange(cuts, [cuts[group.rank][1]], group, op, what)
    return _settle(then(reduced, lambda: gather_exchange(cuts, group, what, hop=SECOND_HOP), what), async_op)


def reduce_scatter(
    output: torch.Tensor,
    input: torch.Tensor,
    group: Group,
    *,
    op: str = "sum",
    label: str = "",
    async_op: bool = False,
) -> Work:
    """Reduce ``input`` (1-D, size * n) and leave this rank's n elements in ``output``.

    ``output`` may be this rank's own slice of ``input``.
    """
    _check_sizes("reduce_scatter", input, output, group)
    what = _enter("reduce_scatter", input, group, label, async_op, op)
    if group.size == 1:
        if output.data_ptr() != input.data_ptr():
            output.copy_(input)
        return Work(what)
    if not _point_to_point(input, group):
        handle = _reduce_scatter_native(output, input, _NATIVE_OPS[op], group.pg, async_op=True)
        return _settle(Work(what, [handle]), async_op)
    cuts = list(enumerate(input.view(-1).tensor_split(group.size)))
    return _settle(reduce_exchange(cuts, [output], group, op, what), async_op)


def reduce_to_owners(
    cuts: Sequence[Cut],
    outputs: Sequence[torch.Tensor],
    group: Group,
    *,
    op: str = "sum",
    label: str = "",
    async_op: bool = False,
    channel: int = 0,
) -> Work:
    """Reduce each cut onto its owner: the general form of reduce_scatter, for cuts of any sizes.

    ``cuts``: (owner, 1-D contiguous view), in the same order with the same sizes on every rank, all of one dtype; an
    owner may have several, and each travels from where it lies. ``outputs``: where this rank's own cuts go, in their
    order; each is the cut itself or shares no memory with it. Raises UsageError where they do not fit.
    """
    if not cuts:
        return Work("reduce_to_owners of nothing")
    nbytes = sum(view.numel() * view.element_size() for _, view in cuts)
    first = cuts[0][1]
    what = _enter("reduce_to_owners", first, group, label, async_op, op, nbytes)
    own = [view for owner, view in cuts if owner == group.rank]
    if [view.numel() for view in own] != [output.numel() for output in outputs]:
        raise UsageError(
            f"{what}: the outputs must hold this rank's {[view.numel() for view in own]} elements, "
            f"found {[output.numel() for output in outputs]}"
        )

    if group.size > 1 and _point_to_point(first, group):
        return _settle(reduce_exchange(cuts, outputs, group, op, what, channel), async_op)
    for view, output in zip(own, outputs, strict=True):
        if output.data_ptr() != view.data_ptr():
            output.copy_(view)
    if group.size == 1:
        return Work(what)
    # The native reduction writes on the owner's side: into the output, not into the cut.
    places = iter(outputs)
    handles = [
        dist.reduce(
            next(places) if owner == group.rank else view,
            group.ranks[owner],
            _NATIVE_OPS[op],
            group.pg,
            async_op=True,
        )
        for owner, view in cuts
    ]
    return _settle(Work(what, handles), async_op)


def all_gather(
    output: torch.Tensor,
    shard: torch.Tensor,
    group: Group,
    *,
    label: str = "",
    async_op: bool = False,
    channel: int = 0,
    guarded: bool = False,
    note: int = 0,
) -> Work:
    """Lay every rank's ``shard`` (1-D, n) end to end in ``output`` (1-D, size * n).

    ``shard`` may be this rank's own slice of ``output``: then nothing is copied. ``guarded``: members tell each
    other the label first, so that ranks which gather different things learn it instead of waiting for ever (on
    gloo; NCCL has its own watchdog), and ``note``, of which ``Work.heard`` is then the lowest. A group with ``hops``
    gathers between nodes first, then inside each: two events, the same result.
    """
    _check_sizes("all_gather", output, shard, group)
    if group.hops is not None and output.numel():
        what = _check("all_gather", output, group, label)
        native = None if _point_to_point(output, group) else _all_gather_native
        work = two_hop_gather(output, shard, group, what, label, async_op, channel, guarded, note, native)
        return _settle(work, async_op)
    what = _enter("all_gather", output, group, label, async_op)
    cuts = list(enumerate(output.view(-1).tensor_split(group.size)))
    own = cuts[group.rank][1]
    if group.size == 1 or _point_to_point(output, group):
        if own.data_ptr() != shard.data_ptr():
            own.copy_(shard)
        if group.size == 1:
            return Work(what)
        match = since_parting(label, group, channel) if guarded else ""
        work = gather_exchange(cuts, group, what, channel, label=match)
        if guarded:
            work.greeting = greet(label, group, channel, note)
        return _settle(work, async_op)
    handle = _all_gather_native(output, shard, group.pg, async_op=True)
    return _settle(Work(what, [handle]), async_op)


def gather_from_owners(cuts: Sequence[Cut], group: Group, *, label: str = "", async_op: bool = False) -> Work:
    """Give every rank each cut as its owner has it, in place: the counterpart of reduce_to_owners.

    ``cuts``: at most one (owner, 1-D contiguous view) per owner, with the same sizes on every rank, all of one dtype.
    """
    if not cuts:
        return Work("gather_from_owners of nothing")
    nbytes = sum(view.numel() * view.element_size() for _, view in cuts)
    what = _enter("gather_from_owners", cuts[0][1], group, label, async_op, nbytes=nbytes)
    if group.size == 1:
        return Work(what)
    if _point_to_point(cuts[0][1], group):
        return _settle(gather_exchange(cuts, group, what), async_op)
    handles = [dist.broadcast(view, group.ranks[owner], group.pg, async_op=True) for owner, view in cuts]
    return _settle(Work(what, handles), async_op)


def broadcast(
    tensor: torch.Tensor, src: int, group: Group, *, label: str = "", async_op: bool = False
) -> Work:
    """Copy ``tensor`` of the group's member ``src`` (index in the group) to all members, in place."""
    what = _enter("broadcast", tensor, group, label, async_op)
    if group.size == 1 or tensor.numel() == 0:
        return Work(what)
    handle = dist.broadcast(_bytes(tensor), group.ranks[src], group.pg, async_op=True)
    return _settle(Work(what, [handle]), async_op)


def all_to_all(
    output: torch.Tensor, input: torch.Tensor, group: Group, *, label: str = "", async_op: bool = False
) -> Work:
    """Send the j-th equal part of ``input`` to member j; ``output`` holds what each member sent here."""
    if output.numel() != input.numel() or input.numel() % group.size:
        raise UsageError(
            f"all_to_all needs equal numels, a multiple of the group's {group.size}; found input {input.numel()}, "
            f"output {output.numel()}"
        )
    what = _enter("all_to_all", input, group, label, async_op)
    sends = input.view(-1).tensor_split(group.size)
    receives = output.view(-1).tensor_split(group.size)
    if group.size == 1:
        output.copy_(input)
        return Work(what)
    if not _point_to_point(input, group):
        handle = dist.all_to_all_single(output, input, group=group.pg, async_op=True)
        return _settle(Work(what, [handle]), async_op)
    handles = [send_to(sends[j], j, group) for j in peers(group)]
    handles += [receive_from(receives[j], j, group) for j in peers(group)]
    receives[group.rank].copy_(sends[group.rank])
    return _settle(Work(what, [h for h in handles if h is not None]), async_op)


def send(
    tensor: torch.Tensor, dst: int, group: Group, *, tag: int = 0, label: str = "", async_op: bool = False
) -> Work:
    """Send ``tensor`` (contiguous) to member ``dst``; it must not change before the work is done."""
    what = _enter("send", tensor, group, label, async_op)
    handle = send_to(tensor, dst, group, tag)
    return _settle(Work(what, [] if handle is None else [handle]), async_op)


def recv(
    tensor: torch.Tensor, src: int, group: Group, *, tag: int = 0, label: str = "", async_op: bool = False
) -> Work:
    """Receive into ``tensor`` (contiguous) from member ``src``; shape and dtype must be the sender's."""
    what = _enter("recv", tensor, group, label, async_op)
    handle = receive_from(tensor, src, group, tag)
    return _settle(Work(what, [] if handle is None else [handle]), async_op)


def meet(
    what: str, group: Group, *, channel: int = 0, note: int = 0, patience: timedelta | None = None
) -> int:
    """Return when every member says the same ``what`` on this channel, where guarded gathers speak too.

    Returns the lowest of the members' notes. Raises DesyncError on every member when one is about to do something
    else, CommunicationError when one says nothing for as long as ``patience`` (None: the group's timeout). Without
    gloo it does nothing.
    """
    if group.size > 1 and greets(group):
        SEAM.pass_through("meet", group.size, 0, what, False)
        return _say(what, group, channel, note, patience)()
    return note


def greets(group: Group) -> bool:
    """Whether members can tell each other what they are about to do: it takes gloo, alone or beside NCCL."""
    return dict(group.backends).get("cpu") == "gloo"


def announce(what: str, group: Group, *, channel: int = 0) -> Callable[[], int]:
    """Say ``what`` to members that expect a meeting or a guarded gather, without waiting for them.

    The result waits until every member has said the same; it raises as ``meet``.
    """
    return _say(what, group, channel) if group.size > 1 and greets(group) else lambda: 0


def _say(
    what: str, group: Group, channel: int, note: int = 0, patience: timedelta | None = None
) -> Callable[[], int]:
    work = Work(f"[rank {group.ranks[group.rank]}] {what} (with ranks {list(group.ranks)})")
    work.greeting = greet(what, group, channel, note, patience)

    def heard() -> int:
        work.wait()
        assert work.heard is not None
        return work.heard

    return heard


def barrier(group: Group, *, label: str = "") -> None:
    """Return when every member has called it."""
    SEAM.pass_through("barrier", group.size, 0, label, False)
    if group.size > 1:
        dist.barrier(group.pg)


def all_gather_object(obj: Any, group: Group, *, label: str = "") -> list[Any]:
    """Every member's (small, picklable) object, in group order."""
    SEAM.pass_through("all_gather_object", group.size, 0, label, False)
    if group.size == 1:
        return [obj]
    found: list[Any] = [None] * group.size
    dist.all_gather_object(found, obj, group.pg)
    return found


def broadcast_object(obj: Any, src: int, group: Group, *, label: str = "") -> Any:
    """Member ``src``'s (small, picklable) object on every member."""
    SEAM.pass_through("broadcast_object", group.size, 0, label, False)
    if group.size == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, group.ranks[src], group.pg)
    return box[0]


def _enter(
    op: str,
    tensor: torch.Tensor,
    group: Group,
    label: str,
    async_op: bool,
    reduction: str | None = None,
    nbytes: int | None = None,
) -> str:
    if reduction is not None and reduction not in _NATIVE_OPS:
        raise UsageError(f"{op}: op is one of {', '.join(_NATIVE_OPS)}; found {reduction!r}")
    if reduction == "avg" and not tensor.dtype.is_floating_point:
        raise UsageError(
            f"{op}: an average of {tensor.dtype} tensors is not exact. Fix: use op='sum' and divide"
        )
    what = _check(op, tensor, group, label)
    size = tensor.numel() * tensor.element_size() if nbytes is None else nbytes
    SEAM.pass_through(op, group.size, size, label, async_op, group.ranks)
    return what


def _check(op: str, tensor: torch.Tensor, group: Group, label: str) -> str:
    """What an error calls the operation; raises UsageError where the tensor cannot travel."""
    if not tensor.is_contiguous():
        raise UsageError(f"{op}: the tensor must be contiguous; found strides {tensor.stride()}")
    return f"[rank {group.ranks[group.rank]}] {op} {label!r} among ranks {list(group.ranks)}"


def _check_sizes(op: str, full: torch.Tensor, part: torch.Tensor, group: Group) -> None:
    if full.numel() != part.numel() * group.size or full.dtype != part.dtype:
        raise UsageError(
            f"{op}: the full tensor must hold {group.size} x {part.numel()} elements of {part.dtype}; "
            f"found {full.numel()} of {full.dtype}"
        )


def _settle(work: Work, async_op: bool) -> Work:
    if not async_op:
        work.wait()
    return work


def _point_to_point(tensor: torch.Tensor, group: Group) -> bool:
    return group.backend_for(tensor) == "gloo"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes: gloo's native collectives lack some dtypes, a copy needs none."""
    return tensor.view(-1).view(torch.uint8)
