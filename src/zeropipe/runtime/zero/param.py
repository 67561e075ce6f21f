"""What a parameter knows of ZeRO: its name, who trains it, and (stage 3) the shards that it is cut into.

The record stands between the two wings, so it knows neither: each says here what the other may ask of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from zeropipe.comm.group import Group
from zeropipe.layout.flat import FlatShards
from zeropipe.runtime.zero.status import ZeroParamStatus

# Channels: collectives on one need no order among those on another.
GATHER, REDUCE = 1, 2


class Trainer(Protocol):
    """An optimizer's side of a parameter (``hold/access.py``)."""

    @property
    def group(self) -> Group:
        """The ranks that hold what it trains, whole or as shards."""

    def write_value(self, value: torch.Tensor) -> None:
        """Set master and parameter to ``value`` (its shape, the same on every rank)."""


class Cut(Protocol):
    """A parameter that is shards, as its partition sees it (``gather/shards.py``)."""

    ident: int
    group: Group
    shape: torch.Size
    numel: int
    shard_numel: int
    full: torch.Tensor  # 1D, padded: the whole value while it is gathered
    renewals: int  # how often the shards changed under it

    @property
    def name(self) -> str: ...
    @property
    def layout(self) -> FlatShards: ...
    @property
    def source(self) -> torch.Tensor:  # 1D, shard_numel: what gathers read
        ...

    @property
    def status(self) -> ZeroParamStatus: ...
    @property
    def contexts(self) -> int:
        """Who is writing to the whole value and brings it back."""

    @property
    def own_elements(self) -> torch.Tensor:
        """This rank's elements of the gathered value: 1D, shard_numel, a view."""

    def live_at(
        self,
        source: torch.Tensor,
        master: torch.Tensor | None,
        let_go: Callable[[torch.Tensor], None] | None = None,
        read_ahead: Callable[[torch.Tensor], None] | None = None,
        remote: bool | None = None,
    ) -> None:
        """From now on gathers read ``source``; ``master``: what is rounded into it, where that is another tensor.

        None: as they are. ``let_go`` and ``read_ahead`` are told of elements that were and will be read; ``remote``:
        ``source`` lives away from where the parameter is used.
        """

    def show(self, whole: torch.Tensor) -> None:
        """The shards were renewed: let the gathered value be ``whole`` (1D, with or without padding)."""

    def differs(self) -> bool:
        """Whether this rank's elements of the gathered value are no longer those of its shard."""

    def write_back(self) -> None:
        """Take this rank's shard anew from the gathered value (the same on every rank)."""


@dataclass(slots=True, weakref_slot=True)
class ZeroParam:
    """Carried by a parameter as ``param._zero``, the only state that zeropipe puts there.

    ``trained`` is None while no optimizer trains it; ``shards`` is None where the value is whole on each rank.
    """

    name: str
    trained: Trainer | None = None
    shards: Cut | None = None
    group: Group | None = None  # the ranks that hold it whole, where no optimizer trains it


def zero_param(param: torch.Tensor) -> ZeroParam | None:
    """The parameter's ZeroParam; None for one that no engine and no zero.Init knows."""
    return getattr(param, "_zero", None)


def is_trained(param: torch.Tensor) -> bool:
    """Whether an engine's optimizer has it."""
    zp = zero_param(param)
    return zp is not None and zp.trained is not None


def shards_at(param: torch.Tensor) -> Cut | None:
    """The parameter's shards, as a partition sees them; None where its value is whole on each rank."""
    zp = zero_param(param)
    return None if zp is None else zp.shards


def is_sharded(param: torch.Tensor) -> bool:
    return shards_at(param) is not None
