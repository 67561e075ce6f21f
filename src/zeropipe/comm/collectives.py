"""The only place where collectives are issued: flat tensors in, the backend's fastest algorithm inside.

On gloo a point-to-point exchange with a local sum beats the native collectives several times over, and it
sums in rank order on whoever owns the elements. So every algorithm here gives the same bits on every rank,
for every cut of the tensor: all_reduce = reduce_scatter + all_gather = reduce_to_owners, bitwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from zeropipe.comm.group import Group
from zeropipe.comm.record import SEAM
from zeropipe.errors import CommunicationError, UsageError

_TAG = 7919  # keeps our exchanges apart from a user's own send and recv on the same group
_SECOND_HOP = (
    _TAG + 1
)  # is sent when the first hop is waited for, so it must not queue behind later first hops
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

Cut = tuple[int, torch.Tensor]  # (owner: index in the group, view of the elements that it owns)


class Work:
    """A collective in flight. ``wait`` returns when its result may be read; it may be called again."""

    def __init__(
        self, what: str, handles: Sequence[Any] = (), finish: Callable[[], None] | None = None
    ) -> None:
        self._what = what
        self._handles = list(handles)
        self._finish = finish

    def wait(self) -> None:
        """Raises CommunicationError when a peer is gone or the group's timeout has passed."""
        try:
            while self._handles:
                self._handles[-1].wait()
                self._handles.pop()
        except RuntimeError as error:
            raise CommunicationError(
                f"{self._what} did not complete: {str(error).splitlines()[0]}. Fix: another rank has most likely "
                "failed first; read its traceback"
            ) from error
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()

    def done(self) -> bool:
        """Whether everything has arrived, so that ``wait`` has only local work left."""
        return all(handle.is_completed() for handle in self._handles)

    def then(self, finish: Callable[[], None]) -> Work:
        """This work, followed by ``finish`` when it is waited for."""
        before = self._finish

        def both() -> None:
            if before is not None:
                before()
            finish()

        self._finish = both
        return self


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
        return _settle(_one_hop(flat, group, op, what), async_op)
    cuts = list(enumerate(flat.tensor_split(group.size)))
    reduced = _reduce_exchange(cuts, cuts[group.rank][1], group, op, what)
    return _settle(_then(reduced, lambda: _gather_exchange(cuts, group, what, _SECOND_HOP), what), async_op)


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
    return _settle(_reduce_exchange(cuts, output, group, op, what), async_op)


def reduce_to_owners(
    cuts: Sequence[Cut],
    output: torch.Tensor | None,
    group: Group,
    *,
    op: str = "sum",
    label: str = "",
    async_op: bool = False,
) -> Work:
    """Reduce each cut onto its owner: the general form of reduce_scatter, for cuts of any sizes.

    ``cuts``: at most one (owner, 1-D contiguous view) per owner, with the same sizes on every rank, all of one
    dtype. ``output``: where this rank's own cut goes (None where it owns none); it may be that cut itself.
    """
    if not cuts:
        return Work("reduce_to_owners of nothing")
    nbytes = sum(view.numel() * view.element_size() for _, view in cuts)
    first = cuts[0][1]
    what = _enter("reduce_to_owners", first, group, label, async_op, op, nbytes)
    if group.size == 1:
        if output is not None and output.data_ptr() != first.data_ptr():
            output.copy_(first)
        return Work(what)
    if _point_to_point(first, group):
        return _settle(_reduce_exchange(cuts, output, group, op, what), async_op)
    handles = [
        dist.reduce(view, group.ranks[owner], _NATIVE_OPS[op], group.pg, async_op=True)
        for owner, view in cuts
    ]
    own = dict(cuts).get(group.rank)

    def keep() -> None:
        if output is not None and own is not None and output.data_ptr() != own.data_ptr():
            output.copy_(own)

    return _settle(Work(what, handles, keep), async_op)


def all_gather(
    output: torch.Tensor, shard: torch.Tensor, group: Group, *, label: str = "", async_op: bool = False
) -> Work:
    """Lay every rank's ``shard`` (1-D, n) end to end in ``output`` (1-D, size * n).

    ``shard`` may be this rank's own slice of ``output``: then nothing is copied.
    """
    _check_sizes("all_gather", output, shard, group)
    what = _enter("all_gather", output, group, label, async_op)
    cuts = list(enumerate(output.view(-1).tensor_split(group.size)))
    own = cuts[group.rank][1]
    if group.size == 1 or _point_to_point(output, group):
        if own.data_ptr() != shard.data_ptr():
            own.copy_(shard)
        if group.size == 1:
            return Work(what)
        return _settle(_gather_exchange(cuts, group, what), async_op)
    handle = _all_gather_native(output, shard, group.pg, async_op=True)
    return _settle(Work(what, [handle]), async_op)


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
    handles = [_send(sends[j], j, group) for j in _peers(group)]
    handles += [_receive(receives[j], j, group) for j in _peers(group)]
    receives[group.rank].copy_(sends[group.rank])
    return _settle(Work(what, [h for h in handles if h is not None]), async_op)


def send(
    tensor: torch.Tensor, dst: int, group: Group, *, tag: int = 0, label: str = "", async_op: bool = False
) -> Work:
    """Send ``tensor`` (contiguous) to member ``dst``; it must not change before the work is done."""
    what = _enter("send", tensor, group, label, async_op)
    handle = _send(tensor, dst, group, tag)
    return _settle(Work(what, [] if handle is None else [handle]), async_op)


def recv(
    tensor: torch.Tensor, src: int, group: Group, *, tag: int = 0, label: str = "", async_op: bool = False
) -> Work:
    """Receive into ``tensor`` (contiguous) from member ``src``; shape and dtype must be the sender's."""
    what = _enter("recv", tensor, group, label, async_op)
    handle = _receive(tensor, src, group, tag)
    return _settle(Work(what, [] if handle is None else [handle]), async_op)


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
    if not tensor.is_contiguous():
        raise UsageError(f"{op}: the tensor must be contiguous; found strides {tensor.stride()}")
    SEAM.pass_through(
        op, group.size, tensor.numel() * tensor.element_size() if nbytes is None else nbytes, label, async_op
    )
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


def _then(first: Work, start: Callable[[], Work], what: str) -> Work:
    """A work that, when waited for, waits for ``first``, starts the second and waits for that."""

    def finish() -> None:
        first.wait()
        start().wait()

    return Work(what, (), finish)


def _point_to_point(tensor: torch.Tensor, group: Group) -> bool:
    return group.backend_for(tensor) == "gloo"


def _peers(group: Group) -> list[int]:
    """The other members, starting after this one, so that no member is everybody's first."""
    return [(group.rank + step) % group.size for step in range(1, group.size)]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes: gloo's native collectives lack some dtypes, a copy needs none."""
    return tensor.view(-1).view(torch.uint8)


def _send(tensor: torch.Tensor, dst: int, group: Group, tag: int = _TAG) -> Any:
    return dist.isend(tensor, group.ranks[dst], group.pg, tag) if tensor.numel() else None


def _receive(tensor: torch.Tensor, src: int, group: Group, tag: int = _TAG) -> Any:
    return dist.irecv(tensor, group.ranks[src], group.pg, tag) if tensor.numel() else None


def _gather_exchange(cuts: Sequence[Cut], group: Group, what: str, tag: int = _TAG) -> Work:
    """Send the own cut to all, receive every other cut into its place."""
    own = dict(cuts).get(group.rank)
    handles = [_send(own, peer, group, tag) for peer in _peers(group)] if own is not None else []
    handles += [_receive(view, owner, group, tag) for owner, view in cuts if owner != group.rank]
    return Work(what, [h for h in handles if h is not None])


def _reduce_exchange(
    cuts: Sequence[Cut], output: torch.Tensor | None, group: Group, op: str, what: str
) -> Work:
    """Send each cut to its owner; the owner reduces what it received in rank order."""
    views = dict(cuts)
    handles = [_send(views[peer], peer, group) for peer in _peers(group) if peer in views]
    own = views.get(group.rank)
    if own is None or own.numel() == 0:
        return Work(what, [h for h in handles if h is not None])
    if output is None or output.numel() != own.numel():
        raise UsageError(f"{what}: the output must hold this rank's {own.numel()} elements")
    received = {peer: torch.empty_like(own) for peer in _peers(group)}
    handles += [_receive(buffer, peer, group) for peer, buffer in received.items()]
    received[group.rank] = own
    parts = [received[member] for member in range(group.size)]
    return Work(what, [h for h in handles if h is not None], lambda: _reduce_in_order(parts, output, op))


def _one_hop(flat: torch.Tensor, group: Group, op: str, what: str) -> Work:
    mine = flat.clone()
    received = {peer: torch.empty_like(flat) for peer in _peers(group)}
    handles = [_send(mine, peer, group) for peer in _peers(group)]
    handles += [_receive(buffer, peer, group) for peer, buffer in received.items()]
    received[group.rank] = mine
    parts = [received[member] for member in range(group.size)]
    return Work(what, [h for h in handles if h is not None], lambda: _reduce_in_order(parts, flat, op))


def _reduce_in_order(parts: Sequence[torch.Tensor], output: torch.Tensor, op: str) -> None:
    """Reduce ``parts`` in member order into ``output``, which may be one of them.

    16-bit sums run in fp32 and round once, so that neither the number of ranks nor the range of fp16 shows.
    """
    if op in ("max", "min"):
        reduce = torch.maximum if op == "max" else torch.minimum
        total = reduce(parts[0], parts[1])
        for part in parts[2:]:
            reduce(total, part, out=total)
        output.copy_(total)
        return
    wide = torch.float32 if output.dtype in (torch.float16, torch.bfloat16) else output.dtype
    if wide != output.dtype:
        total = parts[0].to(wide)
        for part in parts[1:]:
            total += part
    elif len(parts) == 2:
        total = torch.add(parts[0], parts[1], out=output)
    else:
        scratch = parts[0] if parts[0].data_ptr() != output.data_ptr() else None
        if all(part.data_ptr() != output.data_ptr() for part in parts[1:]):
            total = output if scratch is None else output.copy_(scratch)
        else:
            total = parts[0]  # a received buffer: ours to overwrite
        for part in parts[1:]:
            total += part
    if op == "avg":
        total /= len(parts)
    if total.data_ptr() != output.data_ptr():
        output.copy_(total)
