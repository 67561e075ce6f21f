"""Values of stages 0 to 2: one flat buffer that parameters are views of, and the master of this rank's shard of it.

    whole    |---------- shard 0 ----------|---------- shard 1 ----------|   parameters are views into it
    master                                 |####### fp32, rank 1 ########|   the one tensor that is stepped

In fp32 the master *is* this rank's slice of the values, so nothing is stored twice; in 16 bits it is a tensor
of its own, and the values are rounded from it after each step. (``shard_values.py`` has the values of stage 3.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from zeropipe.comm.collectives import Work, all_gather, all_reduce, broadcast, gather_from_owners
from zeropipe.comm.group import SELF, Group
from zeropipe.errors import UsageError
from zeropipe.layout.buckets import Bucket, Span, cut_buckets
from zeropipe.layout.flat import FlatShards, Piece, flat_shards
from zeropipe.runtime.zero.hold.offload import Move
from zeropipe.runtime.zero.hold.policy import Policy
from zeropipe.streams import STREAMS
from zeropipe.tensor.memory import moving

# Why 16 elements: a cache line of fp32. torch's fused CPU steps handle the last numel % 16 elements in a scalar loop
# whose rounding differs by an ulp; a whole number of lines leaves no such rest, so that where the shards are cut
# (stage, number of ranks, threads) never shows in the numbers.
ALIGN = 16
# Elements from which a message of its own costs less than a copy into a common one; only gloo sends one by one.
ALONE_NUMEL = 2**16


@dataclass(frozen=True, slots=True)
class Segment:
    """One parameter: tensor ``tensor`` of ``layout``, of which this rank has ``piece`` (None: nothing)."""

    layout: FlatShards
    tensor: int
    piece: Piece | None
    start: int  # where the piece begins in the master
    stop: int  # where its room ends, padding included
    shape: tuple[int, ...]  # as it is stepped by itself

    @property
    def name(self) -> str:
        return self.layout.tensors[self.tensor].name

    @property
    def room(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class Room:
    """Where a bucket lies when it travels in one: a run of a flat that is cut in equal shards."""

    start: int
    numel: int
    shard_numel: int
    own: slice  # of this rank's shard, as the master lies: its part of the run


class FlatValues:
    """Stages 0 to 2: one buffer, the same on every rank, of which each updates its shard or (stage 0) all.

    Every method but ``publish``, ``publish_run`` and ``full`` is local.
    """

    def __init__(
        self, names: Sequence[str], params: Sequence[torch.nn.Parameter], group: Group, policy: Policy
    ) -> None:
        self.params = tuple(params)
        self.dtype, self.device = params[0].dtype, params[0].device
        self.shapes = tuple(tuple(param.shape) for param in params)

        # Who holds what: at stage 0 each rank is the owner of all.
        self.group = group
        self.sharded = policy.shards_optimizer
        self.replicas = SELF if self.sharded else group
        self.shard = group.rank if self.sharded else 0
        kind = str(self.dtype).removeprefix("torch.")
        specs = [(name, shape, kind) for name, shape in zip(names, self.shapes, strict=True)]
        self.layout = flat_shards(specs, group.size if self.sharded else 1, ALIGN)
        self.whole_numel = self.layout.padded_numel
        self.segments = tuple(self._segment(index) for index in range(len(specs)))

        # The memory.
        self.whole = _flatten(self.params, self.layout)  # 1D, padded_numel
        self.own = self.whole[slice(*self.layout.shard_range(self.shard))]  # 1D, shard_numel; a view
        broadcast(self.whole, 0, group, label="initial values")
        self.master = torch.nn.Parameter(self._make_master(policy))
        self._publish_numel = policy.publish_numel

        # How an edit is seen: an operation in place counts a version up, an assignment of ``.data`` (which leaves the
        # counter alone) moves the parameter out of its place.
        self._starts = tuple(self.layout.offsets[:-1])
        self._versions = [param._version for param in self.params]

    def _segment(self, index: int) -> Segment:
        pieces = self.layout.tensor_pieces(index)
        piece = next((piece for piece in pieces if piece.shard == self.shard), None)
        start, stop = (0, 0) if piece is None else (piece.offset, piece.offset + piece.numel)
        return Segment(self.layout, index, piece, start, stop, self.shapes[index])

    def _make_master(self, policy: Policy) -> torch.Tensor:
        streams = STREAMS.of(self.device)
        offloaded = policy.offload_optimizer and streams.apart
        dtype = policy.master_dtype(self.dtype)
        if not offloaded:
            return self.own.to(dtype)  # itself, where it is of that dtype
        host = streams.zeros(self.own.numel(), dtype, policy.pin_memory)
        streams.copy(host, self.own)
        streams.host_turn()
        return host

    # Asked by address, since both may be moved away for a while (``move``) and come back.
    @property
    def master_is_values(self) -> bool:
        return self.master.data_ptr() == self.own.data_ptr() and self.own.numel() > 0

    def parts(self) -> list[torch.nn.Parameter]:
        """What is stepped where parameters are stepped one by one: each in its shape, or its shard."""
        if self.master_is_values:
            return list(self.params)
        return [torch.nn.Parameter(self.master.detach()[s.room].view(s.shape)) for s in self.segments]

    def flats(self, group_index: int) -> Iterator[tuple[str, FlatShards, slice]]:
        """(name, layout, where its shard lies in the master): what a checkpoint saves."""
        kind, first = str(self.dtype).removeprefix("torch."), self.layout.tensors[0].name
        yield f"group{group_index}.{kind}.{first}", self.layout, slice(0, self.layout.shard_numel)

    def buckets(self, numel: int) -> tuple[Bucket, ...]:
        """The parameters whose gradients travel together, from the last to the first."""
        return cut_buckets(self.layout, numel, ALONE_NUMEL if self.device.type == "cpu" else None)

    def spans(self, bucket: Bucket) -> Sequence[Span]:
        """Its messages: what one rank owns of it, and where that lies in a shard."""
        return bucket.spans

    def room(self, bucket: Bucket) -> Room:
        """The bucket as one run; that of the last parameter takes the padding along, so that a bucket of all is cut
        as the flat is."""
        layout, stop = self.layout, bucket.start + bucket.numel
        stop = layout.padded_numel if stop == layout.numel else stop
        size = layout.shard_numel
        first, last = (min(max(at - self.shard * size, 0), size) for at in (bucket.start, stop))
        return Room(bucket.start, stop - bucket.start, size, slice(first, last))

    def fill(self, wire: torch.Tensor, sources: Sequence[tuple[int, torch.Tensor]], bucket: Bucket) -> None:
        """Parameters' elements (by index, each 1D) into their places in the bucket's run."""
        if sources:
            starts = [self.layout.offsets[index] - bucket.start for index, _ in sources]
            values = [source for _, source in sources]
            places = [wire[at : at + value.numel()] for at, value in zip(starts, values, strict=True)]
            torch._foreach_copy_(places, values)

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        streams = STREAMS.of(self.device)
        apart = self.sharded and self.group.size > 1 and self.device.type == "cpu" and not streams.apart
        # From host memory they travel while the next are stepped there.
        apart = apart or streams.on_host(self.master)
        size = self._publish_numel if apart else max(self.layout.shard_numel, 1)
        return tuple(cuts(self.layout.shard_numel, size))

    def publish(self) -> None:
        """Let the parameters be what the masters say: everywhere, or where they are gathered now."""
        if self.layout.numel == 0:
            return
        # Several messages where those of one run travel while the next is copied, and scratch stays small.
        if len(self.runs) > 1:
            for work in [self.publish_run(start, stop) for start, stop in self.runs]:
                work.wait()
            return
        if not self.master_is_values:
            STREAMS.of(self.device).bring(self.own, self.master.detach())
        if self.sharded and self.group.size > 1:
            all_gather(self.whole, self.own, self.group, label="parameters")

    def publish_run(self, start: int, stop: int) -> Work:
        """``publish`` of the elements [start, stop) of every rank's shard, which may still be under way."""
        streams = STREAMS.of(self.device)
        if not self.master_is_values:
            streams.bring(self.own[start:stop], self.master.detach()[start:stop])
        if streams.apart:  # in one message, with the last of them
            if stop < self.layout.shard_numel or not self.sharded or self.group.size == 1:
                return Work("parameters")
            return all_gather(self.whole, self.own, self.group, label="parameters", async_op=True)
        shards = self.whole.view(self.group.size, -1)
        cuts = [(rank, shards[rank, start:stop]) for rank in range(self.group.size)]
        return gather_from_owners(cuts, self.group, label="parameters", async_op=True)

    def _value(self, index: int) -> torch.Tensor:
        """The parameter's value in the buffer: a view of its shape."""
        return self.whole[slice(*self.layout.tensor_range(index))].view(self.shapes[index])

    def write(self, index: int, value: torch.Tensor) -> None:
        """Parameter ``index``'s master was set to ``value`` (its shape): let the value be that too."""
        self._value(index).copy_(value.detach())

    def before_write(self) -> None:
        """The master is about to be written: return when nobody reads it any more."""

    def refresh_master(self) -> None:
        """Take the master anew from the values, after somebody wrote those (a loaded state dict, an edit)."""
        if not self.master_is_values:
            STREAMS.of(self.device).host_turn()
            self.master.detach().copy_(self.own)

    def take_edits(self, sure: bool = False) -> None:
        """Let what was written to parameters in place, under ``no_grad``, reach the master.

        ``sure``: look at the values, whatever version counters say.
        """
        # Each rank takes the elements of its shard, so all must have written the same; nothing is sent to find out.
        first, size = self.whole.data_ptr(), self.whole.element_size()
        for index, param in enumerate(self.params):
            if param.data_ptr() != first + self._starts[index] * size:
                self._bring_home(index)
        versions = [param._version for param in self.params]
        if versions == self._versions and not sure:
            return
        self._versions = versions
        if not self.master_is_values:
            take_edited(self.master.detach(), self.own)

    def take_edit(self, index: int) -> None:
        """``take_edits`` of one parameter."""
        self._bring_home(index)
        version, room = self.params[index]._version, self.segments[index].room
        if version == self._versions[index]:
            return
        self._versions[index] = version
        if not self.master_is_values:
            take_edited(self.master.detach()[room], self.own[room])

    def _bring_home(self, index: int) -> None:
        """Copy a value that was assigned to ``param.data`` into the buffer, and show that again."""
        param, home = self.params[index], self._value(index)
        if not param.numel() or (param.data_ptr() == home.data_ptr() and param.shape == home.shape):
            return
        self.check_dtypes(index)
        home.copy_(param.detach())
        param.data = home
        self._versions[index] = -1  # an edit, whatever its counter says

    def check_dtypes(self, index: int = 0) -> None:
        """Raise UsageError where the module was converted (``module.half()``) after the engine had taken it, or a
        parameter was given another shape."""
        # A conversion is one of all parameters, so that one tells; what is resized is mostly the first, an embedding.
        param = self.params[index]
        if param.shape != self.shapes[index]:
            raise UsageError(
                f"parameter '{self.segments[index].name}' was given other data, as param.data = ... "
                "and resize_token_embeddings() do",
                expected=f"shape {tuple(self.shapes[index])}",
                found=f"shape {tuple(param.shape)}",
                fix="give it data of its shape; or call engine.destroy(), resize, and initialize again",
            )
        if param.dtype != self.dtype or param.device != self.whole.device:
            raise UsageError(
                f"parameter '{self.segments[index].name}' is trained in {self.dtype} on {self.whole.device} and cannot "
                f"become {param.dtype} on {param.device}. Fix: choose the precision in the config (bf16 or fp16)"
            )

    def full(self, shard: torch.Tensor, index: int) -> torch.Tensor:
        """Parameter ``index``'s elements of a master-sized tensor, from all ranks: a new tensor of its shape."""
        spec = self.layout.tensors[index]
        whole = torch.zeros(spec.numel, dtype=shard.dtype, device=self.whole.device)
        for piece in self.layout.tensor_pieces(index):
            view = whole[piece.start : piece.start + piece.numel]
            if piece.shard == self.shard:
                view.copy_(shard[piece.offset : piece.offset + piece.numel])
            if self.sharded:
                broadcast(view, piece.shard, self.group, label=spec.name)
        return whole.view(spec.shape)

    def move(self, move: Move) -> None:
        """Let the values be ``move`` of themselves; a master that is a part of them goes along."""
        with_master = self.master_is_values
        self.whole = move(self.whole)
        self.own = self.whole[slice(*self.layout.shard_range(self.shard))]
        for index, param in enumerate(self.params):
            param.data = self._value(index)
        if with_master:
            self.master.data = self.own

    def move_master(self, move: Move) -> None:
        """Let a master that is a tensor of its own be ``move`` of itself."""
        if not self.master_is_values:
            self.master.data = move(self.master.data)

    def release(self) -> None:
        """Let the parameters go on without an optimizer."""
        for param in self.params:
            param.data = param.data.clone()

    def stored(self) -> tuple[list[torch.Tensor], int, bool]:
        """(the memory that values take, the bytes that the stage promises, whether the masters are copies)."""
        promised = self.whole_numel * self.dtype.itemsize
        return [self.whole], promised, not self.master_is_values and self.own.numel() > 0


def take_edited(master: torch.Tensor, values: torch.Tensor) -> None:
    """Set ``master`` to ``values`` (its shape, any dtype) where somebody wrote those."""
    # Where they are still what the master rounds to nobody did, and it keeps the bits that the rounding lost.
    new = values.to(master.device)
    master.copy_(torch.where(new == master.to(new.dtype), master, new.to(master.dtype)))


def _flatten(params: Sequence[torch.nn.Parameter], layout: FlatShards) -> torch.Tensor:
    """Move the parameters into one buffer."""
    with moving(params) as values:
        flat = torch.empty(layout.padded_numel, dtype=params[0].dtype, device=params[0].device)
        flat[layout.numel :].zero_()
        for index, (param, value) in enumerate(zip(params, values, strict=True)):
            view = flat[slice(*layout.tensor_range(index))].view(value.shape)
            param.data = view.copy_(value)
            del value
    return flat


def cuts(numel: int, size: int) -> Iterator[tuple[int, int]]:
    """Runs of at most about ``size`` elements; all but the last are whole cache lines, for the reason of ALIGN."""
    size = max(size // ALIGN, 1) * ALIGN
    for start in range(0, numel, size):
        yield start, min(start + size, numel)


class RowNorms:
    """Embeddings with ``max_norm`` at stages 0 to 2: rows that one rank's batch shortened are shortened on all.

    Such a forward writes to the table, each rank's to the rows of its own batch, so that replicas would part. (At
    stage 3 see ``edits.py``.)
    """

    # It is noted which rows forwards read, and at the boundary every rank takes a row from the first that read it; all
    # that did have the same value, as shortening a row depends on nothing else. One process makes that of all batches.
    def __init__(self, module: torch.nn.Module, group: Group) -> None:
        self._group = group
        self._tables = [
            child
            for child in module.modules()
            if isinstance(child, torch.nn.Embedding | torch.nn.EmbeddingBag) and child.max_norm is not None
        ]
        self._read: dict[int, torch.Tensor] = {}  # by place in _tables: 1D, uint8, whether the row was read
        self._handles = [
            table.register_forward_pre_hook(partial(self._note, place))
            for place, table in enumerate(self._tables if group.size > 1 else ())
        ]

    def remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _note(self, place: int, table: Any, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor):
            self._rows(place)[args[0].detach().reshape(-1).long()] = 1

    def _rows(self, place: int) -> torch.Tensor:
        weight = self._tables[place].weight
        if place not in self._read:
            self._read[place] = torch.zeros(weight.shape[0], dtype=torch.uint8, device=weight.device)
        return self._read[place]

    def join(self) -> None:
        """Give every rank the rows that any has shortened since the last call."""
        if self._group.size == 1:
            return
        for place, table in enumerate(self._tables):
            self._join_one(table.weight, self._rows(place))
        self._read.clear()

    @torch.no_grad()
    def _join_one(self, weight: torch.Tensor, mine: torch.Tensor) -> None:
        every = mine.new_empty((self._group.size, mine.numel()))
        all_gather(every.view(-1), mine, self._group, label="rows that forwards read")
        rows = every.amax(0).nonzero().view(-1)
        if not rows.numel():
            return
        first = every.argmax(0)[rows]  # the first rank that read each
        # Bits, summed with zeros: the same everywhere, whatever the values are. Not all backends sum 16-bit integers.
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
        bits = weight[rows].view(kind) * (first == self._group.rank)[:, None].to(kind)
        wide = bits.int() if kind is torch.int16 else bits
        all_reduce(wide, self._group, label="rows that forwards shortened")
        weight[rows] = wide.to(kind).view(weight.dtype)
