"""This rank's shard of one parameter: where its elements lie at rest, and how they are cut from a whole value.

source    1D, shard_numel, any floating dtype: what a gather reads
theirs    the other ranks' as well, by member, where all see them in the memory of one host
master    the same elements in fp32, where ``source`` is a copy of them in the parameter's dtype
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from zeropipe.comm.collectives import Exposed, Work, all_gather, all_gather_many, goes_in_one, read_exposed
from zeropipe.comm.group import Group
from zeropipe.layout.flat import FlatShards, flat_shards
from zeropipe.runtime.zero.param import GATHER, State, ZeroParamType, stays
from zeropipe.streams import STREAMS, Side

Tell = Callable[[torch.Tensor], None]


class OwnShard:
    """Cut from ``value`` (the whole)."""

    def __init__(self, value: torch.Tensor, name: str, group: Group) -> None:
        self.shape, self.dtype = value.shape, value.dtype
        self.lay_out(name, group)
        self.kind = ZeroParamType.PARTITIONED
        self.keep(self.cut(value))

    def keep(self, source: torch.Tensor) -> None:
        """Let ``source`` be the elements, held by nobody else."""
        self.source = source
        self.exposed: Exposed | None = None
        self.theirs: list[torch.Tensor] = []
        self.master: torch.Tensor | None = None
        # A place that is a file is told of what was read and is not used for a while, and of what will be read soon.
        self.let_go: Tell = stays
        self.read_ahead: Tell = stays

    def lay_out(self, name: str, group: Group) -> None:
        spec = (name, tuple(self.shape), str(self.dtype).removeprefix("torch."))
        self.name, self.group = name, group
        self.layout: FlatShards = flat_shards([spec], group.size)
        self._range = slice(*self.layout.shard_range(group.rank))

    def live_at(
        self,
        source: torch.Tensor,
        master: torch.Tensor | None,
        let_go: Tell | None = None,
        read_ahead: Tell | None = None,
        remote: bool | None = None,
        exposed: tuple[Exposed, slice] | None = None,
    ) -> None:
        """From now on gathers read ``source``, which ``master`` (None: it is the master) is rounded into; ``exposed``:
        where all members see each other's."""
        self.source, self.master = source, master
        self.exposed, self.theirs = None, []
        if exposed is not None:
            self.exposed, place = exposed
            self.theirs = [one[place] for one in self.exposed.every]
        self.let_go, self.read_ahead = let_go or self.let_go, read_ahead or self.read_ahead
        if remote is not None:
            self.kind = ZeroParamType.REMOTE if remote else ZeroParamType.PARTITIONED

    def cast(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.lay_out(self.name, self.group)
        away = self.kind is ZeroParamType.REMOTE  # what offload placed stays there
        self.exposed, self.theirs = None, []
        self.source = self.source.to(self.source.device if away else device, dtype)

    def of(self, full: torch.Tensor) -> torch.Tensor:  # 1D, shard_numel
        """This rank's elements of a whole value (1D, padded): a view."""
        return full[self._range]

    def gather_into(self, full: torch.Tensor, **how: Any) -> Work:
        """Fill ``full`` (1D, padded) with all ranks' shards; collective."""
        if self.exposed is not None:
            rows = full.view(self.group.size, -1).unbind()
            return read_exposed(rows, self.theirs, self.exposed.talk, label=self.name, **how)
        own = self.of(full)
        STREAMS.of(full.device).copy(own, self.source)
        self.let_go(self.source)
        return all_gather(full, own, self.group, label=self.name, channel=GATHER, guarded=True, **how)

    def differs(self, full: torch.Tensor) -> bool:
        """Whether this rank's elements of ``full`` are other bytes than those of its shard."""
        own = self.of(full)
        return not torch.equal(own.view(torch.uint8), self.source.to(own.device, own.dtype).view(torch.uint8))

    def cut(self, value: torch.Tensor) -> torch.Tensor:  # 1D, shard_numel
        """This rank's shard of a whole value, in the parameter's dtype."""
        cut = torch.zeros(self.layout.shard_numel, dtype=self.dtype, device=value.device)
        flat = value.detach().reshape(-1)
        for piece in self.layout.pieces(self.group.rank):
            cut[piece.offset : piece.offset + piece.numel] = flat[piece.start : piece.start + piece.numel]
        return cut

    def renew(self, shard: torch.Tensor) -> None:
        """Take the elements from ``shard`` (1D, in the parameter's dtype)."""
        self._before_write(shard.device)
        for place in (self.source, self.master):
            if place is None:
                continue
            if place.dtype == shard.dtype:
                place.copy_(shard)
            else:
                # A wider master keeps the bits of elements that did not change in the parameter's precision.
                new = shard.to(place.device)
                place.copy_(torch.where(new == place.to(new.dtype), place, new.to(place.dtype)))
            self.let_go(place)

    def _before_write(self, device: torch.device) -> None:
        STREAMS.of(device).host_turn()  # a gather may still read them
        if self.exposed is not None:
            self.exposed.before_write()

    @contextmanager
    def anew(self, device: torch.device) -> Iterator[torch.Tensor]:
        """A tensor (1D, in the parameter's dtype) for all elements of the shard, which are taken from it at the end."""
        if self.master is None and self.source.dtype == self.dtype:
            self._before_write(device)
            yield self.source  # where they stay
            self.let_go(self.source)
        else:
            shard = torch.zeros(self.layout.shard_numel, dtype=self.dtype, device=device)
            yield shard
            self.renew(shard)


class Member(Protocol):
    """A parameter that is gathered."""

    own: OwnShard
    state: State
    numel: int
    full: torch.Tensor  # 1D, padded
    rows: torch.Tensor  # the same, by rank
    row_of: tuple[torch.Tensor, ...]  # each of these
    own_elements: torch.Tensor  # this rank's row
    route: tuple[Any, ...]

    def depart(self, gather: Gather) -> None:
        """``gather`` is about to fill ``full``."""

    def arrive(self) -> None:
        """It has."""

    def give_up(self, free: bool) -> None:
        """It failed; not ``free``: the transport may still write to the memory."""


class Gather:
    """A gather under way: of one parameter straight to where it will lie, or of several small ones as one message.

    wire      | shards of a, b, c of rank 0 | shards of a, b, c of rank 1 | ...
    a.full    | rank 0's | rank 1's | ...         cut out of the wire once that has arrived
    """

    def __init__(self, members: Sequence[Member], note: int, early: bool = False) -> None:
        self._members = members
        self._early = early
        self._streams = STREAMS.of(members[0].full.device)
        self._wire: torch.Tensor | None = None  # ranks x elements of all shards
        try:
            # The memory is the compute stream's, and filled beside it: that waits for this gather alone, in ``finish``.
            for member in members:
                member.depart(self)
            straight = self._lay_out(members[0])
            with self._streams.beside(Side.IN):
                self._work = self._send(members[0], straight, note)
                self._filled = self._streams.mark()
        except BaseException:  # nothing is under way: the parameters are at rest as before
            for member in members:
                member.give_up(free=True)
            raise

    def _lay_out(self, first: Member) -> bool:
        """Whether each shard goes to its place, in one call; else there is a wire."""
        group = first.own.group
        if len(self._members) == 1 or group.size == 1 or goes_in_one(group) or first.own.exposed is not None:
            return True
        numel = sum(member.own.layout.shard_numel for member in self._members)
        self._wire = first.full.new_empty((group.size, numel))
        return False

    def _send(self, first: Member, straight: bool, note: int) -> Work:
        every, group = [member.own for member in self._members], first.own.group
        label = every[0].name
        if len(every) > 1:
            label = f"{label} to {every[-1].name} ({len(every)} parameters)"
        exposed = first.own.exposed
        if exposed is not None:
            rows = [row for member in self._members for row in member.row_of]
            theirs = [one for own in every for one in own.theirs]
            return read_exposed(
                rows, theirs, exposed.talk, label=label, note=note, early=self._early, async_op=True
            )
        if len(every) == 1:
            return every[0].gather_into(first.full, async_op=True, note=note)
        if straight:
            fulls = [member.full for member in self._members]
            mine = fulls if group.size == 1 else [member.own_elements for member in self._members]
        else:
            assert self._wire is not None
            mine = list(self._wire[group.rank].split([own.layout.shard_numel for own in every]))
        self._streams.copy_each(mine, [own.source for own in every])
        for own in every:
            if own.let_go is not stays:
                own.let_go(own.source)
        if straight:
            return all_gather_many(fulls, mine, group, label=label, async_op=True, channel=GATHER)
        assert self._wire is not None
        flat, own_row = self._wire.view(-1), self._wire[group.rank]
        how: dict[str, Any] = {"channel": GATHER, "guarded": True, "async_op": True, "note": note}
        return all_gather(flat, own_row, group, label=label, **how)

    @property
    def peers_wait(self) -> bool:
        """Whether peers may be waiting for what this rank hands on in it."""
        return self._work.peers_wait

    def finish(self) -> int | None:
        """Wait: then all members are whole. Returns the lowest of all ranks' notes; None where they said none."""
        try:
            self._work.wait()
            self._streams.wait(self._filled)
            if self._wire is not None:
                rows = [member.rows for member in self._members]
                torch.split_with_sizes_copy(self._wire, [row.size(1) for row in rows], 1, out=rows)
        except BaseException:
            for member in self._members:
                member.give_up(free=False)
            raise
        for member in self._members:
            member.arrive()
        return self._work.lowest_note


def start_gathers(
    units: Iterable[Iterable[Member]], note: int = 0, together: int = 0, early: bool = False
) -> None:
    """Begin to gather what is at rest; the peers are told ``note``. Neighbours of at most ``together`` elements in all
    are one gather, and so is all of a unit where the backend would rather be asked once. ``early``: in a pass, in which
    nobody writes to shards: where they are exposed no rank waits for another."""
    some: dict[Member, None] = {}
    numel = 0
    route: tuple[Any, ...] = ()
    for unit in units:
        away = [
            one
            for one in unit
            if one.state is not State.WHOLE and one.state is not State.INFLIGHT and one not in some
        ]
        for bundle in [away] if away and goes_in_one(away[0].own.group) else [[one] for one in away]:
            size = sum([one.numel for one in bundle])
            way = (*bundle[0].route, bundle[0].own.exposed is None)
            if some and (numel + size > together or way != route):
                Gather(list(some), note, early)
                some, numel = {}, 0
            some.update(dict.fromkeys(bundle))
            numel, route = numel + size, way
    if some:
        Gather(list(some), note, early)
