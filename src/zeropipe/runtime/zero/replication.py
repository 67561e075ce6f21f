"""MiCS: shards inside small groups of ranks, replicas across them, so that parameters never leave a group.

    ranks        0 1 2 3 | 4 5 6 7          mics_shard_size = 4
    shard group  0 1 2 3 | 4 5 6 7          gathers, and the reduction of every micro-step
    replicas     0 4, 1 5, 2 6, 3 7         one all-reduce of the gradient shard per boundary

Source: arXiv 2205.00119, section 3 (partitioning into groups) and 3.4 (2-hop gradient synchronisation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import SELF, Group, new_groups, world
from zeropipe.config.schema_zero import ZeroOptimization
from zeropipe.errors import ConfigError, describe


@dataclass(frozen=True, slots=True)
class Replication:
    """The two groups of one rank. Together they span the ranks that train together."""

    shard: Group  # a parameter's shards are divided among these
    replicas: Group = SELF  # these hold the same shards; a group of one where there is one replica


def shard_size(zero: ZeroOptimization) -> int | None:
    """Ranks that share one copy of the shards, where the config says so."""
    if zero.mics_shard_size > 0:
        return zero.mics_shard_size
    # Keeping what backward gathers inside a group is what users of hpZ are after; MiCS gives it, without a copy.
    return zero.zero_hpz_partition_size if zero.zero_hpz_partition_size > 1 else None


def shard_lists(ranks: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The shard groups: runs of ``size`` consecutive members of ``ranks``. Raises ConfigError if it is no divisor."""
    count = len(ranks)
    if size < 1 or count % size:
        divisors = ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)
        raise ConfigError(
            describe(
                "config key 'zero_optimization.mics_shard_size'",
                expected=f"a divisor of the {count} ranks that train together",
                found=size,
                fix=f"use one of {divisors}",
            )
        )
    return [tuple(ranks[at : at + size]) for at in range(0, count, size)]


def replica_lists(ranks: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The members that hold the same shard, one tuple for each place in a shard group."""
    return [tuple(members) for members in zip(*shard_lists(ranks, size), strict=True)]


def shard_group(group: Group, size: int) -> Group:
    """This rank's shard group of ``size`` ranks of ``group``. Collective over the world."""
    if size == group.size:
        return group
    return new_groups([members for ranks in _all_groups(group) for members in shard_lists(ranks, size)])


def mics_groups(group: Group, size: int, shard: Group | None = None) -> Replication:
    """Divide ``group`` into shard groups of ``size`` ranks. Collective over the world.

    ``shard``: this rank's shard group where it exists already (the parameters were made shards before).
    """
    if size == group.size:
        return Replication(group)
    shard = shard_group(group, size) if shard is None else shard
    lists = [members for ranks in _all_groups(group) for members in replica_lists(ranks, size)]
    return Replication(shard, new_groups(lists))


def _all_groups(group: Group) -> list[tuple[int, ...]]:
    """The data-parallel groups of all ranks: a group starts only when the whole world takes part."""
    if group.ranks == world().ranks:
        return [group.ranks]
    return sorted(set(all_gather_object(group.ranks, world(), label="data-parallel groups")))
