"""Values of stage 3: parameters that are shards, whose masters lie end to end in one 1-D tensor.

    master   |-- a's shard --|- b's -|------ c's shard ------|pad|      fp32, this rank's; the optimizer steps it
    a        gathered from every rank's "a's shard" when a module needs it, cast to a's dtype on the way

No second copy exists, in fp32 as in 16 bits, unless the masters live too far away to be read by gathers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from zeropipe.comm.collectives import Work, all_gather, expose
from zeropipe.comm.group import Group
from zeropipe.layout.buckets import Bucket, Span, cut_buckets
from zeropipe.layout.flat import FlatShards, Piece, flat_shards
from zeropipe.runtime.zero.hold.offload import Move, Offload
from zeropipe.runtime.zero.hold.policy import Place
from zeropipe.runtime.zero.hold.values import ALIGN, ALONE_NUMEL, Room, Segment, cuts, take_edited
from zeropipe.runtime.zero.param import GATHER, Cut, State, shards_at, stays
from zeropipe.streams import STREAMS, Side
from zeropipe.tensor.host import HOST
from zeropipe.tensor.memory import moving

_FEW_RANKS = 8  # whose spans are kept


class ShardValues:
    """Stage 3: every parameter is cut by itself, and its shards lie in the masters of the ranks; else as above."""

    sharded = True

    def __init__(
        self,
        params: Sequence[torch.nn.Parameter],
        group: Group,  # the ranks that train together; shards may lie within a part of them (MiCS)
        replicas: Group,
        offload: Offload,
    ) -> None:
        self.dtype, self.device = params[0].dtype, params[0].device
        self.cut = tuple(_shards(param) for param in params)
        self.shapes = tuple(tuple(shards.shape) for shards in self.cut)

        # Who holds what. The master is cut in whole lines (see ALIGN), a parameter's shards need not be.
        self.group = self.cut[0].group
        self.replicas = replicas
        self.shard = self.group.rank
        assert self.group.size * self.replicas.size == group.size
        specs = ((shards.name, (shards.shard_numel,), "float32") for shards in self.cut)
        self.local_layout = flat_shards(specs, 1, ALIGN)  # where each shard lies in the master, on every rank
        self.whole_numel = numel = self.local_layout.padded_numel
        self.segments = tuple(self._segment(index) for index in range(len(self.cut)))

        self._spans: dict[int, list[Span]] = {}  # of buckets, by where they start

        # The memory: ``copy`` is what gathers read where that is not the master, in the parameters' dtype.
        self._offload = offload
        wide = offload.policy.master_dtype(self.dtype)
        self.copy: torch.Tensor | None = None  # 1D, as the master
        remote = offload.is_remote(self.device)
        # Where the ranks share a host they read each other's masters where those lie.
        self._exposed = None
        if (
            self.device.type == "cpu"
            and not offload.has_files
            and offload.gathers_read_masters(self.dtype, self.device)
        ):
            self._exposed = expose(numel, wide, self.group, GATHER)
        with moving([shards.source for shards in self.cut]) as values:
            if self._exposed is not None:
                master = self._exposed.own
            else:
                master = offload.state(numel, wide, self.device, self.local_layout.numel)
            if not offload.gathers_read_masters(self.dtype, self.device):
                self.copy = offload.source(numel, self.dtype, self.device, self.local_layout.numel)
            for shards, segment, value in zip(self.cut, self.segments, values, strict=True):
                piece = master[segment.room]
                offload.copy(piece, value, self.device)
                source = piece if self.copy is None else self.copy[segment.room]
                if self.copy is not None:
                    offload.copy(source, value, self.device)
                ahead = offload.read_ahead if remote else None
                let_go = offload.let_go if offload.has_files else stays
                exposed = None if self._exposed is None else (self._exposed, segment.room)
                shards.live_at(source, None if self.copy is None else piece, let_go, ahead, remote, exposed)
                del value
        STREAMS.of(self.device).host_turn()  # what the copies read is gone from here on
        self.master = torch.nn.Parameter(master)
        # New values go from host memory to the device while the next are stepped there.
        goes_early = self.copy is not None and not remote and offload.policy.optimizer_place is Place.HOST
        size = offload.policy.publish_numel if goes_early else max(numel, 1)
        self.runs = tuple(cuts(numel, size)) or ((0, 0),)

        # What the parameters that stay gathered showed last, and which these were: to see that somebody wrote to them.
        self._shown: tuple[list[tuple[int, int]], torch.Tensor]
        self._remember()

    def _segment(self, index: int) -> Segment:
        shards, (start, stop) = self.cut[index], self.local_layout.tensor_range(index)
        own = shards.layout.pieces(self.shard)
        return Segment(shards.layout, 0, own[0] if own else None, start, stop, (shards.shard_numel,))

    def parts(self) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(self.master.detach()[segment.room]) for segment in self.segments]

    def flats(self, group_index: int) -> Iterator[tuple[str, FlatShards, slice]]:
        for shards, segment in zip(self.cut, self.segments, strict=True):
            yield shards.name, shards.layout, segment.room

    def buckets(self, numel: int) -> tuple[Bucket, ...]:
        return cut_buckets(flat_shards(((s.name, tuple(s.shape), "") for s in self.cut), 1), numel)

    def spans(self, bucket: Bucket) -> Sequence[Span]:
        # Among many ranks made anew each time: of many parameters they would be more memory than the shards.
        known = self._spans.get(bucket.start)
        if known is not None:
            return known
        # bucket of a, b    span of rank r:  | a's shard r | b's shard r |     as they lie in r's master
        runs: list[list[int]] = []
        joins = False
        for index in bucket.tensors:
            layout = self.cut[index].layout
            alone = layout.padding == 0 and layout.shard_numel >= ALONE_NUMEL and self.device.type == "cpu"
            if joins and not alone:
                runs[-1].append(index)
            else:
                runs.append([index])
            joins = not alone
        made = [self._span(run, owner) for run in runs for owner in range(self.group.size)]
        if self.group.size <= _FEW_RANKS:
            self._spans[bucket.start] = made
        return made

    def room(self, bucket: Bucket) -> Room:
        # The same spans, all ranks' end to end: a flat of which each owner's span is a shard.
        own = slice(self.segments[bucket.tensors[0]].start, self.segments[bucket.tensors[-1]].stop)
        width = own.stop - own.start
        return Room(0, width * self.group.size, width, own)

    def fill(self, wire: torch.Tensor, sources: Sequence[tuple[int, torch.Tensor]], bucket: Bucket) -> None:
        # wire, one row a rank    | a's shard 0 | b's shard 0 |      a is a column: as many copies for many ranks as
        #                         | a's shard 1 | b's shard 1 |      for two, and one kernel where all are there
        rows = wire.view(self.group.size, -1)
        if len(sources) == len(bucket.tensors):
            some = [source for _, source in sources if source.numel()]
            if some:
                torch._chunk_cat(some, 0, self.group.size, out=rows)
            return
        for index, source in sources:
            numel = self.cut[index].shard_numel
            at = self.segments[index].start - self.segments[bucket.tensors[0]].start
            column = rows[:, at : at + numel]
            full, rest = divmod(source.numel(), max(numel, 1))
            column[:full].copy_(source[: full * numel].view(full, numel))
            if rest:
                column[full, :rest].copy_(source[full * numel :])

    def _span(self, run: Sequence[int], owner: int) -> Span:
        at = self.segments[run[0]].start
        pieces = []
        for index in run:
            start = self.segments[index].start
            for p in self.cut[index].layout.pieces(owner):
                pieces.append(Piece(index, p.start, owner, start + p.offset, p.numel))
        return Span(owner, at, 0, self.segments[run[-1]].stop - at, tuple(pieces))

    def publish(self) -> None:
        for start, stop in self.runs:
            self.publish_run(start, stop)

    def _publish_gathered(self) -> None:
        gathered = self._whole()
        if not gathered:
            return
        layout = flat_shards(((s.name, (s.shard_numel,), "") for s in gathered), 1)
        # Row r: rank r's shards of all that is gathered.
        wire = torch.empty((self.group.size, layout.numel), dtype=self.dtype, device=self.device)
        own, sizes = wire[self.shard], [shards.shard_numel for shards in gathered]
        streams = STREAMS.of(self.device)
        with streams.beside(Side.IN):
            streams.copy_each(own.split(sizes), [shards.source for shards in gathered])
            moment = streams.mark()
        streams.wait(moment)
        for shards in gathered:
            self._offload.let_go(shards.source)
        all_gather(wire.view(-1), own, self.group, label="persistent parameters")
        torch.split_with_sizes_copy(
            wire, sizes, 1, out=[s.renewed().view(self.group.size, -1) for s in gathered]
        )
        self._remember()

    def publish_run(self, start: int, stop: int) -> Work:
        if self.copy is not None:
            self._offload.copy(self.copy[start:stop], self.master.detach()[start:stop], self.device)
        if stop == self.master.numel():
            self._publish_gathered()
        return Work("persistent parameters")

    def write(self, index: int, value: torch.Tensor) -> None:
        shards, segment = self.cut[index], self.segments[index]
        flat = value.detach().reshape(-1)
        if self.copy is not None and segment.piece is not None:
            place = self.copy[segment.start : segment.start + segment.piece.numel]
            place.copy_(flat[segment.piece.start : segment.piece.start + segment.piece.numel])
            self._offload.let_go(place)
        if shards.state is State.WHOLE:
            shards.renewed()[: flat.numel()].copy_(flat)

    def before_write(self) -> None:
        if self._exposed is not None:
            self._exposed.before_write()

    def refresh_master(self) -> None:
        self.before_write()
        if self.copy is not None:
            self._offload.copy(self.master.detach(), self.copy, self.device)
            STREAMS.of(self.device).host_turn()

    def take_edits(self, sure: bool = False) -> None:
        # Only what stays gathered can have been written to; what a ``GatheredParameters`` holds is left to that.
        gathered = self._gathered()
        if self._blind:
            self._take_all(gathered)
            return
        # One comparison of all first, with what they showed last: a step would notice one for each small parameter.
        known, values = self._shown
        if known == _facts(gathered):
            here = self._own_elements(gathered)
            if torch.equal(here, values):
                return
            sizes = [shards.shard_numel for shards in gathered]
            pairs = zip(gathered, here.split(sizes), values.split(sizes), strict=True)
            edited = [shards for shards, new, old in pairs if not torch.equal(new, old)]
        else:  # others were gathered then, or the shards were written since
            edited = gathered
        for shards in edited:
            if shards.differs():
                shards.write_back()
        self._remember()

    @property
    def _blind(self) -> bool:
        """Whether to compare values would make the host wait for the device, which can do without: all is there."""
        return not HOST.sees(self.device) and self.copy is None and self.master.device == self.device

    def _take_all(self, gathered: Sequence[Cut]) -> None:
        """Let the shards be what the gathered values show, whether somebody wrote to those or not."""
        if not gathered:
            return
        sources, shown = [s.source for s in gathered], [s.own_elements for s in gathered]
        if self.dtype != self.master.dtype:
            masters = torch.cat(sources)
            take_edited(masters, torch.cat(shown))
            shown = list(masters.split([s.shard_numel for s in gathered]))
        torch._foreach_copy_(sources, shown)

    def take_edit(self, index: int) -> None:
        shards = self.cut[index]
        if shards.state is State.WHOLE and shards.numel and not shards.contexts and shards.differs():
            shards.write_back()

    def _remember(self) -> None:
        gathered = [] if self._blind else self._gathered()
        self._shown = (_facts(gathered), self._own_elements(gathered))

    def _own_elements(self, gathered: Sequence[Cut]) -> torch.Tensor:
        """1D, a copy."""
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        return torch.cat([nothing, *(shards.own_elements for shards in gathered)])

    def _gathered(self) -> list[Cut]:
        return [shards for shards in self._whole() if not shards.contexts]

    def _whole(self) -> list[Cut]:
        return [shards for shards in self.cut if shards.state is State.WHOLE and shards.numel]

    def check_dtypes(self) -> None:
        """Shards refuse another dtype when it is assigned."""

    def full(self, shard: torch.Tensor, index: int) -> torch.Tensor:
        shards = self.cut[index]
        own = shard[self.segments[index].room].to(self.device)
        whole = torch.empty(shards.layout.padded_numel, dtype=shard.dtype, device=self.device)
        all_gather(whole, own, self.group, label=shards.name, channel=GATHER, guarded=True)
        return whole[: shards.numel].view(shards.shape)

    def move(self, move: Move) -> None:
        if self.copy is not None:
            self.copy = move(self.copy)
            self._point()

    def move_master(self, move: Move) -> None:
        if self._exposed is None:  # else it is in host memory, and others read it there
            self.master.data = move(self.master.data)
            self._point()

    def _point(self) -> None:
        """Let gathers read where the masters, or their copies, lie now."""
        for shards, segment in zip(self.cut, self.segments, strict=True):
            piece = self.master.data[segment.room]
            shards.live_at(*((piece, None) if self.copy is None else (self.copy[segment.room], piece)))

    def release(self) -> None:
        remote = self._offload.is_remote(self.device)
        for shards in self.cut:
            source = shards.source if remote else shards.source.to(self.device, self.dtype, copy=True)
            shards.live_at(source, None)

    def stored(self) -> tuple[list[torch.Tensor], int, bool]:
        copied = self.copy is not None or self.dtype != self.master.dtype
        own = 0 if self.copy is None and copied else self.whole_numel
        gathered = sum(shards.numel for shards in self._whole())  # one that is a shard has none
        stored = self.copy if self.copy is not None else None if copied else self.master.detach()
        return [] if stored is None else [stored], (own + gathered) * self.dtype.itemsize, copied


def _facts(gathered: Sequence[Cut]) -> list[tuple[int, int]]:
    # What changes when other parameters are gathered, or the shards are written behind the gathered values.
    return [(shards.ident, shards.renewals) for shards in gathered]


def _shards(param: torch.nn.Parameter) -> Cut:
    shards = shards_at(param)
    assert shards is not None
    return shards
