"""The only place where collectives are issued: arguments are checked, the call is recorded, and a transport carries it.

On gloo that is an exchange of messages (``point_to_point.py``), which inside a host are reads of each other's memory
(``host/``), on other backends their own algorithms (``native.py``). What passes on one must pass on the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from zeropipe.comm.group import Group
from zeropipe.comm.host.exposed import Exposed, expose, read_exposed
from zeropipe.comm.host.one_sided import ONE_SIDED
from zeropipe.comm.messages import start
from zeropipe.comm.native import Alone, Native, Transport, all_gather_object, barrier, broadcast_object
from zeropipe.comm.point_to_point import PointToPoint
from zeropipe.comm.record import Call, Cut, Cuts, Later, Run, Work
from zeropipe.errors import UsageError

__all__ = [
    "Cut",
    "Cuts",
    "Exposed",
    "Messages",
    "Run",
    "Work",
    "all_gather",
    "all_gather_many",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object",
    "carried_by",
    "collect_at_owners",
    "expose",
    "gather_from_owners",
    "goes_in_one",
    "read_exposed",
    "recv",
    "reduce_run",
    "reduce_scatter",
    "reduce_to_owners",
    "send",
]


class _Carriers:
    """Which transport carries what. A new one is chosen here, by group and device."""

    def __init__(self) -> None:
        self.native = Native()  # what others leave to it as well
        self._alone, self._by_messages = Alone(), PointToPoint()
        self.forced: Transport | None = None

    def carrier(self, tensor: torch.Tensor, group: Group) -> Transport:
        # Before the device is asked for: a group of one sends nothing, so no backend needs to carry it.
        if group.size == 1:
            return self._alone
        if self.forced is not None and group.pg is not None:
            return self.forced
        return self._by_messages if group.backend_for(tensor) == "gloo" else self.native

    def broadcasts(self, tensor: torch.Tensor, group: Group) -> Native | PointToPoint:
        """The backend's own spreads over many hosts; inside one everybody may read what the source has."""
        near = group.backend_for(tensor) == "gloo" and ONE_SIDED.within(group)
        return self._by_messages if near and tensor.nbytes >= ONE_SIDED.least else self.native

    def in_one(self, group: Group) -> bool:
        if group.size == 1:
            return False
        return not group.has_tags if self.forced is None else self.forced.in_one


_CARRIERS = _Carriers()


def carry_by(transport: Transport) -> None:
    """From now on have ``transport`` carry what a group that was started does."""
    _CARRIERS.forced = transport


@contextmanager
def carried_by(transport: Transport) -> Iterator[None]:
    """Have ``transport`` carry what a group that was started does inside the block: tests of what others than gloo
    go by."""
    before, _CARRIERS.forced = _CARRIERS.forced, transport
    try:
        yield
    finally:
        _CARRIERS.forced = before


def goes_in_one(group: Group) -> bool:
    """Whether a bucket, or a unit's parameters, had better be one call: on backends with their own algorithms, where a
    call costs more than a copy, and where channels need process groups of their own (``Leases.with_lanes``)."""
    return _CARRIERS.in_one(group)


def all_reduce(
    tensor: torch.Tensor, group: Group, *, op: str = "sum", label: str = "", async_op: bool = False
) -> Work:
    """Reduce ``tensor`` (any shape, contiguous) over the group, in place, to the same bits on every rank.

    ``op``: ``sum``, ``avg``, ``max`` or ``min``. Integer ``avg`` is refused.
    """
    call = Call("all_reduce", group, label, async_op, op).check(tensor).enter(tensor.nbytes)
    if tensor.numel() == 0:
        return Work(call)
    return _CARRIERS.carrier(tensor, call.group).all_reduce(call, tensor).under(call)


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
    call = Call("reduce_scatter", group, label, async_op, op).check(input).enter(input.nbytes)
    return _CARRIERS.carrier(input, call.group).reduce_scatter(call, output, input).under(call)


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
    # Of nothing there is no dtype to check and no device to choose by; the same on all ranks.
    if not cuts:
        return Work("reduce_to_owners of nothing")
    call = Call("reduce_to_owners", group, label, async_op, op, channel).check(cuts[0][1])
    call.enter(sum(view.nbytes for _, view in cuts))
    own = [view.numel() for owner, view in cuts if owner == group.rank]
    found = [output.numel() for output in outputs]
    if own != found:
        raise UsageError(f"{call}: the outputs must hold this rank's {own} elements, found {found}")
    return _CARRIERS.carrier(cuts[0][1], call.group).reduce_to_owners(call, cuts, outputs).under(call)


def reduce_run(
    run: Run,
    output: torch.Tensor,
    group: Group,
    *,
    op: str = "sum",
    label: str = "",
    async_op: bool = False,
    channel: int = 0,
) -> Work:
    """Reduce each part of ``run`` onto its owner: as ``reduce_to_owners``, of cuts that need no list.

    ``output``: where this rank's part goes, empty if it has none; the part itself, or memory of its own. The run
    holds anything afterwards.
    """
    call = Call("reduce_to_owners", group, label, async_op, op, channel).check(run.whole)
    call.enter(run.whole.nbytes)
    if not run.whole.numel():
        return Work(call)
    return _CARRIERS.carrier(run.whole, call.group).reduce_run(call, run, output).under(call)


def collect_at_owners(
    cuts: Sequence[Cuts],
    outputs: Sequence[torch.Tensor],
    rows: Sequence[int],
    group: Group,
    *,
    label: str = "",
    async_op: bool = False,
    channel: int = 0,
) -> Work:
    """Give the owner of each cut what all members have there, as it is: what ``reduce_to_owners`` would add up.

    ``cuts``: (owner, views), in the same order with the same sizes on every rank, all of one dtype; a member has as
    many views (1-D, contiguous; at least one) of each cut as ``rows`` says. ``outputs``: for each of this rank's
    own cuts all rows, [sum(rows), numel], member by member. Raises UsageError where they do not fit.
    """
    if not cuts:
        return Work("collect_at_owners of nothing")
    like = cuts[0][1][0]
    call = Call("collect_at_owners", group, label, async_op, channel=channel).check(like)
    call.enter(sum(view.nbytes for _, views in cuts for view in views))
    own = [(sum(rows), views[0].numel()) for owner, views in cuts if owner == group.rank]
    found = [tuple(output.shape) for output in outputs]
    if own != found or any(len(views) != rows[group.rank] for _, views in cuts):
        raise UsageError(f"{call}: the outputs must be of shapes {own}, found {found}")
    return _CARRIERS.carrier(like, call.group).collect(call, cuts, outputs, rows).under(call)


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
    gloo; NCCL has its own watchdog), and ``note``, of which ``Work.lowest_note`` is then the lowest. A group with
    ``hops`` gathers between nodes first, then inside each: two events, the same result.
    """
    _check_sizes("all_gather", output, shard, group)
    call = Call("all_gather", group, label, async_op, channel=channel, guarded=guarded, note=note).check(
        output
    )
    # In two hops each is an event of its own, with the bytes that it moves (``enter_hop``).
    if call.group.hops is None or not output.numel():
        call.enter(output.nbytes)
    return _CARRIERS.carrier(output, call.group).all_gather(call, output, shard).under(call)


def all_gather_many(
    outputs: Sequence[torch.Tensor],
    shards: Sequence[torch.Tensor],
    group: Group,
    *,
    label: str = "",
    async_op: bool = False,
    channel: int = 0,
) -> Work:
    """``all_gather`` of each shard into its output, as one call; unguarded."""
    size = group.size
    for output, shard in zip(outputs, shards, strict=True):
        if output is shard and size == 1:
            continue
        if output.numel() != shard.numel() * size or output.dtype != shard.dtype:
            _check_sizes("all_gather", output, shard, group)
    call = Call("all_gather", group, label, async_op, channel=channel).check(outputs[0])
    if call.group.hops is None:
        call.enter(sum([output.nbytes for output in outputs]))
    return _CARRIERS.carrier(outputs[0], call.group).all_gather_many(call, outputs, shards).under(call)


def gather_from_owners(cuts: Sequence[Cut], group: Group, *, label: str = "", async_op: bool = False) -> Work:
    """Give every rank each cut as its owner has it, in place: the counterpart of reduce_to_owners.

    ``cuts``: at most one (owner, 1-D contiguous view) per owner, with the same sizes on every rank, all of one dtype.
    """
    if not cuts:
        return Work("gather_from_owners of nothing")
    call = Call("gather_from_owners", group, label, async_op).check(cuts[0][1])
    call.enter(sum(view.nbytes for _, view in cuts))
    return _CARRIERS.carrier(cuts[0][1], call.group).gather_from_owners(call, cuts).under(call)


def broadcast(
    tensor: torch.Tensor, src: int, group: Group, *, label: str = "", async_op: bool = False
) -> Work:
    """Copy ``tensor`` of the group's member ``src`` (index in the group) to all members, in place."""
    call = Call("broadcast", group, label, async_op).check(tensor).enter(tensor.nbytes)
    if group.size == 1 or tensor.numel() == 0:
        return Work(call)
    carrier = _CARRIERS.broadcasts(tensor, call.group)
    return carrier.broadcast(call, tensor, src).under(call)


def all_to_all(
    output: torch.Tensor, input: torch.Tensor, group: Group, *, label: str = "", async_op: bool = False
) -> Work:
    """Send the j-th equal part of ``input`` to member j; ``output`` holds what each member sent here."""
    if output.numel() != input.numel() or input.numel() % group.size:
        raise UsageError(
            f"all_to_all needs equal numels, a multiple of the group's {group.size}; found input {input.numel()}, "
            f"output {output.numel()}"
        )
    call = Call("all_to_all", group, label, async_op).check(input).enter(input.nbytes)
    return _CARRIERS.carrier(input, call.group).all_to_all(call, output, input).under(call)


def send(
    tensor: torch.Tensor, dst: int, group: Group, *, tag: int = 0, label: str = "", async_op: bool = False
) -> Work:
    """Send ``tensor`` (contiguous) to member ``dst``; it must not change before the work is done."""
    call = Call("send", group, label, async_op).check(tensor).enter(tensor.nbytes)
    call.group.backend_for(tensor)
    return Work(call, start(call, [(dst, tensor)], (), call.group, tag)).under(call)


def recv(
    tensor: torch.Tensor, src: int, group: Group, *, tag: int = 0, label: str = "", async_op: bool = False
) -> Work:
    """Receive into ``tensor`` (contiguous) from member ``src``; shape and dtype must be the sender's."""
    call = Call("recv", group, label, async_op).check(tensor).enter(tensor.nbytes)
    call.group.backend_for(tensor)
    return Work(call, start(call, (), [(src, tensor)], call.group, tag)).under(call)


class Messages:
    """Messages between members that begin together: at once where tags tell them apart, else with ``begin``."""

    # On NCCL a message alone takes a communicator for its pair of ranks, and what comes after it there waits until the
    # other side has come as far: two ranks that both send first would wait for ever. What begins in one call has no
    # order but that of the messages from one rank to another.
    def __init__(self, group: Group, label: str) -> None:
        self._group, self._label = group, label
        self._later = Later()
        self._messages: list[tuple[bool, torch.Tensor, int, int]] = []

    def send(self, tensor: torch.Tensor, dst: int, tag: int) -> Work:
        return self._add(True, tensor, dst, tag)

    def recv(self, tensor: torch.Tensor, src: int, tag: int) -> Work:
        return self._add(False, tensor, src, tag)

    def _add(self, sends: bool, tensor: torch.Tensor, member: int, tag: int) -> Work:
        # With tags nothing is gained by waiting: the first piece travels while the next is made.
        if not goes_in_one(self._group.carrying(tensor)):
            begin = send if sends else recv
            return begin(tensor, member, self._group, tag=tag, label=self._label, async_op=True)
        call = Call("send" if sends else "recv", self._group, self._label, async_op=True).check(tensor)
        call.enter(tensor.nbytes).group.backend_for(tensor)
        self._messages.append((sends, tensor, member, tag))
        return Work(f"messages {self._label!r}", [self._later])

    def begin(self) -> None:
        """What was asked for is under way. Each member calls it, for all that it exchanges with the others by then."""
        call = Call("messages", self._group, self._label, async_op=True)
        self._later.begin(_CARRIERS.native.exchange(call, self._messages) if self._messages else Work(call))


def _check_sizes(op: str, full: torch.Tensor, part: torch.Tensor, group: Group) -> None:
    if full.numel() != part.numel() * group.size or full.dtype != part.dtype:
        raise UsageError(
            f"{op}: the full tensor must hold {group.size} x {part.numel()} elements of {part.dtype}; "
            f"found {full.numel()} of {full.dtype}"
        )
