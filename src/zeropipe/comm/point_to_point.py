"""Collectives as messages between pairs of ranks: on gloo this beats the native algorithms several times over.

Everybody sends the others what they own or need, and the owner of an element sums it in rank order, so that the result
has the same bits on every rank and however the tensor was cut: all_reduce = reduce_scatter + all_gather =
reduce_to_owners, bitwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from zeropipe.comm.agreement import TALKS
from zeropipe.comm.group import Group
from zeropipe.comm.host.giving_up import give_up
from zeropipe.comm.host.one_sided import ONE_SIDED, Source
from zeropipe.comm.messages import (
    DATA,
    SECOND_HOP,
    neighbour,
    peers,
    start,
    tag_of,
    tag_of_label,
)
from zeropipe.comm.native import enter_hop, put
from zeropipe.comm.record import Call, Cut, Cuts, Run, Work
from zeropipe.errors import CommunicationError

_SMALL = 4096  # elements; below this one hop (everyone sends all to all) beats two
_IN_CACHE = 2**16  # elements summed at a time on CPU: what the next operation needs is still in cache


class PointToPoint:
    in_one = False  # a message more costs less than a copy of what it carries

    def all_reduce(self, call: Call, tensor: torch.Tensor) -> Work:
        group, flat = call.group, tensor.view(-1)
        if flat.numel() <= _SMALL:
            # The sum goes where others still read from, so what is sent is a copy.
            mine = flat.clone()
            return _reduce(call, [(peer, mine) for peer in peers(group)], [(mine, flat)])
        # Everybody reduces its part now, and sends it to all when the whole is waited for: a sum that has not arrived
        # cannot be sent, and to wait for it here would not be asynchronous.
        cuts = list(enumerate(flat.tensor_split(group.size)))
        reduced = self.reduce_to_owners(call, cuts, [cuts[group.rank][1]])

        def spread() -> None:
            reduced.wait()
            _gather(call, group, cuts, SECOND_HOP).wait()

        return Work(call, finish=spread, sends_late=True)

    def reduce_scatter(self, call: Call, output: torch.Tensor, input: torch.Tensor) -> Work:
        return self.reduce_to_owners(
            call, list(enumerate(input.view(-1).tensor_split(call.group.size))), [output]
        )

    def reduce_to_owners(self, call: Call, cuts: Sequence[Cut], outputs: Sequence[torch.Tensor]) -> Work:
        rank = call.group.rank
        own = [view for owner, view in cuts if owner == rank]
        return _reduce(call, [cut for cut in cuts if cut[0] != rank], zip(own, outputs, strict=True))

    def all_gather(self, call: Call, output: torch.Tensor, shard: torch.Tensor) -> Work:
        group = call.group
        cuts = list(enumerate(output.view(-1).tensor_split(group.size)))
        put(cuts[group.rank][1], shard)
        talk = TALKS.of(group, call.channel) if call.guarded else None
        label = "" if talk is None else talk.since_parting(call.label)
        relay = None
        if group.hops is not None and output.numel():
            relay = _Relay(call, output, label)
            work = Work(call, finish=relay.finish, sends_late=True)
        else:
            work = _gather(call, group, cuts, label=label)
        # After the shards, so that they are under way where the words have been found equal.
        return work if talk is None else work.after(talk.say(call.label, call.note, relay=relay))

    def reduce_run(self, call: Call, run: Run, output: torch.Tensor) -> Work:
        cuts = [(owner, run.part(owner)) for owner in run.owners]
        return self.reduce_to_owners(call, cuts, [output] if call.group.rank in run.owners else [])

    def collect(
        self, call: Call, cuts: Sequence[Cuts], outputs: Sequence[torch.Tensor], rows: Sequence[int]
    ) -> Work:
        group, tag, own = call.group, tag_of(call.channel), iter(outputs)
        sends = [(owner, view) for owner, views in cuts if owner != group.rank for view in views]
        receives: list[Cut] = []
        for owner, views in cuts:
            if owner != group.rank:
                continue
            places = next(own).split(list(rows))  # by member
            for row, view in zip(places[group.rank], views, strict=True):
                put(row, view)
            receives += [(peer, row) for peer in peers(group) for row in places[peer]]
        return Work(call, start(call, sends, receives, group, tag, soon=bool(call.channel)))

    def all_gather_many(
        self, call: Call, outputs: Sequence[torch.Tensor], shards: Sequence[torch.Tensor]
    ) -> Work:
        return Work(call, [self.all_gather(call, *pair) for pair in zip(outputs, shards, strict=True)])

    def gather_from_owners(self, call: Call, cuts: Sequence[Cut]) -> Work:
        return _gather(call, call.group, cuts)

    def all_to_all(self, call: Call, output: torch.Tensor, input: torch.Tensor) -> Work:
        group = call.group
        sends, receives = (whole.view(-1).tensor_split(group.size) for whole in (input, output))
        others = peers(group)
        work = Work(
            call, start(call, [(p, sends[p]) for p in others], [(p, receives[p]) for p in others], group)
        )
        receives[group.rank].copy_(sends[group.rank])
        return work

    def broadcast(self, call: Call, tensor: torch.Tensor, src: int) -> Work:
        group, mine = call.group, call.group.rank == src
        sends = [(peer, tensor) for peer in peers(group)] if mine else []
        return Work(call, start(call, sends, [] if mine else [(src, tensor)], group))


def _gather(call: Call, group: Group, cuts: Sequence[Cut], purpose: int = DATA, label: str = "") -> Work:
    """Send the own cuts to all, receive every other cut into its place; with ``label``, only from who has the same."""
    tag = tag_of(call.channel, purpose)
    if label:
        tag = tag_of_label(label, sum(view.numel() for _, view in cuts))
    own = [view for owner, view in cuts if owner == group.rank]
    sends = [(peer, view) for peer in peers(group) for view in own]
    receives = [cut for cut in cuts if cut[0] != group.rank]
    return Work(call, start(call, sends, receives, group, tag, soon=bool(call.channel)))


def _reduce(call: Call, sent: Sequence[Cut], own: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Work:
    """Send to each owner; of ``own`` (this rank's values, where the result goes) reduce what everybody sends, in rank
    order."""
    group, tag = call.group, tag_of(call.channel)
    sums: list[tuple[list[torch.Tensor], torch.Tensor]] = []
    receives: list[Cut] = []
    handles: list[Any] = []
    for view, output in own:
        handle = _add_where_they_lie(call, view, output, tag)
        if handle is not None:
            handles.append(handle)
            continue
        # Of two members the other's values may arrive where the sum goes.
        straight = group.size == 2 and output.data_ptr() != view.data_ptr() and output.dtype == view.dtype
        parts = {peer: output if straight else torch.empty_like(view) for peer in peers(group)}
        receives += parts.items()
        parts[group.rank] = view
        # By rank, so that all ranks add in the same order, whatever arrives first.
        sums.append(([parts[member] for member in range(group.size)], output))

    def reduce() -> None:
        for parts, output in sums:
            reduce_in_order(parts, output, call.reduction)

    handles += start(call, sent, receives, group, tag, soon=bool(call.channel))
    return Work(call, handles, reduce)


def _add_where_they_lie(call: Call, view: torch.Tensor, output: torch.Tensor, tag: int) -> Any:
    """The sum of ``view`` and what all others have of it, read where it lies; None where that is not in reach."""
    group, others = call.group, peers(call.group)
    found = [neighbour(view, peer, group) for peer in others]
    near = [one for one in found if one is not None]
    if len(near) < len(others):
        return None

    def add(sources: Sequence[Source]) -> None:
        numel = min(view.numel(), _IN_CACHE)
        rooms = [view.new_empty(numel) for _ in sources]
        for at in range(0, view.numel(), _IN_CACHE):
            run = slice(at, at + _IN_CACHE)
            mine = view[run]
            parts = {peer: room[: len(mine)] for peer, room in zip(others, rooms, strict=True)}
            for peer, source in zip(others, sources, strict=True):
                ONE_SIDED.take(source, parts[peer], at * view.element_size())
            parts[group.rank] = mine
            _reduce_run([parts[member] for member in range(group.size)], output[run], call.reduction)

    return ONE_SIDED.read_all(near, view.nbytes, group, tag, add)


class _Relay:
    """A gather in two hops (``layout/two_hops.py``): what a rank received from other nodes it hands on inside its own.

    The first hop is under way, the second begins when all are known to gather the same, or when it is waited for.
    """

    def __init__(self, call: Call, output: torch.Tensor, label: str) -> None:
        assert call.group.hops is not None
        self._call, self._label, self._output = call, label, output
        self._hops = hops = call.group.hops
        self._shards = output.tensor_split(call.group.size)
        cuts = [(owner, self._shards[shard]) for owner, shard in hops.plan.first(hops.node.rank)]
        enter_hop(call, hops.across, output)
        self._first = _gather(call, hops.across, cuts, label=label)
        self._second: Work | None = None

    def begin(self) -> None:
        """Wait for the first hop and start the second."""
        node = self._hops.node
        try:
            self._first.wait()
            enter_hop(self._call, node, self._output)
            cuts = [(owner, self._shards[shard]) for owner, shard in self._hops.plan.second()]
            self._second = _gather(self._call, node, cuts, SECOND_HOP, self._label)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Close the connections inside the node, so that nobody there waits for what will not come."""
        give_up(self._hops.node, "its first hop has failed", close=True)

    def finish(self) -> None:
        if not self._call.guarded:  # there was no word at which it would have begun
            self.begin()
        if self._second is None:
            raise CommunicationError(f"{self._call} was given up, because its first hop had failed")
        self._second.wait()


def reduce_in_order(parts: Sequence[torch.Tensor], output: torch.Tensor, op: str) -> None:
    """Reduce ``parts`` (1-D) in member order into ``output``, which may be one of them.

    16-bit sums run in fp32 and round once, so that neither the number of ranks nor the range of fp16 shows.
    """
    numel = output.numel()
    if output.device.type != "cpu" or numel <= _IN_CACHE:
        _reduce_run(parts, output, op)
        return
    for at in range(0, numel, _IN_CACHE):
        run = slice(at, at + _IN_CACHE)
        _reduce_run([part[run] for part in parts], output[run], op)


def _reduce_run(parts: Sequence[torch.Tensor], output: torch.Tensor, op: str) -> None:
    wide = torch.float32 if output.dtype in (torch.float16, torch.bfloat16) else output.dtype
    if op in ("max", "min"):
        reduce = torch.maximum if op == "max" else torch.minimum
        total = reduce(parts[0], parts[1])
        for part in parts[2:]:
            reduce(total, part, out=total)
    elif wide != output.dtype:
        total = parts[0].to(wide)
        for part in parts[1:]:
            total += part
    elif len(parts) == 2:
        total = torch.add(parts[0], parts[1], out=output)
    else:
        # Rank order decides where the sum may grow: in the output unless a later part lies there, else in the first
        # part, which is then a received buffer and ours to overwrite.
        later = any(part.data_ptr() == output.data_ptr() for part in parts[1:])
        total = parts[0]
        if not later and total.data_ptr() != output.data_ptr():
            total = output.copy_(total)
        for part in parts[1:]:
            total += part
    if op == "avg":
        total /= len(parts)
    if total.data_ptr() != output.data_ptr():
        output.copy_(total)
