"""What a parameter knows of ZeRO: its name, where its master lives, and (stage 3) its shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from zeropipe.comm.group import Group
    from zeropipe.runtime.zero.gather.shards import Shards
    from zeropipe.runtime.zero.hold.partition import Partition
    from zeropipe.runtime.zero.hold.sharded_partition import ShardedPartition


@dataclass(slots=True, weakref_slot=True)
class ZeroParam:
    """Carried by a parameter as ``param._zero``, the only state that zeropipe puts there.

    ``partition`` is None while no optimizer trains it; ``shards`` is None where the value is whole on each rank.
    """

    name: str
    partition: Partition | ShardedPartition | None = None
    index: int = 0  # in partition.params
    shards: Shards | None = None
    group: Group | None = None  # the ranks that hold it whole, where no optimizer trains it


def zero_param(param: torch.Tensor) -> ZeroParam | None:
    """The parameter's ZeroParam; None for one that no engine and no zero.Init knows."""
    return getattr(param, "_zero", None)


def shards_of(param: torch.Tensor) -> Shards | None:
    """The parameter's shards; None where its value is whole on each rank."""
    zp = getattr(param, "_zero", None)
    return None if zp is None else zp.shards


def is_trained(param: torch.Tensor) -> bool:
    """Whether an engine's optimizer has it."""
    zp = getattr(param, "_zero", None)
    return zp is not None and zp.partition is not None


def is_sharded(param: torch.Tensor) -> bool:
    return shards_of(param) is not None
