"""This rank's shard of one parameter: where its elements lie at rest, and how they are cut from a whole value.

source    1D, shard_numel, any floating dtype: what a gather reads
master    the same elements in fp32, where ``source`` is a copy of them in the parameter's dtype
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zeropipe.comm.collectives import Work, all_gather, all_gather_many, goes_in_one
from zeropipe.comm.group import Group
from zeropipe.comm.record import Later
from zeropipe.layout.flat import FlatShards, flat_shards
from zeropipe.runtime.zero.param import GATHER, ZeroParamType

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
        self.master: torch.Tensor | None = None
        # A place that is a file is told of what was read and is not used for a while, and of what will be read soon.
        self.let_go: Tell = _keep
        self.read_ahead: Tell = _keep

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
    ) -> None:
        """From now on gathers read ``source``, which ``master`` (None: it is the master) is rounded into."""
        self.source, self.master = source, master
        self.let_go, self.read_ahead = let_go or self.let_go, read_ahead or self.read_ahead
        if remote is not None:
            self.kind = ZeroParamType.REMOTE if remote else ZeroParamType.PARTITIONED

    def cast(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.lay_out(self.name, self.group)
        away = self.kind is ZeroParamType.REMOTE  # what offload placed stays there
        self.source = self.source.to(self.source.device if away else device, dtype)

    def of(self, full: torch.Tensor) -> torch.Tensor:  # 1D, shard_numel
        """This rank's elements of a whole value (1D, padded): a view."""
        return full[self._range]

    def without_memory(self, device: torch.device) -> torch.Tensor:  # 1D, padded
        """What holds the whole value once its storage is resized."""
        full = torch.empty(self.layout.padded_numel, dtype=self.dtype, device=device)
        full.untyped_storage().resize_(0)
        return full

    def gather_into(self, full: torch.Tensor, together: Together | None = None, **how: Any) -> Work:
        """Fill ``full`` (1D, padded) with all ranks' shards; collective. With ``together`` when that begins."""
        own = self.of(full)
        own.copy_(self.source, non_blocking=True)
        self.let_go(self.source)
        if together is not None:
            return together.add(self, full)
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


class Together:
    """Gathers that begin as one call."""

    def __init__(self) -> None:
        self._parts: list[tuple[OwnShard, torch.Tensor]] = []
        self._later = Later()

    def add(self, own: OwnShard, full: torch.Tensor) -> Work:
        self._parts.append((own, full))
        return Work(f"the gather of {own.name}", [self._later])

    def begin(self) -> None:
        if self._parts:
            owns, fulls = zip(*self._parts, strict=True)
            label = ", ".join(own.name for own in owns)
            shards = [own.of(full) for own, full in self._parts]
            group = owns[0].group
            work = all_gather_many(fulls, shards, group, label=label, async_op=True, channel=GATHER)
            self._later.begin(work)


@contextmanager
def together(group: Group) -> Iterator[Together | None]:
    """What starts to be gathered in the block begins at its end, in one call, where the backend would rather be asked
    once; None where it would not."""
    gathers = Together() if goes_in_one(group) else None
    yield gathers
    if gathers is not None:
        gathers.begin()


def _keep(tensor: torch.Tensor) -> None:
    """Memory that is nowhere else needs no telling."""
