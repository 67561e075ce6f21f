"""The states of a sharded parameter, what each costs in memory, and the only ways from one to another."""

from __future__ import annotations

from enum import Enum

from zeropipe.errors import UsageError


class ZeroParamType(Enum):
    """Where a parameter's elements are at rest."""

    NORMAL = 1  # whole on every rank
    PARTITIONED = 2  # a shard on every rank of the group
    REMOTE = 3  # a shard, off the device (host memory or a file)


class ZeroParamStatus(Enum):
    """What this rank has of a sharded parameter at the moment (P = its elements, N = ranks)."""

    AVAILABLE = 1  # the whole value: P + P/N elements
    NOT_AVAILABLE = 2  # its shard alone: P/N elements
    INFLIGHT = 3  # a gather is under way: P + P/N elements, not to be read


_ALLOWED = {
    (ZeroParamStatus.NOT_AVAILABLE, ZeroParamStatus.INFLIGHT),
    (ZeroParamStatus.INFLIGHT, ZeroParamStatus.AVAILABLE),
    (ZeroParamStatus.AVAILABLE, ZeroParamStatus.NOT_AVAILABLE),
    (ZeroParamStatus.INFLIGHT, ZeroParamStatus.NOT_AVAILABLE),  # a gather that failed
}


def check_transition(name: str, before: ZeroParamStatus, after: ZeroParamStatus) -> ZeroParamStatus:
    """``after``, if it may follow ``before``; raises UsageError naming the parameter otherwise."""
    if (before, after) not in _ALLOWED:
        raise UsageError(f"parameter '{name}' cannot go from {before.name} to {after.name}")
    return after
